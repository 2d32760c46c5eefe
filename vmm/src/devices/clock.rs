//! Clock and entropy: what only the outside knows.

use replay_log::{Answer, GuestTime};

use crate::tape::{Query, Tape, TapeError};

const NANOS_PER_MILLI: u64 = 1_000_000;

/// In a short answer: the bits above the 31 that it has are not those that the guest knows.
const STALE: u32 = 1 << 31;

/// The clock. It remembers the time that it told last, and what the guest knows of its high bits:
/// nearly always a guest needs the low ones only, and one exit instead of two.
#[derive(Debug, Default)]
pub struct Clock {
    latched_high: u32,
    /// The time that was read in two halves last, without its 31 low bits.
    known: u64,
    told: GuestTime,
}

impl Clock {
    /// Asks the time: the low half of the nanoseconds; latches the high half.
    pub fn read_low(&mut self, tape: &mut dyn Tape) -> Result<u32, TapeError> {
        let nanos = self.tell(tape)?;
        self.latched_high = (nanos >> 32) as u32;
        self.known = nanos >> 31;
        Ok(nanos as u32)
    }

    /// Asks the time: its 31 low bits, and in the highest one whether the others have changed
    /// since they were read in two halves.
    pub fn read_short(&mut self, tape: &mut dyn Tape) -> Result<u32, TapeError> {
        let nanos = self.tell(tape)?;
        let stale = if nanos >> 31 == self.known { 0 } else { STALE };
        Ok(nanos as u32 & !STALE | stale)
    }

    /// The latched high half.
    pub const fn read_high(&self) -> u32 {
        self.latched_high
    }

    /// Asks the time: milliseconds, modulo 2^32.
    pub fn read_millis(&mut self, tape: &mut dyn Tape) -> Result<u32, TapeError> {
        Ok((self.tell(tape)? / NANOS_PER_MILLI) as u32)
    }

    fn tell(&mut self, tape: &mut dyn Tape) -> Result<u64, TapeError> {
        self.told = ask(tape)?;
        Ok(self.told.0)
    }

    /// The time that was told last.
    pub const fn told(&self) -> GuestTime {
        self.told
    }

    /// Adds the latch, what the guest knows, and what it was told.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.latched_high.to_le_bytes());
        hasher.update(&self.known.to_le_bytes());
        hasher.update(&self.told.0.to_le_bytes());
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
