//! How hosts, gateways and operators ask the witness.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use super::keeper::{KeeperHealth, Kept, Restored, SetBack, Swap};
use super::patience::Patience;
use super::{Answer, COPIED, Question, Refusal};
use crate::agent::link::{Channel, Endpoint, Peer, RequestError, StreamKind, lock};
use crate::protocol::{Committed, Record, Seen, Swapped, Version, VmName};

/// Between two attempts of a watch.
const WATCH_PAUSE: Duration = Duration::from_millis(100);
/// So much is given back in one request.
const RESTORE_AT_ONCE: usize = 256;

/// Asks one witness. Cheap to clone; clones share a connection.
#[derive(Clone)]
pub struct WitnessClient {
    channel: Channel,
    patience: Arc<Mutex<Patience>>,
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
    /// It has less than a host has seen.
    #[error("{0}")]
    SetBack(SetBack),
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

/// What the witness answers to a report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reported {
    /// Of these VMs it has less than was reported.
    pub set_back: BTreeMap<VmName, SetBack>,
    /// How it does.
    pub health: KeeperHealth,
}

impl WitnessClient {
    /// Asks this witness by this endpoint. Nothing is dialled yet.
    pub fn new(endpoint: &Endpoint, witness: Peer) -> Self {
        Self::over(Channel::new(endpoint, witness))
    }

    /// Asks whoever is at the other end of this channel: the witness, or a host that relays what it
    /// has seen ([`super::reporter::relay`]).
    pub fn over(channel: Channel) -> Self {
        Self {
            channel,
            patience: Arc::default(),
        }
    }

    /// The record of a VM; `None` if the witness has never heard of it. `seen` is the newest state
    /// that the asker has seen, who judges by itself a witness that has less. One that has less than
    /// others have seen comes as an error.
    pub async fn read(
        &self,
        vm: &VmName,
        seen: Option<Seen>,
    ) -> Result<Option<Committed>, AskError> {
        let Kept {
            committed,
            set_back,
        } = self.kept_by(vm, seen).await?;
        let theirs = committed.as_ref().map(Committed::seen);
        let judged = seen.is_some_and(|seen| SetBack::judge(theirs, seen).is_some());
        match set_back {
            Some(set_back) if !judged => Err(AskError::SetBack(set_back)),
            _ => Ok(committed),
        }
    }

    /// What the witness has of a VM, believed or not.
    pub async fn kept(&self, vm: &VmName) -> Result<Kept, AskError> {
        self.kept_by(vm, None).await
    }

    async fn kept_by(&self, vm: &VmName, seen: Option<Seen>) -> Result<Kept, AskError> {
        let vm = vm.clone();
        match self.ask(&Question::Read { vm, seen }).await? {
            Answer::Kept(kept) => Ok(*kept),
            _ => Err(AskError::Confused),
        }
    }

    /// What the witness has of all VMs.
    pub async fn list_kept(&self) -> Result<BTreeMap<VmName, Kept>, AskError> {
        match self.ask(&Question::List).await? {
            Answer::All(kept) => Ok(kept),
            _ => Err(AskError::Confused),
        }
    }

    /// All records.
    pub async fn list(&self) -> Result<BTreeMap<VmName, Record>, AskError> {
        let kept = self.list_kept().await?;
        let known = kept
            .into_iter()
            .filter_map(|(vm, kept)| Some((vm, kept.committed?.record)));
        Ok(known.collect())
    }

    /// Compare and set, as the protocol wants the answer. A refusal cannot have changed anything,
    /// but it is no conflict either: it comes as unknown with the witness's reason, and whoever
    /// asked reads the record.
    pub async fn swap(
        &self,
        vm: &VmName,
        expect: Option<Version>,
        new: Record,
        seen: Option<Seen>,
    ) -> Swapped {
        let question = Question::Swap {
            vm: vm.clone(),
            expect,
            new: Box::new(new),
            seen,
        };
        let reason = match self.ask(&question).await {
            Ok(Answer::Swapped(swap)) => match *swap {
                Swap::Done(committed) => return Swapped::Done(committed),
                Swap::Conflict(committed) => return Swapped::Conflict(committed),
                Swap::SetBack(set_back) => set_back.to_string(),
                Swap::Copied => COPIED.to_owned(),
            },
            Ok(_) => AskError::Confused.to_string(),
            Err(error) => error.to_string(),
        };
        Swapped::Unknown { reason }
    }

    /// Says what this host has seen of its VMs.
    pub async fn report(&self, seen: BTreeMap<VmName, Committed>) -> Result<Reported, AskError> {
        match self.ask(&Question::Report { seen }).await? {
            Answer::Reported { set_back, health } => Ok(Reported { set_back, health }),
            _ => Err(AskError::Confused),
        }
    }

    /// Gives back what hosts have seen: the newest of each VM. With `forced` although something
    /// newer may have been seen.
    pub async fn restore(
        &self,
        newest: BTreeMap<VmName, Committed>,
        forced: bool,
    ) -> Result<BTreeMap<VmName, Restored>, AskError> {
        let mut restored = BTreeMap::new();
        let mut rest: Vec<_> = newest.into_iter().collect();
        loop {
            let later = rest.split_off(rest.len().min(RESTORE_AT_ONCE));
            let settle = later.is_empty();
            let newest = rest.into_iter().collect();
            let question = Question::Restore {
                newest,
                forced,
                settle,
            };
            match self.ask(&question).await? {
                Answer::Restored(outcomes) => restored.extend(outcomes),
                _ => return Err(AskError::Confused),
            }
            if settle {
                return Ok(restored);
            }
            rest = later;
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

    /// Resolves when the connection with the witness has ended, or cannot be made.
    pub async fn parted(&self) {
        if let Ok(connection) = self.channel.connection().await {
            connection.closed().await;
        }
    }

    /// Every question may be asked twice: a swap that is done already is answered so.
    async fn ask(&self, question: &Question) -> Result<Answer, AskError> {
        let answer = match self.ask_once(question).await {
            // The connection was to a process that is gone; the next one may be there.
            Err(RequestError::Refused { .. }) => self.ask_once(question).await?,
            other => other?,
        };
        match answer {
            Answer::Refused(refusal) => Err(AskError::Refused(refusal)),
            Answer::Failed { reason } => Err(AskError::Failed { reason }),
            answer => Ok(answer),
        }
    }

    async fn ask_once(&self, question: &Question) -> Result<Answer, RequestError> {
        let patience = lock(&self.patience).now();
        let asked = Instant::now();
        let answer = self
            .channel
            .request(StreamKind::Witness, question, patience)
            .await;
        match &answer {
            Ok(_) => lock(&self.patience).answered(asked.elapsed()),
            Err(RequestError::TimedOut { .. }) => lock(&self.patience).exhausted(),
            Err(_) => {}
        }
        answer
    }
}

async fn follow_once(
    channel: &Channel,
    vm: &VmName,
    sender: &watch::Sender<Option<Committed>>,
) -> Result<(), AskError> {
    let question = Question::Watch { vm: vm.clone() };
    let mut answers = channel.ask(StreamKind::Witness, &question).await?;
    while let Some(answer) = answers.next().await? {
        match answer {
            Answer::Kept(kept) => drop(sender.send_replace(kept.committed)),
            _ => return Err(AskError::Confused),
        }
    }
    Ok(())
}

/// A record that is kept up to date for as long as this lives.
pub struct Following {
    record: watch::Receiver<Option<Committed>>,
    task: AbortHandle,
}

impl Following {
    /// The latest that the witness has said.
    pub fn latest(&mut self) -> Option<Committed> {
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
