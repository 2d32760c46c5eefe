//! What a `KVM_RUN` came back with, decoded from the mapped run page.
//!
//! Exits of the numbered kinds ([`Exit`]) are landmarks: things the guest did. Everything else is
//! either no event at all (a signal) or a failure of the host ([`describe_failure`]).
//!
//! What KVM calls an internal error is most often the guest's doing: an instruction that has to be
//! emulated and cannot be. Every copy of the guest comes to it, at the same instruction. If it counted
//! as a failure of the host, the guest would end each of its hosts in turn.

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_EXCEPTION, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MEMORY_FAULT, KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR, KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_SIMUL_EX, kvm_run,
};

use crate::tape::Unrunnable;

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
    /// The guest made the CPU do what this KVM cannot do.
    Unrunnable(Unrunnable),
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
        KVM_EXIT_INTERNAL_ERROR => Exit::Unrunnable(match suberror(run) {
            KVM_INTERNAL_ERROR_EMULATION => Unrunnable::Emulation,
            KVM_INTERNAL_ERROR_SIMUL_EX => Unrunnable::Exceptions,
            KVM_INTERNAL_ERROR_DELIVERY_EV => Unrunnable::Delivery,
            // An exit that this KVM does not expect: it may be the CPU's doing.
            _ => return None,
        }),
        KVM_EXIT_EXCEPTION => Exit::Unrunnable(Unrunnable::Forbidden {
            // SAFETY: as above.
            vector: u8::try_from(unsafe { u.ex.exception }).ok()?,
        }),
        _ => return None,
    })
}

/// Which internal error it is; the exit reason must say that it is one.
fn suberror(run: &kvm_run) -> u32 {
    // SAFETY: plain integers, whatever the exit reason.
    unsafe { run.__bindgen_anon_1.internal.suberror }
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

/// Everything KVM says about an exit that ends the guest's execution: a failure of the host, or what
/// no KVM like this can do for it.
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
        KVM_EXIT_EXCEPTION => {
            // SAFETY: as above.
            let exception = unsafe { u.ex };
            format!(
                "the host kept exception {} from the guest, error code {:#x}",
                exception.exception, exception.error_code
            )
        }
        reason => format!("KVM came back with exit reason {reason}, which nobody asked for"),
    }
}

const fn direction(write: bool) -> Direction {
    if write { Direction::Out } else { Direction::In }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(reason: u32, fill: impl FnOnce(&mut kvm_run)) -> kvm_run {
        let mut run = kvm_run {
            exit_reason: reason,
            ..kvm_run::default()
        };
        fill(&mut run);
        run
    }

    fn internal(suberror: u32) -> kvm_run {
        left(KVM_EXIT_INTERNAL_ERROR, |run| {
            run.__bindgen_anon_1.internal.suberror = suberror;
        })
    }

    #[test]
    fn what_the_guest_caused_is_its_end_and_all_else_the_hosts_failure() {
        let exception = left(KVM_EXIT_EXCEPTION, |run| {
            run.__bindgen_anon_1.ex.exception = 17;
        });
        for (run, why) in [
            (internal(1), Unrunnable::Emulation),
            (internal(2), Unrunnable::Exceptions),
            (internal(3), Unrunnable::Delivery),
            (exception, Unrunnable::Forbidden { vector: 17 }),
        ] {
            assert_eq!(decode(&run), Some(Exit::Unrunnable(why)));
        }
        for (run, said) in [
            (internal(4), "suberror 4 (an exit that this KVM does not"),
            (left(KVM_EXIT_FAIL_ENTRY, |_| {}), "refused to enter"),
            (left(KVM_EXIT_MEMORY_FAULT, |_| {}), "could not be reached"),
            (left(999, |_| {}), "exit reason 999"),
        ] {
            assert_eq!(decode(&run), None, "{said}");
            let text = describe_failure(&run);
            assert!(text.contains(said), "{text}");
        }
    }
}
