//! The keeper that has records in files, with a thread of its own: everything that is asked of it
//! while the disk works is decided and written together next time, with one sync.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::folder::{self, Folder, Opened};
use super::keeper::{
    Change, KeeperError, KeeperHealth, Kept, OpenError, RecordKeeper, Restored, SetBack, Swap,
    VMS_MAX, VMS_OF_A_HOST,
};
use super::store::{Entries, Entry, Store};
use crate::agent::certs::proof::{SignError, Signer};
use crate::agent::certs::{Identity, Role};
use crate::agent::link::lock;
use crate::protocol::{Record, Seen, VmName};

/// So many requests are decided and written together.
const AT_ONCE: usize = 1_024;
/// After a write that failed the disk is tried again this often.
const TRY_AGAIN: Duration = Duration::from_secs(2);

/// Keeps records in two files, with a thread that writes.
pub struct FileKeeper {
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

/// What readers see: never what is not on the disk.
struct Shared {
    kept: Mutex<BTreeMap<VmName, watch::Sender<Kept>>>,
    health: Mutex<KeeperHealth>,
    #[cfg(test)]
    disk: TestDisk,
}

/// What tests do to the disk, and see of it.
#[cfg(test)]
#[derive(Default)]
pub(super) struct TestDisk {
    /// The next write waits until the other end of this is dropped.
    pub(super) gate: Mutex<Option<Receiver<()>>>,
    /// How writes fail.
    pub(super) broken: Mutex<Option<super::store::Broken>>,
    /// How often something was written.
    pub(super) writes: std::sync::atomic::AtomicU64,
}

type Reply<T> = oneshot::Sender<Result<T, KeeperError>>;

enum Job {
    Swap(Box<Change>, Reply<Swap>),
    SetBack(VmName, Seen, Identity, Reply<()>),
    Restore {
        newest: BTreeMap<VmName, Record>,
        forced: bool,
        settle: bool,
        reply: Reply<BTreeMap<VmName, Restored>>,
    },
}

impl FileKeeper {
    /// Opens the records in a folder; makes the folder when it is not there. What it hands out is
    /// signed by `signer`.
    pub fn open(folder: &Path, signer: Signer) -> Result<Self, OpenError> {
        let Opened {
            folder,
            store,
            entries,
            copied,
        } = Folder::open(folder)?;
        let mut kept = BTreeMap::new();
        for (vm, entry) in &entries {
            kept.insert(vm.clone(), watch::Sender::new(sign(&signer, vm, entry)?));
        }
        let shared = Arc::new(Shared {
            kept: Mutex::new(kept),
            health: Mutex::new(KeeperHealth {
                refuses_writes: None,
                copied,
            }),
            #[cfg(test)]
            disk: TestDisk::default(),
        });
        let (jobs, received) = channel();
        let mut names = BTreeMap::new();
        for by in entries.values().filter_map(Entry::counts_for) {
            *names.entry(by).or_default() += 1;
        }
        let mut worker = Worker {
            folder,
            store,
            entries,
            names,
            copied,
            signer,
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new()
            .name("records".to_owned())
            .spawn(move || worker.work(&received))
            .map_err(OpenError::Thread)?;
        Ok(Self {
            shared,
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    #[cfg(test)]
    pub(super) fn disk(&self) -> &TestDisk {
        &self.shared.disk
    }

    async fn ask<T>(&self, job: impl FnOnce(Reply<T>) -> Job) -> Result<T, KeeperError> {
        let (reply, answer) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(KeeperError::Ended)?;
        jobs.send(job(reply)).map_err(|_| KeeperError::Ended)?;
        answer.await.unwrap_or(Err(KeeperError::Ended))
    }
}

impl Drop for FileKeeper {
    /// Waits until what was asked is written: the folder is free after it.
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // It has ended, in whatever way.
            let _ = thread.join();
        }
    }
}

fn seen_of(record: Option<&Record>) -> Option<Seen> {
    record.map(Record::seen)
}

/// What readers see of an entry.
fn sign(signer: &Signer, vm: &VmName, entry: &Entry) -> Result<Kept, SignError> {
    let record = entry.record.clone();
    let committed = record.map(|record| signer.sign(vm, record)).transpose()?;
    let kept = seen_of(entry.record.as_ref());
    let set_back = entry.set_back.map(|seen| SetBack { kept, seen });
    Ok(Kept {
        committed,
        set_back,
    })
}

struct Worker {
    folder: Folder,
    store: Store,
    /// What is on the disk.
    entries: Entries,
    /// How many names of those each asker has brought in.
    names: BTreeMap<Identity, usize>,
    copied: bool,
    signer: Signer,
    shared: Arc<Shared>,
}

/// Says what came of a request, if what was decided could be written.
type Replying = Box<dyn FnOnce(Option<&KeeperError>) + Send>;

/// What one batch of requests leads to.
#[derive(Default)]
struct Batch {
    /// What is to be written.
    changes: Entries,
    /// Who brings in the names among them that are new.
    new: Vec<Identity>,
    /// The same as readers will see it.
    signed: BTreeMap<VmName, Kept>,
    /// The folder is to be settled in.
    settle: bool,
    /// What is said once that is done, or was not.
    replies: Vec<Replying>,
}

impl Batch {
    fn reply<T: Send + 'static>(&mut self, reply: Reply<T>, answer: Result<T, KeeperError>) {
        self.replies.push(Box::new(move |failed| {
            let answer = failed.map_or(answer, |error| Err(error.clone()));
            // Without an asker nobody needs it.
            let _ = reply.send(answer);
        }));
    }
}

impl Worker {
    /// Works until nobody can ask any more.
    fn work(&mut self, jobs: &Receiver<Job>) {
        loop {
            let first = if self.store.is_doubtful() {
                match jobs.recv_timeout(TRY_AGAIN) {
                    Ok(job) => Some(job),
                    Err(RecvTimeoutError::Timeout) => None,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            } else {
                let Ok(job) = jobs.recv() else { return };
                Some(job)
            };
            let mut batch = Batch::default();
            let others = jobs.try_iter().take(AT_ONCE);
            for job in first.into_iter().chain(others) {
                self.decide(&mut batch, job);
            }
            self.carry_out(batch);
        }
    }

    fn entry(&self, batch: &Batch, vm: &VmName) -> Entry {
        let entry = batch.changes.get(vm).or_else(|| self.entries.get(vm));
        entry.cloned().unwrap_or_default()
    }

    /// What readers will see of a VM after this batch.
    fn kept(&self, batch: &Batch, vm: &VmName) -> Kept {
        if let Some(kept) = batch.signed.get(vm) {
            return kept.clone();
        }
        let kept = lock(&self.shared.kept);
        kept.get(vm)
            .map(|kept| kept.borrow().clone())
            .unwrap_or_default()
    }

    /// Whether a name is new.
    fn is_new(&self, batch: &Batch, vm: &VmName) -> bool {
        !batch.changes.contains_key(vm) && !self.entries.contains_key(vm)
    }

    /// Whether there is room for what this asker says of a VM.
    fn check_room(&self, batch: &Batch, vm: &VmName, by: &Identity) -> Result<(), KeeperError> {
        if !self.is_new(batch, vm) {
            return Ok(());
        }
        if self.entries.len() + batch.new.len() >= VMS_MAX {
            return Err(KeeperError::TooMany);
        }
        let before = self.names.get(by).copied().unwrap_or_default();
        let now = batch.new.iter().filter(|other| *other == by).count();
        // Operators decide what the cluster is for.
        if by.role == Role::Host && before + now >= VMS_OF_A_HOST {
            return Err(KeeperError::TooManyOfOne { by: by.clone() });
        }
        Ok(())
    }

    fn put(&self, batch: &mut Batch, vm: VmName, entry: Entry) -> Result<Kept, KeeperError> {
        let kept = sign(&self.signer, &vm, &entry)?;
        if self.is_new(batch, &vm) {
            batch.new.extend(entry.counts_for());
        }
        batch.signed.insert(vm.clone(), kept.clone());
        batch.changes.insert(vm, entry);
        Ok(kept)
    }

    fn decide(&self, batch: &mut Batch, job: Job) {
        match job {
            Job::Swap(change, reply) => {
                let answer = self.swap(batch, *change);
                batch.reply(reply, answer);
            }
            Job::SetBack(vm, seen, by, reply) => {
                let answer = self.set_back(batch, vm, seen, by);
                batch.reply(reply, answer);
            }
            Job::Restore {
                newest,
                forced,
                settle,
                reply,
            } => {
                batch.settle |= settle;
                let restore = |(vm, record): (VmName, Record)| {
                    let restored = self.restore(batch, &vm, record, forced)?;
                    Ok((vm, restored))
                };
                let answer = newest.into_iter().map(restore).collect();
                batch.reply(reply, answer);
            }
        }
    }

    fn swap(&self, batch: &mut Batch, change: Change) -> Result<Swap, KeeperError> {
        let Change {
            vm,
            expect,
            new,
            seen,
            by,
        } = change;
        let kept = self.kept(batch, &vm);
        if let Some(committed) = &kept.committed
            && committed.record == new
        {
            // It is asked again, because an answer was late or lost.
            return Ok(Swap::Done(committed.clone()));
        }
        if self.copied {
            return Ok(Swap::Copied);
        }
        let current = kept.committed.as_ref().map(|committed| &committed.record);
        let behind = seen.and_then(|seen| SetBack::judge(seen_of(current), seen));
        if let Some(set_back) = kept.set_back.or(behind) {
            return Ok(Swap::SetBack(set_back));
        }
        if current.map(Record::version) != expect {
            return Ok(Swap::Conflict(kept.committed));
        }
        self.check_room(batch, &vm, &by)?;
        let named_by = self.entry(batch, &vm).counts_for().or(Some(by));
        let entry = Entry {
            record: Some(new),
            set_back: None,
            named_by,
        };
        let kept = self.put(batch, vm, entry)?;
        Ok(kept.committed.map_or(Swap::Conflict(None), Swap::Done))
    }

    fn set_back(
        &self,
        batch: &mut Batch,
        vm: VmName,
        seen: Seen,
        by: Identity,
    ) -> Result<(), KeeperError> {
        let mut entry = self.entry(batch, &vm);
        let kept = seen_of(entry.record.as_ref());
        let newer = entry
            .set_back
            .is_none_or(|known| known.lineage == seen.lineage && known.version < seen.version);
        if SetBack::judge(kept, seen).is_none() || !newer {
            return Ok(());
        }
        self.check_room(batch, &vm, &by)?;
        tracing::error!(%vm, "{}", SetBack { kept, seen });
        entry.named_by = entry.counts_for().or(Some(by));
        entry.set_back = Some(seen);
        self.put(batch, vm, entry).map(drop)
    }

    fn restore(
        &self,
        batch: &mut Batch,
        vm: &VmName,
        newest: Record,
        forced: bool,
    ) -> Result<Restored, KeeperError> {
        let before = self.entry(batch, vm);
        let kept = seen_of(before.record.as_ref());
        if kept.is_some_and(|kept| kept.lineage != newest.lineage) {
            return Ok(Restored::OtherLineage);
        }
        let record = match before.record {
            Some(record) if record.version() >= newest.version() => record,
            _ => newest,
        };
        let too_old = before
            .set_back
            .and_then(|seen| SetBack::judge(Some(record.seen()), seen));
        if let Some(set_back) = too_old.filter(|_| !forced) {
            return Ok(Restored::TooOld(set_back));
        }
        let (old, new) = (kept.map(|kept| kept.version), record.version());
        let entry = Entry {
            record: Some(record),
            set_back: None,
            named_by: before.named_by,
        };
        if old != Some(new) || before.set_back.is_some() {
            self.put(batch, vm.clone(), entry)?;
        }
        Ok(if old == Some(new) {
            Restored::Kept(new)
        } else {
            Restored::Replaced(old, new)
        })
    }

    /// Writes what was decided, shows it to readers, and answers.
    fn carry_out(&mut self, batch: Batch) {
        let written = self.write(&batch);
        let failed = written.err().map(|error| KeeperError::Disk {
            reason: error.to_string(),
        });
        if let Some(error) = &failed {
            tracing::error!(%error, "records are not kept");
        } else {
            self.entries.extend(batch.changes);
            for by in batch.new {
                *self.names.entry(by).or_default() += 1;
            }
            let mut kept = lock(&self.shared.kept);
            for (vm, now) in batch.signed {
                let slot = kept.entry(vm).or_default();
                slot.send_replace(now);
            }
        }
        let health = KeeperHealth {
            refuses_writes: failed.as_ref().map(ToString::to_string),
            copied: self.copied,
        };
        *lock(&self.shared.health) = health;
        for reply in batch.replies {
            reply(failed.as_ref());
        }
    }

    fn write(&mut self, batch: &Batch) -> io::Result<()> {
        #[cfg(test)]
        {
            let disk = &self.shared.disk;
            let gate = lock(&disk.gate).take();
            if let Some(gate) = gate {
                // It ends with an error: nothing is sent.
                let _ = gate.recv();
            }
            self.store.broken = *lock(&disk.broken);
            disk.writes
                .fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        }
        let (kept, changes) = (&self.entries, &batch.changes);
        if batch.settle && self.copied {
            let id = folder::draw()?;
            self.store.rewrite_as(id, kept, changes)?;
            self.folder.settle(id)?;
            self.copied = false;
            return Ok(());
        }
        if !changes.is_empty() {
            self.store.append(kept, changes)
        } else if self.store.is_doubtful() {
            self.store.rewrite(kept, changes)
        } else {
            Ok(())
        }
    }
}

impl RecordKeeper for FileKeeper {
    async fn read(&self, vm: &VmName) -> Result<Kept, KeeperError> {
        let kept = lock(&self.shared.kept);
        Ok(kept
            .get(vm)
            .map(|kept| kept.borrow().clone())
            .unwrap_or_default())
    }

    async fn swap(&self, change: Change) -> Result<Swap, KeeperError> {
        self.ask(|reply| Job::Swap(Box::new(change), reply)).await
    }

    async fn set_back(&self, vm: VmName, seen: Seen, by: Identity) -> Result<(), KeeperError> {
        self.ask(|reply| Job::SetBack(vm, seen, by, reply)).await
    }

    async fn restore(
        &self,
        newest: BTreeMap<VmName, Record>,
        forced: bool,
        settle: bool,
    ) -> Result<BTreeMap<VmName, Restored>, KeeperError> {
        self.ask(|reply| Job::Restore {
            newest,
            forced,
            settle,
            reply,
        })
        .await
    }

    fn watch(&self, vm: &VmName) -> watch::Receiver<Kept> {
        let mut kept = lock(&self.shared.kept);
        if let Some(slot) = kept.get(vm) {
            return slot.subscribe();
        }
        // Slots of nothing that nobody watches any more make room for others.
        kept.retain(|_, slot| *slot.borrow() != Kept::default() || slot.receiver_count() > 0);
        if kept.len() < VMS_MAX {
            return kept.entry(vm.clone()).or_default().subscribe();
        }
        watch::Sender::new(Kept::default()).subscribe()
    }

    async fn list(&self) -> Result<BTreeMap<VmName, Kept>, KeeperError> {
        let kept = lock(&self.shared.kept);
        let known = kept
            .iter()
            .map(|(vm, kept)| (vm.clone(), kept.borrow().clone()))
            .filter(|(_, kept)| *kept != Kept::default());
        Ok(known.collect())
    }

    fn health(&self) -> KeeperHealth {
        lock(&self.shared.health).clone()
    }
}

#[cfg(test)]
#[path = "file_keeper_tests.rs"]
mod tests;
