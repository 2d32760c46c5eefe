//! Trying what this KVM can do that machines do not use: debugging a guest, kicking and injecting at
//! arbitrary places, counting its branches. For `doctor`, which measures instead of believing.
//!
//! A guest under trial has no devices: its exits are told, and nobody serves them.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::FromRawFd as _;

use kvm_bindings::{
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug,
};
use kvm_ioctls::Cap;

use super::exit::Exit;
use super::vcpu::{Left, refused};
use super::{Kicker, KvmError, KvmMachine, vm};
use crate::boot::BootImage;
use crate::config::MachineConfig;
use crate::machine::MachineError;

/// What KVM offers beyond what machines need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extras {
    /// The largest ring of dirty pages in bytes; 0 if there is none.
    pub dirty_ring: u32,
    /// The guest's time stamp counter can be scaled.
    pub tsc_scaling: bool,
}

/// Asks for them.
pub fn extras() -> Result<Extras, KvmError> {
    let kvm = vm::open()?;
    Ok(Extras {
        dirty_ring: u32::try_from(kvm.check_extension_int(Cap::DirtyLogRing)).unwrap_or(0),
        tsc_scaling: kvm.check_extension(Cap::TscControl),
    })
}

/// Where a debugger wants the guest to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// After each instruction.
    EachInstruction,
    /// Before the instruction at this address.
    At(u64),
}

/// Why the guest came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Came {
    /// It used a port.
    Port(u16),
    /// It left for something else.
    OtherExit,
    /// It ended by a triple fault.
    TripleFault,
    /// A kick.
    Kicked,
    /// The debugger's stop, before the instruction at this address.
    Stopped(u64),
}

/// A guest under trial.
pub struct Trial(KvmMachine);

impl Trial {
    /// A guest that is about to execute its first instruction.
    pub fn new(config: &MachineConfig, image: &BootImage) -> Result<Self, KvmError> {
        KvmMachine::new(config, image).map(Self)
    }

    /// Takes the guest out, from any thread.
    pub fn kicker(&self) -> Kicker {
        self.0.kicker()
    }

    /// Executes until something happens.
    pub fn run(&mut self) -> Result<Came, MachineError> {
        let vcpu = &mut self.0.vcpu;
        match vcpu.run(false) {
            Ok(Left::Interrupted) => Ok(Came::Kicked),
            Ok(Left::Exit(Exit::Port(access))) => Ok(Came::Port(access.port)),
            Ok(Left::Exit(Exit::Shutdown)) => Ok(Came::TripleFault),
            Ok(Left::Exit(_)) => Ok(Came::OtherExit),
            Err(error) => vcpu.stopped_at().map(Came::Stopped).ok_or(error),
        }
    }

    /// Completes the last exit; the address of the instruction that comes next.
    pub fn next_instruction(&mut self) -> Result<u64, MachineError> {
        while let Left::Exit(_) = self.0.vcpu.settle()? {}
        self.0.vcpu.registers().map(|(regs, _)| regs.rip)
    }

    /// From now on the guest stops there.
    pub fn stop_at(&mut self, stop: Stop) -> Result<(), MachineError> {
        let mut debug = kvm_guest_debug {
            control: KVM_GUESTDBG_ENABLE,
            ..Default::default()
        };
        match stop {
            Stop::EachInstruction => debug.control |= KVM_GUESTDBG_SINGLESTEP,
            Stop::At(address) => {
                debug.control |= KVM_GUESTDBG_USE_HW_BP;
                debug.arch.debugreg[0] = address;
                // Breakpoint 0, for execution; and the bit that is always set.
                debug.arch.debugreg[7] = 1 << 10 | 1;
            }
        }
        let set = self.0.vcpu.fd().set_guest_debug(&debug);
        set.map_err(|e| refused("KVM_SET_GUEST_DEBUG", e))
    }

    /// Injects an interrupt where the guest is; `false` if it has interrupts off.
    pub fn inject(&mut self, vector: u8) -> Result<bool, MachineError> {
        self.next_instruction()?;
        if !self.0.vcpu.ready_for_interrupt() {
            return Ok(false);
        }
        let injected = self.0.vcpu.inject(vector);
        injected.map_err(|e| refused("KVM_INTERRUPT", e))?;
        Ok(true)
    }
}

/// Counts the branches that guests of this thread retire.
pub struct BranchCounter(File);

/// The first 64 bytes of the kernel's `perf_event_attr`, which every kernel takes.
#[repr(C)]
#[derive(Default)]
struct EventAttributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    breakpoint_address: u64,
}

impl BranchCounter {
    /// A counter for the calling thread.
    pub fn new() -> io::Result<Self> {
        /// `PERF_COUNT_HW_BRANCH_INSTRUCTIONS`.
        const BRANCHES: u64 = 4;
        /// Always on the CPU or in error; neither hypervisor nor host.
        const FLAGS: u64 = 1 << 2 | 1 << 6 | 1 << 19;
        /// `PERF_FLAG_FD_CLOEXEC`.
        const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;
        let attributes = EventAttributes {
            size: size_of::<EventAttributes>() as u32,
            config: BRANCHES,
            flags: FLAGS,
            ..Default::default()
        };
        let (this_thread, any_cpu, no_group) = (0, -1, -1);
        // SAFETY: the kernel reads as many bytes of the structure as it says it has.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_perf_event_open,
                &raw const attributes,
                this_thread,
                any_cpu,
                no_group,
                CLOSE_ON_EXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just opened it for us.
        Ok(Self(unsafe { File::from_raw_fd(fd as i32) }))
    }

    /// How many there were since it was made.
    pub fn count(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        self.0.read_exact(&mut bytes)?;
        Ok(u64::from_ne_bytes(bytes))
    }
}
