//! How hosts, gateways and operators ask the witness.

use std::collections::BTreeMap;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::keeper::Swap;
use super::{Answer, Question, Refusal};
use crate::agent::link::{Channel, Endpoint, Peer, RequestError, StreamKind};
use crate::protocol::{Committed, Proof, Record, Swapped, Version, VmName};

/// How long an answer may take before it is asked again or given up.
const PATIENCE: Duration = Duration::from_millis(800);
/// Between two attempts of a watch.
const WATCH_PAUSE: Duration = Duration::from_millis(100);

/// Asks one witness. Cheap to clone; clones share a connection.
#[derive(Clone)]
pub struct WitnessClient {
    channel: Channel,
}

/// Why the witness did not answer as it should.
#[derive(Clone, Debug, Error)]
pub enum AskError {
    /// It could not be asked, or did not answer.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// It said no.
    #[error(transparent)]
    Refused(Refusal),
    /// It failed.
    #[error("{reason}")]
    Failed {
        /// Its own words.
        reason: String,
    },
    /// It answered another question.
    #[error("the witness answered another question: use the same version of Understudy everywhere")]
    Confused,
}

impl WitnessClient {
    /// Asks this witness by this endpoint. Nothing is dialled yet.
    pub fn new(endpoint: &Endpoint, witness: Peer) -> Self {
        Self {
            channel: Channel::new(endpoint, witness),
        }
    }

    /// The record of a VM; `None` if the witness has never heard of it.
    pub async fn read(&self, vm: &VmName) -> Result<Option<Record>, AskError> {
        match self.ask(&Question::Read { vm: vm.clone() }).await? {
            Answer::Record(record) => Ok(record),
            _ => Err(AskError::Confused),
        }
    }

    /// All records.
    pub async fn list(&self) -> Result<BTreeMap<VmName, Record>, AskError> {
        match self.ask(&Question::List).await? {
            Answer::All(records) => Ok(records),
            _ => Err(AskError::Confused),
        }
    }

    /// Compare and set, as the protocol wants the answer. A refusal cannot have changed anything,
    /// but it is no conflict either: it comes as unknown with the witness's reason, and whoever
    /// asked reads the record.
    pub async fn swap(&self, vm: &VmName, expect: Option<Version>, new: Record) -> Swapped {
        let question = Question::Swap {
            vm: vm.clone(),
            expect,
            new,
        };
        let unknown = |reason: String| Swapped::Unknown { reason };
        match self.ask(&question).await {
            Ok(Answer::Swapped(Swap::Done(record))) => Swapped::Done(unproven(record)),
            Ok(Answer::Swapped(Swap::Conflict(record))) => Swapped::Conflict(record.map(unproven)),
            Ok(_) => unknown(AskError::Confused.to_string()),
            Err(error) => unknown(error.to_string()),
        }
    }

    /// The record of a VM, kept up to date: asked again whenever the witness was away. The first
    /// value is `None` until the witness has answered, as for a VM that it does not know.
    pub fn follow(&self, vm: VmName) -> Following {
        let (sender, record) = watch::channel(None);
        let channel = self.channel.clone();
        let task = tokio::spawn(async move {
            loop {
                if let Err(error) = follow_once(&channel, &vm, &sender).await {
                    tracing::debug!(%error, "the witness is away");
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        });
        Following {
            record,
            task: task.abort_handle(),
        }
    }

    /// Every question may be asked twice: a swap that is done already is answered so.
    async fn ask(&self, question: &Question) -> Result<Answer, AskError> {
        let ask = || {
            self.channel
                .request(StreamKind::Witness, question, PATIENCE)
        };
        let answer = match ask().await {
            // The connection was to a process that is gone; the next one may be there.
            Err(RequestError::Refused { .. }) => ask().await?,
            other => other?,
        };
        match answer {
            Answer::Refused(refusal) => Err(AskError::Refused(refusal)),
            Answer::Failed { reason } => Err(AskError::Failed { reason }),
            answer => Ok(answer),
        }
    }
}

/// A record from the witness itself.
pub fn unproven(record: Record) -> Committed {
    Committed {
        record,
        proof: Proof::default(),
    }
}

async fn follow_once(
    channel: &Channel,
    vm: &VmName,
    sender: &watch::Sender<Option<Record>>,
) -> Result<(), AskError> {
    let question = Question::Watch { vm: vm.clone() };
    let mut answers = channel.ask(StreamKind::Witness, &question).await?;
    while let Some(answer) = answers.next().await? {
        match answer {
            Answer::Record(record) => drop(sender.send_replace(record)),
            _ => return Err(AskError::Confused),
        }
    }
    Ok(())
}

/// A record that is kept up to date for as long as this lives.
pub struct Following {
    record: watch::Receiver<Option<Record>>,
    task: AbortHandle,
}

impl Following {
    /// The latest that the witness has said.
    pub fn latest(&mut self) -> Option<Record> {
        self.record.borrow_and_update().clone()
    }

    /// Resolves when the witness has said something since [`Following::latest`]. Cancel safe.
    pub async fn changed(&mut self) {
        if self.record.changed().await.is_err() {
            // The task ends only with us.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}
