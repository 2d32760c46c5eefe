//! Power and idle: how a guest ends or waits.
//!
//! ```text
//!   Running ──idle port──▶ Idle ──anything arrives, or an interrupt is taken──▶ Running
//!      └──power port, or ACPI's registers──▶ Ended
//! ```
//!
//! An arrival may be delivered at any exit between a guest's last look at its queues and its
//! write to the idle port. A guest that writes a value other than 0 there does not wait in that
//! case, so it cannot oversleep.

use super::layout;
use crate::tape::GuestEnd;

/// PM1 control: ACPI is on, always (ACPI 6.5, table 4.13).
const SCI_ENABLED: u16 = 1;
/// PM1 control: enter the sleep state whose type is written beside it.
const SLEEP: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 10;

/// The power and the idle port, and ACPI's fixed registers.
#[derive(Debug, Default)]
pub struct Power {
    ended: Option<GuestEnd>,
    idle: bool,
    /// The last access of the guest was to the idle port: it has executed nothing that could
    /// have overlooked what arrives now.
    just_idled: bool,
    /// Something arrived behind the guest's back since it last wrote to the idle port.
    arrived: bool,
    /// PM1 enable. None of its events ever happens, but kernels read back what they enable.
    acpi_enabled: [u8; 2],
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

    /// A byte of ACPI's fixed registers, if it is there.
    pub const fn read_acpi(&self, port: u16) -> Option<u8> {
        match port {
            layout::ACPI_STATUS..layout::ACPI_ENABLE => Some(0),
            layout::ACPI_ENABLE => Some(self.acpi_enabled[0]),
            _ if port == layout::ACPI_ENABLE + 1 => Some(self.acpi_enabled[1]),
            layout::ACPI_CONTROL => Some(SCI_ENABLED as u8),
            _ if port == layout::ACPI_CONTROL + 1 => Some((SCI_ENABLED >> 8) as u8),
            _ => None,
        }
    }

    /// The guest writes PM1 enable.
    pub const fn write_acpi_enable(&mut self, value: [u8; 2]) {
        self.acpi_enabled = value;
    }

    /// The guest writes PM1 control.
    pub const fn write_acpi_control(&mut self, value: u16) {
        if value & SLEEP != 0 && value >> SLEEP_TYPE & 7 == layout::ACPI_OFF as u16 {
            self.ended = Some(GuestEnd::PowerOff);
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
            // The vCPU's own ends, which this device never has.
            Some(GuestEnd::Dead | GuestEnd::TripleFault | GuestEnd::Unrunnable { .. }) => 3,
        };
        hasher.update(&[
            ended,
            u8::from(self.idle),
            u8::from(self.just_idled),
            u8::from(self.arrived),
        ]);
        hasher.update(&self.acpi_enabled);
    }
}
