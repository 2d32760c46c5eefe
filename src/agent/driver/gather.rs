//! When a busy guest is given the frames that have come for it. Pure: no I/O and no clock.
//!
//! Clients that wait for answers come in step: those that are answered together ask again together.
//! A guest that is given what comes as it comes serves two or three such groups in turn, each with
//! turns of its loop, a flush of its disk, a batch of the log and an acknowledgement of its own, and
//! every copy pays for all of it. So under load, what comes while answers are on their way waits for
//! those who are about to be answered, and the groups become one.
//!
//! ```text
//!              few frames ──► given at once
//!            ┌──────────────────────────────────────────────────────────────┐
//!            ▼                                                              │
//!     many: given together ──► on their way ── answers let out ──► joined by the answered
//!                                   │                                       ▲
//!                                   └─── never longer than MOST ────────────┘
//! ```

use crate::protocol::{Span, Time};

/// Fewer than this at once are no load.
const MANY: usize = 8;
/// After so many deliveries of few a guest is not busy any more.
const CALM_AFTER: u8 = 4;
/// So many do not wait for more.
const ENOUGH: usize = 256;
/// The longest that a frame waits for others.
const MOST: Span = Span::from_millis(1);
/// How long after answers were let out those who got them are waited for.
const JOIN: Span = Span::from_micros(600);

/// Frames on their way to a guest.
#[derive(Debug)]
pub struct Gather<T> {
    waiting: Vec<T>,
    /// When the first of them came.
    since: Option<Time>,
    /// Above 0: the guest was given many lately.
    busy: u8,
    /// The guest has not answered what it was given.
    on_their_way: bool,
    /// Since it has answered: so many frames make all groups one.
    expected: usize,
    /// When the last answers were let out.
    answered_at: Time,
}

impl<T> Default for Gather<T> {
    fn default() -> Self {
        Self {
            waiting: Vec::new(),
            since: None,
            busy: 0,
            on_their_way: false,
            expected: 0,
            answered_at: Time::default(),
        }
    }
}

impl<T> Gather<T> {
    /// A frame has come.
    pub fn push(&mut self, frame: T, now: Time) {
        self.since.get_or_insert(now);
        self.waiting.push(frame);
    }

    /// Whether nothing more needs to come before the guest is given what waits.
    pub const fn is_full(&self) -> bool {
        self.waiting.len() >= ENOUGH
    }

    /// So many of the guest's outputs were let out.
    pub const fn answered(&mut self, outputs: usize, now: Time) {
        if self.on_their_way {
            self.on_their_way = false;
            self.expected = self.waiting.len();
        }
        self.expected += outputs;
        self.answered_at = now;
    }

    /// When what waits is to be given to the guest at the latest.
    pub fn poll_timeout(&self) -> Option<Time> {
        let since = self.since?;
        let most = since.plus(MOST);
        Some(if self.busy == 0 {
            since
        } else if self.on_their_way {
            most
        } else {
            most.min(self.answered_at.plus(JOIN))
        })
    }

    /// What the guest is to be given now.
    pub fn poll(&mut self, now: Time) -> Vec<T> {
        let Some(at) = self.poll_timeout() else {
            return Vec::new();
        };
        let joined = !self.on_their_way && self.waiting.len() >= self.expected;
        if !joined && !self.is_full() && now < at {
            return Vec::new();
        }
        self.busy = if self.waiting.len() >= MANY {
            CALM_AFTER
        } else {
            self.busy.saturating_sub(1)
        };
        self.on_their_way = true;
        self.since = None;
        std::mem::take(&mut self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(micros: u64) -> Time {
        Time::from_nanos(micros * 1_000)
    }

    fn come(gather: &mut Gather<usize>, frames: usize, now: Time) {
        (0..frames).for_each(|frame| gather.push(frame, now));
    }

    /// A guest that was given many frames and has not answered them.
    fn busy() -> Gather<usize> {
        let mut gather = Gather::default();
        come(&mut gather, MANY, at(0));
        assert_eq!(gather.poll(at(0)).len(), MANY);
        gather
    }

    #[test]
    fn few_frames_wait_for_nobody() {
        let mut gather = Gather::default();
        assert_eq!(gather.poll_timeout(), None);
        for turn in 0..100 {
            come(&mut gather, MANY - 1, at(turn));
            assert_eq!(gather.poll(at(turn)).len(), MANY - 1);
            assert!(gather.poll(at(turn)).is_empty());
        }
    }

    #[test]
    fn groups_become_one() {
        let mut gather = busy();
        come(&mut gather, 5, at(100));
        assert!(gather.poll(at(100)).is_empty(), "answers are on their way");
        gather.answered(MANY, at(300));
        assert!(gather.poll(at(300)).is_empty(), "the answered may join");
        come(&mut gather, MANY - 1, at(350));
        assert!(gather.poll(at(350)).is_empty());
        come(&mut gather, 1, at(360));
        let all = gather.poll(at(360));
        assert_eq!(
            all.len(),
            5 + MANY,
            "all that waited and all that were answered"
        );
        // From now on they are one group.
        gather.answered(all.len(), at(600));
        come(&mut gather, all.len() - 1, at(700));
        assert!(gather.poll(at(700)).is_empty());
        come(&mut gather, 1, at(710));
        assert_eq!(gather.poll(at(710)).len(), all.len());
    }

    #[test]
    fn answers_may_leave_in_parts() {
        let mut gather = busy();
        gather.answered(3, at(300));
        come(&mut gather, 2, at(310));
        gather.answered(MANY - 3, at(320));
        come(&mut gather, MANY - 3, at(330));
        assert!(gather.poll(at(330)).is_empty());
        come(&mut gather, 1, at(340));
        assert_eq!(gather.poll(at(340)).len(), MANY);
    }

    #[test]
    fn a_guest_is_calm_only_after_a_while() {
        let mut gather = busy();
        for turn in 1..=u64::from(CALM_AFTER) {
            come(&mut gather, 1, at(turn * 10_000));
            assert!(gather.poll(at(turn * 10_000)).is_empty());
            assert_eq!(gather.poll(at(turn * 10_000).plus(MOST)).len(), 1);
        }
        come(&mut gather, 1, at(100_000));
        assert_eq!(gather.poll(at(100_000)).len(), 1);
    }

    #[test]
    fn nobody_is_waited_for_long() {
        let mut gather = busy();
        come(&mut gather, 1, at(100));
        let due = at(100).plus(MOST);
        assert_eq!(gather.poll_timeout(), Some(due));
        assert_eq!(gather.poll(due), [0], "an answer may never come");

        let mut gather = busy();
        come(&mut gather, 1, at(100));
        gather.answered(MANY, at(300));
        let due = at(300).plus(JOIN);
        assert_eq!(gather.poll_timeout(), Some(due));
        assert_eq!(gather.poll(due), [0], "nor may a question");

        let mut gather = busy();
        come(&mut gather, ENOUGH, at(100));
        assert_eq!(gather.poll(at(100)).len(), ENOUGH);
    }
}
