//! The witness: keeps the record of every VM, changes it by compare-and-set, and tells whoever
//! watches. It runs no guest.
//!
//! [`keeper`] is what keeps records (one process with files now, a consensus group later),
//! [`client`] is how hosts and gateways ask. This file is the server between the two: it decides
//! who may change what.

pub mod client;
pub mod keeper;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use replay_log::Term;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::certs::{Identity, Role};
use super::link::{BindError, Endpoint, Reply, StreamKind, serve_requests};
use crate::config::{Config, ConfigError};
use crate::protocol::{HostName, Record, Version, VmName};
use keeper::{FileKeeper, KeeperError, OpenError, RecordKeeper, Swap};

/// A question to the witness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Question {
    /// What is the record? One [`Answer::Record`].
    Read {
        /// Of which VM.
        vm: VmName,
    },
    /// Compare and set. One [`Answer::Swapped`] or [`Answer::Refused`].
    Swap {
        /// Of which VM.
        vm: VmName,
        /// What it must be now; `None` if the VM must be unknown.
        expect: Option<Version>,
        /// What it shall be.
        new: Record,
    },
    /// What is the record, now and after every change? [`Answer::Record`] again and again; changes
    /// that follow closely may be skipped, the last never is.
    Watch {
        /// Of which VM.
        vm: VmName,
    },
    /// Which VMs are there? One [`Answer::All`].
    List,
}

/// An answer of the witness.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The record; `None` if the VM is unknown.
    Record(Option<Record>),
    /// What came of a compare-and-set.
    Swapped(Swap),
    /// Every record.
    All(BTreeMap<VmName, Record>),
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
    /// The new record may not follow the old one.
    #[error("{reason}")]
    BadRecord {
        /// Why.
        reason: String,
    },
}

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
}

/// Runs a witness until `stop` resolves.
pub async fn run(config: &Config, stop: impl Future<Output = ()>) -> Result<(), RunError> {
    let keeper = FileKeeper::open(&config.data.join("records"))?;
    let endpoint = listen(config)?;
    tracing::info!(name = %config.name, listen = ?config.listen, "the witness keeps records");
    tokio::select! {
        () = serve(&endpoint, Arc::new(keeper)) => {}
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

/// Answers questions on this endpoint until it ends.
pub async fn serve<K: RecordKeeper>(endpoint: &Endpoint, keeper: Arc<K>) {
    let streams = endpoint.serve(StreamKind::Witness, 64);
    serve_requests(streams, move |from, question, reply| {
        answer(Arc::clone(&keeper), from, question, reply)
    })
    .await;
}

async fn answer<K: RecordKeeper>(
    keeper: Arc<K>,
    from: Identity,
    question: Question,
    mut reply: Reply,
) {
    let answer = match question {
        // Goes on for as long as a gateway lives: it must not take a place that requests need.
        Question::Watch { vm } => {
            tokio::spawn(async move { watch(&*keeper, &vm, reply).await });
            return;
        }
        Question::Read { vm } => keeper.read(&vm).await.map(Answer::Record),
        Question::List => keeper.list().await.map(Answer::All),
        Question::Swap { vm, expect, new } => swap(&*keeper, &from, vm, expect, new).await,
    };
    let answer = answer.unwrap_or_else(|error| {
        tracing::error!(%error, "a record is not kept");
        Answer::Failed {
            reason: error.to_string(),
        }
    });
    // Fails only when the asker is gone: it will read the record when it is back.
    let _ = reply.send(&answer).await;
}

async fn watch<K: RecordKeeper>(keeper: &K, vm: &VmName, mut reply: Reply) {
    let mut changes = keeper.watch(vm);
    loop {
        let record = changes.borrow_and_update().clone();
        if reply.send(&Answer::Record(record)).await.is_err() {
            return;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = reply.unwanted() => return,
        }
    }
}

async fn swap<K: RecordKeeper>(
    keeper: &K,
    from: &Identity,
    vm: VmName,
    expect: Option<Version>,
    new: Record,
) -> Result<Answer, KeeperError> {
    let current = keeper.read(&vm).await?;
    if current.as_ref() == Some(&new) {
        // It asks again because our answer was lost.
        return Ok(Answer::Swapped(Swap::Done(new)));
    }
    if current.as_ref().map(Record::version) != expect {
        return Ok(Answer::Swapped(Swap::Conflict(current)));
    }
    if let Err(refusal) = may_change(from, current.as_ref(), &new) {
        tracing::warn!(%from, %vm, %refusal, "refused to change a record");
        return Ok(Answer::Refused(refusal));
    }
    // The keeper compares again: the record may have changed meanwhile.
    keeper.swap(vm, expect, new).await.map(Answer::Swapped)
}

/// Whether this asker may put `new` in the place of `current`.
fn may_change(from: &Identity, current: Option<&Record>, new: &Record) -> Result<(), Refusal> {
    let bad = |error: crate::protocol::RecordError| Refusal::BadRecord {
        reason: error.to_string(),
    };
    new.may_follow(current).map_err(bad)?;
    match from.role {
        Role::Operator if current.is_none() => return Ok(()),
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
