//! Timer 0: one shot, armed by the guest with a deadline in guest time.
//!
//! ```text
//!   Off ──arm──▶ Armed ──TimerDue──▶ Due (line high) ──arm──▶ Armed
//!    ▲             │                   │
//!    └──disarm─────┴───────disarm──────┘
//! ```

use replay_log::{GuestTime, TimerId};

use crate::tape::{Command, Tape, TapeError};

/// The only timer.
pub const TIMER: TimerId = TimerId(0);

const NANOS_PER_MILLI: u64 = 1_000_000;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Off,
    Armed(GuestTime),
    Due,
}

/// Timer 0.
#[derive(Debug, Default)]
pub struct Timer {
    /// The low half of the next deadline.
    low: u32,
    state: State,
}

impl Timer {
    /// Keeps the low half of a deadline in nanoseconds.
    pub const fn write_low(&mut self, low: u32) {
        self.low = low;
    }

    /// Arms with a deadline in nanoseconds.
    pub fn write_high(&mut self, high: u32, tape: &mut dyn Tape) -> Result<(), TapeError> {
        self.arm(u64::from(high) << 32 | u64::from(self.low), tape)
    }

    /// Arms with a deadline in milliseconds.
    pub fn write_millis(&mut self, millis: u32, tape: &mut dyn Tape) -> Result<(), TapeError> {
        self.arm(u64::from(millis) * NANOS_PER_MILLI, tape)
    }

    /// Arms with a distance in nanoseconds from the time that the clock has told last.
    pub fn write_distance(
        &mut self,
        distance: u32,
        told: GuestTime,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        let deadline = match distance {
            0 => 0,
            _ => told.0.saturating_add(distance.into()),
        };
        self.arm(deadline, tape)
    }

    fn arm(&mut self, nanos: u64, tape: &mut dyn Tape) -> Result<(), TapeError> {
        let deadline = (nanos != 0).then_some(GuestTime(nanos));
        self.state = deadline.map_or(State::Off, State::Armed);
        tape.command(Command::ArmTimer {
            timer: TIMER,
            deadline,
        })
    }

    /// The deadline has passed. A timer that is not armed any more stays as it is: the news and
    /// the guest's disarming may have crossed.
    pub fn due(&mut self) {
        if let State::Armed(_) = self.state {
            self.state = State::Due;
        }
    }

    /// The level of the interrupt line: high from the deadline until the timer is armed again or
    /// disarmed.
    pub fn line(&self) -> bool {
        self.state == State::Due
    }

    /// Adds the latch and the state.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        let (tag, deadline) = match self.state {
            State::Off => (0, 0),
            State::Armed(GuestTime(nanos)) => (1, nanos),
            State::Due => (2, 0),
        };
        hasher.update(&self.low.to_le_bytes());
        hasher.update(&[tag]);
        hasher.update(&deadline.to_le_bytes());
    }
}
