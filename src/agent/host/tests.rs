//! The agent without the world: one whose drivers are played by the tests.

use std::net::SocketAddr;

use replay_log::{LogIndex, LogTip, Term};
use tempfile::TempDir;
use tokio::sync::mpsc::Receiver;
use tokio::time::timeout;

use super::*;
use crate::agent::certs::{Identity, Name, Role};
use crate::agent::init::{Plan, init};
use crate::agent::journal::What;
use crate::agent::link::{Ended, SessionId};
use crate::agent::operator::Request;
use crate::agent::witness;
use crate::protocol::{
    Epoch, Event, Incarnation, Lineage, Member, Message, PROTOCOL_VERSION, Policy, Record, Swapped,
    Version,
};

/// Only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(20);

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn vm(text: &str) -> VmName {
    VmName::new(text).expect("a name")
}

fn host(text: &str) -> HostName {
    HostName::new(text).expect("a name")
}

fn free_port() -> SocketAddr {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("bound")
}

/// Host a, which nobody is connected with; the witness is only there where a test starts it.
struct Stage {
    agent: Agent,
    wished: Receiver<Wish>,
    /// Starts the witness.
    witness: Config,
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
            witness: (name("w"), free_port()),
            advertise: BTreeMap::new(),
            gateways: vec![],
            operator: name("ann"),
        };
        let folders = init(&folder.path().join("cluster"), &plan).expect("a cluster");
        let witness = Identity {
            role: Role::Witness,
            name: name("w"),
        };
        let config = Config::load(&folders[&Identity::host(&name("a"))]).expect("a configuration");
        let credentials = config.credentials().expect("certified");
        let endpoint = Endpoint::bind(&credentials, at(0)).expect("an endpoint");
        let (wishes, wished) = mpsc::channel(64);
        let introduction = Introduction::of_this_host();
        let verifier = Verifier::new(&credentials.authority).expect("a verifier");
        let made = Agent::new(config, None, introduction, &endpoint, verifier, wishes);
        let (agent, events) = made.expect("an agent");
        Self {
            agent,
            wished,
            witness: Config::load(&folders[&witness]).expect("a configuration"),
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
        let request = Request::Switchover {
            vm: vm(about),
            to: None,
        };
        self.begin(request).await.expect("an answer")
    }

    /// Gives an order.
    fn begin(&mut self, request: Request) -> oneshot::Receiver<Answer> {
        let (reply, answer) = oneshot::channel();
        let who = Identity::host(&name("ann"));
        self.agent.order(Asked {
            who,
            request,
            reply,
        });
        answer
    }

    /// Orders that a VM be removed, and what that leads to.
    async fn remove(&mut self, about: &str) -> Answer {
        let mut answer = self.begin(Request::Remove { vm: vm(about) });
        loop {
            tokio::select! {
                answer = &mut answer => return answer.expect("an answer"),
                Some(wish) = self.wished.recv() => self.agent.grant(wish),
            }
        }
    }

    fn folder(&self, of: &str) -> PathBuf {
        self.agent.env.config.data.join("vms").join(of)
    }
}

/// The reason of a refusal.
fn refused(answer: Answer) -> String {
    match answer {
        Answer::Refused { why } => why,
        other => panic!("{other:?}"),
    }
}

fn record(primary: &str, hosts: &[&str]) -> Record {
    Record {
        begins: LogIndex::START,
        follows: replay_log::Term(0),
        loss: false,
        lineage: Lineage(1),
        through: replay_log::LogIndex::START,
        failed: None,
        term: Term(1),
        epoch: Epoch(1),
        primary: Member {
            host: host(primary),
            incarnation: Incarnation(1),
        },
        members: vec![],
        hosts: hosts.iter().map(|name| host(name)).collect(),
        policy: Policy::default(),
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
    let status = stage.agent.status().await;
    assert!(status.silent.contains_key(&vm("stuck")), "{status:?}");
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

/// Only what the witness says counts, and it has to say something.
#[tokio::test]
async fn a_vm_is_removed_only_where_its_record_does_not_want_it() {
    let mut stage = Stage::new();
    for name in ["wanted", "stray"] {
        std::fs::create_dir_all(stage.folder(name)).expect("a folder");
    }
    let why = refused(stage.remove("wanted").await);
    assert!(why.contains("the witness does not answer"), "{why}");
    assert!(stage.folder("wanted").exists());

    let config = stage.witness.clone();
    let (_stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let stopped = async move { drop(stopped.await) };
        witness::run(&config, stopped).await.expect("a witness");
    });
    let client = stage.agent.env.witness.clone().expect("a witness");
    let new = record("a", &["a", "b"]);
    while let Swapped::Unknown { .. } = client.swap(&vm("wanted"), None, new.clone(), None).await {}
    let why = refused(stage.remove("wanted").await);
    assert!(why.contains("names a"), "{why}");
    assert!(stage.folder("wanted").exists());

    assert_eq!(stage.remove("stray").await, Answer::Done);
    assert!(!stage.folder("stray").exists());
    let why = refused(stage.remove("stray").await);
    assert!(why.contains("does not look after stray"), "{why}");
}

/// While a folder is removed nobody begins with the VM anew.
#[tokio::test]
async fn a_vm_that_is_being_removed_is_not_taken() {
    let mut stage = Stage::new();
    std::fs::create_dir_all(stage.folder("stray")).expect("a folder");
    let (end, ended) = oneshot::channel::<()>();
    let (inbox, _heard) = mpsc::channel(1);
    let task = tokio::spawn(async move {
        let _ = ended.await;
        Ok(())
    });
    let running = Running::new(inbox, task);
    stage.agent.drivers.insert(vm("stray"), running);
    let (reply, answer) = oneshot::channel();
    stage.agent.grant(Wish::Remove {
        vm: vm("stray"),
        reply,
    });
    stage.agent.up.insert(host("b"));
    stage.hears("stray", 1);
    assert!(stage.agent.asked.is_empty(), "its record is not asked for");
    stage.agent.grant(Wish::Take {
        vm: vm("stray"),
        why: "b speaks of it".to_owned(),
    });
    assert!(stage.agent.drivers.is_empty());
    assert!(stage.folder("stray").exists(), "its driver has not ended");
    drop(end);
    assert_eq!(answer.await, Ok(Answer::Done));
    assert!(!stage.folder("stray").exists());
    let wish = stage.wished.recv().await.expect("the end of it");
    stage.agent.grant(wish);
    stage.hears("stray", 2);
    assert!(!stage.agent.asked.is_empty(), "it may be wanted again");
}

/// What is kept of a VM is read on another thread; where it cannot be read that is said once, and
/// tried again later.
#[tokio::test]
async fn a_folder_that_cannot_be_used_is_told_of() {
    let mut stage = Stage::new();
    std::fs::create_dir_all(stage.folder("torn")).expect("a folder");
    std::fs::write(stage.folder("torn").join("state.json"), "{").expect("written");
    stage.agent.take_known().await;
    assert_eq!(stage.agent.drivers.len(), 1, "it is being opened");
    let wish = stage.wished.recv().await.expect("what came of it");
    assert!(matches!(&wish, Wish::Unreadable { .. }));
    stage.agent.grant(wish);
    assert!(stage.agent.drivers.is_empty());
    let lines = stage.agent.env.journal.read(0, 100).await.expect("lines");
    let told = lines
        .iter()
        .filter(|line| line.text.contains("cannot be understood"));
    assert_eq!(told.count(), 1);
    let silent = stage.agent.status().await.silent;
    let why = silent.get(&vm("torn")).expect("it is told of");
    assert!(why.contains("cannot be understood"), "{why}");
    stage.agent.up.insert(host("b"));
    stage.hears("torn", 1);
    assert!(stage.agent.asked.is_empty(), "not so soon");
}

/// A state that cannot be written is as it was, and is written when it can be.
#[tokio::test]
async fn a_state_that_cannot_be_written_is_written_later() {
    let mut stage = Stage::new();
    // No file can be written beside the one that is to be replaced.
    let in_the_way = stage.folder("books").join("state.new");
    std::fs::create_dir_all(&in_the_way).expect("a folder");
    stage.agent.take(&vm("books"), "a test").expect("taken");
    let journal = Arc::clone(&stage.agent.env.journal);
    let until = async |wanted: fn(&Event) -> bool| {
        let mut written = journal.written();
        let says = |what: &What| matches!(what, What::Decision(event) if wanted(event));
        let waiting = async {
            loop {
                let lines = journal.read(0, 100).await.expect("lines");
                if lines.iter().any(|line| says(&line.what)) {
                    return;
                }
                written.changed().await.expect("it goes on");
            }
        };
        timeout(PATIENCE, waiting).await.expect("in time");
    };
    until(|event| matches!(event, Event::StoreFull { .. })).await;
    assert!(!stage.folder("books").join("state").exists());
    std::fs::remove_dir(&in_the_way).expect("removed");
    until(|event| matches!(event, Event::StoreRoom)).await;
    assert!(stage.folder("books").join("state").exists());
    stage.agent.end().await;
}
