//! Batches: the unit in which the log is written, stored, sent and acknowledged.

use bytes::Bytes;
use thiserror::Error;

use crate::codec::{DecodeError, EncodeError, Entries, EntryEncoder};
use crate::entry::Entry;
use crate::position::{Chain, LogIndex, LogTip, Term};
use crate::varint::{self, FieldError, FieldReader};

/// A batch of this many bytes should be finished and sent, whoever waits or not.
pub const TARGET_BATCH: usize = 64 << 10;
/// The most bytes a batch's payload can have.
pub const MAX_BATCH: usize = 1 << 20;
/// The most entries a batch can have: bounds what decoding one allocates.
pub const MAX_ENTRIES: u32 = 1 << 16;
/// The longest frame: a full payload, its numbers, length and checksum.
pub const MAX_FRAME_LEN: usize = MAX_BODY + varint::MAX_VARINT + CRC_LEN;

const CRC_LEN: usize = 4;
const MAX_BODY: usize = MAX_BATCH + 3 * varint::MAX_VARINT;
/// Three one-byte numbers and one entry of one byte.
const MIN_BODY: usize = 4;

/// Some entries of the log, encoded. Immutable, never empty, ends at a group boundary, needs
/// nothing of the batches before it. Every copy stores and sends the same batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    term: Term,
    first: LogIndex,
    entries: u32,
    payload: Bytes,
}

/// Why bytes are not the frame of a batch. There is no way to go on after one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The frame claims to be shorter or longer than a frame can be.
    #[error("a frame of {found} bytes is outside the bounds of {MIN_BODY} to {MAX_BODY}")]
    Length {
        /// The length it claims.
        found: u64,
    },
    /// The bytes are not the ones that were written.
    #[error("the frame's checksum is {found:#010x}, its bytes have {computed:#010x}")]
    Checksum {
        /// What the frame says.
        found: u32,
        /// What its bytes have.
        computed: u32,
    },
    /// A number in it is malformed or out of bounds.
    #[error("the frame's numbers cannot be read")]
    Field(#[from] FieldError),
    /// More entries than its bytes or the log's last index allow, or none.
    #[error("the frame claims {entries} entries from index {first}, which cannot be")]
    Entries {
        /// How many it claims.
        entries: u64,
        /// Where they would begin.
        first: LogIndex,
    },
}

impl Batch {
    /// The term under which it was written.
    pub fn term(&self) -> Term {
        self.term
    }

    /// Where it begins: the index of its first entry.
    pub fn first(&self) -> LogIndex {
        self.first
    }

    /// Where it ends: the index of the entry after its last.
    pub fn end(&self) -> LogIndex {
        self.first.plus(u64::from(self.entries))
    }

    /// How many entries it holds, at least 1.
    #[allow(clippy::len_without_is_empty, reason = "a batch is never empty")]
    pub fn len(&self) -> u32 {
        self.entries
    }

    /// The encoded entries.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Its entries, decoded one by one; ends after the first error.
    pub fn entries(&self) -> Entries {
        Entries::new(self.payload.clone(), self.first, self.entries)
    }

    /// All its entries. Byte strings in them are slices of the payload, not copies.
    pub fn decode(&self) -> Result<Vec<Entry>, DecodeError> {
        let mut entries = Vec::with_capacity(self.entries as usize);
        for entry in self.entries() {
            entries.push(entry?);
        }
        Ok(entries)
    }

    /// The chain after this batch: BLAKE3 over the chain before it, its term and first index (8
    /// bytes each, little endian) and its payload. Recomputed by every copy, never sent.
    pub fn chain(&self, previous: Chain) -> Chain {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&previous.0);
        hasher.update(&self.term.0.to_le_bytes());
        hasher.update(&self.first.0.to_le_bytes());
        hasher.update(&self.payload);
        Chain(*hasher.finalize().as_bytes())
    }

    /// The end of a log whose last batch this is.
    pub fn tip(&self, previous: Chain) -> LogTip {
        LogTip {
            term: self.term,
            index: self.end(),
            chain: self.chain(previous),
        }
    }

    /// Appends the batch in the form it has in segments and on streams: the length of what
    /// follows the checksum, CRC-32 (IEEE, little endian), term, first index, number of entries,
    /// payload.
    pub fn encode_frame(&self, out: &mut Vec<u8>) {
        let mut numbers = Vec::with_capacity(3 * varint::MAX_VARINT);
        varint::put(&mut numbers, self.term.0);
        varint::put(&mut numbers, self.first.0);
        varint::put(&mut numbers, u64::from(self.entries));
        let mut crc = crc32fast::Hasher::new();
        crc.update(&numbers);
        crc.update(&self.payload);
        let body = numbers.len() + self.payload.len();
        out.reserve(body + varint::MAX_VARINT + CRC_LEN);
        varint::put(out, body as u64);
        out.extend_from_slice(&crc.finalize().to_le_bytes());
        out.extend_from_slice(&numbers);
        out.extend_from_slice(&self.payload);
    }

    /// Reads the frame at the start of `input`: the batch and how many bytes it took, or `None`
    /// if more bytes are needed. Copies the payload; [`Batch::take_frame`] does not.
    pub fn decode_frame(input: &[u8]) -> Result<Option<(Self, usize)>, FrameError> {
        let Some(frame) = measure_frame(input)? else {
            return Ok(None);
        };
        let body = Bytes::copy_from_slice(frame.body(input));
        Ok(Some((Self::from_body(frame.crc, &body)?, frame.end)))
    }

    /// Takes the frame at the start of `input` off it: the batch, or `None` if more bytes are
    /// needed. The batch shares the memory of `input`.
    pub fn take_frame(input: &mut bytes::BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(frame) = measure_frame(input)? else {
            return Ok(None);
        };
        let body = input.split_to(frame.end).freeze().slice(frame.start..);
        Self::from_body(frame.crc, &body).map(Some)
    }

    fn from_body(crc: u32, body: &Bytes) -> Result<Self, FrameError> {
        let computed = crc32fast::hash(body);
        if computed != crc {
            return Err(FrameError::Checksum {
                found: crc,
                computed,
            });
        }
        let mut fields = FieldReader::new(body, 0);
        let term = Term(fields.number()?);
        let first = LogIndex(fields.number()?);
        let entries = fields.number()?;
        let payload = body.slice(fields.offset()..);
        let fits = (1..=u64::from(MAX_ENTRIES)).contains(&entries)
            && entries <= payload.len() as u64
            && payload.len() <= MAX_BATCH
            && first.0.checked_add(entries).is_some();
        if !fits {
            return Err(FrameError::Entries { entries, first });
        }
        Ok(Self {
            term,
            first,
            entries: entries as u32,
            payload,
        })
    }
}

/// Where a complete frame's parts are.
struct FrameExtent {
    crc: u32,
    start: usize,
    end: usize,
}

impl FrameExtent {
    fn body<'a>(&self, input: &'a [u8]) -> &'a [u8] {
        input.get(self.start..self.end).unwrap_or_default()
    }
}

fn measure_frame(input: &[u8]) -> Result<Option<FrameExtent>, FrameError> {
    let (found, prefix) = match varint::get(input) {
        Ok(read) => read,
        Err(FieldError::Short) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if !(MIN_BODY as u64..=MAX_BODY as u64).contains(&found) {
        return Err(FrameError::Length { found });
    }
    let start = prefix + CRC_LEN;
    let end = start + found as usize;
    let crc = input.get(prefix..).and_then(<[u8]>::first_chunk);
    Ok(match crc {
        Some(crc) if input.len() >= end => Some(FrameExtent {
            crc: u32::from_le_bytes(*crc),
            start,
            end,
        }),
        _ => None,
    })
}

/// Collects entries until they are to be sent.
#[derive(Debug)]
pub struct BatchBuilder {
    term: Term,
    first: LogIndex,
    entries: u32,
    encoder: EntryEncoder,
    payload: Vec<u8>,
}

impl BatchBuilder {
    /// A builder whose first batch begins at `first`.
    pub fn new(term: Term, first: LogIndex) -> Self {
        Self {
            term,
            first,
            entries: 0,
            encoder: EntryEncoder::default(),
            payload: Vec::new(),
        }
    }

    /// Adds an entry; says where the log ends after it. After an error the batch is as before.
    ///
    /// Fails for entries that the log cannot hold, and with [`EncodeError::BatchFull`] for a
    /// batch that was not finished long after [`TARGET_BATCH`].
    pub fn push(&mut self, entry: &Entry) -> Result<LogIndex, EncodeError> {
        if self.entries == MAX_ENTRIES {
            return Err(EncodeError::BatchFull);
        }
        let (encoder, len) = (self.encoder, self.payload.len());
        self.encoder.encode(self.end(), entry, &mut self.payload)?;
        if self.payload.len() > MAX_BATCH {
            self.encoder = encoder;
            self.payload.truncate(len);
            return Err(EncodeError::BatchFull);
        }
        self.entries += 1;
        Ok(self.end())
    }

    /// Whether there is nothing to finish.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// How many bytes the payload has so far.
    pub fn bytes(&self) -> usize {
        self.payload.len()
    }

    /// Where the log ends after what was pushed so far.
    pub fn end(&self) -> LogIndex {
        self.first.plus(u64::from(self.entries))
    }

    /// The batch of all that was pushed since the last one, or `None` if nothing was. The builder
    /// goes on at its end, under the same term.
    pub fn finish(&mut self) -> Option<Batch> {
        if self.is_empty() {
            return None;
        }
        // Copied, so that the batch has no spare capacity and the builder keeps its buffer.
        let batch = Batch {
            term: self.term,
            first: self.first,
            entries: self.entries,
            payload: Bytes::copy_from_slice(&self.payload),
        };
        self.first = batch.end();
        self.entries = 0;
        self.encoder = EntryEncoder::default();
        self.payload.clear();
        Some(batch)
    }

    /// Goes on under another term.
    ///
    /// # Panics
    /// If entries wait to be finished: a batch has one term.
    pub fn set_term(&mut self, term: Term) {
        assert!(self.is_empty(), "the term changes only between batches");
        self.term = term;
    }
}
