//! Executes disk requests on a thread of its own.
//!
//! ```text
//!   submit ──▶ queue (bounded in bytes) ──▶ batch: reads and writes in order ──▶ notify
//!                                             └─ flushes, one sync per disk ───▶ notify
//! ```
//!
//! A flush covers every write that was submitted before it. The worker lets it cover the rest of
//! the batch as well, so that flushes that pile up while the disk is busy share one sync. What was
//! submitted together is told together: who writes and flushes waits for both.
//!
//! Who lets nothing out before it is durable need not wait for the disk to go on ([`Finish::Ahead`]).
//! Two things hold all the same. What is submitted after a flush has finished is written only when
//! that flush is durable, so that a power failure never leaves the later without the earlier. And one
//! flush at a time runs ahead: the next finishes when the one before it is durable, so that they
//! grow with the load as they do on a disk that is waited for.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use replay_log::RequestNumber;
use thiserror::Error;

use super::{Overlay, OverlayError, Storage};
use crate::host::DiskData;
use crate::tape::{DiskOp, DiskRequest};

/// Submitted requests may hold this many bytes before whoever submits has to wait.
const QUEUE_BYTES: usize = 8 << 20;
/// What a request counts for besides its data.
const REQUEST_BYTES: usize = 4096;

/// How long a flush that is done later may wait for its sync.
const LATER: Duration = Duration::from_millis(250);

/// So much may wait to be done later before the worker is woken for it.
const LATER_BYTES: usize = 1 << 20;

/// When writes and flushes are finished.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Finish {
    /// When they are done: a flush, when everything before it is durable.
    #[default]
    Done,
    /// A flush before it is done, which is told by [`DiskNews::Durable`]. For a primary: none of its
    /// outputs leaves before that, so nobody can tell the difference.
    Ahead,
    /// When they are submitted; what is before a flush becomes durable soon, or by
    /// [`DiskWorker::sync_at_once`]. For replicas: whoever was told that data is durable was told so
    /// by the primary, and nobody goes by a replica's disk before it has gone live.
    Later,
}

/// What the worker tells.
#[derive(Debug)]
pub enum DiskNews {
    /// These have finished, or failed.
    Finished(Vec<DiskCompletion>),
    /// What was written before this flush is durable ([`Finish::Ahead`] only).
    Durable(RequestNumber),
}

/// A finished request.
#[derive(Debug)]
pub struct DiskCompletion {
    /// Which request.
    pub number: RequestNumber,
    /// How it ended.
    pub result: Result<DiskData, DiskError>,
}

/// Why a request failed. Always a failure of the host, never told to the guest.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The machine has no such disk.
    #[error("disk request {} is for disk {disk}, which this host does not have", number.0)]
    NoSuchDisk {
        /// The request.
        number: RequestNumber,
        /// The disk it names.
        disk: u8,
    },
    /// A disk failed outside of any request.
    #[error("disk {disk} cannot be synced: {source}")]
    Sync {
        /// Which disk.
        disk: u8,
        /// What it says.
        source: Arc<OverlayError>,
    },
    /// The disk failed.
    #[error("disk {disk} failed request {}: {source}", number.0)]
    Overlay {
        /// The request.
        number: RequestNumber,
        /// Which disk.
        disk: u8,
        /// What it says.
        source: Arc<OverlayError>,
    },
}

/// Why the disks could not be made durable.
#[derive(Debug, Error)]
pub enum SyncError {
    /// Nobody is there to do it.
    #[error(transparent)]
    Gone(#[from] WorkerGone),
    /// A disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// The worker's thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the disk worker has stopped: the host cannot go on")]
pub struct WorkerGone;

enum Task {
    /// What was submitted together.
    Requests {
        requests: Vec<DiskRequest>,
        /// Its writes and flushes are finished for whoever submitted them.
        finished: bool,
    },
    /// Make everything durable now; from now on, requests finish like this.
    SyncAtOnce(Finish, mpsc::Sender<Result<(), DiskError>>),
}

impl Task {
    fn bytes(&self) -> usize {
        match self {
            Self::Requests { requests, .. } => requests.iter().map(weight).sum(),
            Self::SyncAtOnce(..) => REQUEST_BYTES,
        }
    }
}

const fn weight(request: &DiskRequest) -> usize {
    match &request.op {
        DiskOp::Write { data, .. } => REQUEST_BYTES + data.len(),
        DiskOp::Read { .. } | DiskOp::Flush => REQUEST_BYTES,
    }
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// What the tasks count for, those that the worker executes now included.
    bytes: usize,
    finish: Finish,
    /// The worker is at a batch.
    busy: bool,
    closed: bool,
    gone: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing is half done while the lock is held, so a panic elsewhere does no harm here.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed
            .wait(queue)
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'a>(&self, queue: MutexGuard<'a, Queue>, long: Duration) -> MutexGuard<'a, Queue> {
        let waited = self.changed.wait_timeout(queue, long);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Does the disk I/O of one machine. Dropping it finishes what was submitted.
pub struct DiskWorker<F: Storage = File> {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Vec<Overlay<F>>>>,
}

/// Called on the worker's thread.
pub type Notify = Box<dyn Fn(DiskNews) + Send>;

impl<F: Storage + 'static> DiskWorker<F> {
    /// Starts the thread.
    pub fn new(disks: Vec<Overlay<F>>, finish: Finish, notify: Notify) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        shared.lock().finish = finish;
        let executor = Executor {
            shared: Arc::clone(&shared),
            late: disks.iter().map(|_| Late::Nothing).collect(),
            disks,
            finish,
            sync_at: None,
            failed: false,
            notify,
        };
        let thread = thread::Builder::new()
            .name("disks".into())
            .spawn(move || executor.run())?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Submits requests that are made together, and gives those that are finished by that. Waits
    /// while the queue is full.
    pub fn submit(&self, requests: Vec<DiskRequest>) -> Result<Vec<DiskCompletion>, WorkerGone> {
        let bytes = requests.iter().map(weight).sum();
        let mut queue = self.room_for(bytes)?;
        let finished = match queue.finish {
            Finish::Done => false,
            Finish::Ahead => queue.tasks.is_empty() && !queue.busy,
            Finish::Later => true,
        };
        let done = if finished {
            requests.iter().filter_map(accepted).collect()
        } else {
            Vec::new()
        };
        // Nobody waits for what is done later: the worker is woken for a lot of it at once.
        let waits = queue.finish == Finish::Later
            && done.len() == requests.len()
            && queue.bytes < LATER_BYTES;
        queue.tasks.push_back(Task::Requests { requests, finished });
        // A worker that is woken while the queue is locked would only wait for it.
        drop(queue);
        if !waits {
            self.shared.changed.notify_all();
        }
        Ok(done)
    }

    /// The submitter has nothing to do: what was left for later may be done.
    pub fn nudge(&self) {
        let idle = {
            let queue = self.shared.lock();
            !queue.tasks.is_empty() && !queue.busy
        };
        if idle {
            self.shared.changed.notify_all();
        }
    }

    /// Makes everything durable that was submitted before; from now on, requests finish like this.
    /// Waits for it.
    pub fn sync_at_once(&self, then: Finish) -> Result<(), SyncError> {
        let (done, result) = mpsc::channel();
        let task = Task::SyncAtOnce(then, done);
        let mut queue = self.room_for(task.bytes())?;
        queue.tasks.push_back(task);
        drop(queue);
        self.shared.changed.notify_all();
        Ok(result.recv().map_err(|_| WorkerGone)??)
    }

    /// Waits until the queue has room for a task, and counts it.
    fn room_for(&self, bytes: usize) -> Result<MutexGuard<'_, Queue>, WorkerGone> {
        let mut queue = self.shared.lock();
        // A task that is larger than the whole queue goes in alone.
        while !queue.gone && queue.bytes > 0 && queue.bytes + bytes > QUEUE_BYTES {
            queue = self.shared.wait(queue);
        }
        if queue.gone {
            return Err(WorkerGone);
        }
        queue.bytes += bytes;
        Ok(queue)
    }

    /// Finishes what was submitted, stops the thread and gives the disks back.
    pub fn stop(mut self) -> Result<Vec<Overlay<F>>, WorkerGone> {
        self.join().unwrap_or(Err(WorkerGone))
    }
}

impl<F: Storage> DiskWorker<F> {
    fn join(&mut self) -> Option<Result<Vec<Overlay<F>>, WorkerGone>> {
        let thread = self.thread.take()?;
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        Some(thread.join().map_err(|_| WorkerGone))
    }
}

impl<F: Storage> Drop for DiskWorker<F> {
    fn drop(&mut self) {
        // A worker that panicked has said so on its own.
        let _ = self.join();
    }
}

/// Says that the thread is gone, however it went.
struct Farewell<'a>(&'a Shared);

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        self.0.lock().gone = true;
        self.0.changed.notify_all();
    }
}

/// What of a disk's flushes is still to be done.
enum Late {
    Nothing,
    Sync,
    /// It could not be done: nothing more is claimed.
    Failed(Arc<OverlayError>),
}

/// The thread's side.
struct Executor<F> {
    shared: Arc<Shared>,
    disks: Vec<Overlay<F>>,
    finish: Finish,
    /// For each disk.
    late: Vec<Late>,
    /// When the late syncs are due.
    sync_at: Option<Instant>,
    /// A request has failed: nothing is called durable any more, because what was finished ahead of
    /// it may rest on it.
    failed: bool,
    notify: Notify,
}

/// What of a batch is still to be done or told.
#[derive(Default)]
struct Unfinished {
    flushes: Vec<Flush>,
    /// Done, and submitted together with a flush.
    done: Vec<DiskCompletion>,
}

struct Flush {
    number: RequestNumber,
    disk: u8,
    /// Nobody waits for it.
    finished: bool,
}

impl<F: Storage> Executor<F> {
    fn run(mut self) -> Vec<Overlay<F>> {
        let shared = Arc::clone(&self.shared);
        let _farewell = Farewell(&shared);
        while let Some(batch) = self.next_batch() {
            let bytes: usize = batch.iter().map(Task::bytes).sum();
            self.execute(batch);
            if self.sync_at.is_some_and(|at| at <= Instant::now()) {
                self.sync_late();
            }
            let mut queue = shared.lock();
            queue.busy = false;
            queue.bytes -= bytes;
            drop(queue);
            shared.changed.notify_all();
        }
        self.sync_late();
        self.disks
    }

    /// Waits for something to do. `None`: nothing more will come.
    fn next_batch(&self) -> Option<VecDeque<Task>> {
        let mut queue = self.shared.lock();
        while queue.tasks.is_empty() {
            if queue.closed {
                return None;
            }
            queue = match self.sync_at {
                None => self.shared.wait(queue),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    self.shared.wait_for(queue, left)
                }
            };
        }
        queue.busy = true;
        Some(std::mem::take(&mut queue.tasks))
    }

    fn execute(&mut self, batch: VecDeque<Task>) {
        let mut unfinished = Unfinished::default();
        for task in batch {
            match task {
                Task::Requests { requests, finished } => {
                    self.perform(requests, finished, &mut unfinished);
                }
                Task::SyncAtOnce(then, done) => {
                    // Flushes that were submitted before keep their meaning.
                    self.flush(&mut unfinished);
                    self.finish = then;
                    self.shared.lock().finish = then;
                    // Whoever asked may have ended by now.
                    let _ = done.send(self.sync_all());
                }
            }
        }
        self.flush(&mut unfinished);
    }

    /// Reads and writes; flushes wait for the batch's end, and what came together with them.
    fn perform(&mut self, requests: Vec<DiskRequest>, finished: bool, unfinished: &mut Unfinished) {
        let mut done = Vec::new();
        let flushes_before = unfinished.flushes.len();
        for DiskRequest { number, disk, op } in requests {
            let Some(overlay) = self.disks.get_mut(usize::from(disk)) else {
                let result = Err(DiskError::NoSuchDisk { number, disk });
                done.push(DiskCompletion { number, result });
                continue;
            };
            let result = match op {
                DiskOp::Read { offset, len } => overlay.read(offset, len).map(DiskData::Read),
                DiskOp::Write { offset, data } => match overlay.write(offset, &data) {
                    Ok(()) if finished => continue,
                    written => written.map(|()| DiskData::Written),
                },
                DiskOp::Flush => {
                    unfinished.flushes.push(Flush {
                        number,
                        disk,
                        finished,
                    });
                    continue;
                }
            };
            let result = result.map_err(|source| failed(number, disk, Arc::new(source)));
            done.push(DiskCompletion { number, result });
        }
        let flushes = unfinished.flushes.len() > flushes_before;
        if flushes && !finished {
            unfinished.done.append(&mut done);
            return;
        }
        self.tell(done);
        if flushes && self.finish == Finish::Ahead {
            // What comes after it may have been submitted because of it.
            self.flush(unfinished);
        }
    }

    fn tell(&mut self, done: Vec<DiskCompletion>) {
        self.failed |= done.iter().any(|one| one.result.is_err());
        if !done.is_empty() {
            (self.notify)(DiskNews::Finished(done));
        }
    }

    /// Does the flushes that wait, by one sync of each disk, and tells what waits for them.
    fn flush(&mut self, unfinished: &mut Unfinished) {
        let mut done = std::mem::take(&mut unfinished.done);
        let flushes = std::mem::take(&mut unfinished.flushes);
        let Some(last) = flushes.last().map(|flush| flush.number) else {
            return self.tell(done);
        };
        if self.finish == Finish::Ahead {
            let waited_for = flushes.iter().filter(|flush| !flush.finished);
            done.extend(waited_for.map(|flush| DiskCompletion {
                number: flush.number,
                result: Ok(DiskData::Flushed),
            }));
            self.tell(std::mem::take(&mut done));
        }
        for disk in 0..self.disks.len() {
            let of_this = || {
                flushes
                    .iter()
                    .filter(|flush| usize::from(flush.disk) == disk)
            };
            if of_this().next().is_none() {
                continue;
            }
            let flushed = match self.finish {
                Finish::Done | Finish::Ahead => self.sync(disk),
                Finish::Later => self.put_off(disk),
            };
            done.extend(of_this().filter_map(|flush| {
                let told = flush.finished || self.finish == Finish::Ahead;
                let result = match &flushed {
                    Ok(()) if told => return None,
                    Ok(()) => Ok(DiskData::Flushed),
                    Err(source) => Err(failed(flush.number, flush.disk, Arc::clone(source))),
                };
                let number = flush.number;
                Some(DiskCompletion { number, result })
            }));
        }
        self.tell(done);
        if self.finish == Finish::Ahead && !self.failed {
            (self.notify)(DiskNews::Durable(last));
        }
    }

    fn sync(&mut self, disk: usize) -> Result<(), Arc<OverlayError>> {
        if let Late::Failed(why) = &self.late[disk] {
            return Err(Arc::clone(why));
        }
        let synced = self.disks[disk].flush().map_err(Arc::new);
        self.late[disk] = match &synced {
            Ok(()) => Late::Nothing,
            Err(why) => Late::Failed(Arc::clone(why)),
        };
        synced
    }

    fn put_off(&mut self, disk: usize) -> Result<(), Arc<OverlayError>> {
        if let Late::Failed(why) = &self.late[disk] {
            return Err(Arc::clone(why));
        }
        self.late[disk] = Late::Sync;
        self.sync_at.get_or_insert_with(|| Instant::now() + LATER);
        Ok(())
    }

    /// Does what was put off. A failure is told to the next flush.
    fn sync_late(&mut self) {
        self.sync_at = None;
        for disk in 0..self.disks.len() {
            if matches!(self.late[disk], Late::Sync) {
                // It is remembered.
                let _ = self.sync(disk);
            }
        }
    }

    fn sync_all(&mut self) -> Result<(), DiskError> {
        self.sync_at = None;
        for disk in 0..self.disks.len() {
            self.sync(disk).map_err(|source| DiskError::Sync {
                // A machine has at most a handful of disks.
                disk: u8::try_from(disk).unwrap_or(u8::MAX),
                source,
            })?;
        }
        Ok(())
    }
}

/// What a request that is finished by being submitted came to; a read never is.
fn accepted(request: &DiskRequest) -> Option<DiskCompletion> {
    let data = match request.op {
        DiskOp::Read { .. } => return None,
        DiskOp::Write { .. } => DiskData::Written,
        DiskOp::Flush => DiskData::Flushed,
    };
    let number = request.number;
    Some(DiskCompletion {
        number,
        result: Ok(data),
    })
}

const fn failed(number: RequestNumber, disk: u8, source: Arc<OverlayError>) -> DiskError {
    DiskError::Overlay {
        number,
        disk,
        source,
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
