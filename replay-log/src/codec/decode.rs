//! Reading entries.

use bytes::Bytes;

use super::{
    ANSWER_CLOCK, ANSWER_ENTROPY, Base, CLOCK, CONSOLE, CUT, DISK, DecodeError, EXIT, EntryProblem,
    FAR_REQUEST, FRAME, FRAME_FROM, FRAME_SKIP, HEADER, LONG_DELTA, MANY_ANSWERS, MANY_OUTPUTS,
    MARK, MAX_ANSWERS, MAX_CONFIG, MAX_CONSOLE, MAX_DISKS, MAX_ENTROPY, MAX_ENTRY, MAX_FRAME,
    OUTPUT, SPECIAL, TERM, TIMER,
};
use crate::entry::{
    Answer, Arrival, DiskBase, DiskOutcome, Entry, FrameNumber, FrameSource, GatewayIncarnation,
    Group, GroupBody, GuestTime, Header, ImageDigest, Mark, MarkDigest, RequestNumber, TermChange,
    TimerId,
};
use crate::position::{LogIndex, Position, Term};
use crate::varint::{FieldError, FieldReader, unzigzag};

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
            outputs = u32::try_from(self.fields.number()?)
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
