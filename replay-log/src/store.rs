//! What every store of a log promises: append, sync, read from anywhere, cut back, drop the oldest.
//!
//! A store holds one unbroken stretch of one machine's log: from its *base* (the tip before its
//! first batch; the log's start unless retention dropped something) to its *tip*. The suite in
//! [`crate::conformance`] runs against every implementation.

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
    /// After a failed write the batch is not part of the log and the store takes nothing more.
    fn append(&mut self, batch: &Batch) -> Result<LogTip, AppendError>;

    /// Makes what was appended durable, unless the store was told never to. Returns the durable
    /// tip. After a failure nobody knows what the disk holds: the store takes nothing more.
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

    /// What retention dropped since this was last asked.
    fn take_dropped(&mut self) -> Dropped;

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

/// What retention dropped: whole oldest segments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dropped {
    /// How many segments.
    pub segments: u32,
    /// How many bytes they took.
    pub bytes: u64,
    /// How many entries they held.
    pub entries: u64,
    /// Why the last segment over the budget could not be dropped, if it could not.
    pub failed: Option<String>,
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

/// A store that failed and takes nothing more.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the log takes no more entries since it failed ({reason}); repair the disk and restart")]
pub struct Poisoned {
    /// The first failure.
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
    /// It could not be written or made durable; the store takes nothing more.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

/// Why the log could not be made durable.
#[derive(Debug, Error)]
pub enum SyncError {
    /// The store failed before.
    #[error(transparent)]
    Poisoned(#[from] Poisoned),
    /// The system refused; the store takes nothing more.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

/// Why the log cannot be read.
#[derive(Debug, Error)]
pub enum ReadError {
    /// Retention dropped it.
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
    /// The system refused; the store takes nothing more.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

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
