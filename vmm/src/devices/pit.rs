//! The 8254 interval timer of a PC, and port 0x61 that gates its third counter, as far as kernels
//! use them (Intel 82C54 data sheet, 231244). Its input runs at 1.193182 MHz of guest time.
//!
//! ```text
//!              control word               count complete
//!   any state ─────────────▶ Programmed ─────────────────▶ Counting ◀─┐ a new count
//!                                                             └───────┘
//!   counter 0, Counting:  one shot (modes 0, 1, 4, 5)   Armed ──due──▶ Done
//!                         periodic (modes 2, 3)         Armed ──due──▶ Ticked ──next exit──▶ Armed
//! ```
//!
//! A count that is read, or loaded, asks the time. Ticks are never lost: one that was late moves
//! the next by nothing. Counting in BCD is not offered: nobody asks for it.

use replay_log::{GuestTime, TimerId};

use super::clock::ask;
use crate::tape::{Command, Tape, TapeError};

/// The timer that counter 0 arms.
pub const PIT_TIMER: TimerId = TimerId(1);

/// Input clocks a second.
const HERTZ: u128 = 1_193_182;
const NANOS: u128 = 1_000_000_000;
/// What a count of 0 means.
const FULL: u32 = 0x1_0000;

/// Port 0x61: gate of counter 2, loudspeaker, refresh toggle, output of counter 2.
const GATE_2: u8 = 1;
const SPEAKER: u8 = 2;
const REFRESH: u8 = 0x10;
const OUT_2: u8 = 0x20;

/// Which bytes of a count an access moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bytes {
    Low,
    High,
    Both,
}

/// One counter.
#[derive(Clone, Debug)]
struct Counter {
    mode: u8,
    bytes: Bytes,
    /// The count it was loaded with, 1 to 65,536.
    reload: u32,
    /// When it was loaded; `None` until a count is complete.
    since: Option<GuestTime>,
    /// The low byte of a count whose high byte is still to be written.
    written_low: Option<u8>,
    /// The high byte of a count whose low byte was read.
    read_high: Option<u8>,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
}

impl Counter {
    const fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bytes: Bytes::Both,
            reload: FULL,
            since: None,
            written_low: None,
            read_high: None,
            latched: None,
            latched_status: None,
            gate,
        }
    }

    fn program(&mut self, mode: u8, bytes: Bytes) {
        *self = Self {
            mode,
            bytes,
            ..Self::new(self.gate)
        };
    }

    const fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Input clocks since the count was loaded.
    fn clocks(&self, now: GuestTime) -> u64 {
        let since = self.since.unwrap_or(now);
        let nanos = now.0.saturating_sub(since.0);
        (u128::from(nanos) * HERTZ / NANOS) as u64
    }

    /// The count that can be read now.
    fn count(&self, now: GuestTime) -> u16 {
        let reload = u64::from(self.reload);
        let clocks = self.clocks(now);
        let left = match self.mode {
            2 => reload - clocks % reload,
            3 => reload - clocks.wrapping_mul(2) % reload,
            _ => reload.wrapping_sub(clocks),
        };
        left as u16
    }

    /// The level of its output.
    fn out(&self, now: GuestTime) -> bool {
        let reload = u64::from(self.reload);
        let clocks = self.clocks(now);
        match self.mode {
            _ if self.since.is_none() => self.mode != 0,
            0 | 1 => clocks >= reload,
            2 => clocks % reload != reload - 1,
            3 => clocks % reload < reload.div_ceil(2),
            _ => clocks != reload,
        }
    }

    /// How long after `since` the `n`-th end of the count is.
    fn after(&self, n: u64) -> u64 {
        let clocks = u128::from(self.reload) * u128::from(n);
        u64::try_from((clocks * NANOS).div_ceil(HERTZ)).unwrap_or(u64::MAX)
    }

    fn latch_status(&mut self, now: GuestTime) {
        let bytes = match self.bytes {
            Bytes::Low => 1,
            Bytes::High => 2,
            Bytes::Both => 3,
        };
        let status = u8::from(self.out(now)) << 7
            | u8::from(self.since.is_none()) << 6
            | bytes << 4
            | self.mode << 1;
        self.latched_status.get_or_insert(status);
    }

    fn latch(&mut self, now: GuestTime) {
        let count = self.count(now);
        self.latched.get_or_insert(count);
    }

    /// A byte of the count; the whole count once it is complete.
    fn write(&mut self, value: u8) -> Option<u16> {
        let value = u16::from(value);
        match (self.bytes, self.written_low.take()) {
            (Bytes::Low, _) => Some(value),
            (Bytes::High, _) => Some(value << 8),
            (Bytes::Both, Some(low)) => Some(value << 8 | u16::from(low)),
            (Bytes::Both, None) => {
                self.written_low = Some(value as u8);
                None
            }
        }
    }

    /// What was latched, if anything: the next byte that a read gets without asking the time.
    fn read_kept(&mut self) -> Option<u8> {
        self.latched_status
            .take()
            .or_else(|| self.read_high.take())
            .or_else(|| self.latched.take().map(|count| self.split(count)))
    }

    fn split(&mut self, count: u16) -> u8 {
        let [low, high] = count.to_le_bytes();
        match self.bytes {
            Bytes::Low => low,
            Bytes::High => high,
            Bytes::Both => {
                self.read_high = Some(high);
                low
            }
        }
    }

    fn digest(&self, hasher: &mut blake3::Hasher) {
        let kept = |byte: Option<u8>| byte.map_or([0, 0], |byte| [1, byte]);
        hasher.update(&[self.mode, self.bytes as u8, u8::from(self.gate)]);
        hasher.update(&self.reload.to_le_bytes());
        hasher.update(&self.since.map_or(u64::MAX, |at| at.0).to_le_bytes());
        for byte in [self.written_low, self.read_high, self.latched_status] {
            hasher.update(&kept(byte));
        }
        let latched = self.latched.map_or([0; 3], |count| {
            let [low, high] = count.to_le_bytes();
            [1, low, high]
        });
        hasher.update(&latched);
    }
}

/// Where counter 0 stands with its interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ticks {
    /// None are to come.
    None,
    /// The timer is armed for the end of this period, counted from 1.
    Armed(u64),
    /// This period has ended; the timer is armed for the next at the next exit.
    Ticked(u64),
}

/// The three counters and port 0x61.
#[derive(Debug)]
pub struct Pit {
    counters: [Counter; 3],
    ticks: Ticks,
    speaker: bool,
    refresh: bool,
}

impl Pit {
    /// As a PC's firmware leaves it: counter 0 runs freely, as a square wave (kernels read it for
    /// entropy long before they program it), and interrupts nobody.
    pub const fn new() -> Self {
        Self {
            counters: [
                Counter {
                    mode: 3,
                    since: Some(GuestTime(0)),
                    ..Counter::new(true)
                },
                Counter::new(true),
                Counter::new(false),
            ],
            ticks: Ticks::None,
            speaker: false,
            refresh: false,
        }
    }

    /// The guest reads counter 0, 1 or 2; the control port (3) cannot be read.
    pub fn read(&mut self, port: u8, tape: &mut dyn Tape) -> Result<u8, TapeError> {
        let Some(counter) = self.counters.get_mut(usize::from(port)) else {
            return Ok(0xff);
        };
        if let Some(byte) = counter.read_kept() {
            return Ok(byte);
        }
        let count = counter.count(ask(tape)?);
        Ok(counter.split(count))
    }

    /// The guest writes counter 0, 1 or 2, or the control port (3).
    pub fn write(&mut self, port: u8, value: u8, tape: &mut dyn Tape) -> Result<(), TapeError> {
        let Some(counter) = self.counters.get_mut(usize::from(port)) else {
            return self.control(value, tape);
        };
        let Some(count) = counter.write(value) else {
            return Ok(());
        };
        counter.reload = match count {
            0 => FULL,
            count => count.into(),
        };
        counter.since = Some(ask(tape)?);
        if port == 0 {
            self.arm(1, tape)?;
        }
        Ok(())
    }

    fn control(&mut self, value: u8, tape: &mut dyn Tape) -> Result<(), TapeError> {
        let select = usize::from(value >> 6);
        if select == 3 {
            return self.read_back(value, tape);
        }
        let bytes = match value >> 4 & 3 {
            0 => {
                let now = ask(tape)?;
                self.counters[select].latch(now);
                return Ok(());
            }
            1 => Bytes::Low,
            2 => Bytes::High,
            _ => Bytes::Both,
        };
        // Modes 2 and 3 are decoded from two bits.
        let mode = match value >> 1 & 7 {
            mode @ 0..=5 => mode,
            mode => mode & 3,
        };
        self.counters[select].program(mode, bytes);
        if select == 0 {
            self.disarm(tape)?;
        }
        Ok(())
    }

    /// The read-back command: both bits that ask for something are low-active.
    fn read_back(&mut self, value: u8, tape: &mut dyn Tape) -> Result<(), TapeError> {
        if value & 0x30 == 0x30 {
            return Ok(());
        }
        let now = ask(tape)?;
        for (n, counter) in self.counters.iter_mut().enumerate() {
            if value & 2 << n == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                counter.latch(now);
            }
            if value & 0x10 == 0 {
                counter.latch_status(now);
            }
        }
        Ok(())
    }

    /// The guest reads port 0x61.
    pub fn read_speaker(&mut self, tape: &mut dyn Tape) -> Result<u8, TapeError> {
        self.refresh = !self.refresh;
        let counter = &self.counters[2];
        let out = counter.since.is_some() && counter.out(ask(tape)?);
        let bits = [
            (counter.gate, GATE_2),
            (self.speaker, SPEAKER),
            (self.refresh, REFRESH),
            (out, OUT_2),
        ];
        let high = bits.into_iter().filter(|(high, _)| *high);
        Ok(high.fold(0, |all, (_, bit)| all | bit))
    }

    /// The guest writes port 0x61. A rising gate starts counter 2 anew.
    pub fn write_speaker(&mut self, value: u8, tape: &mut dyn Tape) -> Result<(), TapeError> {
        self.speaker = value & SPEAKER != 0;
        let counter = &mut self.counters[2];
        let rising = value & GATE_2 != 0 && !counter.gate;
        counter.gate = value & GATE_2 != 0;
        if rising && counter.since.is_some() {
            counter.since = Some(ask(tape)?);
        }
        Ok(())
    }

    fn arm(&mut self, period: u64, tape: &mut dyn Tape) -> Result<(), TapeError> {
        let counter = &self.counters[0];
        let deadline = counter
            .since
            .map(|since| GuestTime(since.0.saturating_add(counter.after(period))));
        self.ticks = Ticks::Armed(period);
        tape.command(Command::ArmTimer {
            timer: PIT_TIMER,
            deadline,
        })
    }

    fn disarm(&mut self, tape: &mut dyn Tape) -> Result<(), TapeError> {
        if std::mem::replace(&mut self.ticks, Ticks::None) == Ticks::None {
            return Ok(());
        }
        tape.command(Command::ArmTimer {
            timer: PIT_TIMER,
            deadline: None,
        })
    }

    /// Counter 0 has reached the end of its count: whether its output rises. News that crossed a
    /// new program is ignored.
    #[must_use]
    pub fn due(&mut self) -> bool {
        let Ticks::Armed(period) = self.ticks else {
            return false;
        };
        self.ticks = if self.counters[0].periodic() {
            Ticks::Ticked(period)
        } else {
            Ticks::None
        };
        true
    }

    /// What belongs to an exit: arms the timer for the next tick. An arrival cannot.
    pub fn exit(&mut self, tape: &mut dyn Tape) -> Result<(), TapeError> {
        match self.ticks {
            Ticks::Ticked(period) => self.arm(period + 1, tape),
            Ticks::None | Ticks::Armed(_) => Ok(()),
        }
    }

    /// Adds the state.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        for counter in &self.counters {
            counter.digest(hasher);
        }
        let (tag, period) = match self.ticks {
            Ticks::None => (0, 0),
            Ticks::Armed(period) => (1, period),
            Ticks::Ticked(period) => (2, period),
        };
        hasher.update(&[tag, u8::from(self.speaker), u8::from(self.refresh)]);
        hasher.update(&period.to_le_bytes());
    }
}

#[cfg(test)]
#[path = "pit_tests.rs"]
mod tests;
