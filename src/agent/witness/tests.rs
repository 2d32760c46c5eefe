//! The witness over real QUIC, with real files.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use replay_log::{LogIndex, Term};
use tokio::time::timeout;

use super::client::{AskError, WitnessClient, unproven};
use super::*;
use crate::agent::certs::authority::Authority;
use crate::agent::certs::{Credentials, Name};
use crate::agent::link::Peer;
use crate::protocol::{Epoch, Incarnation, Lineage, Member, Policy, Swapped};

/// Only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(20);

fn vm() -> VmName {
    VmName::new("ledger").expect("a name")
}

fn member(host: &str) -> Member {
    Member {
        host: HostName::new(host).expect("a name"),
        incarnation: Incarnation(1),
    }
}

fn record(term: u64, epoch: u64, primary: &str, members: &[&str]) -> Record {
    Record {
        lineage: Lineage(1),
        through: LogIndex::START,
        begins: LogIndex::START,
        loss: false,
        failed: None,
        term: Term(term),
        epoch: Epoch(epoch),
        primary: member(primary),
        members: members.iter().map(|host| member(host)).collect(),
        hosts: vec![],
        policy: Policy::default(),
    }
}

#[allow(clippy::unnecessary_wraps)] // What is expected is always an option.
fn version(term: u64, epoch: u64) -> Option<Version> {
    Some(Version {
        term: Term(term),
        epoch: Epoch(epoch),
    })
}

struct Cluster {
    authority: Authority,
    witness: Credentials,
    folder: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Self {
        let authority = Authority::generate().expect("an authority");
        let witness = Self::issue(&authority, Role::Witness, "w");
        Self {
            authority,
            witness,
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    fn issue(authority: &Authority, role: Role, name: &str) -> Credentials {
        let name = name.parse::<Name>().expect("a name");
        authority
            .issue(&Identity { role, name })
            .expect("a certificate")
    }

    /// Starts the witness; it ends when the task is aborted and the endpoint closed.
    fn start(&self, at: SocketAddr) -> (Endpoint, tokio::task::JoinHandle<()>) {
        let keeper = FileKeeper::open(self.folder.path()).expect("records");
        let endpoint = Endpoint::bind(&self.witness, at).expect("an endpoint");
        let serving = endpoint.clone();
        let task = tokio::spawn(async move { serve(&serving, Arc::new(keeper)).await });
        (endpoint, task)
    }

    fn client(&self, role: Role, name: &str, at: &Endpoint) -> WitnessClient {
        let us = Endpoint::client(&Self::issue(&self.authority, role, name)).expect("an endpoint");
        let witness = Peer {
            identity: self.witness.identity.clone(),
            address: at.local_address().expect("bound").into(),
        };
        WitnessClient::new(&us, witness)
    }
}

fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

#[tokio::test]
async fn a_record_changes_only_from_what_was_expected_and_by_its_copies() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let b = cluster.client(Role::Host, "b", &endpoint);
    let c = cluster.client(Role::Host, "c", &endpoint);

    assert_eq!(a.read(&vm()).await.expect("an answer"), None);
    let first = record(1, 1, "a", &["b"]);
    assert_eq!(
        a.swap(&vm(), None, first.clone()).await,
        Swapped::Done(unproven(first.clone()))
    );
    // An answer that was lost: asking again says the same.
    assert_eq!(
        a.swap(&vm(), None, first.clone()).await,
        Swapped::Done(unproven(first.clone()))
    );
    // Another creation comes too late.
    assert_eq!(
        c.swap(&vm(), None, record(1, 1, "c", &[])).await,
        Swapped::Conflict(Some(unproven(first.clone())))
    );
    // A host that the record does not name.
    let usurped = c.swap(&vm(), version(1, 1), record(2, 2, "c", &[])).await;
    assert!(matches!(&usurped, Swapped::Unknown { reason } if reason.contains("no copy")));
    // A replica may not shrink its primary's record, nor claim for another.
    for new in [record(1, 2, "a", &[]), record(2, 2, "a", &["b"])] {
        let refused = b.swap(&vm(), version(1, 1), new).await;
        assert!(
            matches!(&refused, Swapped::Unknown { reason } if reason.contains("only a host itself")),
            "{refused:?}"
        );
    }
    // Numbers that do not rise by one.
    let leap = a.swap(&vm(), version(1, 1), record(1, 3, "a", &[])).await;
    assert!(matches!(leap, Swapped::Unknown { .. }));
    assert_eq!(c.read(&vm()).await.expect("an answer"), Some(first.clone()));
    // What is right is done, by a member's claim here, and of two that expect the same one wins.
    let claim = record(2, 2, "b", &[]);
    let shrink = record(1, 2, "a", &[]);
    let known = vm();
    let (one, other) = tokio::join!(
        b.swap(&known, version(1, 1), claim.clone()),
        a.swap(&known, version(1, 1), shrink.clone())
    );
    let now = a.read(&vm()).await.expect("an answer").expect("a record");
    if now == claim {
        assert_eq!(
            (one, other),
            (
                Swapped::Done(unproven(claim)),
                Swapped::Conflict(Some(unproven(now)))
            )
        );
    } else {
        assert_eq!(
            (other, one),
            (
                Swapped::Done(unproven(shrink)),
                Swapped::Conflict(Some(unproven(now)))
            )
        );
    }
}

#[tokio::test]
async fn a_host_that_shall_have_a_copy_may_claim_and_nothing_else() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let c = cluster.client(Role::Host, "c", &endpoint);
    let mut first = record(1, 1, "a", &["b"]);
    first.hosts = ["a", "b", "c"]
        .map(|host| HostName::new(host).expect("a name"))
        .to_vec();
    assert_eq!(
        a.swap(&vm(), None, first.clone()).await,
        Swapped::Done(unproven(first.clone()))
    );
    let joined = Record {
        epoch: Epoch(2),
        members: vec![member("b"), member("c")],
        ..first.clone()
    };
    let refused = c.swap(&vm(), version(1, 1), joined).await;
    assert!(matches!(refused, Swapped::Unknown { .. }));
    let forced = Record {
        term: Term(2),
        epoch: Epoch(2),
        primary: member("c"),
        members: vec![],
        ..first
    };
    assert_eq!(
        c.swap(&vm(), version(1, 1), forced.clone()).await,
        Swapped::Done(unproven(forced))
    );
}

#[tokio::test]
async fn gateways_only_look_and_operators_only_create() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let operator = cluster.client(Role::Operator, "ann", &endpoint);
    let gateway = cluster.client(Role::Gateway, "g", &endpoint);
    let first = record(1, 1, "a", &["b"]);
    let refused = gateway.swap(&vm(), None, first.clone()).await;
    assert!(matches!(&refused, Swapped::Unknown { reason } if reason.contains("gateway")));
    assert_eq!(
        operator.swap(&vm(), None, first.clone()).await,
        Swapped::Done(unproven(first.clone()))
    );
    let refused = operator
        .swap(&vm(), version(1, 1), record(1, 2, "a", &[]))
        .await;
    assert!(matches!(&refused, Swapped::Unknown { reason } if reason.contains("operator")));
    let all = gateway.list().await.expect("an answer");
    assert_eq!(all, BTreeMap::from([(vm(), first)]));
}

#[tokio::test]
async fn watchers_hear_of_changes_and_records_survive_a_restart() {
    let cluster = Cluster::new();
    let (endpoint, task) = cluster.start(any_port());
    let address = endpoint.local_address().expect("bound");
    let a = cluster.client(Role::Host, "a", &endpoint);
    let mut watching = cluster.client(Role::Gateway, "g", &endpoint).follow(vm());
    let first = record(1, 1, "a", &["b"]);
    assert_eq!(
        a.swap(&vm(), None, first.clone()).await,
        Swapped::Done(unproven(first.clone()))
    );
    let until = async |watching: &mut client::Following, wanted: &Record| {
        timeout(PATIENCE, async {
            while watching.latest().as_ref() != Some(wanted) {
                watching.changed().await;
            }
        })
        .await
        .expect("heard of it");
    };
    until(&mut watching, &first).await;

    endpoint.close().await;
    task.abort();
    drop(endpoint);
    assert!(matches!(a.read(&vm()).await, Err(AskError::Request(_))));
    // A change that was cut off by the crash is no record.
    fs::write(cluster.folder.path().join("ledger.json.new"), b"{").expect("written");
    let (_endpoint, _task) = loop {
        // The old socket goes when its last task has ended.
        if std::net::UdpSocket::bind(address).is_ok() {
            break cluster.start(address);
        }
        tokio::task::yield_now().await;
    };
    assert_eq!(a.read(&vm()).await.expect("an answer"), Some(first));
    let second = record(1, 2, "a", &[]);
    assert_eq!(
        a.swap(&vm(), version(1, 1), second.clone()).await,
        Swapped::Done(unproven(second.clone()))
    );
    until(&mut watching, &second).await;
}

#[tokio::test]
async fn a_damaged_record_keeps_the_witness_from_starting() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let keeper = FileKeeper::open(folder.path()).expect("records");
    let first = record(1, 1, "a", &["b"]);
    keeper.swap(vm(), None, first).await.expect("kept");
    let file = folder.path().join("ledger.json");
    let good = fs::read_to_string(&file).expect("written");
    fs::write(&file, good.replace("\"b\"", "\"a\"")).expect("written");
    assert!(matches!(
        FileKeeper::open(folder.path()),
        Err(OpenError::Damaged { .. })
    ));
    fs::write(&file, good).expect("written");
    fs::write(folder.path().join("notes.txt"), b"x").expect("written");
    assert!(matches!(
        FileKeeper::open(folder.path()),
        Err(OpenError::Foreign { .. })
    ));
}

#[tokio::test]
async fn a_keeper_whose_disk_fails_promises_nothing_more() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("records");
    let keeper = FileKeeper::open(&path).expect("records");
    let first = record(1, 1, "a", &["b"]);
    keeper.swap(vm(), None, first.clone()).await.expect("kept");
    fs::remove_dir_all(&path).expect("removed");
    let second = record(1, 2, "a", &[]);
    let failed = keeper.swap(vm(), version(1, 1), second.clone()).await;
    assert!(matches!(failed, Err(KeeperError::Disk { .. })));
    fs::create_dir(&path).expect("made");
    let stopped = keeper.swap(vm(), version(1, 1), second).await;
    assert!(matches!(stopped, Err(KeeperError::Stopped)));
    assert_eq!(keeper.read(&vm()).await.expect("an answer"), Some(first));
}
