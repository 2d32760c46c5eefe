//! What every store of a log promises: append, sync, read from anywhere, cut back.
//!
//! A store holds one unbroken stretch of one machine's log: from its *base* (the tip before its
//! first batch; the log's start, unless an earlier version of this program dropped what was before)
//! to its *tip*. A store never drops a part of its log by itself. The suite in
//! [`crate::conformance`] runs against every implementation.
//!
//! What goes wrong is one of two things, and errors say which:
//!
//! - *Full*: the system takes no more (no space, a quota, a file system that became read-only, no
//!   file descriptor, an error of a write). What is held is as sure as before. The same call may
//!   succeed later.
//! - *Doubtful*: a sync failed, and the kernel may have forgotten what it could not write. What was
//!   durable before the sync still is; what is after that is not known, and the store takes nothing
//!   more.

use std::fmt;
use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::batch::{Batch, FrameError};
use crate::codec::{DecodeError, FORMAT_VERSION};
use crate::compress::DecompressError;
use crate::position::{Chain, LogIndex, LogTip, Term};

/// A place that keeps a log.
pub trait Store: Send + fmt::Debug {
    /// Adds the batch that continues the log: it begins at the tip, under the same term or a
    /// later one. Once this returns, the batch survives the death of the process; whether it
    /// survives the death of the host is what [`Store::durable_tip`] says.
    ///
    /// After an error the batch is not part of the log; unless the error is
    /// [doubtful](AppendError::is_doubtful), the same batch may be appended again later.
    fn append(&mut self, batch: &Batch) -> Result<LogTip, AppendError>;

    /// Makes what was appended durable, unless the store was told never to. Returns the durable
    /// tip. After a [doubtful](SyncError::is_doubtful) failure nobody knows what the disk holds: the
    /// store takes nothing more.
    fn sync(&mut self) -> Result<LogTip, SyncError>;

    /// Forgets everything from `end` on; `end` is where some batch ends, or the base. Durable
    /// when it returns, unless the store was told never to sync.
    fn truncate(&mut self, end: LogIndex) -> Result<LogTip, TruncateError>;

    /// The tip before the oldest batch that is kept.
    fn base(&self) -> LogTip;

    /// Where the log ends.
    fn tip(&self) -> LogTip;

    /// Up to where the log survives the death of the host.
    fn durable_tip(&self) -> LogTip;

    /// The last place not after `index` where a batch ends (or the base): where this log may
    /// still agree with another. `None` when `index` is before the base. Reads about a megabyte.
    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError>;

    /// Reads batches, beginning with the one that holds entry `from`. The reader is independent
    /// of the store: it goes on reading while batches are appended, and is sent to another thread
    /// if that suits.
    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError>;

    /// How many bytes the log takes where it is kept.
    fn bytes(&self) -> u64;

    /// The same log for those who only read, on any thread, whatever the store is busy with. Of no
    /// use once the store is gone.
    fn source(&self) -> Box<dyn LogSource>;

    /// The index of the oldest entry that is kept.
    fn first(&self) -> LogIndex {
        self.base().index
    }

    /// The chain at `index`: `None` where no batch ends, or outside what is kept. Two logs with
    /// equal chains at an index are the same up to there.
    fn chain_at(&self, index: LogIndex) -> Result<Option<Chain>, ReadError> {
        let floor = self.floor(index)?;
        Ok(floor.filter(|tip| tip.index == index).map(|tip| tip.chain))
    }
}

/// Reads a store's log beside it.
pub trait LogSource: Send + Sync + fmt::Debug {
    /// As [`Store::read_from`].
    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError>;

    /// As [`Store::floor`].
    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError>;
}

/// Reads a store's batches in order, one at a time.
pub trait LogReader: Send + fmt::Debug {
    /// The next batch, or `None` at the log's end; ask again after more was appended. After
    /// [`ReadError::Truncated`] this reader gives nothing more: take another one.
    fn next_batch(&mut self) -> Result<Option<Batch>, ReadError>;

    /// Where the next batch begins (or the entry that was asked for).
    fn position(&self) -> LogIndex;

    /// Batches of about `max_bytes` together, and at least one unless the log ends.
    fn next_batches(&mut self, max_bytes: usize) -> Result<Vec<Batch>, ReadError> {
        let (mut batches, mut bytes) = (Vec::new(), 0);
        while bytes < max_bytes {
            let Some(batch) = self.next_batch()? else {
                break;
            };
            bytes += batch.payload().len();
            batches.push(batch);
        }
        Ok(batches)
    }
}

/// The operating system refused something.
#[derive(Debug, Error)]
#[error("cannot {action} {}", path.display())]
pub struct IoFailure {
    /// What was to be done.
    pub action: &'static str,
    /// To which file or folder.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl IoFailure {
    /// For `map_err`.
    pub(crate) fn new(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self {
            action,
            path,
            source,
        }
    }
}

/// A store whose sync failed and that takes nothing more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the log takes no more entries since it failed ({reason}); repair the disk and restart")]
pub struct Poisoned {
    /// The sync that failed.
    pub reason: String,
}

/// Bytes of a segment that are not what was written.
#[derive(Debug, Error)]
#[error("segment {} is damaged at byte {offset}: {reason}", segment.display())]
pub struct Damage {
    /// The file.
    pub segment: PathBuf,
    /// Where in it the damaged part begins; everything before is good.
    pub offset: u64,
    /// What is wrong there.
    #[source]
    pub reason: DamageReason,
}

/// What is wrong with a segment.
#[derive(Debug, Error)]
pub enum DamageReason {
    /// It ends in the middle of something.
    #[error("it ends in the middle of a chunk")]
    CutOff,
    /// It does not begin as segments do.
    #[error("it is not a log segment")]
    NotASegment,
    /// It was written by another version.
    #[error(
        "it has format version {found}, this program reads {FORMAT_VERSION}: use the version that wrote it"
    )]
    Version {
        /// The version it names.
        found: u32,
    },
    /// Its header has the wrong checksum.
    #[error("its header does not have the checksum it was written with")]
    Header,
    /// Its header says something else than its name or the segment before it.
    #[error("it begins at {found}, where {expected} should follow")]
    Misplaced {
        /// Where the log before it ends.
        expected: LogIndex,
        /// Where it begins.
        found: LogIndex,
    },
    /// A chunk's header has the wrong checksum.
    #[error("a chunk's header does not have the checksum it was written with")]
    ChunkHeader,
    /// A chunk's contents have the wrong checksum.
    #[error("a chunk does not have the checksum it was written with")]
    ChunkChecksum,
    /// A chunk of a kind that this version does not have, or of a length it cannot have.
    #[error("a chunk of kind {kind} and {len} bytes has no meaning here")]
    UnknownChunk {
        /// Its kind.
        kind: u8,
        /// Its length.
        len: u32,
    },
    /// A chunk does not decompress.
    #[error("a chunk cannot be decompressed")]
    Compression(#[source] DecompressError),
    /// A chunk does not hold a batch.
    #[error("a chunk does not hold a batch")]
    Frame(#[source] FrameError),
    /// A chunk holds less or more than one batch.
    #[error("a chunk does not hold exactly one batch")]
    NotOneBatch,
    /// A batch does not follow the one before it.
    #[error("a batch of term {term} at {found} cannot follow term {last_term} at {expected}")]
    Discontinuous {
        /// Where the log ends before it.
        expected: LogIndex,
        /// The term there.
        last_term: Term,
        /// Where it begins.
        found: LogIndex,
        /// Its term.
        term: Term,
    },
    /// A checkpoint or trailer, or the next segment, names another chain.
    #[error("the hash chain does not lead from the batches before it to what it names")]
    Chain,
    /// Something follows a trailer.
    #[error("something follows the trailer")]
    AfterTrailer,
    /// A sealed segment without its trailer.
    #[error("it is sealed but its trailer is missing")]
    NoTrailer,
    /// A batch whose entries cannot be read.
    #[error("a batch cannot be decoded")]
    Entry(#[source] DecodeError),
}

/// Why a store cannot be opened. Nothing was written.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoFailure),
    /// Another process has it.
    #[error("the log in {} is in use by another process: stop it first", dir.display())]
    Locked {
        /// The log's folder.
        dir: PathBuf,
    },
    /// A file has a segment's ending and no segment's name.
    #[error("{} is not named as a segment: move it out of the log's folder", path.display())]
    StrangeFile {
        /// The file.
        path: PathBuf,
    },
    /// A segment is damaged.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// A sync of it failed in an earlier process.
    #[error(
        "nobody knows what the disk has of this log since a sync failed ({reason}): set its folder \
         aside, or remove {} to believe what is found there",
        mark.display()
    )]
    Doubtful {
        /// The mark that says so.
        mark: PathBuf,
        /// Which sync, and what the system said.
        reason: String,
    },
}

/// Why a batch was not added.
#[derive(Debug, Error)]
pub enum AppendError {
    /// It does not begin where the log ends.
    #[error("a batch that begins at {found} cannot follow a log that ends at {expected}")]
    Gap {
        /// Where the log ends.
        expected: LogIndex,
        /// Where the batch begins.
        found: LogIndex,
    },
    /// It is of an older term than the log's last batch.
    #[error("a batch of term {found} cannot follow one of term {last}")]
    OldTerm {
        /// The term of the log's last batch.
        last: Term,
        /// The batch's term.
        found: Term,
    },
    /// The store failed before.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// The system takes no more. The log is what it was; the batch may be appended again later.
    #[error("the log cannot grow: make room where it lies")]
    Full(#[source] IoFailure),
    /// The batch, or what was before it, could not be made durable; the store takes nothing more.
    #[error("what the log holds has become doubtful: repair the disk and restart")]
    Doubtful(#[source] IoFailure),
}

impl AppendError {
    /// Whether what the log holds beyond its durable tip has become doubtful.
    pub const fn is_doubtful(&self) -> bool {
        matches!(self, Self::Doubtful(_) | Self::Poisoned(_))
    }
}

/// Why the log could not be made durable.
#[derive(Debug, Error)]
pub enum SyncError {
    /// The store failed before.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// The log cannot be synced as yet: its file cannot be opened. Nothing is lost by that.
    #[error("the log cannot be synced as yet")]
    Full(#[source] IoFailure),
    /// The sync failed; the store takes nothing more.
    #[error("what the log holds has become doubtful: repair the disk and restart")]
    Doubtful(#[source] IoFailure),
}

impl SyncError {
    /// Whether what the log holds beyond its durable tip has become doubtful.
    pub const fn is_doubtful(&self) -> bool {
        matches!(self, Self::Doubtful(_) | Self::Poisoned(_))
    }
}

/// Why the log cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It is before what is kept: an earlier version of this program dropped it.
    #[error("entry {wanted} is no longer kept, the log begins at {first}")]
    Dropped {
        /// What was asked for.
        wanted: LogIndex,
        /// The oldest that is kept.
        first: LogIndex,
    },
    /// It is beyond the log's end.
    #[error("entry {wanted} is beyond the log's end at {end}")]
    Beyond {
        /// What was asked for.
        wanted: LogIndex,
        /// Where the log ends.
        end: LogIndex,
    },
    /// The log was cut back to before what this reader had read.
    #[error("the log was cut back to {to}, before what was read already: read again from there")]
    Truncated {
        /// To where.
        to: LogIndex,
    },
    /// A segment is damaged.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

/// Why the log was not cut back.
#[derive(Debug, Error)]
pub enum TruncateError {
    /// No batch ends there.
    #[error(
        "the log cannot be cut at {index}: no batch ends there, the last one before at {nearest}"
    )]
    NotABoundary {
        /// What was asked for.
        index: LogIndex,
        /// The nearest place before where it could be cut.
        nearest: LogIndex,
    },
    /// The place cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The store failed before.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// The system refused. The log is whole and ends where [`Store::tip`] says: somewhere between
    /// what was asked for and where it ended before. It can be cut again later.
    #[error("the log cannot be cut back as yet")]
    Full(#[source] IoFailure),
    /// The cut could not be made durable; the store takes nothing more.
    #[error("what the log holds has become doubtful: repair the disk and restart")]
    Doubtful(#[source] IoFailure),
}

/// What stops a store in the middle of something.
#[derive(Debug)]
pub(crate) enum Stopped {
    /// The system takes no more, and nothing is lost.
    Full(IoFailure),
    /// A sync failed.
    Doubtful(IoFailure),
}

/// Makes what stopped a store the error of each of its calls.
macro_rules! stopped_becomes {
    ($($error:ident),*) => {
        $(impl From<Stopped> for $error {
            fn from(stopped: Stopped) -> Self {
                match stopped {
                    Stopped::Full(failure) => Self::Full(failure),
                    Stopped::Doubtful(failure) => Self::Doubtful(failure),
                }
            }
        })*
    };
}

stopped_becomes!(AppendError, SyncError, TruncateError);

/// Whether `batch` continues a log that ends at `tip`.
pub(crate) fn check_continues(tip: LogTip, batch: &Batch) -> Result<(), AppendError> {
    if batch.first() != tip.index {
        return Err(AppendError::Gap {
            expected: tip.index,
            found: batch.first(),
        });
    }
    if batch.term() < tip.term {
        return Err(AppendError::OldTerm {
            last: tip.term,
            found: batch.term(),
        });
    }
    Ok(())
}

/// Whether `wanted` is inside a log, its end included.
pub(crate) fn check_within(base: LogTip, tip: LogTip, wanted: LogIndex) -> Result<(), ReadError> {
    if wanted < base.index {
        return Err(ReadError::Dropped {
            wanted,
            first: base.index,
        });
    }
    if wanted > tip.index {
        return Err(ReadError::Beyond {
            wanted,
            end: tip.index,
        });
    }
    Ok(())
}
