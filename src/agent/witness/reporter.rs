//! What a host has seen of its VMs' records: told to the witness every few seconds, so that a
//! witness that was set back is known before it matters; and relayed to gateways and operators, who
//! may be cut off from the witness. Records carry the witness's signature: nobody has to trust us.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::client::{AskError, Reported, WitnessClient};
use super::keeper::{KeeperHealth, Kept, SetBack};
use super::{Answer, COPIED, Question, Refusal};
use crate::agent::certs::proof::{ProofError, Verifier};
use crate::agent::clock;
use crate::agent::journal::{Incident, Journal};
use crate::agent::link::{Endpoint, Reply, StreamKind, lock, serve_requests};
use crate::protocol::{Committed, Message, Time, VmName};

/// How often the witness is told.
const EVERY: Duration = Duration::from_secs(2);
/// A disk that takes longer to read VMs from is not waited for.
const OPENED_WITHIN: Duration = Duration::from_secs(5);
/// How often it is tried when it does not answer.
const TRY_AGAIN: Duration = Duration::from_millis(250);
/// A witness that is away for less is not worth a line of the journal.
const AWAY: crate::protocol::Span = crate::protocol::Span::from_millis(1_000);
/// So much is told in one request.
const AT_ONCE: usize = 256;
/// VMs without a record that are watched here; more are not.
const WATCHED_MAX: usize = 1_024;

/// How the witness does, seen from one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessHealth {
    /// Whether it answers.
    pub reachable: bool,
    /// Since when that is so, on the host's clock.
    pub since: Time,
    /// Why it does not, in words.
    pub unreachable: Option<String>,
    /// What it last said of itself.
    pub keeper: KeeperHealth,
    /// The VMs of this host of which it has less than this or another host has seen.
    pub set_back: BTreeMap<VmName, SetBack>,
}

impl WitnessHealth {
    fn unknown(now: Time) -> Self {
        Self {
            reachable: false,
            since: now,
            unreachable: None,
            keeper: KeeperHealth::default(),
            set_back: BTreeMap::new(),
        }
    }

    /// What is wrong with the witness as a whole, each with what ends it.
    pub fn troubles(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        if !self.reachable {
            let why = self
                .unreachable
                .as_deref()
                .unwrap_or("it was not asked yet");
            troubles.push(format!(
                "the witness does not answer ({why}): no failover and no change of copies until \
                 'understudy witness' runs and is reached"
            ));
        }
        if let Some(why) = &self.keeper.refuses_writes {
            troubles.push(format!("the witness refuses writes: {why}"));
        }
        if self.keeper.copied {
            troubles.push(COPIED.to_owned());
        }
        troubles
    }
}

/// What this host has seen, and what the witness says to it.
pub struct Reports {
    verifier: Verifier,
    seen: Mutex<BTreeMap<VmName, watch::Sender<Option<Committed>>>>,
    health: Mutex<WitnessHealth>,
    /// How many VMs are being read from the disk: what was seen of them is not known yet.
    opening: watch::Sender<usize>,
}

/// While this lives, a VM is being read from the disk.
pub struct Opening(Arc<Reports>);

impl Drop for Opening {
    fn drop(&mut self) {
        self.0.opening.send_modify(|opening| *opening -= 1);
    }
}

impl Reports {
    /// Nothing is seen yet.
    pub fn new(verifier: Verifier) -> Self {
        Self {
            verifier,
            seen: Mutex::default(),
            health: Mutex::new(WitnessHealth::unknown(clock::now())),
            opening: watch::Sender::default(),
        }
    }

    /// A VM is about to be read from the disk.
    pub fn opening(self: &Arc<Self>) -> Opening {
        self.opening.send_modify(|opening| *opening += 1);
        Opening(Arc::clone(self))
    }

    /// Takes out of another host's message what no witness has signed: what is left, and what was
    /// wrong.
    pub fn sift(&self, vm: &VmName, message: Message) -> (Option<Message>, Option<ProofError>) {
        let relayed = match &message {
            Message::Record(committed) => Some(committed),
            Message::Refused { record, .. } => record.as_ref(),
            _ => None,
        };
        let verified = relayed.map_or(Ok(()), |relayed| self.verifier.verify(vm, relayed));
        match (verified, message) {
            (Ok(()), message) => (Some(message), None),
            (
                Err(error),
                Message::Refused {
                    term, why, promise, ..
                },
            ) => {
                let stripped = Message::Refused {
                    term,
                    why,
                    promise,
                    record: None,
                };
                (Some(stripped), Some(error))
            }
            (Err(error), _) => (None, Some(error)),
        }
    }

    /// This host has seen this record of a VM.
    pub fn saw(&self, vm: &VmName, committed: &Committed) {
        let mut seen = lock(&self.seen);
        let slot = seen.entry(vm.clone()).or_default();
        slot.send_if_modified(|known| {
            let older = known.as_ref().is_some_and(|known| {
                known.record.lineage == committed.record.lineage
                    && known.record.version() >= committed.record.version()
            });
            if !older {
                *known = Some(committed.clone());
            }
            !older
        });
    }

    /// This host has nothing of this VM any more.
    pub fn forget(&self, vm: &VmName) {
        if let Some(slot) = lock(&self.seen).get(vm) {
            slot.send_replace(None);
        }
    }

    /// Everything that was seen.
    fn all(&self) -> BTreeMap<VmName, Committed> {
        let seen = lock(&self.seen);
        let known = seen
            .iter()
            .filter_map(|(vm, slot)| Some((vm.clone(), slot.borrow().clone()?)));
        known.collect()
    }

    fn watch(&self, vm: &VmName) -> watch::Receiver<Option<Committed>> {
        let mut seen = lock(&self.seen);
        if let Some(slot) = seen.get(vm) {
            return slot.subscribe();
        }
        seen.retain(|_, slot| slot.borrow().is_some() || slot.receiver_count() > 0);
        if seen.len() < WATCHED_MAX {
            return seen.entry(vm.clone()).or_default().subscribe();
        }
        watch::Sender::new(None).subscribe()
    }

    /// How the witness does.
    pub fn health(&self) -> WitnessHealth {
        lock(&self.health).clone()
    }
}

/// Tells the witness what was seen, again and again, and notes how it does.
pub async fn report(reports: Arc<Reports>, witness: WitnessClient, journal: Arc<Journal>) {
    let mut teller = Teller {
        reports,
        journal,
        away_told: false,
    };
    // The witness takes the first report for all that this host knows.
    let mut opening = teller.reports.opening.subscribe();
    let opened = opening.wait_for(|opening| *opening == 0);
    let _ = tokio::time::timeout(OPENED_WITHIN, opened).await;
    loop {
        let told = tell(&teller.reports, &witness).await;
        let well = told.is_ok();
        teller.note(told);
        if well {
            // A witness that starts anew is told at once: it may have been set back.
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = witness.parted() => {}
            }
        } else {
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }
}

async fn tell(reports: &Reports, witness: &WitnessClient) -> Result<Reported, AskError> {
    let mut whole = Reported::default();
    let mut rest: Vec<_> = reports.all().into_iter().collect();
    loop {
        let later = rest.split_off(rest.len().min(AT_ONCE));
        let reported = witness.report(rest.into_iter().collect()).await?;
        whole.set_back.extend(reported.set_back);
        whole.health = reported.health;
        if later.is_empty() {
            return Ok(whole);
        }
        rest = later;
    }
}

/// Writes down what changes.
struct Teller {
    reports: Arc<Reports>,
    journal: Arc<Journal>,
    /// That the witness is away is in the journal.
    away_told: bool,
}

impl Teller {
    fn note(&mut self, told: Result<Reported, AskError>) {
        let now = clock::now();
        let before = self.reports.health();
        let mut health = before.clone();
        match told {
            Ok(Reported {
                set_back,
                health: keeper,
            }) => {
                if !before.reachable {
                    health.since = now;
                }
                health.reachable = true;
                health.unreachable = None;
                health.keeper = keeper;
                health.set_back = set_back;
                if std::mem::take(&mut self.away_told) {
                    let after = now.since(before.since);
                    self.journal.write(None, Incident::WitnessBack { after });
                }
            }
            Err(error) => {
                let reason = error.to_string();
                if before.reachable {
                    health.since = now;
                }
                health.reachable = false;
                health.unreachable = Some(reason.clone());
                if now.since(health.since) >= AWAY && !self.away_told {
                    self.away_told = true;
                    self.journal.write(None, Incident::WitnessAway { reason });
                }
            }
        }
        self.compare(&before, &health);
        *lock(&self.reports.health) = health;
    }

    fn compare(&self, before: &WitnessHealth, now: &WitnessHealth) {
        let unwell = |health: &KeeperHealth| {
            let copied = health.copied.then(|| COPIED.to_owned());
            let writes = health.refuses_writes.as_ref();
            copied.or_else(|| writes.map(|why| format!("the witness refuses writes: {why}")))
        };
        match (unwell(&before.keeper), unwell(&now.keeper)) {
            (old, Some(why)) if old.as_ref() != Some(&why) => {
                self.journal.write(None, Incident::WitnessUnwell { why });
            }
            (Some(_), None) => self.journal.write(None, Incident::WitnessWell),
            _ => {}
        }
        for (vm, fact) in &now.set_back {
            if before.set_back.get(vm) != Some(fact) {
                let why = fact.to_string();
                self.journal
                    .write(Some(vm), Incident::RecordSetBack { why });
            }
        }
        for vm in before.set_back.keys() {
            if !now.set_back.contains_key(vm) {
                self.journal.write(Some(vm), Incident::RecordRecovered);
            }
        }
    }
}

/// Answers on this endpoint, to whoever asks, what this host has seen: a [`Question::Watch`],
/// [`Question::Read`] or [`Question::List`] as the witness would answer it.
pub async fn relay(endpoint: &Endpoint, reports: Arc<Reports>) {
    let streams = endpoint.serve(StreamKind::Witness, 16);
    serve_requests(streams, move |_, question, reply| {
        answer(Arc::clone(&reports), question, reply)
    })
    .await;
}

fn kept(committed: Option<Committed>) -> Kept {
    Kept {
        committed,
        set_back: None,
    }
}

async fn answer(reports: Arc<Reports>, question: Question, mut reply: Reply) {
    let answer = match question {
        // Goes on for as long as a gateway lives: it must not take a place that requests need.
        Question::Watch { vm } => {
            let mut changes = reports.watch(&vm);
            tokio::spawn(async move {
                loop {
                    let now = changes.borrow_and_update().clone();
                    let answer = Answer::Kept(Box::new(kept(now)));
                    if reply.send(&answer).await.is_err() {
                        return;
                    }
                    tokio::select! {
                        changed = changes.changed() => if changed.is_err() { return },
                        () = reply.unwanted() => return,
                    }
                }
            });
            return;
        }
        Question::Read { vm, .. } => Answer::Kept(Box::new(kept(reports.all().remove(&vm)))),
        Question::List => {
            let all = reports.all().into_iter();
            Answer::All(all.map(|(vm, seen)| (vm, kept(Some(seen)))).collect())
        }
        Question::Swap { .. } | Question::Report { .. } | Question::Restore { .. } => {
            Answer::Refused(Refusal::NotTheKeeper)
        }
    };
    // Fails only when the asker is gone.
    let _ = reply.send(&answer).await;
}

#[cfg(test)]
#[path = "reporter_tests.rs"]
mod tests;
