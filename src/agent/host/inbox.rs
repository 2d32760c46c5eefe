//! The way to a VM's driver. Nothing here waits for one: a driver that does not take what is said
//! must not keep the links, the orders and the heartbeats of all others waiting.
//!
//! ```text
//!   hears ── its inbox is full ──► deaf to a host: all that one says is dropped
//!     ▲                                  │
//!     └── PeerDown, PeerUp ◄── room ─────┘
//! ```
//!
//! The protocol relies on the order within a lane of one connection. So after a message was dropped
//! the driver hears nothing more of that host until it can be told that the connection has ended
//! and that there is a new one: it resynchronises, as after any other broken connection.

use std::collections::BTreeSet;

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::super::certs::Name;
use super::super::driver::ToDriver;
use super::super::frame_streams::GatewayStream;
use super::super::operator::{VmAnswer, VmQuestion};
use crate::protocol::{HostName, Input, Lane};

/// How many inputs may wait for a driver.
pub const INBOX: usize = 4_096;
/// A driver hears again when it has so much room.
const ROOM: usize = INBOX / 2;

/// The driver of a VM.
pub struct Running {
    inbox: mpsc::Sender<ToDriver>,
    /// Ends with the driver: with a sentence if a VMM process is not gone by then.
    task: JoinHandle<Result<(), String>>,
    /// The hosts that it is deaf to.
    deaf_to: BTreeSet<HostName>,
}

/// What came of telling a driver something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It hears it, or does not need to: it is deaf to that host as yet, or has ended.
    Well,
    /// It has become deaf just now. Somebody is to wait for [`Running::room`].
    Deaf,
}

impl Running {
    /// A driver that reads from this inbox and runs as this task.
    pub const fn new(inbox: mpsc::Sender<ToDriver>, task: JoinHandle<Result<(), String>>) -> Self {
        Self {
            inbox,
            task,
            deaf_to: BTreeSet::new(),
        }
    }

    /// Tells it what another host says, or how the connection with that host is.
    pub fn tell(&mut self, about: &HostName, input: Input) -> Told {
        if self.deaf_to.contains(about) {
            return Told::Well;
        }
        // What a datagram says is said again, and so are distances.
        let may_be_lost = match &input {
            Input::Message { message, .. } => message.lane() == Lane::Datagram,
            input => matches!(input, Input::Distance { .. }),
        };
        match self.inbox.try_send(ToDriver::Heard(input)) {
            Err(mpsc::error::TrySendError::Full(_)) if !may_be_lost => {
                let first = self.deaf_to.is_empty();
                self.deaf_to.insert(about.clone());
                if first { Told::Deaf } else { Told::Well }
            }
            // A driver that has ended has said why.
            _ => Told::Well,
        }
    }

    /// There is room: the driver is told anew of the hosts that it was deaf to. `up` are those that
    /// are connected.
    pub fn hears_again(&mut self, up: &BTreeSet<HostName>) -> Told {
        let mut told = Told::Well;
        for host in std::mem::take(&mut self.deaf_to) {
            let mut tell = |input| {
                if self.tell(&host, input) == Told::Deaf {
                    told = Told::Deaf;
                }
            };
            tell(Input::PeerDown(host.clone()));
            if up.contains(&host) {
                tell(Input::PeerUp(host.clone()));
            }
        }
        told
    }

    /// Ends it: what is given ends when it has.
    pub fn end(self) -> JoinHandle<Result<(), String>> {
        self.task
    }

    /// Waits until the inbox has room again, or the driver has ended.
    pub fn room(&self) -> impl Future<Output = ()> + Send + 'static {
        let inbox = self.inbox.clone();
        async move {
            // The places are given back at once: there is room.
            let _ = inbox.reserve_many(ROOM.min(inbox.max_capacity())).await;
        }
    }

    /// Hands it a gateway's stream. One that it has no room for is closed: the gateway asks again.
    pub fn gateway(&self, who: &Name, stream: GatewayStream) {
        let opened = ToDriver::Gateway(who.clone(), stream);
        if self.inbox.try_send(opened).is_err() {
            tracing::warn!(%who, "a gateway is turned away: the driver of its VM takes nothing");
        }
    }

    /// Asks it something; `None` when it takes no questions now, or has ended.
    pub fn ask(&self, question: VmQuestion) -> Option<oneshot::Receiver<VmAnswer>> {
        let (reply, answer) = oneshot::channel();
        let asked = ToDriver::Operator(question, reply);
        self.inbox.try_send(asked).ok()?;
        Some(answer)
    }
}

#[cfg(test)]
mod tests {
    use replay_log::{LogIndex, LogTip};

    use super::*;
    use crate::protocol::{Incarnation, Message, Version};

    fn host(name: &str) -> HostName {
        HostName::new(name).expect("a name")
    }

    fn says(from: &HostName, number: u64) -> Input {
        Input::Message {
            from: from.clone(),
            message: Message::Hello {
                protocol: 1,
                incarnation: Incarnation(number),
                tip: LogTip::default(),
                known: Version::default(),
            },
        }
    }

    fn beats(from: &HostName) -> Input {
        Input::Message {
            from: from.clone(),
            message: Message::Heartbeat {
                version: Version::default(),
                tail: LogIndex(1),
                committed: LogIndex(1),
                forget: replay_log::FrameNumber(0),
            },
        }
    }

    /// What a driver would hear: who and what, in short.
    fn heard(inbox: &mut mpsc::Receiver<ToDriver>) -> Vec<String> {
        let mut all = Vec::new();
        while let Ok(ToDriver::Heard(input)) = inbox.try_recv() {
            all.push(match input {
                Input::PeerUp(host) => format!("{host} up"),
                Input::PeerDown(host) => format!("{host} down"),
                Input::Message {
                    from,
                    message: Message::Hello { incarnation, .. },
                } => format!("{from} {}", incarnation.0),
                other => format!("{other:?}"),
            });
        }
        all
    }

    #[tokio::test]
    async fn what_a_deaf_driver_misses_looks_like_a_new_connection() {
        let (inbox, mut there) = mpsc::channel(2);
        let mut running = Running::new(inbox, tokio::spawn(async { Ok(()) }));
        let (a, b) = (host("a"), host("b"));
        assert_eq!(running.tell(&a, says(&a, 1)), Told::Well);
        assert_eq!(running.tell(&b, says(&b, 1)), Told::Well);
        assert_eq!(running.tell(&a, beats(&a)), Told::Well, "it is said again");
        assert_eq!(running.tell(&a, says(&a, 2)), Told::Deaf);
        assert_eq!(
            running.tell(&b, says(&b, 2)),
            Told::Well,
            "one waits already"
        );
        assert_eq!(heard(&mut there), ["a 1", "b 1"]);
        // Room, but not for what comes after something that was dropped.
        assert_eq!(running.tell(&a, says(&a, 3)), Told::Well);
        assert_eq!(heard(&mut there), [""; 0]);
        running.room().await;
        // Not room enough for all: it goes on being deaf to the second.
        assert_eq!(running.hears_again(&[a.clone()].into()), Told::Deaf);
        assert_eq!(heard(&mut there), ["a down", "a up"]);
        assert_eq!(running.tell(&a, says(&a, 4)), Told::Well);
        assert_eq!(running.tell(&b, says(&b, 4)), Told::Well);
        assert_eq!(heard(&mut there), ["a 4"]);
        assert_eq!(running.hears_again(&[a].into()), Told::Well);
        assert_eq!(heard(&mut there), ["b down"]);
    }

    #[tokio::test]
    async fn nobody_waits_for_room_in_an_inbox_that_is_gone() {
        let (inbox, there) = mpsc::channel(1);
        let mut running = Running::new(inbox, tokio::spawn(async { Ok(()) }));
        let a = host("a");
        running.tell(&a, says(&a, 1));
        assert_eq!(running.tell(&a, says(&a, 2)), Told::Deaf);
        assert!(running.ask(VmQuestion::Status).is_none());
        let room = running.room();
        drop(there);
        room.await;
        assert_eq!(running.hears_again(&[a].into()), Told::Well);
    }
}
