//! The log in a folder: append-only segments, the last of them open.
//!
//! ```text
//!             create: *.tmp, header, rename          append        trailer, rename
//!  (nothing) ------------------------------> *.open --------> *.open ------> *.seg ---> dropped
//!                                               ^                              |      (retention)
//!                                               +---------- truncate ----------+
//! ```
//!
//! One file at a time is written to, and each append is one `write(2)`: what was appended is the
//! kernel's when [`Store::append`] returns. A write cut short by the end of the process or the
//! host is cut off on opening; anything else that is not as written is an error that names the
//! segment and the offset, and nothing is changed. The bytes are described in `format.rs`.

mod format;
mod index;
pub mod inspect;
mod scan;
mod survey;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::compress::Compressor;
use crate::folder;
use crate::position::{LogIndex, LogTip};
use crate::store::{
    AppendError, Dropped, IoFailure, LogReader, OpenError, Poisoned, ReadError, Store, SyncError,
    TruncateError, check_continues,
};
use index::{Segment, Shared, segment_path};
use scan::Checkpoint;
use survey::{MAKING, OPEN, Repairs, SEALED, Survey};

/// When what was appended is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncPolicy {
    /// Never: a host that loses power loses the end of the log, or all of it. For copies that
    /// acknowledge from memory.
    Never,
    /// When [`Store::sync`] is called, and when a segment is sealed.
    Explicit,
    /// As `Explicit`, and by the first append after this long.
    Interval(Duration),
    /// Before each append returns.
    EveryBatch,
}

/// How a [`FileStore`] keeps its log.
#[derive(Clone, Copy, Debug)]
pub struct FileOptions {
    /// When it is made durable. Default: every batch.
    pub sync: SyncPolicy,
    /// At what size in bytes a segment is sealed. Default: 64 MiB.
    pub segment_bytes: u64,
    /// After how many uncompressed bytes compression begins anew, so that reading can begin
    /// there. Default: 1 MiB.
    pub checkpoint_bytes: u64,
    /// How many bytes all segments together may take before the oldest are dropped; the open
    /// segment is always kept. Default: no limit.
    pub retain: Option<u64>,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            sync: SyncPolicy::EveryBatch,
            segment_bytes: 64 << 20,
            checkpoint_bytes: 1 << 20,
            retain: None,
        }
    }
}

/// What is done to the file that is written to; tests put faults in between.
trait SegmentIo: Send {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    fn sync(&mut self) -> io::Result<()>;
    fn set_len(&mut self, len: u64) -> io::Result<()>;
}

impl SegmentIo for File {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        Write::write_all(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        Self::set_len(self, len)
    }
}

type Wrap = Box<dyn Fn(File) -> Box<dyn SegmentIo> + Send>;

/// The open segment. Its path and length are in the index.
struct Writing {
    io: Box<dyn SegmentIo>,
    compressor: Compressor,
    /// Uncompressed bytes since the last place where reading can begin; `None` if the next batch
    /// has to begin with one, because the compressor is not the one that wrote what is before.
    since_checkpoint: Option<u64>,
}

/// A log in a folder of its own. Only one process can have it open.
pub struct FileStore {
    dir: PathBuf,
    /// Locked for as long as it lives; also what makes names durable.
    dir_file: File,
    options: FileOptions,
    wrap: Wrap,
    index: Shared,
    writing: Option<Writing>,
    durable: LogTip,
    last_sync: Instant,
    poisoned: Option<Poisoned>,
    dropped: Dropped,
    frame: Vec<u8>,
    chunk: Vec<u8>,
}

impl FileStore {
    /// Opens the log in `dir`, or begins one; makes the folder if it is not there. A torn end is
    /// cut off. On an error nothing was written.
    pub fn open(dir: &Path, options: FileOptions) -> Result<Self, OpenError> {
        Self::open_with(dir, options, Box::new(|file| Box::new(file)))
    }

    fn open_with(dir: &Path, options: FileOptions, wrap: Wrap) -> Result<Self, OpenError> {
        folder::make(dir).map_err(IoFailure::new("make the folder", dir))?;
        let dir_file = File::open(dir).map_err(IoFailure::new("open", dir))?;
        match dir_file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(OpenError::Locked {
                    dir: dir.to_owned(),
                });
            }
            Err(TryLockError::Error(error)) => {
                return Err(IoFailure::new("lock", dir)(error).into());
            }
        }
        let unsynced = options.sync == SyncPolicy::Never;
        let Survey { index, repairs } = survey::survey(dir, unsynced)?;
        let mut store = Self {
            dir: dir.to_owned(),
            dir_file,
            options,
            wrap,
            durable: index.base(),
            index: Shared::new(index),
            writing: None,
            last_sync: Instant::now(),
            poisoned: None,
            dropped: Dropped::default(),
            frame: Vec::new(),
            chunk: Vec::new(),
        };
        store.repair(&repairs)?;
        Ok(store)
    }

    fn repair(&mut self, repairs: &Repairs) -> Result<(), IoFailure> {
        for path in &repairs.remove {
            fs::remove_file(path).map_err(IoFailure::new("remove", path))?;
        }
        let mut segments = Vec::new();
        {
            let mut index = self.index.lock();
            if let Some(last) = index.segments.last_mut() {
                // It may have got its trailer and not its name, or its name and not its trailer.
                let ending = if last.sealed { SEALED } else { OPEN };
                rename_to(&self.dir, last, ending)?;
            }
            segments.extend(index.segments.iter().map(|s| (s.path.clone(), s.sealed)));
        }
        for (path, sealed) in segments {
            // Under another policy, or by a process that was ended, any of them may have been
            // left unsynced.
            if sealed && !self.syncs() {
                continue;
            }
            let mut writing = self.open_for_writing(&path)?;
            if let Some(len) = repairs.cut.filter(|_| !sealed) {
                let cut = writing.io.set_len(len);
                cut.map_err(IoFailure::new("cut the torn end off", &path))?;
            }
            if self.syncs() {
                writing.io.sync().map_err(IoFailure::new("sync", &path))?;
            }
            if !sealed {
                self.writing = Some(writing);
            }
        }
        self.sync_names()?;
        if self.syncs() {
            self.durable = self.tip();
        }
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// How many bytes its segments take.
    pub fn bytes(&self) -> u64 {
        self.index.lock().bytes()
    }

    fn syncs(&self) -> bool {
        self.options.sync != SyncPolicy::Never
    }

    fn open_for_writing(&self, path: &Path) -> Result<Writing, IoFailure> {
        let file = OpenOptions::new().append(true).open(path);
        Ok(Writing {
            io: (self.wrap)(file.map_err(IoFailure::new("open", path))?),
            compressor: Compressor::new(),
            since_checkpoint: None,
        })
    }

    /// Makes renamed, new and removed files durable.
    fn sync_names(&self) -> Result<(), IoFailure> {
        if !self.syncs() {
            return Ok(());
        }
        self.dir_file
            .sync_all()
            .map_err(IoFailure::new("sync the folder", &self.dir))
    }

    fn check_poisoned(&self) -> Result<(), Poisoned> {
        self.poisoned.clone().map_or(Ok(()), Err)
    }

    /// Notes a failure after which nobody knows what the disk holds.
    fn poison<T>(&mut self, done: Result<T, IoFailure>) -> Result<T, IoFailure> {
        if let Err(failure) = &done {
            let reason = format!("{failure}: {}", failure.source);
            self.poisoned = Some(Poisoned { reason });
        }
        done
    }

    /// Begins a segment at the tip.
    fn create_segment(&mut self) -> Result<(), IoFailure> {
        let base = self.tip();
        let making = segment_path(&self.dir, base.index, MAKING);
        let path = segment_path(&self.dir, base.index, OPEN);
        let file = File::create(&making).map_err(IoFailure::new("create", &making))?;
        let mut io = (self.wrap)(file);
        let header = format::header(base);
        io.write_all(&header)
            .map_err(IoFailure::new("write to", &making))?;
        if self.syncs() {
            io.sync().map_err(IoFailure::new("sync", &making))?;
        }
        fs::rename(&making, &path).map_err(IoFailure::new("rename", &making))?;
        self.sync_names()?;
        let len = header.len() as u64;
        self.index.lock().segments.push(Segment {
            path,
            base,
            tip: base,
            len,
            sealed: false,
            checkpoints: Some(vec![Checkpoint {
                offset: len,
                tip: base,
            }]),
        });
        self.writing = Some(Writing {
            io,
            compressor: Compressor::new(),
            since_checkpoint: Some(0),
        });
        Ok(())
    }

    /// Path, length and tip of the segment that is written to.
    fn end_of_open(&self) -> (PathBuf, u64, LogTip) {
        let index = self.index.lock();
        let Some(last) = index.segments.last() else {
            unreachable!("the segment that is written to is in the index")
        };
        (last.path.clone(), last.len, last.tip)
    }

    /// Seals the open segment, and drops what is over the budget then.
    fn seal(&mut self) -> Result<(), IoFailure> {
        let Some(mut writing) = self.writing.take() else {
            return Ok(());
        };
        let (path, len, tip) = self.end_of_open();
        let trailer = format::trailer(len, tip);
        let write = writing.io.write_all(&trailer);
        write.map_err(IoFailure::new("write to", &path))?;
        // Only where nothing is ever synced is a sealed segment looked at for a torn end: waiting
        // for a whole segment to reach the disk would hold up whoever appends.
        if self.syncs() {
            writing.io.sync().map_err(IoFailure::new("sync", &path))?;
        }
        if let Some(last) = self.index.lock().segments.last_mut() {
            last.len += trailer.len() as u64;
            rename_to(&self.dir, last, SEALED)?;
        }
        self.sync_names()?;
        if self.syncs() {
            self.durable = self.tip();
            self.last_sync = Instant::now();
        }
        self.retain();
        Ok(())
    }

    /// Drops the oldest sealed segments while all together are over the budget.
    fn retain(&mut self) {
        let Some(budget) = self.options.retain else {
            return;
        };
        let mut index = self.index.lock();
        while index.bytes() > budget && index.segments.len() > 1 {
            let oldest = &index.segments[0];
            if let Err(error) = fs::remove_file(&oldest.path) {
                self.dropped.failed = Some(format!("{}: {error}", oldest.path.display()));
                return;
            }
            self.dropped.segments += 1;
            self.dropped.bytes += oldest.len;
            self.dropped.entries += oldest.tip.index.since(oldest.base.index);
            index.segments.remove(0);
        }
    }

    fn make_room(&mut self) -> Result<(), IoFailure> {
        let full = {
            let index = self.index.lock();
            let last = index.segments.last();
            last.is_some_and(|last| last.len >= self.options.segment_bytes)
        };
        if full {
            self.seal()?;
        }
        if self.writing.is_none() {
            self.create_segment()?;
        }
        Ok(())
    }

    /// Writes a batch to the open segment, durably if the policy says so.
    fn write(&mut self, batch: &Batch) -> Result<LogTip, IoFailure> {
        self.make_room()?;
        let (path, len, before) = self.end_of_open();
        let Some(writing) = &mut self.writing else {
            unreachable!("make_room leaves a segment to write to")
        };
        self.chunk.clear();
        let due = writing
            .since_checkpoint
            .is_none_or(|since| since >= self.options.checkpoint_bytes);
        let checkpoint = due.then(|| {
            format::put_checkpoint(len, before, &mut self.chunk);
            writing.compressor.restart();
            writing.since_checkpoint = Some(0);
            Checkpoint {
                offset: len + self.chunk.len() as u64,
                tip: before,
            }
        });
        self.frame.clear();
        batch.encode_frame(&mut self.frame);
        let at = len + self.chunk.len() as u64;
        format::put_batch_chunk(at, &mut self.chunk, |out| {
            writing.compressor.compress(&self.frame, out);
        });
        let sync_due = match self.options.sync {
            SyncPolicy::Never | SyncPolicy::Explicit => false,
            SyncPolicy::Interval(interval) => self.last_sync.elapsed() >= interval,
            SyncPolicy::EveryBatch => true,
        };
        let written = writing
            .io
            .write_all(&self.chunk)
            .map_err(IoFailure::new("write to", &path))
            .and_then(|()| {
                if sync_due {
                    writing.io.sync().map_err(IoFailure::new("sync", &path))?;
                }
                Ok(())
            });
        if let Err(failure) = written {
            // The batch is not acknowledged and should not be found after a restart either. If
            // this fails too, a torn end is cut off then, and a whole batch was merely not
            // acknowledged.
            let _best_effort = writing.io.set_len(len);
            return Err(failure);
        }
        writing.since_checkpoint = writing
            .since_checkpoint
            .map(|since| since + self.frame.len() as u64);
        let tip = batch.tip(before.chain);
        if let Some(last) = self.index.lock().segments.last_mut() {
            last.len += self.chunk.len() as u64;
            last.tip = tip;
            if let Some(checkpoints) = &mut last.checkpoints {
                checkpoints.extend(checkpoint);
            }
        }
        if sync_due {
            self.durable = tip;
            self.last_sync = Instant::now();
        }
        Ok(tip)
    }

    fn sync_now(&mut self) -> Result<(), IoFailure> {
        if let Some(writing) = &mut self.writing {
            let sync = writing.io.sync();
            sync.map_err(IoFailure::new("sync the log in", &self.dir))?;
        }
        self.durable = self.tip();
        self.last_sync = Instant::now();
        Ok(())
    }

    /// Cuts the log at a chunk's offset in the segment that begins at `base`: later segments go
    /// first, newest first, so that whatever stops this leaves a log that is merely longer.
    fn cut(&mut self, base: LogTip, tip: LogTip, offset: u64) -> Result<(), IoFailure> {
        self.writing = None;
        {
            let mut index = self.index.lock();
            index.truncations.push(tip.index);
            while index.segments.last().is_some_and(|last| last.base != base) {
                if let Some(last) = index.segments.last() {
                    let gone = fs::remove_file(&last.path);
                    gone.map_err(IoFailure::new("remove", &last.path))?;
                }
                index.segments.pop();
            }
            if let Some(last) = index.segments.last_mut() {
                rename_to(&self.dir, last, OPEN)?;
                last.tip = tip;
                last.len = offset;
                if let Some(known) = &mut last.checkpoints {
                    known.retain(|checkpoint| checkpoint.offset <= offset);
                }
            }
        }
        self.sync_names()?;
        let path = segment_path(&self.dir, base.index, OPEN);
        let mut writing = self.open_for_writing(&path)?;
        let cut = writing.io.set_len(offset);
        cut.map_err(IoFailure::new("cut", &path))?;
        if self.syncs() {
            writing.io.sync().map_err(IoFailure::new("sync", &path))?;
            self.durable = tip;
        } else if self.durable.index > tip.index {
            self.durable = tip;
        }
        self.writing = Some(writing);
        Ok(())
    }
}

/// Gives a segment the name of another state.
fn rename_to(dir: &Path, segment: &mut Segment, ending: &str) -> Result<(), IoFailure> {
    let path = segment_path(dir, segment.base.index, ending);
    if path != segment.path {
        fs::rename(&segment.path, &path).map_err(IoFailure::new("rename", &segment.path))?;
    }
    segment.path = path;
    segment.sealed = ending == SEALED;
    Ok(())
}

impl Store for FileStore {
    fn append(&mut self, batch: &Batch) -> Result<LogTip, AppendError> {
        self.check_poisoned()?;
        check_continues(self.tip(), batch)?;
        let written = self.write(batch);
        Ok(self.poison(written)?)
    }

    fn sync(&mut self) -> Result<LogTip, SyncError> {
        self.check_poisoned()?;
        if self.syncs() && self.durable != self.tip() {
            let synced = self.sync_now();
            self.poison(synced)?;
        }
        Ok(self.durable)
    }

    fn truncate(&mut self, end: LogIndex) -> Result<LogTip, TruncateError> {
        self.check_poisoned()?;
        let Some(located) = self.index.locate(end)? else {
            return Ok(self.tip());
        };
        let (tip, offset) = (located.floor, located.offset);
        if tip.index != end {
            return Err(TruncateError::NotABoundary {
                index: end,
                nearest: tip.index,
            });
        }
        if tip != self.tip() {
            let base = located.scanner.base();
            let cut = self.cut(base, tip, offset);
            self.poison(cut)?;
        }
        Ok(tip)
    }

    fn base(&self) -> LogTip {
        self.index.lock().base()
    }

    fn tip(&self) -> LogTip {
        self.index.lock().tip()
    }

    fn durable_tip(&self) -> LogTip {
        self.durable
    }

    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError> {
        if index < self.first() {
            return Ok(None);
        }
        if index >= self.tip().index {
            return Ok(Some(self.tip()));
        }
        let located = self.index.locate(index)?;
        Ok(Some(located.map_or_else(LogTip::default, |at| at.floor)))
    }

    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        Ok(Box::new(self.index.reader(from)?))
    }

    fn take_dropped(&mut self) -> Dropped {
        std::mem::take(&mut self.dropped)
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore")
            .field("dir", &self.dir)
            .field("base", &self.base())
            .field("tip", &self.tip())
            .field("durable", &self.durable)
            .field("poisoned", &self.poisoned)
            .finish_non_exhaustive()
    }
}
