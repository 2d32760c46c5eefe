//! A witness that has less than hosts have seen: from a backup, from a copy, or from nothing.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::client::{AskError, WitnessClient};
use super::keeper::OpenError;
use super::testing::{Cluster, any_port, done, issue, record, unknown, version, vm};
use super::*;
use crate::protocol::{Lineage, Swapped};

/// Commits these records one after another; what the last swap said.
async fn commit(client: &WitnessClient, records: &[Record]) -> Committed {
    let mut expect = None;
    let mut last = None;
    for record in records {
        match client.swap(&vm(), expect, record.clone(), None).await {
            Swapped::Done(committed) => last = Some(committed),
            other => panic!("not done: {other:?}"),
        }
        expect = Some(record.version());
    }
    last.expect("a record")
}

fn history() -> [Record; 3] {
    [
        record(1, 1, "a", &["b", "c"]),
        record(1, 2, "a", &["b", "c"]),
        record(1, 3, "a", &["b"]),
    ]
}

fn seen(committed: &Committed) -> BTreeMap<VmName, Committed> {
    BTreeMap::from([(vm(), committed.clone())])
}

/// A witness that has only the first two records, and what it once said of the third.
async fn set_back(cluster: &Cluster) -> (FileKeeper, Committed) {
    let (endpoint, task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let newest = commit(&a, &history()).await;
    endpoint.close().await;
    task.abort();
    let older = tempfile::tempdir().expect("a folder").keep();
    let (endpoint, task) =
        cluster.start_with(cluster.keeper_in(&older), any_port(), Duration::ZERO);
    let a = cluster.client(Role::Host, "a", &endpoint);
    commit(&a, &history()[..2]).await;
    endpoint.close().await;
    task.abort();
    // The server has it until its last request has ended.
    let keeper = loop {
        match FileKeeper::open(&older, Signer::new(&cluster.witness).expect("a signer")) {
            Ok(keeper) => break keeper,
            Err(OpenError::Locked(_)) => tokio::task::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    };
    (keeper, newest)
}

#[tokio::test]
async fn a_witness_that_was_set_back_changes_nothing_until_it_is_given_back_what_hosts_have_seen() {
    let cluster = Cluster::new();
    let (keeper, newest) = set_back(&cluster).await;
    let keeper = Arc::new(keeper);
    let (endpoint, task) = cluster.start_shared(&keeper, any_port(), Duration::ZERO);
    let a = cluster.client(Role::Host, "a", &endpoint);
    let c = cluster.client(Role::Host, "c", &endpoint);

    let reported = a.report(seen(&newest)).await.expect("an answer");
    let fact = reported.set_back[&vm()];
    assert_eq!(fact.seen, newest.seen());
    // What the witness has would let c win: it was a member by then.
    let claim = record(2, 3, "c", &[]);
    let claimed = c.swap(&vm(), version(1, 2), claim.clone(), None).await;
    assert!(unknown(&claimed).contains("witness recover"), "{claimed:?}");
    assert!(matches!(
        c.read(&vm(), None).await,
        Err(AskError::SetBack(_))
    ));
    // It is known over restarts, and to who only looks.
    endpoint.close().await;
    task.abort();
    drop(task);
    let kept = keeper.read(&vm()).await.expect("an answer");
    assert_eq!(kept.set_back, Some(fact));
    let (endpoint, _task) = cluster.start_shared(&keeper, any_port(), Duration::ZERO);
    let (a, c, ann) = (
        cluster.client(Role::Host, "a", &endpoint),
        cluster.client(Role::Host, "c", &endpoint),
        cluster.client(Role::Operator, "ann", &endpoint),
    );
    let claimed = c.swap(&vm(), version(1, 2), claim, None).await;
    assert!(unknown(&claimed).contains("witness recover"), "{claimed:?}");
    let kept = ann.kept(&vm()).await.expect("an answer");
    assert_eq!(kept.set_back, Some(fact));
    assert_eq!(kept.committed.expect("a record").record, history()[1]);

    // What is older than what was seen is not enough.
    let older = cluster.sign(&vm(), history()[1].clone());
    let restored = ann.restore(seen(&older), false).await.expect("an answer");
    assert_eq!(restored[&vm()], Restored::TooOld(fact));
    let restored = ann.restore(seen(&newest), false).await.expect("an answer");
    assert_eq!(
        restored[&vm()],
        Restored::Replaced(version(1, 2), newest.record.version())
    );
    let next = record(1, 4, "a", &[]);
    let seen = Some(newest.seen());
    let swapped = a.swap(&vm(), version(1, 3), next.clone(), seen).await;
    assert_eq!(done(&swapped), Some(&next));
}

#[tokio::test]
async fn a_copy_that_asks_for_a_change_says_what_it_has_seen() {
    let cluster = Cluster::new();
    let (keeper, newest) = set_back(&cluster).await;
    let (endpoint, _task) = cluster.start_with(keeper, any_port(), Duration::ZERO);
    let a = cluster.client(Role::Host, "a", &endpoint);
    let c = cluster.client(Role::Host, "c", &endpoint);
    let next = record(1, 4, "a", &[]);
    let swapped = a
        .swap(&vm(), version(1, 3), next, Some(newest.seen()))
        .await;
    assert!(unknown(&swapped).contains("witness recover"), "{swapped:?}");
    // From then on for everybody.
    let claimed = c
        .swap(&vm(), version(1, 2), record(2, 3, "c", &[]), None)
        .await;
    assert!(unknown(&claimed).contains("witness recover"), "{claimed:?}");
}

#[tokio::test]
async fn a_stranger_blocks_no_record_by_what_it_says_it_has_seen() {
    let cluster = Cluster::new();
    let (endpoint, _task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let x = cluster.client(Role::Host, "x", &endpoint);
    let newest = commit(&a, &history()).await;
    let mut lie = newest.clone();
    lie.record.epoch = crate::protocol::Epoch(9);
    let reported = x.report(seen(&lie)).await.expect("an answer");
    assert!(reported.set_back.is_empty());
    let read = x.read(&vm(), Some(lie.seen())).await;
    let read = read.expect("whoever has seen more judges by itself");
    assert_eq!(read.as_ref(), Some(&newest));
    let next = record(1, 4, "a", &[]);
    let swapped = a.swap(&vm(), version(1, 3), next.clone(), None).await;
    assert_eq!(done(&swapped), Some(&next));
    // Nor may anybody but hosts report, or but operators give back.
    let g = cluster.client(Role::Gateway, "g", &endpoint);
    assert!(matches!(
        g.report(seen(&newest)).await,
        Err(AskError::Refused(Refusal::OnlyHosts { .. }))
    ));
    assert!(matches!(
        a.restore(seen(&newest), true).await,
        Err(AskError::Refused(Refusal::OnlyOperators { .. }))
    ));
    let ann = cluster.client(Role::Operator, "ann", &endpoint);
    assert!(matches!(
        ann.restore(seen(&lie), true).await,
        Err(AskError::Refused(Refusal::BadProof { .. }))
    ));
}

#[tokio::test]
async fn an_emptied_witness_creates_nothing_that_hosts_have_seen() {
    let cluster = Cluster::new();
    let (keeper, newest) = set_back(&cluster).await;
    drop(keeper);
    let empty = tempfile::tempdir().expect("a folder");
    let keeper = cluster.keeper_in(empty.path());
    let (endpoint, _task) = cluster.start_with(keeper, any_port(), Duration::from_secs(20));
    let a = cluster.client(Role::Host, "a", &endpoint);
    let b = cluster.client(Role::Host, "b", &endpoint);
    let ann = cluster.client(Role::Operator, "ann", &endpoint);
    // b has forgotten everything and is told to create the VM. The witness hears a first.
    let mut anew = record(1, 1, "b", &["a"]);
    anew.lineage = Lineage(2);
    let known = vm();
    let (created, reports) = tokio::join!(b.swap(&known, None, anew.clone(), None), async {
        let a = a.report(seen(&newest)).await.expect("an answer");
        let b = b.report(BTreeMap::new()).await.expect("an answer");
        (a, b)
    });
    assert!(unknown(&created).contains("witness recover"), "{created:?}");
    assert_eq!(reports.0.set_back[&vm()].kept, None);
    let restored = ann.restore(seen(&newest), false).await.expect("an answer");
    assert_eq!(
        restored[&vm()],
        Restored::Replaced(None, newest.record.version())
    );
    // A namesake does not take its place.
    let other = cluster.sign(&vm(), anew);
    let restored = ann.restore(seen(&other), true).await.expect("an answer");
    assert_eq!(restored[&vm()], Restored::OtherLineage);
}

#[tokio::test]
async fn shortly_after_its_start_a_witness_hears_the_hosts_before_it_lets_one_claim() {
    let cluster = Cluster::new();
    let (keeper, newest) = set_back(&cluster).await;
    let (endpoint, _task) = cluster.start_with(keeper, any_port(), Duration::from_secs(20));
    let [a, b, c] = ["a", "b", "c"].map(|name| cluster.client(Role::Host, name, &endpoint));
    let known = vm();
    let older = cluster.sign(&vm(), history()[1].clone());
    let claim = record(2, 3, "c", &[]);
    let (claimed, ()) = tokio::join!(c.swap(&known, version(1, 2), claim, None), async {
        b.report(seen(&older)).await.expect("an answer");
        c.report(seen(&older)).await.expect("an answer");
        // The last whom the record names is the one that knows.
        a.report(seen(&newest)).await.expect("an answer");
    });
    assert!(unknown(&claimed).contains("witness recover"), "{claimed:?}");
}

#[tokio::test]
async fn a_copy_of_the_folder_changes_nothing_until_an_operator_says_so() {
    let cluster = Cluster::new();
    let (endpoint, task) = cluster.start(any_port());
    let a = cluster.client(Role::Host, "a", &endpoint);
    let newest = commit(&a, &history()).await;
    let dir = tempfile::tempdir().expect("a folder");
    let copy = dir.path().join("records");
    let mut cp = Command::new("cp");
    let copied = cp.arg("-a").args([cluster.folder.path(), &copy]).status();
    assert!(copied.expect("cp runs").success());
    drop((endpoint, task));
    let (endpoint, _task) =
        cluster.start_with(cluster.keeper_in(&copy), any_port(), Duration::ZERO);
    let b = cluster.client(Role::Host, "b", &endpoint);
    let ann = cluster.client(Role::Operator, "ann", &endpoint);
    let reported = b.report(seen(&newest)).await.expect("an answer");
    assert!(reported.health.copied);
    let claim = record(2, 4, "b", &[]);
    let claimed = b.swap(&vm(), version(1, 3), claim.clone(), None).await;
    assert!(unknown(&claimed).contains("witness recover"), "{claimed:?}");
    let restored = ann.restore(seen(&newest), false).await.expect("an answer");
    assert_eq!(restored[&vm()], Restored::Kept(newest.record.version()));
    let claimed = b.swap(&vm(), version(1, 3), claim.clone(), None).await;
    assert_eq!(done(&claimed), Some(&claim));
    let reported = b.report(seen(&newest)).await.expect("an answer");
    assert!(!reported.health.copied);
}

/// The keeper of this test belongs to nobody else's cluster.
#[tokio::test]
async fn what_another_cluster_has_signed_is_not_believed() {
    let (ours, theirs) = (Cluster::new(), Cluster::new());
    let (endpoint, _task) = ours.start(any_port());
    let a = ours.client(Role::Host, "a", &endpoint);
    commit(&a, &history()[..1]).await;
    let foreign = theirs.sign(&vm(), history()[2].clone());
    let reported = a.report(seen(&foreign)).await.expect("an answer");
    assert!(reported.set_back.is_empty());
    let witness = issue(&ours.authority, Role::Witness, "another");
    let ours = Signer::new(&witness).expect("a signer");
    let successor = ours.sign(&vm(), history()[2].clone()).expect("signed");
    let reported = a.report(seen(&successor)).await.expect("an answer");
    assert_eq!(reported.set_back.len(), 1);
}
