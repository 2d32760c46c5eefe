//! What a `KVM_RUN` came back with, decoded from the mapped run page.
//!
//! Exits of the numbered kinds ([`Exit`]) are landmarks: things the guest did. Everything else is
//! either no event at all (a signal) or a failure of the host ([`describe_failure`]).

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
    kvm_run,
};

/// Which way data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The guest reads.
    In,
    /// The guest writes.
    Out,
}

/// One exit of a numbered kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Port I/O; string forms come with more than one element.
    Port(PortAccess),
    /// An access to an address without memory, at most 8 bytes.
    Mmio {
        /// Guest-physical address.
        address: u64,
        /// Bytes, 1 to 8.
        len: usize,
        /// Whether the guest reads or writes.
        direction: Direction,
    },
    /// HLT.
    Halt,
    /// RDMSR or WRMSR of a register that is not on the list.
    Msr {
        /// The register's number.
        index: u32,
        /// What is written; 0 for reads.
        value: u64,
        /// RDMSR or WRMSR.
        direction: Direction,
    },
    /// A hypercall that KVM does not answer itself.
    Hypercall {
        /// Its number.
        number: u64,
    },
    /// A write to CR8 that lowers it.
    TaskPriority,
    /// A triple fault.
    Shutdown,
}

/// One `KVM_EXIT_IO`. Its data lie in the run area, behind the run page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes an element: 1, 2 or 4.
    pub size: usize,
    /// How many elements.
    pub count: usize,
    /// Whether the guest reads or writes.
    pub direction: Direction,
    /// Where the data are in the run area.
    pub(super) offset: usize,
}

/// Decodes a successful return of `KVM_RUN`; `None` if it was no exit of a numbered kind.
pub(super) fn decode(run: &kvm_run) -> Option<Exit> {
    let u = &run.__bindgen_anon_1;
    Some(match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the exit reason names the member of the union, all of it plain integers.
            let io = unsafe { u.io };
            Exit::Port(PortAccess {
                port: io.port,
                size: usize::from(io.size).max(1),
                count: io.count as usize,
                direction: direction(u32::from(io.direction) != KVM_EXIT_IO_IN),
                offset: usize::try_from(io.data_offset).ok()?,
            })
        }
        KVM_EXIT_MMIO => {
            // SAFETY: as above.
            let mmio = unsafe { u.mmio };
            Exit::Mmio {
                address: mmio.phys_addr,
                len: (mmio.len as usize).min(mmio.data.len()),
                direction: direction(mmio.is_write != 0),
            }
        }
        KVM_EXIT_HLT => Exit::Halt,
        KVM_EXIT_X86_RDMSR | KVM_EXIT_X86_WRMSR => {
            let write = run.exit_reason == KVM_EXIT_X86_WRMSR;
            // SAFETY: as above.
            let msr = unsafe { u.msr };
            Exit::Msr {
                index: msr.index,
                value: if write { msr.data } else { 0 },
                direction: direction(write),
            }
        }
        KVM_EXIT_HYPERCALL => Exit::Hypercall {
            // SAFETY: as above.
            number: unsafe { u.hypercall.nr },
        },
        KVM_EXIT_SET_TPR => Exit::TaskPriority,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        _ => return None,
    })
}

/// Where the guest was stopped for a debugger, if it was: no event of the guest either.
pub(super) fn stopped_at(run: &kvm_run) -> Option<u64> {
    if run.exit_reason != KVM_EXIT_DEBUG {
        return None;
    }
    // SAFETY: the exit reason names the member of the union, all of it plain integers.
    Some(unsafe { run.__bindgen_anon_1.debug.arch.pc })
}

/// Whether `KVM_RUN` came back without an event of the guest (a signal, in an old form).
/// An interrupt window is asked for only where no landmark comes of it.
pub(super) fn is_interrupted(run: &kvm_run) -> bool {
    matches!(run.exit_reason, KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN)
}

/// Everything KVM says about an exit that is a failure of the host.
pub(super) fn describe_failure(run: &kvm_run) -> String {
    let u = &run.__bindgen_anon_1;
    match run.exit_reason {
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the exit reason names the member of the union, all of it plain integers.
            let internal = unsafe { u.internal };
            let data = internal.data.get(..internal.ndata as usize).unwrap_or(&[]);
            let what = match internal.suberror {
                1 => " (an instruction that this KVM cannot emulate)",
                2 => " (two exceptions at once)",
                3 => " (an exit while an event was being delivered)",
                4 => " (an exit that this KVM does not expect)",
                _ => "",
            };
            format!(
                "KVM internal error, suberror {}{what}, data {data:x?}",
                internal.suberror
            )
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: as above.
            let entry = unsafe { u.fail_entry };
            format!(
                "the CPU refused to enter the guest, hardware reason {:#x}, CPU {}",
                entry.hardware_entry_failure_reason, entry.cpu
            )
        }
        KVM_EXIT_MEMORY_FAULT => {
            // SAFETY: as above.
            let fault = unsafe { u.memory_fault };
            format!(
                "guest memory could not be reached at {:#x}, {} bytes, flags {:#x}",
                fault.gpa, fault.size, fault.flags
            )
        }
        reason => format!("KVM came back with exit reason {reason}, which nobody asked for"),
    }
}

const fn direction(write: bool) -> Direction {
    if write { Direction::Out } else { Direction::In }
}
