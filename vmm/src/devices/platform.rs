//! All devices of a machine behind one bus.

use crate::GuestMemory;
use crate::config::MachineConfig;
use crate::machine::MachineError;
use crate::tape::{CpuState, Delivery, GuestEnd, Sources, Tape, TapeError};

/// Which address space an access goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Port I/O.
    Port,
    /// Memory-mapped I/O.
    Mmio,
}

/// The devices of one machine.
pub struct Platform {}

impl Platform {
    /// The devices that `config` asks for, as they are at power-on.
    pub fn new(_config: &MachineConfig) -> Self {
        todo!()
    }

    /// The guest reads. Unclaimed addresses read as all ones.
    pub fn read(
        &mut self,
        _space: Space,
        _address: u64,
        _data: &mut [u8],
        _memory: &GuestMemory,
        _tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        todo!()
    }

    /// The guest writes. Writes to unclaimed addresses are ignored.
    pub fn write(
        &mut self,
        _space: Space,
        _address: u64,
        _data: &[u8],
        _memory: &GuestMemory,
        _tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        todo!()
    }

    /// Takes an arrival; ends the idle state.
    pub fn deliver(
        &mut self,
        _delivery: Delivery,
        _memory: &GuestMemory,
    ) -> Result<(), MachineError> {
        todo!()
    }

    /// What can be delivered now.
    pub fn can_take(&self, _memory: &GuestMemory) -> Sources {
        todo!()
    }

    /// Whether the guest waits at the idle port.
    pub fn idle(&self) -> bool {
        todo!()
    }

    /// How the guest ended itself through the power port, if it did.
    pub fn ended(&self) -> Option<GuestEnd> {
        let _ = CpuState::Idle;
        todo!()
    }

    /// Whether the interrupt controller has an interrupt for the CPU.
    pub fn interrupt_waits(&self) -> bool {
        todo!()
    }

    /// Acknowledges the waiting interrupt: its vector.
    pub fn acknowledge_interrupt(&mut self) -> u8 {
        todo!()
    }

    /// Adds the state of all devices.
    pub fn digest(&self, _hasher: &mut blake3::Hasher) {
        todo!()
    }
}
