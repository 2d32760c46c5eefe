//! The gateway's end of the numbered frames: every frame passes once and in order, through lost
//! connections and changes of primary. Pure: no I/O and no clock.
//!
//! ```text
//!            reign(t, host)                 Welcome of term t
//!  Nobody ─────────────────▶ Dialling ────────────────────────▶ Welcomed ──┐ frames both ways
//!                             ▲  ▲  │ lost, refused,               │        ◀─┘
//!                             │  │  ▼ no welcome in time           │
//!                             │  Pausing (15 ms) ◀─────────────────┘ lost
//!                             └── reign(t' > t): from every state, at once
//! ```
//!
//! Who reigns is what the record's keeper says ([`GatewayPort::reign`]), never what an agent
//! claims. A session belongs to one term; what arrives on the session of a term that is over is
//! counted and dropped.

use std::collections::VecDeque;
use std::net::Ipv4Addr;

use bytes::{Bytes, BytesMut};
use replay_log::{FrameNumber, GatewayIncarnation, Term};
use thiserror::Error;

use super::frames::{
    Boot, Hello, Message, NetworkPort, Refusal, SessionId, ToAgent, ToGateway, put_frame,
};
use crate::protocol::{Span, Time, VmName};

/// How long after a failure the primary is tried again.
pub const RETRY_AFTER: Span = Span::from_millis(15);

/// How long a primary may take to welcome before it is asked anew. It may be dead, or have lost
/// the question; being welcomed takes one round trip when it reigns already.
pub const WELCOME_WITHIN: Span = Span::from_millis(1_000);

/// How long the news of received frames may wait for frames to travel with.
const RECEIVED_WITHIN: Span = Span::from_millis(20);

/// After how many received frames the news does not wait.
const RECEIVED_AFTER: u32 = 64;

/// What the port wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortAction<H> {
    /// Open a stream to this host and write this; tell of failure with [`GatewayPort::lost`].
    Open {
        /// The name of the session.
        session: SessionId,
        /// To whom.
        host: H,
        /// What to say first.
        hello: Hello,
    },
    /// Give a session up: nothing is read from it or written to it any more.
    Close {
        /// Which.
        session: SessionId,
    },
}

/// What has gone through a port, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortCounters {
    /// Frames given a number.
    pub frames_to_guest: u64,
    /// Their bytes.
    pub bytes_to_guest: u64,
    /// Frames passed to the stack.
    pub frames_from_guest: u64,
    /// Their bytes.
    pub bytes_from_guest: u64,
    /// Frames that were sent more than once.
    pub resent: u64,
    /// Outputs that came a second time and were dropped.
    pub duplicates: u64,
    /// Outputs of a term that is over, dropped.
    pub dropped_old_term: u64,
    /// Sessions that were welcomed.
    pub welcomes: u64,
}

impl PortCounters {
    /// The sums of two.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            frames_to_guest: self.frames_to_guest + other.frames_to_guest,
            bytes_to_guest: self.bytes_to_guest + other.bytes_to_guest,
            frames_from_guest: self.frames_from_guest + other.frames_from_guest,
            bytes_from_guest: self.bytes_from_guest + other.bytes_from_guest,
            resent: self.resent + other.resent,
            duplicates: self.duplicates + other.duplicates,
            dropped_old_term: self.dropped_old_term + other.dropped_old_term,
            welcomes: self.welcomes + other.welcomes,
        }
    }
}

/// Why a session, or the whole incarnation, cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PortError {
    /// The primary does not hold what was committed: it runs another boot of the machine, it was
    /// promoted with accepted loss, or it has forgotten what this gateway needs. The connections
    /// of this incarnation cannot go on; a new one can start.
    #[error("the guest has lost the connections of this gateway: {why}")]
    HistoryLost {
        /// What was noticed.
        why: &'static str,
    },
    /// The agent broke the rules; the session is closed and tried again.
    #[error("the agent broke the frame protocol: {what}")]
    Broken {
        /// How.
        what: &'static str,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Hello is under way; give up at this time.
    Dialling { until: Time },
    /// Frames flow; the next to be sent has this number.
    Welcomed { next: FrameNumber },
}

#[derive(Clone, Debug)]
struct Session {
    id: SessionId,
    standing: Standing,
}

/// The gateway's end. `H` names hosts.
#[derive(Debug)]
pub struct GatewayPort<H> {
    vm: VmName,
    incarnation: GatewayIncarnation,
    address: Ipv4Addr,
    /// Frames that may have to be sent again; the first one's number is one after `committed`.
    unforgotten: VecDeque<Bytes>,
    unforgotten_bytes: usize,
    most_bytes: usize,
    committed: FrameNumber,
    /// The highest number that was ever sent, to tell what is sent again.
    sent: FrameNumber,
    received: FrameNumber,
    told_received: FrameNumber,
    untold: u32,
    tell_at: Option<Time>,
    boot: Option<Boot>,
    reign: Option<(Term, H)>,
    session: Option<Session>,
    retry_at: Option<Time>,
    next_session: u64,
    actions: VecDeque<PortAction<H>>,
    counters: PortCounters,
    last_refusal: Option<Refusal>,
}

impl<H: Clone + PartialEq> GatewayPort<H> {
    /// A port that has sent and received nothing, with its `address` in the guest's network. Frames beyond `most_bytes` that are not
    /// committed yet make [`GatewayPort::has_room`] false.
    pub fn new(
        vm: VmName,
        incarnation: GatewayIncarnation,
        address: Ipv4Addr,
        most_bytes: usize,
    ) -> Self {
        Self {
            vm,
            incarnation,
            address,
            unforgotten: VecDeque::new(),
            unforgotten_bytes: 0,
            most_bytes,
            committed: FrameNumber(0),
            sent: FrameNumber(0),
            received: FrameNumber(0),
            told_received: FrameNumber(0),
            untold: 0,
            tell_at: None,
            boot: None,
            reign: None,
            session: None,
            retry_at: None,
            next_session: 1,
            actions: VecDeque::new(),
            counters: PortCounters::default(),
            last_refusal: None,
        }
    }

    /// This run of the gateway.
    pub const fn incarnation(&self) -> GatewayIncarnation {
        self.incarnation
    }

    /// The term that is believed in, with its primary.
    pub const fn reigning(&self) -> Option<&(Term, H)> {
        self.reign.as_ref()
    }

    /// Whether frames flow.
    pub fn is_welcomed(&self) -> bool {
        matches!(
            self.session,
            Some(Session {
                standing: Standing::Welcomed { .. },
                ..
            })
        )
    }

    /// The last output that was passed on.
    pub const fn received(&self) -> FrameNumber {
        self.received
    }

    /// What was counted.
    pub const fn counters(&self) -> PortCounters {
        self.counters
    }

    /// Bytes of frames that are not committed yet.
    pub const fn unforgotten_bytes(&self) -> usize {
        self.unforgotten_bytes
    }

    /// Why the last session was refused, if none was welcomed since.
    pub const fn last_refusal(&self) -> Option<Refusal> {
        self.last_refusal
    }

    /// Whether frames may be added. When not, the gateway stops reading from its clients.
    pub const fn has_room(&self) -> bool {
        self.unforgotten_bytes < self.most_bytes
    }

    /// The record's keeper says who reigns. Older news is ignored.
    pub fn reign(&mut self, term: Term, primary: H, now: Time) {
        if let Some((known, host)) = &self.reign
            && (*known > term || (*known == term && *host == primary))
        {
            return;
        }
        self.reign = Some((term, primary));
        self.drop_session();
        self.dial(now);
    }

    /// As the incarnation before this one knew it. The primary is asked soon and not at once: what
    /// ended that incarnation may end this one as well.
    pub fn go_on_with(&mut self, term: Term, primary: H, now: Time) {
        self.reign = Some((term, primary));
        self.retry_at = Some(now.plus(RETRY_AFTER));
    }

    fn drop_session(&mut self) {
        if let Some(session) = self.session.take() {
            self.actions.push_back(PortAction::Close {
                session: session.id,
            });
        }
    }

    fn dial(&mut self, now: Time) {
        let Some((term, host)) = self.reign.clone() else {
            return;
        };
        let id = SessionId(self.next_session);
        self.next_session += 1;
        self.retry_at = None;
        self.tell_at = None;
        self.session = Some(Session {
            id,
            standing: Standing::Dialling {
                until: now.plus(WELCOME_WITHIN),
            },
        });
        self.actions.push_back(PortAction::Open {
            session: id,
            host,
            hello: Hello {
                vm: self.vm.clone(),
                gateway: self.incarnation,
                address: self.address,
                term,
                received: self.received,
            },
        });
    }

    /// The stream of a session has ended or could not be opened.
    pub fn lost(&mut self, session: SessionId, now: Time) {
        if self.is_current(session) {
            self.session = None;
            self.tell_at = None;
            self.retry_at = Some(now.plus(RETRY_AFTER));
        }
    }

    fn is_current(&self, session: SessionId) -> bool {
        self.session.as_ref().is_some_and(|s| s.id == session)
    }

    /// What to do next.
    pub fn poll_action(&mut self) -> Option<PortAction<H>> {
        self.actions.pop_front()
    }

    /// When [`GatewayPort::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        let welcome = match &self.session {
            Some(Session {
                standing: Standing::Dialling { until },
                ..
            }) => Some(*until),
            _ => None,
        };
        [self.retry_at, welcome, self.tell_at]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what has become due.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.dial(now);
        }
        if let Some(Session {
            standing: Standing::Dialling { until },
            ..
        }) = &self.session
            && *until <= now
        {
            self.drop_session();
            self.dial(now);
        }
        if self.tell_at.is_some_and(|at| at <= now) {
            self.tell_at = None;
            self.untold = RECEIVED_AFTER;
        }
    }

    /// A frame for the guest: it gets the next number and is kept until it is committed.
    pub fn send(&mut self, bytes: Bytes) {
        self.counters.frames_to_guest += 1;
        self.counters.bytes_to_guest += bytes.len() as u64;
        self.unforgotten_bytes += bytes.len();
        self.unforgotten.push_back(bytes);
    }

    /// Takes a message from an agent; gives the frame to be passed to the stack, if it is one.
    ///
    /// An error of kind [`PortError::Broken`] has closed the session already.
    pub fn handle(
        &mut self,
        session: SessionId,
        message: ToGateway,
        now: Time,
    ) -> Result<Option<Bytes>, PortError> {
        let Some(current) = self.session.as_mut().filter(|s| s.id == session) else {
            if matches!(message, ToGateway::Frame { .. }) {
                self.counters.dropped_old_term += 1;
            }
            return Ok(None);
        };
        match (current.standing, message) {
            (Standing::Dialling { .. }, ToGateway::Welcome { term, boot, logged }) => {
                self.welcome(term, boot, logged, now).map(|()| None)
            }
            (Standing::Dialling { .. }, ToGateway::Refused { why, .. }) => {
                self.last_refusal = Some(why);
                self.drop_session();
                self.retry_at = Some(now.plus(RETRY_AFTER));
                if why == Refusal::TooLate {
                    return Err(PortError::HistoryLost {
                        why: "it was away from the primary for too long",
                    });
                }
                if why == Refusal::AddressTaken {
                    return Err(PortError::HistoryLost {
                        why: "the guest knows another gateway by its address",
                    });
                }
                Ok(None)
            }
            (Standing::Welcomed { .. }, ToGateway::Refused { .. }) => {
                self.drop_session();
                self.retry_at = Some(now.plus(RETRY_AFTER));
                Ok(None)
            }
            (Standing::Welcomed { .. }, ToGateway::Frame { number, bytes, .. }) => {
                Ok(self.output(number, bytes, now))
            }
            (Standing::Welcomed { next }, ToGateway::Committed { through }) => {
                if through >= next {
                    return self.broken("it committed a frame that it was not sent", now);
                }
                self.forget(through);
                Ok(None)
            }
            (Standing::Dialling { .. }, _) => self.broken("no welcome came first", now),
            (Standing::Welcomed { .. }, ToGateway::Welcome { .. }) => {
                self.broken("a second welcome", now)
            }
        }
    }

    fn broken<T>(&mut self, what: &'static str, now: Time) -> Result<T, PortError> {
        self.drop_session();
        self.retry_at = Some(now.plus(RETRY_AFTER));
        Err(PortError::Broken { what })
    }

    fn welcome(
        &mut self,
        term: Term,
        boot: Boot,
        logged: FrameNumber,
        now: Time,
    ) -> Result<(), PortError> {
        // An agent that knows of a later term may be right, but it is not the one to say so.
        if self.reign.as_ref().is_none_or(|(known, _)| *known != term) {
            return self.broken("it welcomed for another term", now);
        }
        if self.boot.is_some_and(|known| known != boot) {
            return self.history_lost("the machine was started anew", now);
        }
        if logged < self.committed {
            return self.history_lost("the new primary's log lacks committed frames", now);
        }
        if logged > self.last_number() {
            // An agent that gives a gateway up resets its connections in its name.
            return self.history_lost("it was given up, and its connections were reset", now);
        }
        self.boot = Some(boot);
        self.last_refusal = None;
        self.counters.welcomes += 1;
        self.told_received = self.received;
        self.untold = 0;
        if let Some(session) = &mut self.session {
            session.standing = Standing::Welcomed {
                next: FrameNumber(logged.0 + 1),
            };
        }
        Ok(())
    }

    fn history_lost<T>(&mut self, why: &'static str, now: Time) -> Result<T, PortError> {
        self.drop_session();
        self.retry_at = Some(now.plus(RETRY_AFTER));
        Err(PortError::HistoryLost { why })
    }

    fn last_number(&self) -> FrameNumber {
        FrameNumber(self.committed.0 + self.unforgotten.len() as u64)
    }

    fn output(&mut self, number: FrameNumber, bytes: Bytes, now: Time) -> Option<Bytes> {
        if number <= self.received {
            self.counters.duplicates += 1;
            return None;
        }
        self.received = number;
        self.untold += 1;
        if self.tell_at.is_none() {
            self.tell_at = Some(now.plus(RECEIVED_WITHIN));
        }
        self.counters.frames_from_guest += 1;
        self.counters.bytes_from_guest += bytes.len() as u64;
        Some(bytes)
    }

    fn forget(&mut self, through: FrameNumber) {
        while self.committed < through
            && let Some(bytes) = self.unforgotten.pop_front()
        {
            self.unforgotten_bytes -= bytes.len();
            self.committed.0 += 1;
        }
    }

    /// Appends what is to be written to the session until there are `budget` bytes or nothing is
    /// left. Only for the session that is welcomed; others have nothing to say.
    pub fn transmit(&mut self, session: SessionId, out: &mut BytesMut, budget: usize) {
        let Some(Session {
            id,
            standing: Standing::Welcomed { next },
        }) = &mut self.session
        else {
            return;
        };
        if *id != session || out.len() >= budget {
            return;
        }
        let first = FrameNumber(self.committed.0 + 1);
        let skipped = usize::try_from(next.0.saturating_sub(first.0)).unwrap_or(usize::MAX);
        let mut any = false;
        for bytes in self
            .unforgotten
            .range(skipped.min(self.unforgotten.len())..)
        {
            if out.len() >= budget {
                break;
            }
            put_frame(out, NetworkPort::default(), *next, bytes);
            if *next <= self.sent {
                self.counters.resent += 1;
            } else {
                self.sent = *next;
            }
            next.0 += 1;
            any = true;
        }
        if self.received > self.told_received && (any || self.untold >= RECEIVED_AFTER) {
            ToAgent::Received {
                through: self.received,
            }
            .encode(out);
            self.told_received = self.received;
            self.untold = 0;
            self.tell_at = None;
        }
    }
}

#[cfg(test)]
mod tests;
