//! One vCPU: entering the guest, settling pending I/O, injecting, reading registers.
//!
//! ```text
//!              run() -> Exit                     settle() -> Exit (rep movs, 16-byte MMIO)
//!            +--------------+                  +-------+
//!            |              v                  |       v
//!        [settled] ----> [pending] ---------> [pending]
//!            ^  |           |    settle() -> Settled
//!            |  +-+         |
//!            |    | inject  |
//!            +----+---------+
//! ```
//!
//! KVM completes the I/O of an exit only when the guest is entered again. Registers, readiness for
//! interrupts and injection have a meaning in `settled` alone.

use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::{kvm_interrupt, kvm_regs, kvm_run, kvm_sregs};
use kvm_ioctls::{SyncReg, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::exit::{self, Exit, PortAccess};
use super::kick::{KickTarget, Kicker};
use crate::machine::MachineError;

vmm_sys_util::ioctl_iow_nr!(KVM_INTERRUPT, kvm_bindings::KVMIO, 0x86, kvm_interrupt);

/// Why the vCPU is out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// An exit of a numbered kind, to be served.
    Exit(Exit),
    /// Interrupted: kicked in a run, settled in a completion.
    Interrupted,
}

/// The vCPU.
pub(super) struct Vcpu {
    // Before `fd`: kickers must let go of the run page before it is unmapped.
    kicks: KickTarget,
    fd: VcpuFd,
    run_size: usize,
    sync_regs: bool,
    settled: bool,
    /// An interrupt was handed to KVM and the guest has not been entered since.
    queued: bool,
}

impl Vcpu {
    /// Takes over a fresh vCPU. `run_size` is what KVM maps of it.
    pub(super) fn new(
        mut fd: VcpuFd,
        run_size: usize,
        sync_regs: bool,
    ) -> Result<Self, errno::Error> {
        let flag = NonNull::from(&mut fd.get_kvm_run().immediate_exit);
        // SAFETY: the run page is mapped until `fd` is dropped, which is after `kicks`.
        let kicks = unsafe { KickTarget::new(flag)? };
        Ok(Self {
            kicks,
            fd,
            run_size,
            sync_regs,
            // Nothing has run, so nothing is pending.
            settled: true,
            queued: false,
        })
    }

    pub(super) fn kicker(&self) -> Kicker {
        self.kicks.kicker()
    }

    /// Where a debugger has stopped the guest, if that is why it came back last.
    pub(super) fn stopped_at(&mut self) -> Option<u64> {
        exit::stopped_at(self.fd.get_kvm_run())
    }

    /// The file, for what only set-up and digests need.
    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Executes to the next exit; with `window` set, only to where an interrupt can be injected.
    pub(super) fn run(&mut self, window: bool) -> Result<Left, MachineError> {
        self.kicks.entering();
        self.settled = false;
        self.fd.get_kvm_run().request_interrupt_window = u8::from(window);
        let left = self.enter("running the guest")?;
        match left {
            Left::Interrupted => {
                self.kicks.take(immediate_exit(&mut self.fd));
                self.queued = self.queued && self.still_queued()?;
            }
            Left::Exit(_) => self.queued = false,
        }
        Ok(left)
    }

    /// Whether the guest was taken out before it saw the interrupt that was injected last.
    fn still_queued(&self) -> Result<bool, MachineError> {
        let events = self.fd.get_vcpu_events();
        let events = events.map_err(|e| refused("KVM_GET_VCPU_EVENTS", e))?;
        Ok(events.interrupt.injected != 0)
    }

    /// Whether an exception is the next thing that the guest takes. Nothing else is delivered
    /// before it, and a guest that has one to take does not wait, whatever it has executed.
    pub(super) fn exception_waits(&self) -> Result<bool, MachineError> {
        let events = self.fd.get_vcpu_events();
        let events = events.map_err(|e| refused("KVM_GET_VCPU_EVENTS", e))?;
        Ok(events.exception.pending != 0 || events.exception.injected != 0)
    }

    /// Completes pending I/O without executing anything beyond it.
    pub(super) fn settle(&mut self) -> Result<Left, MachineError> {
        if self.settled {
            return Ok(Left::Interrupted);
        }
        self.kicks.entering();
        immediate_exit(&mut self.fd).store(1, std::sync::atomic::Ordering::SeqCst);
        let left = self.enter("completing the guest's I/O");
        self.kicks.keep(immediate_exit(&mut self.fd));
        self.settled = matches!(left, Ok(Left::Interrupted));
        left
    }

    fn enter(&mut self, doing: &'static str) -> Result<Left, MachineError> {
        let error = match self.fd.run().map(|_| ()) {
            Ok(()) => None,
            Err(error) if error.errno() == libc::EINTR => return Ok(Left::Interrupted),
            Err(error) => Some(error),
        };
        let run = self.fd.get_kvm_run();
        let reason = match (error, exit::decode(run)) {
            (None, Some(left)) => return Ok(Left::Exit(left)),
            (None, None) if exit::is_interrupted(run) => return Ok(Left::Interrupted),
            (None, None) => exit::describe_failure(run),
            (Some(error), _) => format!("KVM_RUN failed: {error}"),
        };
        Err(MachineError::Host {
            doing,
            reason: format!("{reason}; {}", self.where_it_was()),
        })
    }

    /// The address of the instruction at which the guest stands, and, for people, all that KVM says of
    /// why it cannot go on. Only the address is the same on every host.
    pub(super) fn last_words(&mut self) -> Result<(u64, String), MachineError> {
        let regs = self.fd.get_regs().map_err(|e| refused("KVM_GET_REGS", e))?;
        let said = exit::describe_failure(self.fd.get_kvm_run());
        Ok((regs.rip, format!("{said}; {}", self.where_it_was())))
    }

    fn where_it_was(&self) -> String {
        match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "RIP {:#x}, RSP {:#x}, RFLAGS {:#x}, CS {:#x}, CR2 {:#x}, CR3 {:#x}",
                regs.rip, regs.rsp, regs.rflags, sregs.cs.selector, sregs.cr2, sregs.cr3
            ),
            _ => "its registers cannot be read".to_owned(),
        }
    }

    /// The data of a port access: to be read or to be filled in.
    pub(super) fn port_data(&mut self, access: &PortAccess) -> &mut [u8] {
        let len = access.size * access.count;
        let end = access.offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.run_size),
            "KVM keeps port data inside its run area"
        );
        let run = std::ptr::from_mut::<kvm_run>(self.fd.get_kvm_run()).cast::<u8>();
        // SAFETY: `run_size` bytes are mapped from the run page on (checked just now), and the
        // slice borrows the vCPU, so nothing else of this process reaches them meanwhile.
        unsafe { std::slice::from_raw_parts_mut(run.add(access.offset), len) }
    }

    /// The data of an MMIO access: to be read or to be filled in.
    pub(super) fn mmio_data(&mut self, len: usize) -> &mut [u8] {
        // SAFETY: plain integers; the caller has just decoded an MMIO exit.
        let data = unsafe { &mut self.fd.get_kvm_run().__bindgen_anon_1.mmio.data };
        &mut data[..len]
    }

    /// Lets the RDMSR or WRMSR of this exit raise #GP.
    pub(super) fn refuse_msr(&mut self) {
        self.fd.get_kvm_run().__bindgen_anon_1.msr.error = 1;
    }

    /// Answers a hypercall.
    pub(super) fn answer_hypercall(&mut self, value: u64) {
        self.fd.get_kvm_run().__bindgen_anon_1.hypercall.ret = value;
    }

    /// Whether the guest has interrupts on, as of the last exit.
    pub(super) fn interrupts_on(&mut self) -> bool {
        self.fd.get_kvm_run().if_flag != 0
    }

    /// Whether an interrupt can be injected now.
    pub(super) fn ready_for_interrupt(&mut self) -> bool {
        assert!(
            self.settled,
            "injection before completion loses the interrupt"
        );
        let run = self.fd.get_kvm_run();
        !self.queued && run.ready_for_interrupt_injection != 0 && run.if_flag != 0
    }

    /// Whether an interrupt was injected that the guest has not seen yet.
    pub(super) fn interrupt_queued(&self) -> bool {
        self.queued
    }

    /// Injects an interrupt; [`Vcpu::ready_for_interrupt`] must have said yes.
    pub(super) fn inject(&mut self, vector: u8) -> Result<(), errno::Error> {
        let interrupt = kvm_interrupt { irq: vector.into() };
        // SAFETY: a vCPU file and a structure that KVM only reads.
        let result = unsafe { ioctl_with_ref(&self.fd, KVM_INTERRUPT(), &interrupt) };
        if result != 0 {
            return Err(errno::Error::last());
        }
        self.queued = true;
        Ok(())
    }

    /// General and system registers, as they are after completion.
    pub(super) fn registers(&mut self) -> Result<(kvm_regs, kvm_sregs), MachineError> {
        assert!(
            self.settled,
            "registers mean something after completion only"
        );
        if !self.sync_regs {
            let regs = self.fd.get_regs().map_err(|e| refused("KVM_GET_REGS", e))?;
            let sregs = self
                .fd
                .get_sregs()
                .map_err(|e| refused("KVM_GET_SREGS", e))?;
            return Ok((regs, sregs));
        }
        // One entry that executes nothing, instead of two calls.
        self.fd.set_sync_valid_reg(SyncReg::Register);
        self.fd.set_sync_valid_reg(SyncReg::SystemRegister);
        self.settled = false;
        let left = self.settle();
        self.fd.clear_sync_valid_reg(SyncReg::Register);
        self.fd.clear_sync_valid_reg(SyncReg::SystemRegister);
        match left? {
            Left::Interrupted => {
                let registers = self.fd.sync_regs();
                Ok((registers.regs, registers.sregs))
            }
            Left::Exit(exit) => Err(MachineError::Host {
                doing: "reading registers",
                reason: format!("a settled vCPU left with {exit:?}"),
            }),
        }
    }
}

/// The error of a refused ioctl.
pub(super) fn refused(call: &'static str, error: errno::Error) -> MachineError {
    MachineError::Host {
        doing: call,
        reason: error.to_string(),
    }
}

fn immediate_exit(fd: &mut VcpuFd) -> &AtomicU8 {
    // SAFETY: the run page is shared with KVM and kickers; an atomic has the layout of its byte.
    unsafe { AtomicU8::from_ptr(&raw mut fd.get_kvm_run().immediate_exit) }
}
