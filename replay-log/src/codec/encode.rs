//! Writing entries.

use super::{
    ANSWER_CLOCK, ANSWER_ENTROPY, Base, CLOCK, CONSOLE, DISK, EXIT, EncodeError, FAR_REQUEST,
    FRAME, FRAME_FROM, FRAME_SKIP, HEADER, LONG_DELTA, MANY_ANSWERS, MANY_OUTPUTS, MARK,
    MAX_ANSWERS, MAX_CONFIG, MAX_CONSOLE, MAX_DISKS, MAX_ENTROPY, MAX_ENTRY, MAX_FRAME, OTHER,
    OUTPUT, SPECIAL, TERM, TIMER,
};
use crate::entry::{
    Answer, Arrival, DiskOutcome, Entry, GroupBody, GuestTime, Header, RequestNumber,
};
use crate::position::LogIndex;
use crate::varint::{put, zigzag};

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
