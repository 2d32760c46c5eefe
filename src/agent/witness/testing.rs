//! What the tests of the witness have in common.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use replay_log::{LogIndex, Term};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::client::WitnessClient;
use super::file_keeper::FileKeeper;
use super::keeper::RecordKeeper;
use super::serve_from;
use crate::agent::certs::authority::Authority;
use crate::agent::certs::proof::{Signer, Verifier};
use crate::agent::certs::{Credentials, Identity, Name, Role};
use crate::agent::link::{Endpoint, Peer};
use crate::protocol::{
    Committed, Epoch, HostName, Incarnation, Lineage, Member, Policy, Record, Swapped, Version,
    VmName,
};

pub(super) fn vm() -> VmName {
    VmName::new("ledger").expect("a name")
}

pub(super) fn member(host: &str) -> Member {
    Member {
        host: HostName::new(host).expect("a name"),
        incarnation: Incarnation(1),
    }
}

pub(super) fn record(term: u64, epoch: u64, primary: &str, members: &[&str]) -> Record {
    Record {
        lineage: Lineage(1),
        term: Term(term),
        epoch: Epoch(epoch),
        primary: member(primary),
        members: members.iter().map(|host| member(host)).collect(),
        hosts: vec![],
        policy: Policy::default(),
        through: LogIndex::START,
        begins: LogIndex::START,
        follows: replay_log::Term(0),
        loss: false,
        failed: None,
    }
}

#[allow(clippy::unnecessary_wraps)] // What is expected is always an option.
pub(super) fn version(term: u64, epoch: u64) -> Option<Version> {
    Some(Version {
        term: Term(term),
        epoch: Epoch(epoch),
    })
}

pub(super) fn issue(authority: &Authority, role: Role, name: &str) -> Credentials {
    let name = name.parse::<Name>().expect("a name");
    authority
        .issue(&Identity { role, name })
        .expect("a certificate")
}

/// A signer of a cluster that nobody else belongs to.
pub(super) fn signer() -> Signer {
    let authority = Authority::generate().expect("an authority");
    Signer::new(&issue(&authority, Role::Witness, "w")).expect("a signer")
}

/// What a swap that was done has committed.
pub(super) fn done(swapped: &Swapped) -> Option<&Record> {
    match swapped {
        Swapped::Done(committed) => Some(&committed.record),
        _ => None,
    }
}

/// What a swap that was not done has found.
pub(super) fn conflict(swapped: &Swapped) -> Option<&Record> {
    match swapped {
        Swapped::Conflict(Some(committed)) => Some(&committed.record),
        _ => None,
    }
}

/// Why nobody knows what came of a swap.
pub(super) fn unknown(swapped: &Swapped) -> &str {
    match swapped {
        Swapped::Unknown { reason } => reason,
        _ => "it is known",
    }
}

pub(super) struct Cluster {
    pub(super) authority: Authority,
    pub(super) witness: Credentials,
    pub(super) folder: tempfile::TempDir,
}

impl Cluster {
    pub(super) fn new() -> Self {
        let authority = Authority::generate().expect("an authority");
        let witness = issue(&authority, Role::Witness, "w");
        Self {
            authority,
            witness,
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// Starts the witness; it ends when the task is aborted and the endpoint closed.
    pub(super) fn start(&self, at: SocketAddr) -> (Endpoint, JoinHandle<()>) {
        self.start_with(self.keeper(), at, Duration::ZERO)
    }

    pub(super) fn keeper(&self) -> FileKeeper {
        self.keeper_in(self.folder.path())
    }

    pub(super) fn keeper_in(&self, folder: &Path) -> FileKeeper {
        let signer = Signer::new(&self.witness).expect("a signer");
        FileKeeper::open(folder, signer).expect("records")
    }

    /// Signs a record as the witness does.
    pub(super) fn sign(&self, vm: &VmName, record: Record) -> Committed {
        let signer = Signer::new(&self.witness).expect("a signer");
        signer.sign(vm, record).expect("signed")
    }

    pub(super) fn start_with<K: RecordKeeper>(
        &self,
        keeper: K,
        at: SocketAddr,
        hear_first: Duration,
    ) -> (Endpoint, JoinHandle<()>) {
        self.start_shared(&Arc::new(keeper), at, hear_first)
    }

    /// The same for a keeper that the test has, too.
    pub(super) fn start_shared<K: RecordKeeper>(
        &self,
        keeper: &Arc<K>,
        at: SocketAddr,
        hear_first: Duration,
    ) -> (Endpoint, JoinHandle<()>) {
        let keeper = Arc::clone(keeper);
        let endpoint = Endpoint::bind(&self.witness, at).expect("an endpoint");
        let serving = endpoint.clone();
        let verifier = Verifier::new(&self.witness.authority).expect("a verifier");
        let from = Instant::now() + hear_first;
        let task = tokio::spawn(async move {
            serve_from(&serving, keeper, verifier, from).await;
        });
        (endpoint, task)
    }

    pub(super) fn client(&self, role: Role, name: &str, at: &Endpoint) -> WitnessClient {
        let us = Endpoint::client(&issue(&self.authority, role, name)).expect("an endpoint");
        let witness = Peer {
            identity: self.witness.identity.clone(),
            address: at.local_address().expect("bound").into(),
        };
        WitnessClient::new(&us, witness)
    }
}

pub(super) fn any_port() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}
