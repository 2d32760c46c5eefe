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

use bytes::Bytes;
use thiserror::Error;

use crate::entry::{
    Answer, Arrival, DiskBase, DiskOutcome, Entry, FrameNumber, FrameSource, GatewayIncarnation,
    Group, GroupBody, GuestTime, Header, ImageDigest, Mark, MarkDigest, RequestNumber, TermChange,
    TimerId,
};
use crate::position::{LogIndex, Position, Term};
use crate::varint::{FieldError, FieldReader, put, unzigzag, zigzag};

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

/// Writes the entries of one batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct EntryEncoder {
    base: Base,
}

impl EntryEncoder {
    /// Appends an entry that will be entry `index` of the log. After an error neither `out` nor
    /// the encoder has changed.
    pub fn encode(
        &mut self,
        index: LogIndex,
        entry: &Entry,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let (before, start) = (self.base, out.len());
        let done = self.write(index, entry, out).and_then(|()| {
            let len = out.len() - start;
            bounded("an encoded entry", len, MAX_ENTRY)
        });
        if done.is_err() {
            self.base = before;
            out.truncate(start);
        }
        done
    }

    fn write(
        &mut self,
        index: LogIndex,
        entry: &Entry,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let (at, last) = (entry.at(), self.base.at);
        let delta =
            at.0.checked_sub(last.0)
                .ok_or(EncodeError::PositionBack { at, last })?;
        self.base.at = at;
        match entry {
            Entry::Header(header) => {
                if index != LogIndex::START {
                    return Err(EncodeError::HeaderNotFirst { index });
                }
                out.push(SPECIAL << 5 | HEADER);
                put_header(header, out)?;
            }
            Entry::Term(change) => {
                out.push(SPECIAL << 5 | TERM);
                put(out, delta);
                put(out, change.term.0);
            }
            Entry::Mark(mark) => {
                put_tag(MARK, delta, out);
                out.extend_from_slice(&mark.digest.0.to_le_bytes());
            }
            Entry::Group(group) => match &group.body {
                GroupBody::Exit { answers, outputs } => {
                    self.write_exit(delta, answers, *outputs, out)?;
                }
                GroupBody::Arrival(arrival) => self.write_arrival(delta, arrival, out)?,
            },
        }
        Ok(())
    }

    fn write_exit(
        &mut self,
        delta: u64,
        answers: &[Answer],
        outputs: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        match (answers, outputs) {
            ([Answer::Clock(time)], 0) => {
                put_tag(CLOCK, delta, out);
                self.put_clock(*time, out);
                return Ok(());
            }
            ([], 1) => {
                put_tag(OUTPUT, delta, out);
                return Ok(());
            }
            _ => {}
        }
        bounded("the answers of one exit", answers.len(), MAX_ANSWERS)?;
        put_tag(EXIT, delta, out);
        let few_outputs = outputs.min(u32::from(MANY_OUTPUTS)) as u8;
        let few_answers = answers.len().min(usize::from(MANY_ANSWERS)) as u8;
        out.push(few_answers << 3 | few_outputs);
        if few_outputs == MANY_OUTPUTS {
            put(out, u64::from(outputs - u32::from(MANY_OUTPUTS)));
        }
        if few_answers == MANY_ANSWERS {
            put(out, (answers.len() - usize::from(MANY_ANSWERS)) as u64);
        }
        for answer in answers {
            match answer {
                Answer::Clock(time) => {
                    out.push(ANSWER_CLOCK);
                    self.put_clock(*time, out);
                }
                Answer::Entropy(bytes) => {
                    out.push(ANSWER_ENTROPY);
                    put_bytes("random bytes", bytes, MAX_ENTROPY, out)?;
                }
            }
        }
        Ok(())
    }

    fn write_arrival(
        &mut self,
        delta: u64,
        arrival: &Arrival,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        match arrival {
            Arrival::Frame { source, bytes } => {
                if *source == self.base.next_source() {
                    put_tag(FRAME, delta, out);
                } else if source.gateway == self.base.source.gateway {
                    put_tag(OTHER, delta, out);
                    out.push(FRAME_SKIP);
                    put(out, source.number.0.wrapping_sub(self.base.source.number.0));
                } else {
                    put_tag(OTHER, delta, out);
                    out.push(FRAME_FROM);
                    put(out, source.gateway.0);
                    put(out, source.number.0);
                }
                self.base.source = *source;
                put_bytes("a frame", bytes, MAX_FRAME, out)?;
            }
            Arrival::DiskDone { request, outcome } => {
                put_tag(DISK, delta, out);
                self.put_disk(*request, *outcome, out);
            }
            Arrival::TimerDue { timer } => {
                put_tag(OTHER, delta, out);
                out.extend_from_slice(&[TIMER, timer.0]);
            }
            Arrival::Console { bytes } => {
                put_tag(OTHER, delta, out);
                out.push(CONSOLE);
                put_bytes("console bytes", bytes, MAX_CONSOLE, out)?;
            }
        }
        Ok(())
    }

    /// Time only goes on, so the delta is small; should it ever go back, the wrapped delta still
    /// says exactly that.
    fn put_clock(&mut self, time: GuestTime, out: &mut Vec<u8>) {
        put(out, time.0.wrapping_sub(self.base.clock));
        self.base.clock = time.0;
    }

    fn put_disk(&mut self, request: RequestNumber, outcome: DiskOutcome, out: &mut Vec<u8>) {
        let step = zigzag(
            request
                .0
                .wrapping_sub(self.base.request)
                .wrapping_sub(1)
                .cast_signed(),
        );
        self.base.request = request.0;
        let near = step.min(u64::from(FAR_REQUEST)) as u8;
        let code = match outcome {
            DiskOutcome::Written => 0,
            DiskOutcome::Flushed => 1,
            DiskOutcome::Read { .. } => 2,
        };
        out.push(near << 2 | code);
        if near == FAR_REQUEST {
            put(out, step - u64::from(FAR_REQUEST));
        }
        if let DiskOutcome::Read { hash } = outcome {
            out.extend_from_slice(&hash.to_le_bytes());
        }
    }
}

fn bounded(what: &'static str, found: usize, max: usize) -> Result<(), EncodeError> {
    if found > max {
        return Err(EncodeError::TooLong { what, found, max });
    }
    Ok(())
}

fn put_tag(kind: u8, delta: u64, out: &mut Vec<u8>) {
    if delta < u64::from(LONG_DELTA) {
        out.push(kind << 5 | delta as u8);
    } else {
        out.push(kind << 5 | LONG_DELTA);
        put(out, delta - u64::from(LONG_DELTA));
    }
}

fn put_bytes(
    what: &'static str,
    bytes: &[u8],
    max: usize,
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    bounded(what, bytes.len(), max)?;
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
    Ok(())
}

fn put_header(header: &Header, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    bounded("the list of disks", header.disks.len(), MAX_DISKS)?;
    put(out, u64::from(header.machine_model));
    out.extend_from_slice(&header.image.0);
    put_bytes("the configuration", &header.config, MAX_CONFIG, out)?;
    put(out, header.disks.len() as u64);
    for disk in &header.disks {
        out.extend_from_slice(&disk.digest);
        put(out, disk.size);
    }
    put(out, header.term.0);
    out.extend_from_slice(&header.boot);
    Ok(())
}

/// Reads the entries of one batch, one after the other. Byte strings are slices of the payload.
#[derive(Clone, Debug)]
pub struct Entries {
    payload: Bytes,
    offset: usize,
    index: LogIndex,
    left: u32,
    base: Base,
}

impl Entries {
    /// The entries of a payload that begins at `first` and is said to hold `count`.
    pub(crate) fn new(payload: Bytes, first: LogIndex, count: u32) -> Self {
        Self {
            payload,
            offset: 0,
            index: first,
            left: count,
            base: Base::default(),
        }
    }

    fn error(&mut self, problem: EntryProblem) -> DecodeError {
        self.left = 0;
        // What follows cannot be understood: the iterator ends after its first error.
        let offset = std::mem::replace(&mut self.offset, self.payload.len());
        DecodeError {
            index: self.index,
            offset,
            problem,
        }
    }

    fn read(&self) -> Result<(Entry, Base, usize), EntryProblem> {
        let mut decoder = EntryDecoder {
            fields: FieldReader::new(&self.payload, self.offset),
            base: self.base,
        };
        let entry = decoder.entry(self.index)?;
        let end = decoder.fields.offset();
        let len = end - self.offset;
        if len > MAX_ENTRY {
            return Err(EntryProblem::Field(FieldError::TooLong {
                what: "an encoded entry",
                found: len as u64,
                max: MAX_ENTRY as u64,
            }));
        }
        Ok((entry, decoder.base, end))
    }
}

impl Iterator for Entries {
    type Item = Result<Entry, DecodeError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            let trailing = self.payload.len() - self.offset;
            return (trailing > 0).then(|| Err(self.error(EntryProblem::Trailing(trailing))));
        }
        match self.read() {
            Ok((entry, base, offset)) => {
                self.base = base;
                self.offset = offset;
                self.index = self.index.plus(1);
                self.left -= 1;
                Some(Ok(entry))
            }
            Err(problem) => Some(Err(self.error(problem))),
        }
    }
}

struct EntryDecoder<'a> {
    fields: FieldReader<'a>,
    base: Base,
}

impl EntryDecoder<'_> {
    fn entry(&mut self, index: LogIndex) -> Result<Entry, EntryProblem> {
        let tag = self.fields.byte()?;
        let (kind, low) = (tag >> 5, tag & 31);
        if kind == SPECIAL {
            return self.special(index, tag, low);
        }
        let at = if low == LONG_DELTA {
            let more = self.fields.number()?;
            let delta = more.checked_add(u64::from(LONG_DELTA));
            self.advance(delta.ok_or(EntryProblem::PositionOverflow)?)?
        } else {
            self.advance(u64::from(low))?
        };
        let body = match kind {
            MARK => {
                let digest = MarkDigest(u64::from_le_bytes(self.fields.array()?));
                return Ok(Entry::Mark(Mark { at, digest }));
            }
            CLOCK => GroupBody::Exit {
                answers: vec![self.clock()?],
                outputs: 0,
            },
            OUTPUT => GroupBody::Exit {
                answers: Vec::new(),
                outputs: 1,
            },
            EXIT => self.exit()?,
            FRAME => {
                self.base.source = self.base.next_source();
                GroupBody::Arrival(self.frame()?)
            }
            DISK => GroupBody::Arrival(self.disk()?),
            _ => GroupBody::Arrival(self.other()?),
        };
        Ok(Entry::Group(Group { at, body }))
    }

    fn advance(&mut self, delta: u64) -> Result<Position, EntryProblem> {
        let at = self.base.at.0.checked_add(delta);
        self.base.at = Position(at.ok_or(EntryProblem::PositionOverflow)?);
        Ok(self.base.at)
    }

    fn special(&mut self, index: LogIndex, tag: u8, low: u8) -> Result<Entry, EntryProblem> {
        match low {
            HEADER if index != LogIndex::START => Err(EntryProblem::HeaderNotFirst),
            HEADER => Ok(Entry::Header(self.header()?)),
            TERM => {
                let delta = self.fields.number()?;
                let at = self.advance(delta)?;
                let term = Term(self.fields.number()?);
                Ok(Entry::Term(TermChange { at, term }))
            }
            CUT => Err(EntryProblem::Cut),
            _ => Err(EntryProblem::UnknownTag(tag)),
        }
    }

    fn clock(&mut self) -> Result<Answer, EntryProblem> {
        self.base.clock = self.base.clock.wrapping_add(self.fields.number()?);
        Ok(Answer::Clock(GuestTime(self.base.clock)))
    }

    fn exit(&mut self) -> Result<GroupBody, EntryProblem> {
        let shape = self.fields.byte()?;
        let mut outputs = u32::from(shape & 7);
        if shape & 7 == MANY_OUTPUTS {
            let more = self
                .fields
                .bounded("the outputs of one exit", u32::MAX as usize)?;
            outputs = u32::try_from(more)
                .ok()
                .and_then(|more| more.checked_add(outputs))
                .ok_or(FieldError::BadNumber)?;
        }
        let mut count = usize::from(shape >> 3);
        if shape >> 3 == MANY_ANSWERS {
            count += self.fields.bounded(
                "the answers of one exit",
                MAX_ANSWERS - usize::from(MANY_ANSWERS),
            )?;
        }
        let mut answers = Vec::with_capacity(count);
        for _ in 0..count {
            answers.push(match self.fields.byte()? {
                ANSWER_CLOCK => self.clock()?,
                ANSWER_ENTROPY => Answer::Entropy(self.fields.bytes("random bytes", MAX_ENTROPY)?),
                unknown => return Err(EntryProblem::UnknownTag(unknown)),
            });
        }
        match (answers.as_slice(), outputs) {
            ([Answer::Clock(_)], 0) | ([], 1) => Err(EntryProblem::NotCanonical),
            _ => Ok(GroupBody::Exit { answers, outputs }),
        }
    }

    /// The bytes of a frame whose source is already in the base.
    fn frame(&mut self) -> Result<Arrival, EntryProblem> {
        Ok(Arrival::Frame {
            source: self.base.source,
            bytes: self.fields.bytes("a frame", MAX_FRAME)?,
        })
    }

    fn disk(&mut self) -> Result<Arrival, EntryProblem> {
        let byte = self.fields.byte()?;
        let mut step = u64::from(byte >> 2);
        if byte >> 2 == FAR_REQUEST {
            step = step
                .checked_add(self.fields.number()?)
                .ok_or(FieldError::BadNumber)?;
        }
        let step = unzigzag(step).cast_unsigned().wrapping_add(1);
        self.base.request = self.base.request.wrapping_add(step);
        let outcome = match byte & 3 {
            0 => DiskOutcome::Written,
            1 => DiskOutcome::Flushed,
            2 => DiskOutcome::Read {
                hash: u64::from_le_bytes(self.fields.array()?),
            },
            _ => return Err(EntryProblem::UnknownTag(byte)),
        };
        Ok(Arrival::DiskDone {
            request: RequestNumber(self.base.request),
            outcome,
        })
    }

    fn other(&mut self) -> Result<Arrival, EntryProblem> {
        match self.fields.byte()? {
            FRAME_FROM => {
                let source = FrameSource {
                    gateway: GatewayIncarnation(self.fields.number()?),
                    number: FrameNumber(self.fields.number()?),
                };
                if source.gateway == self.base.source.gateway {
                    return Err(EntryProblem::NotCanonical);
                }
                self.base.source = source;
                self.frame()
            }
            FRAME_SKIP => {
                let step = self.fields.number()?;
                if step == 1 {
                    return Err(EntryProblem::NotCanonical);
                }
                let number = &mut self.base.source.number.0;
                *number = number.wrapping_add(step);
                self.frame()
            }
            TIMER => Ok(Arrival::TimerDue {
                timer: TimerId(self.fields.byte()?),
            }),
            CONSOLE => Ok(Arrival::Console {
                bytes: self.fields.bytes("console bytes", MAX_CONSOLE)?,
            }),
            unknown => Err(EntryProblem::UnknownTag(unknown)),
        }
    }

    fn header(&mut self) -> Result<Header, EntryProblem> {
        let fields = &mut self.fields;
        let machine_model = u32::try_from(fields.number()?).map_err(|_| FieldError::BadNumber)?;
        let image = ImageDigest(fields.array()?);
        let config = fields.bytes("the configuration", MAX_CONFIG)?;
        let count = fields.bounded("the list of disks", MAX_DISKS)?;
        let disks = (0..count)
            .map(|_| {
                Ok(DiskBase {
                    digest: fields.array()?,
                    size: fields.number()?,
                })
            })
            .collect::<Result<_, FieldError>>()?;
        Ok(Header {
            machine_model,
            image,
            config,
            disks,
            term: Term(fields.number()?),
            boot: fields.array()?,
        })
    }
}

#[cfg(test)]
mod tests;
