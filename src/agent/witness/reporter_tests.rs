//! What hosts tell, and what others get to know by them.

use replay_log::Term;
use tokio::time::timeout;

use super::*;
use crate::agent::certs::Role;
use crate::agent::journal::What;
use crate::agent::link::Peer;
use crate::agent::witness::testing::{Cluster, any_port, done, issue, record, version, vm};
use crate::protocol::{HostName, Refusal as PeerRefusal, Swapped};

/// Only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(20);

fn reports(cluster: &Cluster) -> Arc<Reports> {
    let verifier = Verifier::new(&cluster.witness.authority).expect("a verifier");
    Arc::new(Reports::new(verifier))
}

/// Waits until a line of the journal is like this.
async fn until_told(journal: &Journal, like: impl Fn(&Incident) -> bool) {
    let mut written = journal.written();
    let looking = async {
        loop {
            written.mark_unchanged();
            let lines = journal.read(0, 1_000).await.expect("lines");
            let told = |what: &What| matches!(what, What::Incident(incident) if like(incident));
            if lines.iter().any(|line| told(&line.what)) {
                return;
            }
            written.changed().await.expect("the journal lives");
        }
    };
    timeout(PATIENCE, looking).await.expect("it is told");
}

#[tokio::test]
async fn a_witness_that_has_less_is_told_of_until_it_has_been_given_back() {
    let cluster = Cluster::new();
    let folder = tempfile::tempdir().expect("a folder");
    let host = HostName::new("a").expect("a name");
    let journal = Arc::new(Journal::open(folder.path(), host).expect("a journal"));
    let reports = reports(&cluster);
    let newest = cluster.sign(&vm(), record(3, 7, "a", &["b"]));
    reports.saw(&vm(), &newest);
    let (endpoint, task) = cluster.start(any_port());
    let address = endpoint.local_address().expect("bound");
    let a = cluster.client(Role::Host, "a", &endpoint);
    let first = record(1, 1, "a", &["b"]);
    assert!(done(&a.swap(&vm(), None, first, None).await).is_some());
    let reporting = tokio::spawn(report(
        Arc::clone(&reports),
        a.clone(),
        Arc::clone(&journal),
    ));

    until_told(&journal, |incident| {
        matches!(incident, Incident::RecordSetBack { why } if why.contains("witness recover"))
    })
    .await;
    let health = reports.health();
    assert!(health.reachable && health.troubles().is_empty());
    assert_eq!(health.set_back[&vm()].seen, newest.seen());
    let ann = cluster.client(Role::Operator, "ann", &endpoint);
    let given = BTreeMap::from([(vm(), newest.clone())]);
    ann.restore(given, false).await.expect("restored");
    until_told(&journal, |incident| *incident == Incident::RecordRecovered).await;

    // It goes away, and comes back with what it has.
    endpoint.close().await;
    task.abort();
    drop(endpoint);
    until_told(&journal, |incident| {
        matches!(incident, Incident::WitnessAway { .. })
    })
    .await;
    assert!(reports.health().troubles()[0].contains("no failover"));
    // The old socket goes when its last task has ended.
    let freed = async {
        while std::net::UdpSocket::bind(address).is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, freed).await.expect("the address is free");
    let keeper = cluster.keeper();
    let (_endpoint, _task) = cluster.start_with(keeper, address, Duration::ZERO);
    until_told(&journal, |incident| {
        matches!(incident, Incident::WitnessBack { .. })
    })
    .await;
    assert!(reports.health().set_back.is_empty());
    let next = record(3, 8, "a", &[]);
    let seen = Some(newest.seen());
    let swapped = a.swap(&vm(), version(3, 7), next.clone(), seen).await;
    assert_eq!(done(&swapped), Some(&next));
    reporting.abort();
}

#[tokio::test]
async fn a_host_relays_what_it_has_seen_and_keeps_nothing() {
    let cluster = Cluster::new();
    let reports = reports(&cluster);
    let credentials = issue(&cluster.authority, Role::Host, "b");
    let endpoint = Endpoint::bind(&credentials, any_port()).expect("an endpoint");
    let (serving, relayed) = (endpoint.clone(), Arc::clone(&reports));
    let task = tokio::spawn(async move { relay(&serving, relayed).await });
    let gateway = issue(&cluster.authority, Role::Gateway, "g");
    let us = Endpoint::client(&gateway).expect("an endpoint");
    let host = Peer {
        identity: credentials.identity.clone(),
        address: endpoint.local_address().expect("bound").into(),
    };
    let client = WitnessClient::new(&us, host);
    let mut following = client.follow(vm());
    assert_eq!(client.list().await.expect("an answer"), BTreeMap::new());
    let newest = cluster.sign(&vm(), record(3, 7, "a", &["b"]));
    let older = cluster.sign(&vm(), record(3, 6, "a", &["b"]));
    reports.saw(&vm(), &newest);
    reports.saw(&vm(), &older);
    let heard = async {
        while following.latest().is_none() {
            following.changed().await;
        }
        following.latest()
    };
    let heard = timeout(PATIENCE, heard).await.expect("told");
    assert_eq!(heard.as_ref(), Some(&newest));
    let read = client.read(&vm(), None).await.expect("an answer");
    assert_eq!(read.as_ref(), Some(&newest));
    let swapped = client.swap(&vm(), None, record(1, 1, "b", &[]), None).await;
    assert!(matches!(swapped, Swapped::Unknown { reason } if reason.contains("ask the witness")));
    reports.forget(&vm());
    assert_eq!(client.list().await.expect("an answer"), BTreeMap::new());
    task.abort();
}

#[test]
fn what_no_witness_has_signed_is_taken_out_of_messages() {
    let cluster = Cluster::new();
    let reports = reports(&cluster);
    let good = cluster.sign(&vm(), record(3, 7, "a", &["b"]));
    let mut forged = good.clone();
    forged.record.term = Term(u64::MAX);
    let refused = |record: &Committed| Message::Refused {
        term: Term(3),
        why: PeerRefusal::RecordMovedOn,
        promise: None,
        record: Some(record.clone()),
    };
    for message in [Message::Record(good.clone()), refused(&good)] {
        assert_eq!(reports.sift(&vm(), message.clone()), (Some(message), None));
    }
    let (left, error) = reports.sift(&vm(), Message::Record(forged.clone()));
    assert_eq!((left, error), (None, Some(ProofError::Forged)));
    let (left, error) = reports.sift(&vm(), refused(&forged));
    assert!(matches!(left, Some(Message::Refused { record: None, .. })));
    assert_eq!(error, Some(ProofError::Forged));
}
