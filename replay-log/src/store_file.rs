//! The log in a folder: append-only segments, the last of them open.
//!
//! ```text
//!             create: *.tmp, header, rename          append        trailer, rename
//!  (nothing) ------------------------------> *.open --------> *.open ------> *.seg
//!                                               ^                              |
//!                                               +---------- truncate ----------+
//! ```
//!
//! One file at a time is written to, and each append is one `write(2)`: what was appended is the
//! kernel's when [`Store::append`] returns. A write cut short by the end of the process or the
//! host is cut off on opening; anything else that is not as written is an error that names the
//! segment and the offset, and nothing is changed. The bytes are described in `format.rs`.
//!
//! What the system refuses (`write.rs`) leaves the log as it was: the bytes of a write that stopped
//! half-way are cut off before anything else is written, and a segment that could not be sealed stays
//! open. Only a failed sync of the log's files or names ends a store.

mod doubt;
mod format;
mod index;
pub mod inspect;
mod scan;
mod survey;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::batch::Batch;
use crate::disk;
use crate::folder;
use crate::position::{LogIndex, LogTip};
use crate::store::{
    AppendError, IoFailure, LogReader, LogSource, OpenError, Poisoned, ReadError, Stopped, Store,
    SyncError, TruncateError, check_continues,
};
use index::Shared;
use survey::{OPEN, Repairs, SEALED, Survey};
use write::{Writing, rename_to};

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
}

impl Default for FileOptions {
    fn default() -> Self {
        Self {
            sync: SyncPolicy::EveryBatch,
            segment_bytes: 64 << 20,
            checkpoint_bytes: 1 << 20,
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
        io::Write::write_all(self, bytes)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        Self::set_len(self, len)
    }
}

type Wrap = Box<dyn Fn(File) -> Box<dyn SegmentIo> + Send>;

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
        let (segments, _) = survey::list(dir)?;
        doubt::check(dir, segments.is_empty())?;
        let unsynced = options.sync == SyncPolicy::Never;
        if !unsynced {
            // Whatever is to count as durable is read from where it is.
            forget_cached(dir, &wrap)?;
        }
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
            frame: Vec::new(),
            chunk: Vec::new(),
        };
        let repaired = store.repair(&repairs);
        match store.poison(repaired) {
            Ok(()) => Ok(store),
            Err(Stopped::Full(failure) | Stopped::Doubtful(failure)) => Err(failure.into()),
        }
    }

    fn repair(&mut self, repairs: &Repairs) -> Result<(), Stopped> {
        for path in &repairs.remove {
            let removed = fs::remove_file(path);
            removed
                .map_err(IoFailure::new("remove", path))
                .map_err(Stopped::Full)?;
        }
        let mut open = None;
        if let Some(last) = self.index.lock().segments.last_mut() {
            // It may have got its trailer and not its name, or its name and not its trailer.
            let ending = if last.sealed { SEALED } else { OPEN };
            rename_to(&self.dir, last, ending).map_err(Stopped::Full)?;
            open = (!last.sealed).then(|| last.path.clone());
        }
        if let Some(path) = open {
            let mut writing = self.open_for_writing(&path).map_err(Stopped::Full)?;
            if let Some(len) = repairs.cut {
                let cut = writing.io.set_len(len);
                cut.map_err(IoFailure::new("cut the torn end off", &path))
                    .map_err(Stopped::Full)?;
                if self.syncs() {
                    let sync = writing.io.sync();
                    sync.map_err(IoFailure::new("sync", &path))
                        .map_err(Stopped::Doubtful)?;
                }
            }
            self.writing = Some(writing);
        }
        self.sync_names().map_err(Stopped::Doubtful)?;
        if self.syncs() {
            self.durable = self.tip();
        }
        Ok(())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn syncs(&self) -> bool {
        self.options.sync != SyncPolicy::Never
    }
}

/// Makes everything that is read of a log from now on come from the disk. Under another policy, or by
/// a process that was ended, any of its files may have been left unsynced; and one whose sync failed
/// looks whole for as long as the kernel remembers it.
fn forget_cached(dir: &Path, wrap: &Wrap) -> Result<(), OpenError> {
    let (segments, _) = survey::list(dir)?;
    for segment in segments {
        let path = &segment.path;
        let file = File::open(path).map_err(IoFailure::new("open", path))?;
        let again = file.try_clone().map_err(IoFailure::new("open", path))?;
        if let Err(source) = wrap(again).sync() {
            let failure = IoFailure::new("sync", path)(source);
            doubt::leave(dir, &reason(&failure));
            return Err(failure.into());
        }
        disk::drop_pages(&file);
    }
    Ok(())
}

/// What a failure is in the words of those who only have a line for it.
fn reason(failure: &IoFailure) -> String {
    format!("{failure}: {}", failure.source)
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
        if self.syncs() && (self.durable != self.tip() || self.is_unfinished()) {
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
        } else if self.is_unfinished() {
            let finished = self.finish_cut();
            self.poison(finished)?;
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
        self.index.floor(index)
    }

    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        self.index.read_from(from)
    }

    fn bytes(&self) -> u64 {
        self.index.lock().bytes()
    }

    fn source(&self) -> Box<dyn LogSource> {
        Box::new(self.index.clone())
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
