//! What the run loop needs of a machine: execute to the next landmark, take what arrives, tell its
//! state. The KVM machine and the model machine implement it; a checkpointed machine will.

use replay_log::MarkDigest;
use thiserror::Error;

use crate::tape::{CpuState, Delivery, DigestKey, Sources, Tape, TapeError};

/// How far to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enter {
    /// To the next exit of a numbered kind.
    Run,
    /// The same, or to where an interrupt that waits can be injected: for a machine that nobody
    /// replays.
    RunAnywhere,
    /// Only until the I/O of the last exit is completed; the guest executes nothing beyond that
    /// instruction (which may itself bring further numbered exits: `rep movs`, 16-byte MMIO).
    Complete,
}

/// What came of entering the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entered {
    /// One exit of a numbered kind was served with the tape. The caller numbers it and closes its
    /// group; its I/O may be pending still.
    Exit,
    /// Nothing is pending any more (only after [`Enter::Complete`]).
    Settled,
    /// A kick took the vCPU out at no landmark (or, after [`Enter::RunAnywhere`], an interrupt can be
    /// injected here). Nothing happened that the guest can know of.
    Kicked,
}

/// How much a digest covers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DigestScope {
    /// FPU and MSRs too, not only general and system registers.
    pub deep: bool,
    /// Which pages of guest memory to add: `(first page, how many)`, in 4-KiB pages, wrapping
    /// around at the end of memory.
    pub scrub: (u64, u32),
    /// What it is keyed with.
    pub key: DigestKey,
}

/// A machine that stops at landmarks.
pub trait Machine {
    /// Enters the guest. Exits are served inside, with the tape.
    fn enter(&mut self, how: Enter, tape: &mut dyn Tape) -> Result<Entered, MachineError>;

    /// What the vCPU can do now.
    fn cpu(&self) -> CpuState;

    /// What can be delivered now.
    fn can_take(&self) -> Sources;

    /// Takes an arrival. Called with pending I/O completed, and only for what
    /// [`Machine::can_take`] allows.
    fn deliver(&mut self, delivery: Delivery) -> Result<(), MachineError>;

    /// Whether an interrupt is waiting that the interrupt controller would let through. Cheap.
    fn interrupt_waits(&self) -> bool;

    /// Injects the waiting interrupt if the vCPU is ready for it now; otherwise leaves it for a
    /// later landmark. Called with pending I/O completed. Says whether it injected.
    fn inject(&mut self) -> Result<bool, MachineError>;

    /// The canonical digest of the state, and of the exits since the last call, which it
    /// forgets. Called with pending I/O completed.
    fn digest(&mut self, scope: DigestScope) -> Result<MarkDigest, MachineError>;
}

/// Why a machine cannot go on. Never an event of the guest.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The tape refused.
    #[error(transparent)]
    Tape(#[from] TapeError),
    /// KVM or the host failed (internal error, failed entry, memory fault, a refused ioctl).
    #[error("the host failed the machine while {doing}: {reason}")]
    Host {
        /// What was being done.
        doing: &'static str,
        /// What came back.
        reason: String,
    },
    /// The log asks for something the machine cannot take at this landmark. The run loop, which
    /// knows the landmark, makes a divergence of it.
    #[error("the machine cannot take {what} here: the log is not of this machine")]
    CannotTake {
        /// What was to be delivered.
        what: String,
    },
}
