//! How the entries of one batch are written: a tag byte, then deltas against the entries before.
//!
//! ```text
//! tag byte   kkk ddddd    kind, and how far the position went on (31: 31 + a number follows)
//!   0 clock    exit with one clock answer, no output      time delta
//!   1 output   exit with one output, no answer            -
//!   2 exit     any other exit                             shape, counts, answers
//!   3 frame    the next frame of the last gateway         bytes
//!   4 disk     a finished request                         outcome and number delta, hash if read
//!   5 other    a rarer arrival                            sub-kind, ...
//!   6 mark     a digest                                   8 bytes
//!   7 special  ddddd is 0 header, 1 term change, 2 cut (reserved)
//! ```
//!
//! The byte-level description is in the crate's README.md. Nothing is carried over from an
//! earlier batch. Every entry has exactly one encoding.

mod decode;
mod encode;

use thiserror::Error;

use crate::entry::{FrameNumber, FrameSource};
use crate::position::{LogIndex, Position};
use crate::varint::FieldError;
pub use decode::Entries;
pub use encode::EntryEncoder;

/// The version of everything this crate writes. Segments and streams begin with it.
pub const FORMAT_VERSION: u32 = 1;

/// The longest Ethernet frame an arrival can hold, in bytes.
pub const MAX_FRAME: usize = 64 << 10;
/// The most console bytes one arrival can hold.
pub const MAX_CONSOLE: usize = 64 << 10;
/// The most random bytes one answer can hold.
pub const MAX_ENTROPY: usize = 64 << 10;
/// The longest machine configuration a header can hold, in bytes.
pub const MAX_CONFIG: usize = 64 << 10;
/// The most disks a header can name.
pub const MAX_DISKS: usize = 64;
/// The most answers one exit can have.
pub const MAX_ANSWERS: usize = 4096;
/// The longest encoded entry, in bytes.
pub const MAX_ENTRY: usize = 256 << 10;

const CLOCK: u8 = 0;
const OUTPUT: u8 = 1;
const EXIT: u8 = 2;
const FRAME: u8 = 3;
const DISK: u8 = 4;
const OTHER: u8 = 5;
const MARK: u8 = 6;
const SPECIAL: u8 = 7;

const FRAME_FROM: u8 = 0;
const FRAME_SKIP: u8 = 1;
const TIMER: u8 = 2;
const CONSOLE: u8 = 3;

const HEADER: u8 = 0;
const TERM: u8 = 1;
const CUT: u8 = 2;

const ANSWER_CLOCK: u8 = 0;
const ANSWER_ENTROPY: u8 = 1;

/// The position delta that says "31 and a number".
const LONG_DELTA: u8 = 31;
/// In an exit's shape byte: "a number follows" for the outputs (low three bits) ...
const MANY_OUTPUTS: u8 = 7;
/// ... and for the answers (high five bits).
const MANY_ANSWERS: u8 = 31;
/// In a disk arrival: "the number's delta follows".
const FAR_REQUEST: u8 = 63;

/// Why an entry cannot be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EncodeError {
    /// Something in the entry is larger than the format allows.
    #[error("{what} of {found} is over the log's bound of {max}: it cannot be recorded")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its size.
        found: usize,
        /// The bound.
        max: usize,
    },
    /// The entry's position is before the last one's.
    #[error("an entry at position {at} cannot follow one at position {last}")]
    PositionBack {
        /// The entry's position.
        at: Position,
        /// The position of the entry before it in the batch.
        last: Position,
    },
    /// A header that is not the log's first entry.
    #[error("a header can only be entry 0 of a log, not entry {index}")]
    HeaderNotFirst {
        /// Where it would stand.
        index: LogIndex,
    },
    /// The batch holds as much as a batch can; finish it and push again.
    #[error("the batch is full: finish it and push the entry again")]
    BatchFull,
}

/// Why a batch's payload is not a sequence of entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("entry {index} (byte {offset} of its batch) cannot be read: {problem}")]
pub struct DecodeError {
    /// Which entry of the log.
    pub index: LogIndex,
    /// Where in the batch's payload it begins.
    pub offset: usize,
    /// What is wrong with it.
    #[source]
    pub problem: EntryProblem,
}

/// What is wrong with an encoded entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EntryProblem {
    /// A field is cut off, malformed or over its bound.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// A tag that this format version does not have.
    #[error("tag byte {0:#04x} has no meaning in format version {FORMAT_VERSION}")]
    UnknownTag(u8),
    /// A cut: the tag is reserved, its contents are of a later version.
    #[error(
        "it is a cut, which format version {FORMAT_VERSION} does not hold: use a newer version"
    )]
    Cut,
    /// A position beyond the largest.
    #[error("its position is beyond the largest one")]
    PositionOverflow,
    /// A header that is not the log's first entry.
    #[error("a header can only be entry 0 of a log")]
    HeaderNotFirst,
    /// A long form where the short one had to be used.
    #[error("it is not written in its one valid form")]
    NotCanonical,
    /// The payload goes on after the last entry.
    #[error("{0} bytes follow the batch's last entry")]
    Trailing(usize),
}

/// What the entries of a batch are relative to; all zero where a batch begins.
#[derive(Clone, Copy, Debug, Default)]
struct Base {
    at: Position,
    clock: u64,
    source: FrameSource,
    request: u64,
}

impl Base {
    /// The frame that needs no source bytes: the last gateway's next one.
    fn next_source(&self) -> FrameSource {
        FrameSource {
            gateway: self.source.gateway,
            number: FrameNumber(self.source.number.0.wrapping_add(1)),
        }
    }
}

#[cfg(test)]
mod tests;
