//! Executes disk requests on a thread of its own.
//!
//! ```text
//!   submit ──▶ queue (bounded in bytes) ──▶ batch: reads and writes in order ──▶ notify
//!                                             └─ flushes, one sync per disk ───▶ notify
//! ```
//!
//! A flush covers every write that was submitted before it. The worker lets it cover the rest of
//! the batch as well, so that flushes that pile up while the disk is busy share one sync.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use replay_log::RequestNumber;
use thiserror::Error;

use super::{Durability, Overlay, OverlayError, Storage};
use crate::host::DiskData;
use crate::tape::{DiskOp, DiskRequest};

/// Submitted requests may hold this many bytes before whoever submits has to wait.
const QUEUE_BYTES: usize = 8 << 20;
/// What a request counts for besides its data.
const REQUEST_BYTES: usize = 4096;

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

/// The worker's thread has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the disk worker has stopped: the host cannot go on")]
pub struct WorkerGone;

enum Task {
    Request(DiskRequest),
    SetDurability(Durability),
}

impl Task {
    const fn bytes(&self) -> usize {
        match self {
            Self::Request(DiskRequest {
                op: DiskOp::Write { data, .. },
                ..
            }) => REQUEST_BYTES + data.len(),
            _ => REQUEST_BYTES,
        }
    }
}

#[derive(Default)]
struct Queue {
    tasks: VecDeque<Task>,
    /// What the tasks count for, those that the worker executes now included.
    bytes: usize,
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
}

/// Does the disk I/O of one machine. Dropping it finishes what was submitted.
pub struct DiskWorker<F: Storage = File> {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Vec<Overlay<F>>>>,
}

impl<F: Storage + 'static> DiskWorker<F> {
    /// Starts the thread; `notify` is called on it with every finished request.
    pub fn new(
        disks: Vec<Overlay<F>>,
        notify: Box<dyn Fn(DiskCompletion) + Send>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("disks".into())
            .spawn(move || work(&theirs, disks, &*notify))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Submits a request. Waits while the queue is full.
    pub fn submit(&self, request: DiskRequest) -> Result<(), WorkerGone> {
        self.push(Task::Request(request))
    }

    /// What flushes submitted after this mean. The first of them covers everything written before.
    pub fn set_durability(&self, durability: Durability) -> Result<(), WorkerGone> {
        self.push(Task::SetDurability(durability))
    }

    fn push(&self, task: Task) -> Result<(), WorkerGone> {
        let bytes = task.bytes();
        let mut queue = self.shared.lock();
        // A task that is larger than the whole queue goes in alone.
        while !queue.gone && queue.bytes > 0 && queue.bytes + bytes > QUEUE_BYTES {
            queue = self.shared.wait(queue);
        }
        if queue.gone {
            return Err(WorkerGone);
        }
        queue.bytes += bytes;
        queue.tasks.push_back(task);
        self.shared.changed.notify_all();
        Ok(())
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

fn work<F: Storage>(
    shared: &Shared,
    mut disks: Vec<Overlay<F>>,
    notify: &dyn Fn(DiskCompletion),
) -> Vec<Overlay<F>> {
    let _farewell = Farewell(shared);
    loop {
        let mut queue = shared.lock();
        while queue.tasks.is_empty() {
            if queue.closed {
                return disks;
            }
            queue = shared.wait(queue);
        }
        let batch = std::mem::take(&mut queue.tasks);
        drop(queue);
        let bytes: usize = batch.iter().map(Task::bytes).sum();
        execute(&mut disks, batch, notify);
        shared.lock().bytes -= bytes;
        shared.changed.notify_all();
    }
}

fn execute<F: Storage>(
    disks: &mut [Overlay<F>],
    batch: VecDeque<Task>,
    notify: &dyn Fn(DiskCompletion),
) {
    let mut flushes: Vec<(RequestNumber, u8)> = Vec::new();
    for task in batch {
        let DiskRequest { number, disk, op } = match task {
            Task::Request(request) => request,
            Task::SetDurability(durability) => {
                // Flushes that were submitted before keep their meaning.
                flush(disks, &mut flushes, notify);
                for disk in disks.iter_mut() {
                    disk.set_durability(durability);
                }
                continue;
            }
        };
        let Some(overlay) = disks.get_mut(usize::from(disk)) else {
            let result = Err(DiskError::NoSuchDisk { number, disk });
            notify(DiskCompletion { number, result });
            continue;
        };
        let result = match op {
            DiskOp::Read { offset, len } => overlay.read(offset, len).map(DiskData::Read),
            DiskOp::Write { offset, data } => {
                overlay.write(offset, &data).map(|()| DiskData::Written)
            }
            DiskOp::Flush => {
                flushes.push((number, disk));
                continue;
            }
        };
        let result = result.map_err(|source| DiskError::Overlay {
            number,
            disk,
            source: Arc::new(source),
        });
        notify(DiskCompletion { number, result });
    }
    flush(disks, &mut flushes, notify);
}

/// Syncs each disk that has flushes waiting, once, and finishes them.
fn flush<F: Storage>(
    disks: &mut [Overlay<F>],
    flushes: &mut Vec<(RequestNumber, u8)>,
    notify: &dyn Fn(DiskCompletion),
) {
    for (disk, overlay) in (0..=u8::MAX).zip(disks) {
        if !flushes.iter().any(|(_, wanted)| *wanted == disk) {
            continue;
        }
        let flushed = overlay.flush().map_err(Arc::new);
        for (number, _) in flushes.extract_if(.., |(_, wanted)| *wanted == disk) {
            let result = match &flushed {
                Ok(()) => Ok(DiskData::Flushed),
                Err(source) => Err(DiskError::Overlay {
                    number,
                    disk,
                    source: Arc::clone(source),
                }),
            };
            notify(DiskCompletion { number, result });
        }
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
