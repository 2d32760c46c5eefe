//! The agent without the world: one whose drivers are played by the tests.

use std::net::SocketAddr;

use replay_log::LogTip;
use tempfile::TempDir;
use tokio::sync::mpsc::Receiver;

use super::*;
use crate::agent::certs::{Identity, Name};
use crate::agent::init::{Plan, init};
use crate::agent::link::{Ended, SessionId};
use crate::agent::operator::Request;
use crate::protocol::{Incarnation, Message, PROTOCOL_VERSION, Version};

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn vm(text: &str) -> VmName {
    VmName::new(text).expect("a name")
}

fn host(text: &str) -> HostName {
    HostName::new(text).expect("a name")
}

/// Host a, which nobody is connected with.
struct Stage {
    agent: Agent,
    wished: Receiver<Wish>,
    _events: Receiver<LinkEvent<HostMessage>>,
    _folder: TempDir,
}

impl Stage {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let plan = Plan {
            hosts: [(name("a"), at(1)), (name("b"), at(1))].into(),
            metrics: BTreeMap::new(),
            witness: (name("w"), at(1)),
            gateways: vec![],
            operator: name("ann"),
        };
        let folders = init(&folder.path().join("cluster"), &plan).expect("a cluster");
        let config = Config::load(&folders[&Identity::host(&name("a"))]).expect("a configuration");
        let credentials = config.credentials().expect("certified");
        let endpoint = Endpoint::bind(&credentials, at(0)).expect("an endpoint");
        let (wishes, wished) = mpsc::channel(64);
        let introduction = Introduction::of_this_host();
        let made = Agent::new(config, None, introduction, &endpoint, wishes);
        let (agent, events) = made.expect("an agent");
        Self {
            agent,
            wished,
            _events: events,
            _folder: folder,
        }
    }

    /// A driver that is played by whoever reads what is given.
    fn play(&mut self, name: &str) -> Receiver<ToDriver> {
        let (inbox, heard) = mpsc::channel(INBOX);
        let task = tokio::spawn(async { Ok(()) });
        let running = Running::new(inbox, task);
        self.agent.drivers.insert(vm(name), running);
        heard
    }

    /// Host b says something about a VM.
    fn hears(&mut self, about: &str, incarnation: u64) {
        self.agent.link_event(LinkEvent::Message {
            peer: name("b"),
            session: SessionId(1),
            message: HostMessage::Vm {
                vm: vm(about),
                message: Message::Hello {
                    protocol: PROTOCOL_VERSION,
                    incarnation: Incarnation(incarnation),
                    tip: LogTip::default(),
                    known: Version::default(),
                },
            },
        });
    }

    async fn order(&mut self, about: &str) -> Answer {
        let (reply, answer) = oneshot::channel();
        let request = Request::Switchover {
            vm: vm(about),
            to: None,
        };
        let who = Identity::host(&name("ann"));
        self.agent.order(Asked {
            who,
            request,
            reply,
        });
        answer.await.expect("an answer")
    }
}

fn hello(heard: &ToDriver) -> Option<u64> {
    match heard {
        ToDriver::Heard(Input::Message {
            message: Message::Hello { incarnation, .. },
            ..
        }) => Some(incarnation.0),
        _ => None,
    }
}

#[tokio::test]
async fn a_driver_that_is_stuck_stops_nobody_else() {
    let mut stage = Stage::new();
    stage.agent.up.insert(host("b"));
    let mut stuck = stage.play("stuck");
    let mut well = stage.play("well");
    let more_than_it_takes = INBOX as u64 + 100;
    for number in 0..more_than_it_takes {
        stage.hears("stuck", number);
    }
    stage.hears("well", 1);
    assert_eq!(well.try_recv().ok().as_ref().and_then(hello), Some(1));
    // An order to it is refused, and one to the other is not held up.
    assert!(matches!(stage.order("stuck").await, Answer::Refused { .. }));
    tokio::spawn(async move {
        while let Some(ToDriver::Operator(_, reply)) = well.recv().await {
            let _ = reply.send(operator::VmAnswer::Taken);
        }
    });
    assert!(matches!(stage.order("well").await, Answer::Taken { .. }));
    // It listens again: what it has missed looks to it like the end of the connection.
    for number in 0..INBOX as u64 {
        assert_eq!(stuck.try_recv().ok().as_ref().and_then(hello), Some(number));
    }
    let wish = stage.wished.recv().await.expect("somebody waits for it");
    stage.agent.grant(wish);
    stage.hears("stuck", 7);
    let mut next = || stuck.try_recv().expect("something");
    assert!(matches!(next(), ToDriver::Heard(Input::PeerDown(peer)) if peer == host("b")));
    assert!(matches!(next(), ToDriver::Heard(Input::PeerUp(peer)) if peer == host("b")));
    assert_eq!(hello(&next()), Some(7));
    // What happens to connections is not lost either.
    stage.agent.link_event(LinkEvent::PeerDown {
        peer: name("b"),
        session: SessionId(1),
        ended: Ended::TimedOut,
    });
    assert!(matches!(
        stuck.try_recv().ok(),
        Some(ToDriver::Heard(Input::PeerDown(_)))
    ));
}
