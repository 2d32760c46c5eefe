//! What a simulated host's disk does with what is written: it is slow, hangs, is full, refuses, or
//! has lied.

use std::collections::VecDeque;

use replay_log::{Batch, LogIndex, LogTip, MemoryStore, Store};

use super::queue::{MILLI, Moment, SECOND};
use crate::protocol::Durable;

/// A disk that has not answered for so long is reported as one that takes nothing.
pub(super) const HUNG: Moment = 2 * SECOND;
/// Between two attempts at something that the disk did not take.
pub(super) const AGAIN: Moment = SECOND;
/// Between two looks at a disk that hangs.
pub(super) const LOOK: Moment = 50 * MILLI;

/// Everything a host keeps of the VM, as it was at some time.
#[derive(Debug)]
pub(super) struct Backup {
    pub(super) durable: Durable,
    pub(super) store: MemoryStore,
    pub(super) last_disk: Option<Vec<u8>>,
}

/// What is wrong with a host's disk. Everything counts upwards, and is broken while above zero.
#[derive(Debug, Default)]
pub(super) struct Drive {
    pub(super) slow: u32,
    pub(super) hung: u32,
    pub(super) full: u32,
    /// Small files cannot be written: too many open files, an error of the medium.
    pub(super) refuses: u32,
}

impl Drive {
    /// Whether everything written is taken at once.
    pub(super) fn is_well(&self) -> bool {
        self.slow == 0 && self.hung == 0 && self.full == 0 && self.refuses == 0
    }

    /// Every fault ends.
    pub(super) fn heal(&mut self) {
        *self = Self::default();
    }
}

/// What has become of one VM's log on a disk.
#[derive(Debug, Default)]
pub(super) struct Storage {
    /// What the disk had no room for, in order.
    pub(super) waiting: VecDeque<Batch>,
    /// Since when the node is told that the disk takes nothing.
    pub(super) told: Option<Moment>,
    /// How many bytes of what waits came before it knew: as much as was on its way, up to a window.
    pub(super) early: usize,
    /// Since when something waits for a disk that hangs.
    pub(super) since: Option<Moment>,
    /// Where the log ended that was synced, when the disk turned out to have lost some of it.
    pub(super) lied: Option<LogTip>,
    /// A primary has been told how much is left.
    pub(super) found_out: bool,
    pub(super) backup: Option<Backup>,
}

impl Storage {
    /// The process is another one: nothing of it waits any more.
    pub(super) fn begin(&mut self) {
        self.waiting.clear();
        self.told = None;
        self.early = 0;
        self.since = None;
    }
}

/// The batch that begins at a place, stored or waiting.
pub(super) fn batch_at(
    store: &MemoryStore,
    waiting: &VecDeque<Batch>,
    from: LogIndex,
) -> Option<Batch> {
    if from < store.tip().index {
        return store.read_from(from).ok()?.next_batch().ok()?;
    }
    waiting.iter().find(|batch| batch.first() == from).cloned()
}

/// The batches from a place on, stored or waiting.
pub(super) fn batches(
    store: &MemoryStore,
    waiting: &VecDeque<Batch>,
    from: LogIndex,
) -> Vec<Batch> {
    let mut batches = Vec::new();
    if let Ok(mut reader) = store.read_from(from) {
        while let Ok(Some(batch)) = reader.next_batch() {
            batches.push(batch);
        }
    }
    batches.extend(waiting.iter().filter(|b| b.first() >= from).cloned());
    batches
}

/// Where a batch ends, in what is stored or in what waits.
pub(super) fn tip_at(
    store: &MemoryStore,
    waiting: &VecDeque<Batch>,
    index: LogIndex,
) -> Option<LogTip> {
    let mut tip = store.tip();
    if index <= tip.index {
        let floor = store.floor(index).ok().flatten();
        return floor.filter(|tip| tip.index == index);
    }
    for batch in waiting {
        tip = batch.tip(tip.chain);
        if tip.index == index {
            return Some(tip);
        }
    }
    None
}

/// Another store with the same log, all of it synced.
pub(super) fn copy(store: &MemoryStore) -> MemoryStore {
    let mut copied = MemoryStore::new();
    for batch in batches(store, &VecDeque::new(), LogIndex::START) {
        if copied.append(&batch).is_err() {
            break;
        }
    }
    let _ = copied.sync();
    copied
}
