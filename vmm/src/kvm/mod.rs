//! The replayed machine on KVM: one vCPU, its memory and its devices, stopping at landmarks.
//!
//! The landmark protocol of DESIGN.md section 2 is split in two: [`vcpu`] enters the guest and
//! settles its I/O, this file serves exits with the devices and says what the vCPU can do.

#![allow(
    unsafe_code,
    reason = "ioctls, the run page and kicks cannot be had without; nothing outside this folder needs any"
)]

mod arithmetic;
mod background;
mod cpu_model;
mod cpuid;
mod exit;
mod fingerprint;
mod kick;
mod memory;
mod msr;
mod setup;
pub mod trial;
mod vcpu;
mod vm;

pub use background::Thread;
pub use cpu_model::{CPU_MODEL, NotOffered};
pub use cpuid::Leaf;
pub use fingerprint::{HostFingerprint, KvmKind, Reason, Severity, Unmasked, host_fingerprint};
pub use kick::Kicker;
pub use memory::PAGE;
pub use vm::Capabilities;

use kvm_bindings::Msrs;
use kvm_ioctls::VmFd;
use replay_log::MarkDigest;
use thiserror::Error;
use vmm_sys_util::errno;

use crate::GuestMemory;
use crate::boot::{BootError, BootImage};
use crate::config::{ImpossibleMachine, MachineConfig};
use crate::devices::platform::{Platform, Space};
use crate::digest;
use crate::machine::{DigestScope, Enter, Entered, Machine, MachineError};
use crate::tape::{CpuState, Delivery, GuestEnd, Sources, Tape, TapeError};
use exit::{Direction, Exit, PortAccess};
use vcpu::{Left, Vcpu, refused};

/// What a hypercall gets that nobody answers (`-KVM_ENOSYS`).
const NO_SUCH_HYPERCALL: u64 = 0u64.wrapping_sub(1000);
/// The event in [`digest::Exits`] that is no exit.
const INJECTED: u8 = 0x80;

/// A machine on KVM.
pub struct KvmMachine {
    // Dropped in this order: KVM lets go of the memory before it is unmapped.
    vcpu: Vcpu,
    vm: VmFd,
    memory: GuestMemory,
    platform: Platform,
    pages: u64,
    msrs: Msrs,
    capabilities: Capabilities,
    exits: digest::Exits,
    halted: bool,
    /// How the vCPU itself ended; the power port's word is the platform's.
    ended: Option<GuestEnd>,
}

impl KvmMachine {
    /// A machine that is about to execute the first instruction of `image`.
    pub fn new(config: &MachineConfig, image: &BootImage) -> Result<Self, KvmError> {
        setup::power_on(config, image, false)
    }

    /// The same, with KVM's dirty log on.
    pub fn with_dirty_log(config: &MachineConfig, image: &BootImage) -> Result<Self, KvmError> {
        setup::power_on(config, image, true)
    }

    /// A handle that takes the vCPU out of the guest, from any thread.
    pub fn kicker(&self) -> Kicker {
        self.vcpu.kicker()
    }

    /// What this host's KVM offers.
    pub fn capabilities(&self) -> Capabilities {
        self.capabilities
    }

    /// Guest memory. Only the thread that runs the machine may touch it.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The pages the guest wrote since the last call, one bit each; needs the dirty log. What the
    /// VMM wrote is in the bitmap of the memory itself.
    pub fn dirty_log(&self) -> Result<Vec<u64>, MachineError> {
        memory::dirty_log(&self.vm, &self.memory).map_err(|e| refused("KVM_GET_DIRTY_LOG", e))
    }

    fn serve(&mut self, exit: Exit, tape: &mut dyn Tape) -> Result<(), MachineError> {
        match exit {
            Exit::Port(access) => self.serve_port(&access, tape)?,
            Exit::Mmio {
                address,
                len,
                direction,
            } => {
                let data = self.vcpu.mmio_data(len);
                let (platform, memory) = (&mut self.platform, &self.memory);
                match direction {
                    Direction::In => platform.read(Space::Mmio, address, data, memory, tape)?,
                    Direction::Out => platform.write(Space::Mmio, address, data, memory, tape)?,
                }
                self.exits.add(kind(&exit), address, len, data);
            }
            Exit::Halt => {
                self.exits.add(kind(&exit), 0, 0, &[]);
                if self.vcpu.exception_waits()? {
                    // A single step: the trap flag was set, and HLT is executed.
                } else if self.vcpu.interrupts_on() {
                    self.halted = true;
                } else {
                    self.ended = Some(GuestEnd::Dead);
                }
            }
            Exit::Msr { index, value, .. } => {
                self.vcpu.refuse_msr();
                self.exits
                    .add(kind(&exit), index.into(), 8, &value.to_le_bytes());
            }
            Exit::Hypercall { number } => {
                self.vcpu.answer_hypercall(NO_SUCH_HYPERCALL);
                self.exits.add(kind(&exit), number, 0, &[]);
            }
            Exit::TaskPriority => self.exits.add(kind(&exit), 0, 0, &[]),
            Exit::Shutdown => {
                self.exits.add(kind(&exit), 0, 0, &[]);
                self.ended = Some(GuestEnd::TripleFault);
            }
            Exit::Unrunnable(why) => {
                let (rip, said) = self.vcpu.last_words()?;
                tracing::warn!("the guest cannot be run any further: {said}");
                // Not what KVM says of it: much of that is of the host.
                let (number, detail) = why.digested();
                self.exits.add(kind(&exit), rip, number, &[detail]);
                self.ended = Some(GuestEnd::Unrunnable { why, rip });
            }
        }
        Ok(())
    }

    fn serve_port(&mut self, access: &PortAccess, tape: &mut dyn Tape) -> Result<(), TapeError> {
        let (port, size) = (u64::from(access.port), access.size);
        let data = self.vcpu.port_data(access);
        let (platform, memory) = (&mut self.platform, &self.memory);
        match access.direction {
            Direction::In => {
                for element in data.chunks_exact_mut(size) {
                    platform.read(Space::Port, port, element, memory, tape)?;
                }
            }
            Direction::Out => {
                platform.write_repeated(Space::Port, port, size, data, memory, tape)?;
            }
        }
        self.exits.add(kind(&Exit::Port(*access)), port, size, data);
        Ok(())
    }
}

impl Machine for KvmMachine {
    fn enter(&mut self, how: Enter, tape: &mut dyn Tape) -> Result<Entered, MachineError> {
        let (left, interrupted) = match how {
            Enter::Run | Enter::RunAnywhere => {
                assert_eq!(self.cpu(), CpuState::Ready, "only a ready vCPU may run");
                let waits = how == Enter::RunAnywhere && self.platform.interrupt_waits();
                (self.vcpu.run(waits)?, Entered::Kicked)
            }
            Enter::Complete => (self.vcpu.settle()?, Entered::Settled),
        };
        match left {
            Left::Interrupted => Ok(interrupted),
            Left::Exit(exit) => {
                self.serve(exit, tape)?;
                self.platform.exit_served(tape)?;
                Ok(Entered::Exit)
            }
        }
    }

    fn cpu(&self) -> CpuState {
        if let Some(end) = self.platform.ended().or(self.ended) {
            CpuState::Stopped(end)
        } else if self.halted {
            CpuState::Halted
        } else if self.platform.idle() && !self.vcpu.interrupt_queued() {
            CpuState::Idle
        } else {
            CpuState::Ready
        }
    }

    fn can_take(&self) -> Sources {
        self.platform.can_take(&self.memory)
    }

    fn deliver(&mut self, delivery: Delivery) -> Result<(), MachineError> {
        self.platform.deliver(delivery, &self.memory)
    }

    fn interrupt_waits(&self) -> bool {
        self.platform.interrupt_waits()
    }

    fn inject(&mut self) -> Result<bool, MachineError> {
        let stopped = self.ended.is_some() || self.platform.ended().is_some();
        if stopped || !self.platform.interrupt_waits() {
            return Ok(false);
        }
        if !self.vcpu.ready_for_interrupt() {
            return if self.halted {
                // HLT with interrupts on ends every interrupt shadow, and a guest with an exception
                // to take is not halted: nothing could be in the way.
                Err(refused("KVM_INTERRUPT", errno::Error::new(libc::EBUSY)))
            } else {
                Ok(false)
            };
        }
        let vector = self.platform.acknowledge_interrupt();
        self.vcpu
            .inject(vector)
            .map_err(|e| refused("KVM_INTERRUPT", e))?;
        self.exits.add(INJECTED, vector.into(), 0, &[]);
        self.halted = false;
        Ok(true)
    }

    fn digest(&mut self, scope: DigestScope) -> Result<MarkDigest, MachineError> {
        let (regs, sregs) = self.vcpu.registers()?;
        let mut hasher = blake3::Hasher::new_keyed(scope.key.bytes());
        digest::registers(&mut hasher, &regs, &sregs);
        hasher.update(&[
            u8::from(self.halted),
            u8::from(self.vcpu.interrupt_queued()),
        ]);
        self.exits.take(&mut hasher);
        self.platform.digest(&mut hasher);
        if scope.deep {
            let fd = self.vcpu.fd();
            let xsave = fd.get_xsave().map_err(|e| refused("KVM_GET_XSAVE", e))?;
            digest::floating_point(&mut hasher, &xsave);
            fd.get_msrs(&mut self.msrs)
                .map_err(|e| refused("KVM_GET_MSRS", e))?;
            digest::model_specific(&mut hasher, &self.msrs);
        }
        digest::pages(&mut hasher, &self.memory, self.pages, &scope).map_err(|e| {
            MachineError::Host {
                doing: "reading guest memory",
                reason: e.to_string(),
            }
        })?;
        Ok(digest::truncate(&hasher))
    }
}

/// The number of a kind of exit in the digest.
fn kind(exit: &Exit) -> u8 {
    let (kind, direction) = match exit {
        Exit::Port(access) => (0, access.direction),
        Exit::Mmio { direction, .. } => (2, *direction),
        Exit::Msr { direction, .. } => (4, *direction),
        Exit::Halt => (6, Direction::In),
        Exit::Hypercall { .. } => (7, Direction::In),
        Exit::TaskPriority => (8, Direction::In),
        Exit::Shutdown => (9, Direction::In),
        Exit::Unrunnable(_) => (10, Direction::In),
    };
    kind + u8::from(direction == Direction::Out)
}

/// Why a machine cannot be made on this host.
#[derive(Debug, Error)]
pub enum KvmError {
    /// No KVM.
    #[error(
        "/dev/kvm cannot be opened: load the kernel module kvm_intel or kvm_amd, or turn on nested virtualization if this host is a virtual machine itself"
    )]
    NoDevice {
        /// What came back.
        source: errno::Error,
    },
    /// KVM, but not for us.
    #[error("/dev/kvm may not be opened: add the user to the group kvm, or run as root")]
    NoPermission {
        /// What came back.
        source: errno::Error,
    },
    /// Not the KVM interface.
    #[error("this kernel's KVM speaks interface version {found}, not 12: use another kernel")]
    ApiVersion {
        /// What it speaks.
        found: i32,
    },
    /// Something indispensable is not there.
    #[error("this host's KVM lacks {capability}: use a newer kernel")]
    Missing {
        /// Its name.
        capability: &'static str,
    },
    /// A guest would see another CPU than on other hosts.
    #[error(transparent)]
    CpuModel(#[from] NotOffered),
    /// KVM refused.
    #[error("KVM refused {doing}")]
    Ioctl {
        /// What was being done.
        doing: &'static str,
        /// What came back.
        source: errno::Error,
    },
    /// No memory.
    #[error("{bytes} bytes of guest memory cannot be mapped: give the guest less or the host more")]
    Memory {
        /// What was asked for.
        bytes: u64,
        /// What came back.
        source: vm_memory::mmap::FromRangesError,
    },
    /// A machine that cannot exist.
    #[error(transparent)]
    Config(#[from] ImpossibleMachine),
    /// An image that cannot be started.
    #[error(transparent)]
    Boot(#[from] BootError),
}

impl KvmError {
    fn ioctl(doing: &'static str) -> impl Fn(errno::Error) -> Self {
        move |source| Self::Ioctl { doing, source }
    }
}
