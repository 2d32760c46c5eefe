//! Power and idle: how a guest ends or waits.
//!
//! ```text
//!   Running ──idle port──▶ Idle ──anything arrives, or an interrupt is taken──▶ Running
//!      └──power port──▶ Ended
//! ```
//!
//! An arrival may be delivered at any exit between a guest's last look at its queues and its
//! write to the idle port. A guest that writes a value other than 0 there does not wait in that
//! case, so it cannot oversleep.

use super::layout;
use crate::tape::GuestEnd;

/// The power and the idle port.
#[derive(Debug, Default)]
pub struct Power {
    ended: Option<GuestEnd>,
    idle: bool,
    /// The last access of the guest was to the idle port: it has executed nothing that could
    /// have overlooked what arrives now.
    just_idled: bool,
    /// Something arrived behind the guest's back since it last wrote to the idle port.
    arrived: bool,
}

impl Power {
    /// The guest accesses any device but the idle port.
    pub const fn accessed(&mut self) {
        self.just_idled = false;
    }

    /// The guest writes the power port.
    pub const fn write(&mut self, value: u32) {
        match value {
            layout::POWER_OFF => self.ended = Some(GuestEnd::PowerOff),
            layout::POWER_RESET => self.ended = Some(GuestEnd::Reset),
            _ => {}
        }
    }

    /// The guest writes the idle port. `careful`: not to wait if something has arrived since its
    /// last write there.
    pub const fn write_idle(&mut self, careful: bool) {
        self.idle = !(careful && self.arrived);
        self.arrived = false;
        self.just_idled = true;
    }

    /// Something arrives.
    pub const fn arrival(&mut self) {
        self.idle = false;
        self.arrived |= !self.just_idled;
    }

    /// An interrupt takes the guest out of its wait.
    pub const fn interrupted(&mut self) {
        self.idle = false;
    }

    /// Whether the guest waits.
    pub const fn idle(&self) -> bool {
        self.idle
    }

    /// How the guest ended itself, if it did.
    pub const fn ended(&self) -> Option<GuestEnd> {
        self.ended
    }

    /// Adds the state.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        let ended = match self.ended {
            None => 0,
            Some(GuestEnd::PowerOff) => 1,
            Some(GuestEnd::Reset) => 2,
            Some(GuestEnd::Dead) => 3,
            Some(GuestEnd::TripleFault) => 4,
        };
        hasher.update(&[
            ended,
            u8::from(self.idle),
            u8::from(self.just_idled),
            u8::from(self.arrived),
        ]);
    }
}
