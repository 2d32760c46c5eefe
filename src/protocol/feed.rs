//! Serving one's log to other hosts: find the place where theirs ends in ours, say by what right,
//! and stream what follows.
//!
//! ```text
//!            their tip is ours            a batch ends there, same chain
//!   start ───────────────────────┬──────────────────────────┐
//!     │                          │                          ▼
//!     └──► LookingUp ── TipAt ───┴──────────────────► Streaming { next }
//!             │
//!             └── no batch ends there, or another chain ──► Diverged (the feed ends)
//! ```

use std::collections::{BTreeMap, VecDeque};

use replay_log::{LogIndex, LogTip};

use super::api::Action;
use super::message::{Authority, Message};
use super::name::HostName;

/// One receiver.
#[derive(Clone, Debug)]
struct Feed {
    authority: Authority,
    state: State,
}

#[derive(Clone, Debug)]
enum State {
    LookingUp(LogTip),
    Streaming { next: LogIndex },
}

/// All receivers of this host's log.
#[derive(Debug, Default)]
pub(super) struct Feeds {
    feeds: BTreeMap<HostName, Feed>,
}

impl Feeds {
    /// Begins to serve `to`, whose log ends at `theirs`, the log that ends at `ours`.
    pub(super) fn start(
        &mut self,
        to: &HostName,
        authority: Authority,
        theirs: LogTip,
        ours: LogTip,
        actions: &mut VecDeque<Action>,
    ) {
        self.stop(to, actions);
        if theirs.index > ours.index {
            say_diverged(to, authority, theirs, actions);
        } else if theirs == ours || theirs.index == LogIndex::START {
            self.stream(to, authority, theirs, ours, actions);
        } else {
            let state = State::LookingUp(theirs);
            self.feeds.insert(to.clone(), Feed { authority, state });
            actions.push_back(Action::LookUp {
                peer: to.clone(),
                index: theirs.index,
            });
        }
    }

    /// The store has looked up where the receiver's log ends in ours.
    pub(super) fn looked_up(
        &mut self,
        to: &HostName,
        index: LogIndex,
        found: Option<LogTip>,
        ours: LogTip,
        actions: &mut VecDeque<Action>,
    ) {
        let Some(Feed {
            authority,
            state: State::LookingUp(theirs),
        }) = self.feeds.get(to)
        else {
            return;
        };
        let (authority, theirs) = (authority.clone(), *theirs);
        if theirs.index != index {
            return;
        }
        if found == Some(theirs) {
            self.stream(to, authority, theirs, ours, actions);
        } else {
            self.feeds.remove(to);
            say_diverged(to, authority, theirs, actions);
        }
    }

    /// Our log has grown.
    pub(super) fn grown(&mut self, ours: LogTip, actions: &mut VecDeque<Action>) {
        for (to, feed) in &mut self.feeds {
            if let State::Streaming { next } = &mut feed.state
                && *next < ours.index
            {
                actions.push_back(Action::StreamLog {
                    to: to.clone(),
                    term: feed.authority.term(),
                    from: *next,
                    through: ours.index,
                });
                *next = ours.index;
            }
        }
    }

    /// Whether this host is being served or about to be.
    pub(super) fn serves(&self, to: &HostName) -> bool {
        self.feeds.contains_key(to)
    }

    /// Ends one feed.
    pub(super) fn stop(&mut self, to: &HostName, actions: &mut VecDeque<Action>) {
        if let Some(Feed {
            state: State::Streaming { .. },
            ..
        }) = self.feeds.remove(to)
        {
            actions.push_back(Action::StopStream { to: to.clone() });
        }
    }

    /// Ends all feeds.
    pub(super) fn stop_all(&mut self, actions: &mut VecDeque<Action>) {
        let all: Vec<_> = self.feeds.keys().cloned().collect();
        for to in all {
            self.stop(&to, actions);
        }
    }

    fn stream(
        &mut self,
        to: &HostName,
        authority: Authority,
        after: LogTip,
        ours: LogTip,
        actions: &mut VecDeque<Action>,
    ) {
        let state = State::Streaming { next: after.index };
        actions.push_back(Action::Send {
            to: to.clone(),
            message: Message::Stream {
                authority: authority.clone(),
                after,
            },
        });
        self.feeds.insert(to.clone(), Feed { authority, state });
        self.grown(ours, actions);
    }
}

fn say_diverged(to: &HostName, authority: Authority, tip: LogTip, actions: &mut VecDeque<Action>) {
    actions.push_back(Action::Send {
        to: to.clone(),
        message: Message::Diverged { authority, tip },
    });
}
