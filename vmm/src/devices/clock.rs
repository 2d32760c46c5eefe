//! Clock and entropy: what only the outside knows.

use replay_log::{Answer, GuestTime};

use crate::tape::{Query, Tape, TapeError};

const NANOS_PER_MILLI: u64 = 1_000_000;

/// The clock. It remembers the high half of the last time that was read in two halves.
#[derive(Debug, Default)]
pub struct Clock {
    latched_high: u32,
}

impl Clock {
    /// Asks the time: the low half of the nanoseconds; latches the high half.
    pub fn read_low(&mut self, tape: &mut dyn Tape) -> Result<u32, TapeError> {
        let GuestTime(nanos) = ask(tape)?;
        self.latched_high = (nanos >> 32) as u32;
        Ok(nanos as u32)
    }

    /// The latched high half.
    pub const fn read_high(&self) -> u32 {
        self.latched_high
    }

    /// Asks the time: milliseconds, modulo 2^32.
    pub fn read_millis(tape: &mut dyn Tape) -> Result<u32, TapeError> {
        let GuestTime(nanos) = ask(tape)?;
        Ok((nanos / NANOS_PER_MILLI) as u32)
    }

    /// Adds the latch.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.latched_high.to_le_bytes());
    }
}

/// Asks the time.
pub(super) fn ask(tape: &mut dyn Tape) -> Result<GuestTime, TapeError> {
    match tape.answer(Query::Clock)? {
        Answer::Clock(time) => Ok(time),
        other @ Answer::Entropy(_) => Err(wrong_answer("the time", &other)),
    }
}

/// Fills `data` (at most a few bytes) with random bits.
pub fn read_entropy(data: &mut [u8], tape: &mut dyn Tape) -> Result<(), TapeError> {
    let wanted = data.len() as u32;
    match tape.answer(Query::Entropy(wanted))? {
        Answer::Entropy(bytes) if bytes.len() == data.len() => {
            data.copy_from_slice(&bytes);
            Ok(())
        }
        other => Err(wrong_answer("random bytes", &other)),
    }
}

pub(super) fn wrong_answer(asked: &str, got: &Answer) -> TapeError {
    TapeError::Host {
        reason: format!("a device asked for {asked} and the tape answered {got:?}"),
    }
}
