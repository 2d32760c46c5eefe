//! The witness over real QUIC, with real files.

use std::time::Duration;

use replay_log::Term;
use tokio::time::timeout;

use super::client::AskError;
use super::testing::{Cluster, any_port, conflict, done, member, record, unknown, version, vm};
use super::*;
use crate::protocol::{Epoch, Swapped};

/// Only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_record_changes_only_from_what_was_expected_and_by_its_copies() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let b = cluster.client(Role::Host, "b", &endpoint);
    let c = cluster.client(Role::Host, "c", &endpoint);

    assert_eq!(a.read(&vm(), None).await.expect("an answer"), None);
    let first = record(1, 1, "a", &["b"]);
    assert_eq!(
        done(&a.swap(&vm(), None, first.clone(), None).await),
        Some(&first)
    );
    // An answer that was lost: asking again says the same.
    assert_eq!(
        done(&a.swap(&vm(), None, first.clone(), None).await),
        Some(&first)
    );
    // Another creation comes too late.
    let late = c.swap(&vm(), None, record(1, 1, "c", &[]), None).await;
    assert_eq!(conflict(&late), Some(&first));
    // A host that the record does not name.
    let usurped = c
        .swap(&vm(), version(1, 1), record(2, 2, "c", &[]), None)
        .await;
    assert!(matches!(&usurped, Swapped::Unknown { reason } if reason.contains("no copy")));
    // A replica may not shrink its primary's record, nor claim for another.
    for new in [record(1, 2, "a", &[]), record(2, 2, "a", &["b"])] {
        let refused = b.swap(&vm(), version(1, 1), new, None).await;
        assert!(
            matches!(&refused, Swapped::Unknown { reason } if reason.contains("only a host itself")),
            "{refused:?}"
        );
    }
    // Numbers that do not rise by one.
    let leap = a
        .swap(&vm(), version(1, 1), record(1, 3, "a", &[]), None)
        .await;
    assert!(matches!(leap, Swapped::Unknown { .. }));
    // A term from which nobody could claim another.
    let wild = record(u64::MAX, 2, "a", &[]);
    let wild = a.swap(&vm(), version(1, 1), wild, None).await;
    assert!(unknown(&wild).contains("far beyond"), "{wild:?}");
    let kept = c.read(&vm(), None).await.expect("an answer");
    assert_eq!(kept.map(|kept| kept.record), Some(first.clone()));
    // What is right is done, by a member's claim here, and of two that expect the same one wins.
    let claim = record(2, 2, "b", &[]);
    let shrink = record(1, 2, "a", &[]);
    let known = vm();
    let (one, other) = tokio::join!(
        b.swap(&known, version(1, 1), claim.clone(), None),
        a.swap(&known, version(1, 1), shrink.clone(), None)
    );
    let now = a.read(&vm(), None).await.expect("an answer");
    let now = now.expect("a record").record;
    if now == claim {
        assert_eq!((done(&one), conflict(&other)), (Some(&claim), Some(&now)));
    } else {
        assert_eq!((done(&other), conflict(&one)), (Some(&shrink), Some(&now)));
    }
}

#[tokio::test]
async fn an_operator_may_have_a_host_named_and_change_nothing_else() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let operator = cluster.client(Role::Operator, "admin", &endpoint);
    let first = record(1, 1, "a", &["b"]);
    let made = a.swap(&vm(), None, first.clone(), None).await;
    assert_eq!(done(&made), Some(&first));
    let named = first.wanted_on(&HostName::new("z").expect("a name"));
    for changed in [
        Record {
            members: vec![],
            ..named.clone()
        },
        Record {
            term: Term(2),
            primary: member("z"),
            ..named.clone()
        },
        Record {
            hosts: vec![],
            ..named.clone()
        },
    ] {
        let refused = operator.swap(&vm(), version(1, 1), changed, None).await;
        assert!(matches!(refused, Swapped::Unknown { .. }), "{refused:?}");
    }
    let shop = vm();
    let widened = operator.swap(&shop, version(1, 1), named.clone(), None);
    assert_eq!(done(&widened.await), Some(&named));
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
        done(&a.swap(&vm(), None, first.clone(), None).await),
        Some(&first)
    );
    let joined = Record {
        epoch: Epoch(2),
        members: vec![member("b"), member("c")],
        ..first.clone()
    };
    let refused = c.swap(&vm(), version(1, 1), joined, None).await;
    assert!(matches!(refused, Swapped::Unknown { .. }));
    let forced = Record {
        term: Term(2),
        epoch: Epoch(2),
        primary: member("c"),
        members: vec![],
        ..first
    };
    assert_eq!(
        done(&c.swap(&vm(), version(1, 1), forced.clone(), None).await),
        Some(&forced)
    );
}

#[tokio::test]
async fn gateways_only_look_and_operators_only_create() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let operator = cluster.client(Role::Operator, "ann", &endpoint);
    let gateway = cluster.client(Role::Gateway, "g", &endpoint);
    let first = record(1, 1, "a", &["b"]);
    let refused = gateway.swap(&vm(), None, first.clone(), None).await;
    assert!(matches!(&refused, Swapped::Unknown { reason } if reason.contains("gateway")));
    assert_eq!(
        done(&operator.swap(&vm(), None, first.clone(), None).await),
        Some(&first)
    );
    let refused = operator
        .swap(&vm(), version(1, 1), record(1, 2, "a", &[]), None)
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
        done(&a.swap(&vm(), None, first.clone(), None).await),
        Some(&first)
    );
    let until = async |watching: &mut client::Following, wanted: &Record| {
        timeout(PATIENCE, async {
            while watching.latest().map(|kept| kept.record).as_ref() != Some(wanted) {
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
    assert!(matches!(
        a.read(&vm(), None).await,
        Err(AskError::Request(_))
    ));
    let (_endpoint, _task) = loop {
        // The old socket goes when its last task has ended.
        if std::net::UdpSocket::bind(address).is_ok() {
            break cluster.start(address);
        }
        tokio::task::yield_now().await;
    };
    let kept = a.read(&vm(), None).await.expect("an answer");
    assert_eq!(kept.map(|kept| kept.record), Some(first));
    let second = record(1, 2, "a", &[]);
    assert_eq!(
        done(&a.swap(&vm(), version(1, 1), second.clone(), None).await),
        Some(&second)
    );
    until(&mut watching, &second).await;
}

/// Does nothing quickly.
struct SlowKeeper {
    keeper: FileKeeper,
    disk: tokio::sync::Mutex<()>,
}

/// What a change takes.
const SLOW: Duration = Duration::from_secs(3);

impl RecordKeeper for SlowKeeper {
    async fn read(&self, vm: &VmName) -> Result<Kept, KeeperError> {
        self.keeper.read(vm).await
    }

    async fn swap(&self, change: Change) -> Result<Swap, KeeperError> {
        let _one_at_a_time = self.disk.lock().await;
        tokio::time::sleep(SLOW).await;
        self.keeper.swap(change).await
    }

    async fn set_back(&self, vm: VmName, seen: Seen, by: Identity) -> Result<(), KeeperError> {
        self.keeper.set_back(vm, seen, by).await
    }

    async fn restore(
        &self,
        newest: BTreeMap<VmName, Record>,
        forced: bool,
        settle: bool,
    ) -> Result<BTreeMap<VmName, Restored>, KeeperError> {
        self.keeper.restore(newest, forced, settle).await
    }

    fn watch(&self, vm: &VmName) -> watch::Receiver<Kept> {
        self.keeper.watch(vm)
    }

    async fn list(&self) -> Result<BTreeMap<VmName, Kept>, KeeperError> {
        self.keeper.list().await
    }

    fn health(&self) -> KeeperHealth {
        self.keeper.health()
    }
}

#[tokio::test]
async fn a_witness_that_takes_three_seconds_for_a_change_comes_through() {
    let cluster = Cluster::new();
    let slow = SlowKeeper {
        keeper: cluster.keeper(),
        disk: tokio::sync::Mutex::default(),
    };
    let (endpoint, _task) = cluster.start_with(slow, any_port(), Duration::ZERO);
    let a = cluster.client(Role::Host, "a", &endpoint);
    let first = record(1, 1, "a", &["b"]);
    // As the protocol asks: the same again, until it is known.
    let mut asked = 0;
    let swapped = loop {
        asked += 1;
        assert!(asked <= 4, "a client that learns nothing of how slow it is");
        match a.swap(&vm(), None, first.clone(), None).await {
            Swapped::Unknown { .. } => {}
            known => break known,
        }
    };
    assert_eq!(done(&swapped), Some(&first));
    // By now it is known how long to wait.
    let second = record(1, 2, "a", &[]);
    let swapped = a.swap(&vm(), version(1, 1), second.clone(), None).await;
    assert_eq!(done(&swapped), Some(&second));
}

#[tokio::test]
async fn what_the_witness_says_is_signed() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let verifier = Verifier::new(&cluster.witness.authority).expect("a verifier");
    let mut following = a.follow(vm());
    let mut said = Vec::new();
    match a.swap(&vm(), None, record(1, 1, "a", &["b"]), None).await {
        Swapped::Done(committed) => said.push(committed),
        other => panic!("not done: {other:?}"),
    }
    match a.swap(&vm(), None, record(1, 1, "a", &[]), None).await {
        Swapped::Conflict(committed) => said.extend(committed),
        other => panic!("no conflict: {other:?}"),
    }
    said.extend(a.read(&vm(), None).await.expect("an answer"));
    let all = a.list_kept().await.expect("an answer");
    said.extend(all.into_values().filter_map(|kept| kept.committed));
    while following.latest().is_none() {
        following.changed().await;
    }
    said.extend(following.latest());
    assert_eq!(said.len(), 5);
    for committed in said {
        assert_eq!(verifier.verify(&vm(), &committed), Ok(()));
    }
}
