//! The witness: keeps the record of every VM, changes it by compare-and-set, and tells whoever
//! watches. It runs no guest.
//!
//! [`keeper`] is what keeps records (one process with files now, a consensus group later),
//! [`client`] is how hosts and gateways ask, [`reporter`] how hosts tell what they have seen. This
//! file is the server between them: it decides who may change what.
//!
//! The witness does not trust its own memory. Hosts say what they have seen of every VM, with the
//! witness's own signature on it; where that is newer than what is kept, the disk was set back or
//! lost, and the record is not changed any more until an operator has let the hosts give back what
//! they know (`understudy witness recover`).

pub mod client;
pub mod file_keeper;
mod folder;
pub mod keeper;
mod patience;
pub mod recovery;
pub mod reporter;
mod store;

#[cfg(test)]
mod set_back_tests;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use replay_log::Term;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;
use tokio::time::Instant;

use super::certs::proof::{SignError, Signer, Verifier, VerifierError};
use super::certs::{Identity, Role};
use super::link::{BindError, Endpoint, Reply, StreamKind, serve_requests};
use crate::config::{Config, ConfigError};
use crate::protocol::{Committed, HostName, Record, Seen, Version, VmName};
use file_keeper::FileKeeper;
use keeper::{
    Change, KeeperError, KeeperHealth, Kept, OpenError, RecordKeeper, Restored, SetBack, Swap,
};

/// For so long after its start a witness waits for the hosts that a record names to say what they
/// have seen, before it changes the record: it may have been set back.
const HEAR_FIRST: Duration = Duration::from_secs(2);

/// A question to the witness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// What is the record? One [`Answer::Kept`].
    Read {
        /// Of which VM.
        vm: VmName,
        /// The newest state that the asker has seen.
        seen: Option<Seen>,
    },
    /// Compare and set. One [`Answer::Swapped`] or [`Answer::Refused`].
    Swap {
        /// Of which VM.
        vm: VmName,
        /// What it must be now; `None` if the VM must be unknown.
        expect: Option<Version>,
        /// What it shall be.
        new: Box<Record>,
        /// The newest state that the asker has seen.
        seen: Option<Seen>,
    },
    /// What is the record, now and after every change? [`Answer::Kept`] again and again; changes
    /// that follow closely may be skipped, the last never is.
    Watch {
        /// Of which VM.
        vm: VmName,
    },
    /// Which VMs are there? One [`Answer::All`].
    List,
    /// A host says what it has seen of its VMs. One [`Answer::Reported`].
    Report {
        /// The newest state of each.
        seen: BTreeMap<VmName, Committed>,
    },
    /// An operator gives back what hosts have seen. One [`Answer::Restored`].
    Restore {
        /// The newest of each VM.
        newest: BTreeMap<VmName, Committed>,
        /// Although something newer may have been seen.
        forced: bool,
        /// All that there is has been given back: the folder counts as the witness's own again.
        settle: bool,
    },
}

/// An answer of the witness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// What is kept of a VM.
    Kept(Box<Kept>),
    /// What came of a compare-and-set.
    Swapped(Box<Swap>),
    /// Everything that is kept.
    All(BTreeMap<VmName, Kept>),
    /// What the witness has less of than was reported, and how it does.
    Reported {
        /// Of these VMs it has less.
        set_back: BTreeMap<VmName, SetBack>,
        /// How it does.
        health: KeeperHealth,
    },
    /// What came of giving back.
    Restored(BTreeMap<VmName, Restored>),
    /// It is not done, and will not be when asked again.
    Refused(Refusal),
    /// The records cannot be kept: a disk failed. Nobody knows whether the change is durable.
    Failed {
        /// A sentence that says what failed.
        reason: String,
    },
}

/// Why the witness does not do what it is asked.
#[derive(Clone, Debug, Error, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Only hosts that the record names may change it.
    #[error("{asker} is no copy of this VM and may not change its record")]
    NotACopy {
        /// Who asked.
        asker: Identity,
    },
    /// A new primary must be the one who asks.
    #[error("{asker} asked for {primary} to reign; only a host itself can claim a term")]
    ForAnother {
        /// Who asked.
        asker: Identity,
        /// For whom.
        primary: HostName,
    },
    /// Some roles only look.
    #[error("a {role} may read records and not change them")]
    OnlyLooks {
        /// The role of who asked.
        role: Role,
    },
    /// Only hosts have seen anything.
    #[error("a {role} has seen no records: only hosts report")]
    OnlyHosts {
        /// The role of who asked.
        role: Role,
    },
    /// Only operators recover.
    #[error("a {role} may not give records back: use the operator's folder")]
    OnlyOperators {
        /// The role of who asked.
        role: Role,
    },
    /// A host relays what it has seen, and keeps nothing.
    #[error("a host keeps no records: ask the witness")]
    NotTheKeeper,
    /// The new record may not follow the old one.
    #[error("{reason}")]
    BadRecord {
        /// Why.
        reason: String,
    },
    /// One host has brought in as many names as it may.
    #[error("{reason}")]
    TooManyNames {
        /// How many, and what to do.
        reason: String,
    },
    /// What is said to be committed is not signed by a witness of this cluster.
    #[error("what is said to be the record of {vm} is not believed: {reason}")]
    BadProof {
        /// Of which VM.
        vm: VmName,
        /// Why.
        reason: String,
    },
}

/// What everybody is told while the witness's folder is not where it was made.
pub const COPIED: &str = "the witness's folder was copied or put back from a backup, so it changes \
                          no record: run 'understudy witness recover'";

/// Why a witness cannot run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The configuration is no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The address is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The records cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Records cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Proofs cannot be checked.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
}

/// Runs a witness until `stop` resolves.
pub async fn run(config: &Config, stop: impl Future<Output = ()>) -> Result<(), RunError> {
    let credentials = config.credentials()?;
    let signer = Signer::new(&credentials)?;
    let verifier = Verifier::new(&credentials.authority)?;
    let keeper = FileKeeper::open(&config.data.join("records"), signer)?;
    if keeper.health().copied {
        tracing::error!("{COPIED}");
    }
    let endpoint = listen(config)?;
    tracing::info!(name = %config.name, listen = ?config.listen, "the witness keeps records");
    tokio::select! {
        () = serve(&endpoint, Arc::new(keeper), verifier) => {}
        () = stop => {}
    }
    endpoint.close().await;
    Ok(())
}

fn listen(config: &Config) -> Result<Endpoint, RunError> {
    let credentials = config.credentials()?;
    let address = config.listen.ok_or(ConfigError::Missing {
        file: config.folder.join(crate::config::FILE_NAME),
        key: "listen",
        role: Role::Witness,
    })?;
    Ok(Endpoint::bind(&credentials, address)?)
}

/// Answers questions on this endpoint until it ends. Proofs are checked by `verifier`.
pub async fn serve<K: RecordKeeper>(endpoint: &Endpoint, keeper: Arc<K>, verifier: Verifier) {
    serve_from(endpoint, keeper, verifier, Instant::now() + HEAR_FIRST).await;
}

async fn serve_from<K: RecordKeeper>(
    endpoint: &Endpoint,
    keeper: Arc<K>,
    verifier: Verifier,
    trusts_itself_at: Instant,
) {
    let streams = endpoint.serve(StreamKind::Witness, 64);
    let server = Arc::new(Server {
        keeper,
        verifier,
        trusts_itself_at,
        reported: watch::Sender::default(),
    });
    serve_requests(streams, move |from, question, reply| {
        Arc::clone(&server).answer(from, question, reply)
    })
    .await;
}

struct Server<K> {
    keeper: Arc<K>,
    verifier: Verifier,
    /// Until then it changes no record before the hosts in it have reported.
    trusts_itself_at: Instant,
    /// The hosts that have said what they have seen.
    reported: watch::Sender<BTreeSet<HostName>>,
}

impl<K: RecordKeeper> Server<K> {
    async fn answer(self: Arc<Self>, from: Identity, question: Question, mut reply: Reply) {
        let answer = match question {
            // Goes on for as long as a gateway lives: it must not take a place that requests need.
            Question::Watch { vm } => {
                tokio::spawn(async move { self.watch(&vm, reply).await });
                return;
            }
            Question::Read { vm, seen } => self.read(&from, vm, seen).await,
            Question::List => self.keeper.list().await.map(Answer::All),
            Question::Swap {
                vm,
                expect,
                new,
                seen,
            } => {
                let change = Change {
                    vm,
                    expect,
                    new: *new,
                    seen,
                    by: from.clone(),
                };
                self.swap(&from, change).await
            }
            Question::Report { seen } => self.report(&from, seen).await,
            Question::Restore {
                newest,
                forced,
                settle,
            } => self.restore(&from, newest, forced, settle).await,
        };
        let answer = answer.unwrap_or_else(|error| match error {
            KeeperError::TooManyOfOne { .. } => {
                let reason = error.to_string();
                tracing::warn!("{reason}");
                Answer::Refused(Refusal::TooManyNames { reason })
            }
            error => {
                tracing::error!(%error, "a record is not kept");
                Answer::Failed {
                    reason: error.to_string(),
                }
            }
        });
        // Fails only when the asker is gone: it will read the record when it is back.
        let _ = reply.send(&answer).await;
    }

    async fn watch(&self, vm: &VmName, mut reply: Reply) {
        let mut changes = self.keeper.watch(vm);
        loop {
            let kept = changes.borrow_and_update().clone();
            if reply.send(&Answer::Kept(Box::new(kept))).await.is_err() {
                return;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = reply.unwanted() => return,
            }
        }
    }

    async fn read(
        &self,
        from: &Identity,
        vm: VmName,
        seen: Option<Seen>,
    ) -> Result<Answer, KeeperError> {
        let mut kept = self.keeper.read(&vm).await?;
        let behind = self.behind(from, &vm, &kept, seen).await;
        kept.set_back = kept.set_back.or(behind);
        Ok(Answer::Kept(Box::new(kept)))
    }

    /// Whether less is kept than this asker says it has seen. It is believed, and noted, where it is
    /// a host that can have seen it; what others have seen they prove in their reports.
    async fn behind(
        &self,
        from: &Identity,
        vm: &VmName,
        kept: &Kept,
        seen: Option<Seen>,
    ) -> Option<SetBack> {
        let record = kept.committed.as_ref().map(|committed| &committed.record);
        let behind = SetBack::judge(record.map(Record::seen), seen?)?;
        let host = HostName::from(&from.name);
        let credible = record.is_none_or(|record| record.concerns(&host));
        if from.role == Role::Host && credible {
            let noted = self.keeper.set_back(vm.clone(), behind.seen, from.clone());
            if let Err(error) = noted.await {
                tracing::error!(%vm, %error, "that the record was set back is not noted");
            }
        }
        Some(behind)
    }

    async fn swap(&self, from: &Identity, change: Change) -> Result<Answer, KeeperError> {
        let vm = change.vm.clone();
        let kept = self.keeper.read(&vm).await?;
        if let Some(committed) = kept.committed.as_ref()
            && committed.record == change.new
        {
            // It asks again because our answer was lost.
            let done = Swap::Done(committed.clone());
            return Ok(Answer::Swapped(Box::new(done)));
        }
        let behind = self.behind(from, &vm, &kept, change.seen).await;
        if let Some(set_back) = kept.set_back.or(behind) {
            return Ok(Answer::Swapped(Box::new(Swap::SetBack(set_back))));
        }
        self.hear_first(&kept, &change.new).await;
        let kept = self.keeper.read(&vm).await?;
        let current = kept.committed.as_ref().map(|committed| &committed.record);
        if current.map(Record::version) != change.expect {
            return Ok(Answer::Swapped(Box::new(Swap::Conflict(kept.committed))));
        }
        if let Err(refusal) = may_change(from, current, &change.new) {
            tracing::warn!(%from, %vm, %refusal, "refused to change a record");
            return Ok(Answer::Refused(refusal));
        }
        // The keeper compares again: the record may have changed meanwhile.
        let swap = self.keeper.swap(change).await?;
        Ok(Answer::Swapped(Box::new(swap)))
    }

    /// Waits, shortly after the start, until the hosts that a change is about have reported.
    async fn hear_first(&self, kept: &Kept, new: &Record) {
        if Instant::now() >= self.trusts_itself_at {
            return;
        }
        let named = |record: &Record| -> BTreeSet<HostName> {
            let copies = record.all_copies().map(|copy| copy.host.clone());
            copies.chain(record.hosts.iter().cloned()).collect()
        };
        let mut wanted = named(new);
        if let Some(committed) = &kept.committed {
            wanted.extend(named(&committed.record));
        }
        let mut reported = self.reported.subscribe();
        let all = reported.wait_for(|reported| reported.is_superset(&wanted));
        // Who has not reported by then is not there.
        let _ = tokio::time::timeout_at(self.trusts_itself_at, all).await;
    }

    async fn report(
        &self,
        from: &Identity,
        seen: BTreeMap<VmName, Committed>,
    ) -> Result<Answer, KeeperError> {
        if from.role != Role::Host {
            return Ok(Answer::Refused(Refusal::OnlyHosts { role: from.role }));
        }
        let mut set_back = BTreeMap::new();
        for (vm, committed) in seen {
            let kept = self.keeper.read(&vm).await?;
            let record = kept.committed.as_ref().map(|kept| kept.record.seen());
            let behind = SetBack::judge(record, committed.seen());
            if let Some(behind) = behind {
                if let Err(error) = self.verifier.verify(&vm, &committed) {
                    tracing::warn!(%from, %vm, %error, "reports a record that is not believed");
                    continue;
                }
                let noted = self.keeper.set_back(vm.clone(), behind.seen, from.clone());
                noted.await?;
            }
            if let Some(fact) = kept.set_back.or(behind) {
                set_back.insert(vm, fact);
            }
        }
        let host = HostName::from(&from.name);
        self.reported
            .send_if_modified(|reported| reported.insert(host));
        let health = self.keeper.health();
        Ok(Answer::Reported { set_back, health })
    }

    async fn restore(
        &self,
        from: &Identity,
        newest: BTreeMap<VmName, Committed>,
        forced: bool,
        settle: bool,
    ) -> Result<Answer, KeeperError> {
        if from.role != Role::Operator {
            let role = from.role;
            return Ok(Answer::Refused(Refusal::OnlyOperators { role }));
        }
        for (vm, committed) in &newest {
            if let Err(error) = self.verifier.verify(vm, committed) {
                return Ok(Answer::Refused(Refusal::BadProof {
                    vm: vm.clone(),
                    reason: error.to_string(),
                }));
            }
        }
        let records = newest
            .into_iter()
            .map(|(vm, committed)| (vm, committed.record))
            .collect();
        let restored = self.keeper.restore(records, forced, settle).await?;
        for (vm, outcome) in &restored {
            tracing::warn!(%from, %vm, ?outcome, "gives a record back");
        }
        Ok(Answer::Restored(restored))
    }
}

/// Whether this asker may put `new` in the place of `current`.
fn may_change(from: &Identity, current: Option<&Record>, new: &Record) -> Result<(), Refusal> {
    let bad = |error: crate::protocol::RecordError| Refusal::BadRecord {
        reason: error.to_string(),
    };
    new.may_follow(current).map_err(bad)?;
    match from.role {
        Role::Operator if current.is_none() => return Ok(()),
        // When all the hosts that the record names are gone, another may have what is left.
        Role::Operator
            if current.is_some_and(|old| new.hosts.iter().any(|h| *new == old.wanted_on(h))) =>
        {
            return Ok(());
        }
        Role::Host => {}
        role => return Err(Refusal::OnlyLooks { role }),
    }
    let asker = HostName::from(&from.name);
    // A host that shall have a copy may claim, too: by an operator's order to accept a loss. That it
    // claims in no other case is the protocol's business, as is what it holds.
    let unnamed = current.is_some_and(|record| !record.concerns(&asker));
    if unnamed {
        return Err(Refusal::NotACopy {
            asker: from.clone(),
        });
    }
    let reigned = current.map_or(Term(0), |record| record.term);
    let its_own = if new.term > reigned {
        new.primary.host == asker
    } else {
        current.is_some_and(|record| record.primary.host == asker)
    };
    if its_own {
        Ok(())
    } else {
        Err(Refusal::ForAnother {
            asker: from.clone(),
            primary: new.primary.host.clone(),
        })
    }
}
