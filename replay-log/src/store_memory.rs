//! A store in memory that fails as disks do, on command: it loses what was not synced, tears the
//! last write, flips bits, runs full, lies about syncs, and refuses to write or sync.
//!
//! Nothing in it is random and nothing reads a clock: the same calls give the same store, which
//! is what the simulator needs. A [`MemoryStore`] is a handle; clones share the store, so that a
//! test keeps one to give orders with while the code under test owns another.
//!
//! ```text
//!   full ◄─── limit, fail_appends ───► working --- a sync fails ---> poisoned --- restart ---+
//!   (nothing is lost)                   ^  |                                                 |
//!                                       |  +--- crash (unsynced bytes lost or torn), ---------+
//!                                       |       lose, roll_back, corrupt                      |
//!                                       +------------- whatever is whole ------------------<--+
//! ```

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::batch::Batch;
use crate::position::{LogIndex, LogTip};
use crate::store::{
    AppendError, Damage, DamageReason, IoFailure, LogReader, LogSource, OpenError, Poisoned,
    ReadError, Store, SyncError, TruncateError, check_continues, check_within,
};

/// What a damage or failure of this store names instead of a file.
const NAME: &str = "memory";

/// One batch as it is on the "disk".
#[derive(Clone, Debug)]
struct Stored {
    frame: Bytes,
    /// Where the log ends after it.
    tip: LogTip,
}

#[derive(Clone, Debug, Default)]
struct State {
    base: LogTip,
    batches: Vec<Stored>,
    /// The bytes of all of them.
    size: u64,
    /// Bytes of a write that a crash tore; cut off by the restart.
    torn: u64,
    durable: LogTip,
    /// What a crash leaves where syncs are lied about: less than `durable` says.
    truly_durable: LogTip,
    lies: bool,
    poisoned: Option<Poisoned>,
    truncations: Vec<LogIndex>,
    capacity: Option<u64>,
    failing_appends: u32,
    failing_syncs: u32,
}

impl State {
    fn tip(&self) -> LogTip {
        self.batches.last().map_or(self.base, |last| last.tip)
    }

    /// How many batches end at or before `index`.
    fn ending_by(&self, index: LogIndex) -> usize {
        self.batches.partition_point(|b| b.tip.index <= index)
    }

    fn floor(&self, index: LogIndex) -> LogTip {
        let last = self.ending_by(index).checked_sub(1);
        last.map_or(self.base, |last| self.batches[last].tip)
    }

    /// Where a batch begins in what would be one long file.
    fn offset(&self, batch: usize) -> u64 {
        let before = self.batches.iter().take(batch);
        before.map(|b| b.frame.len() as u64).sum()
    }

    /// Reads a batch as from a disk, checking that it is what was written.
    fn read(&self, at: usize) -> Result<Batch, Damage> {
        let damage = |reason| Damage {
            segment: NAME.into(),
            offset: self.offset(at),
            reason,
        };
        let mut frame = bytes::BytesMut::from(&self.batches[at].frame[..]);
        let batch = Batch::take_frame(&mut frame).map_err(DamageReason::Frame);
        let batch = batch.and_then(|batch| {
            batch
                .filter(|_| frame.is_empty())
                .ok_or(DamageReason::CutOff)
        });
        batch.map_err(damage)
    }

    /// Removes everything from batch `keep` on.
    fn keep(&mut self, keep: usize) {
        self.batches.truncate(keep);
        self.size = self.offset(keep);
        let tip = self.tip();
        self.truncations.push(tip.index);
        for durable in [&mut self.durable, &mut self.truly_durable] {
            if durable.index > tip.index {
                *durable = tip;
            }
        }
    }

    fn check_poisoned(&self) -> Result<(), Poisoned> {
        self.poisoned.clone().map_or(Ok(()), Err)
    }

    /// Notes a failure after which nobody knows what the disk holds.
    fn poison(&mut self, action: &'static str) -> IoFailure {
        let failure = refusal(action, io::ErrorKind::Other);
        let reason = format!("{failure}: {}", failure.source);
        self.poisoned = Some(Poisoned { reason });
        failure
    }
}

fn refusal(action: &'static str, kind: io::ErrorKind) -> IoFailure {
    IoFailure::new(action, NAME)(io::Error::from(kind))
}

/// What a store held at some time: a backup, or a snapshot of the disk it lies on.
#[derive(Clone, Debug)]
pub struct Snapshot(State);

/// A handle to a log in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore(Arc<Mutex<State>>);

impl MemoryStore {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host dies. Of the bytes that were appended and not synced, the first `survive` are
    /// found after the restart; a batch of which only a part is among them is torn. Where the disk
    /// [lies](Self::lie_about_syncs), what it only said to be synced is not synced either.
    pub fn crash(&self, survive: u64) {
        let mut state = self.state();
        let durable = state.truly_durable.index;
        let mut keep = state.ending_by(durable);
        let mut left = survive;
        while let Some(batch) = state.batches.get(keep) {
            let len = batch.frame.len() as u64;
            if left < len {
                state.torn = left;
                break;
            }
            left -= len;
            keep += 1;
        }
        state.keep(keep);
    }

    /// The disk lies: it loses the last `batches`, synced or not, and the host dies.
    pub fn lose(&self, batches: usize) {
        let mut state = self.state();
        let keep = state.batches.len().saturating_sub(batches);
        state.keep(keep);
    }

    /// From now on a sync says that it is done, and [`Self::crash`] shows that it was not; or syncs
    /// are honest again.
    pub fn lie_about_syncs(&self, lie: bool) {
        self.state().lies = lie;
    }

    /// What is held now, for [`Self::roll_back`].
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.state().clone())
    }

    /// The disk is put back to what it held then, synced or not, and the host dies: a backup or an
    /// older snapshot is restored. Orders about failures to come stay as they are.
    pub fn roll_back(&self, to: &Snapshot) {
        let mut state = self.state();
        let then = to.0.clone();
        state.base = then.base;
        state.batches = then.batches;
        state.torn = then.torn;
        state.durable = then.durable;
        state.truly_durable = then.truly_durable;
        let all = state.batches.len();
        state.keep(all);
    }

    /// Flips the bits of `mask` in byte `offset` of everything that is stored. Says whether there
    /// is such a byte.
    pub fn corrupt(&self, mut offset: u64, mask: u8) -> bool {
        let mut state = self.state();
        for stored in &mut state.batches {
            let len = stored.frame.len() as u64;
            if offset < len {
                let mut frame = stored.frame.to_vec();
                frame[offset as usize] ^= mask;
                stored.frame = frame.into();
                return true;
            }
            offset -= len;
        }
        false
    }

    /// The next `count` appends are refused (an error of a write); nothing is lost by that.
    pub fn fail_appends(&self, count: u32) {
        self.state().failing_appends = count;
    }

    /// The next `count` syncs fail, the first of them poisoning the store.
    pub fn fail_syncs(&self, count: u32) {
        self.state().failing_syncs = count;
    }

    /// The disk is full at this many bytes: what does not fit is refused, and nothing is lost by
    /// that. `None` takes the limit away.
    pub fn limit(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// How many stored bytes are not yet synced, whatever the disk says of them.
    pub fn unsynced_bytes(&self) -> u64 {
        let state = self.state();
        let synced = state.ending_by(state.truly_durable.index);
        state.size - state.offset(synced)
    }

    /// Opens the log again, as a process does that starts: reads everything, forgets that it
    /// failed. Returns how many torn bytes were cut off, or what is damaged; nothing is changed
    /// then.
    pub fn restart(&self) -> Result<u64, OpenError> {
        let mut state = self.state();
        let mut tip = state.base;
        for i in 0..state.batches.len() {
            let batch = state.read(i)?;
            let continues = check_continues(tip, &batch).is_ok();
            tip = batch.tip(tip.chain);
            if !continues || tip != state.batches[i].tip {
                return Err(OpenError::Damaged(Damage {
                    segment: NAME.into(),
                    offset: state.offset(i),
                    reason: DamageReason::Chain,
                }));
            }
        }
        state.poisoned = None;
        Ok(std::mem::take(&mut state.torn))
    }
}

impl Store for MemoryStore {
    fn append(&mut self, batch: &Batch) -> Result<LogTip, AppendError> {
        let mut state = self.state();
        state.check_poisoned()?;
        let before = state.tip();
        check_continues(before, batch)?;
        let mut frame = Vec::new();
        batch.encode_frame(&mut frame);
        if state.failing_appends > 0 {
            state.failing_appends -= 1;
            let failure = refusal("write to", io::ErrorKind::Other);
            return Err(AppendError::Full(failure));
        }
        let size = state.size + frame.len() as u64;
        if state.capacity.is_some_and(|capacity| size > capacity) {
            let failure = refusal("write to", io::ErrorKind::StorageFull);
            return Err(AppendError::Full(failure));
        }
        let tip = batch.tip(before.chain);
        state.size = size;
        state.batches.push(Stored {
            frame: frame.into(),
            tip,
        });
        Ok(tip)
    }

    fn sync(&mut self) -> Result<LogTip, SyncError> {
        let mut state = self.state();
        state.check_poisoned()?;
        if state.failing_syncs > 0 {
            state.failing_syncs -= 1;
            return Err(SyncError::Doubtful(state.poison("sync")));
        }
        state.durable = state.tip();
        if !state.lies {
            state.truly_durable = state.durable;
        }
        Ok(state.durable)
    }

    fn truncate(&mut self, end: LogIndex) -> Result<LogTip, TruncateError> {
        let mut state = self.state();
        state.check_poisoned()?;
        check_within(state.base, state.tip(), end)?;
        let floor = state.floor(end);
        if floor.index != end {
            return Err(TruncateError::NotABoundary {
                index: end,
                nearest: floor.index,
            });
        }
        if floor != state.tip() {
            let keep = state.ending_by(end);
            state.keep(keep);
            state.durable = state.tip();
            state.truly_durable = state.tip();
        }
        Ok(floor)
    }

    fn base(&self) -> LogTip {
        self.state().base
    }

    fn tip(&self) -> LogTip {
        self.state().tip()
    }

    fn durable_tip(&self) -> LogTip {
        self.state().durable
    }

    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError> {
        let state = self.state();
        Ok((index >= state.base.index).then(|| state.floor(index)))
    }

    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        let state = self.state();
        check_within(state.base, state.tip(), from)?;
        Ok(Box::new(MemoryReader {
            store: self.clone(),
            next: from,
            truncations: state.truncations.len(),
        }))
    }

    fn bytes(&self) -> u64 {
        self.state().size
    }

    fn source(&self) -> Box<dyn LogSource> {
        Box::new(self.clone())
    }
}

impl LogSource for MemoryStore {
    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        Store::read_from(self, from)
    }

    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError> {
        Store::floor(self, index)
    }
}

#[derive(Debug)]
struct MemoryReader {
    store: MemoryStore,
    next: LogIndex,
    truncations: usize,
}

impl LogReader for MemoryReader {
    fn next_batch(&mut self) -> Result<Option<Batch>, ReadError> {
        let state = self.store.state();
        let unseen = state.truncations.get(self.truncations..);
        if let Some(to) = unseen.and_then(|unseen| unseen.iter().min().copied()) {
            if to < self.next {
                return Err(ReadError::Truncated { to });
            }
            self.truncations = state.truncations.len();
        }
        check_within(state.base, state.tip(), self.next)?;
        let at = state.ending_by(self.next);
        if at == state.batches.len() {
            return Ok(None);
        }
        let batch = state.read(at)?;
        self.next = state.batches[at].tip.index;
        Ok(Some(batch))
    }

    fn position(&self) -> LogIndex {
        self.next
    }
}

#[cfg(test)]
mod tests;
