//! Time, as rarely as possible: reading the clock is an exit.

use smoltcp::time::Instant;

use super::ports;

/// The clock and the timer.
pub struct Clock {
    /// The last answer, milliseconds since power-on.
    now: u64,
    /// The deadline that the timer is armed with.
    armed: Option<u64>,
}

impl Clock {
    /// Reads the clock.
    pub fn new() -> Self {
        Self {
            now: u64::from(ports::clock_millis()),
            armed: None,
        }
    }

    /// Reads the clock. It wraps every 49 days and is read many times a day, as connections have
    /// timers.
    pub fn read(&mut self) {
        let passed = ports::clock_millis().wrapping_sub(self.now as u32);
        self.now += u64::from(passed);
        if self.armed.is_some_and(|deadline| deadline <= self.now) {
            self.armed = None;
        }
    }

    /// The time of the last reading.
    pub fn now(&self) -> Instant {
        Instant::from_millis(self.now.cast_signed())
    }

    /// Makes sure that something arrives at `deadline` at the latest. An earlier deadline that is
    /// armed already stays: waking too early is cheaper than arming anew every time.
    pub fn wake_by(&mut self, deadline: Instant) {
        // What is due now is due in a millisecond: the work of this turn is done.
        let deadline = deadline.total_millis().cast_unsigned().max(self.now + 1);
        if self.armed.is_none_or(|armed| deadline < armed) {
            ports::arm_timer(deadline);
            self.armed = Some(deadline);
        }
    }
}
