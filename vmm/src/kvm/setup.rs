//! Making a machine: KVM, memory, CPU model, the image, and the state the guest starts in.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::vcpu::Vcpu;
use super::{Capabilities, KvmError, KvmMachine, PAGE, cpu_model, memory, msr, vm};
use crate::boot::{self, BootImage, EntryState};
use crate::config::MachineConfig;
use crate::devices::platform::Platform;
use crate::digest;

/// CR0: protected mode, coprocessor, native FPU errors, write protection, paging.
const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
/// CR4: PAE, FXSAVE and SSE, SSE exceptions.
const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// EFER: long mode enabled, active.
const EFER: u64 = 1 << 8 | 1 << 10;
/// RFLAGS with nothing but the bit that is always set: interrupts are off.
const RFLAGS: u64 = 2;
/// FPU control word and MXCSR after FNINIT and reset.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

/// Builds the machine as it is before its first instruction.
pub(super) fn power_on(
    config: &MachineConfig,
    image: &BootImage,
    log_dirty: bool,
) -> Result<KvmMachine, KvmError> {
    config.check()?;
    let kvm = vm::open()?;
    let memory = memory::allocate(config.memory)?;
    let entry = boot::load(&memory, config, image)?;
    let vm = vm::create(&kvm)?;
    let msr_exits = msr::restrict(&kvm, &vm)?;
    memory::register(&vm, &memory, log_dirty)?;
    let fd = vm
        .create_vcpu(0)
        .map_err(KvmError::ioctl("creating the vCPU"))?;
    fd.set_cpuid2(&cpu_model::for_kvm(&kvm)?)
        .map_err(KvmError::ioctl("setting the CPU model"))?;
    start_at(&fd, &entry)?;
    let msrs = msr::readable_state(&fd)?;
    let capabilities = Capabilities {
        sync_regs: has_sync_regs(&kvm),
        msr_exits,
    };
    let run_size = kvm
        .get_vcpu_mmap_size()
        .map_err(KvmError::ioctl("asking for the size of the run area"))?;
    let vcpu = Vcpu::new(fd, run_size, capabilities.sync_regs)
        .map_err(KvmError::ioctl("installing the signal handler of kicks"))?;
    Ok(KvmMachine {
        vcpu,
        vm,
        memory,
        platform: Platform::new(config),
        pages: config.memory / PAGE,
        msrs,
        capabilities,
        exits: digest::Exits::default(),
        halted: false,
        ended: None,
    })
}

fn has_sync_regs(kvm: &Kvm) -> bool {
    let needed = kvm_bindings::KVM_SYNC_X86_REGS | kvm_bindings::KVM_SYNC_X86_SREGS;
    // The answer is the set of registers that can be had.
    u32::try_from(kvm.check_extension_int(Cap::SyncRegs)).is_ok_and(|set| set & needed == needed)
}

/// Long mode, ring 0, flat segments, interrupts off, RSI at the boot parameters.
fn start_at(fd: &VcpuFd, entry: &EntryState) -> Result<(), KvmError> {
    let mut sregs = fd
        .get_sregs()
        .map_err(KvmError::ioctl("reading system registers"))?;
    let code = segment(entry.code_selector, 0xb, 1, 1);
    let data = segment(entry.data_selector, 0x3, 1, 0);
    sregs.cs = code;
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        limit: 0x67,
        ..segment(0, 0xb, 0, 0)
    };
    sregs.tr.g = 0;
    sregs.ldt = kvm_segment {
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt.base = entry.gdt;
    sregs.gdt.limit = entry.gdt_limit;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0;
    sregs.cr2 = 0;
    sregs.cr3 = entry.page_tables;
    sregs.cr4 = CR4;
    sregs.cr8 = 0;
    sregs.efer = EFER;
    // There is no local APIC, and KVM says so in CPUID when its base is off.
    sregs.apic_base = 0;
    fd.set_sregs(&sregs)
        .map_err(KvmError::ioctl("setting system registers"))?;
    fd.set_regs(&kvm_regs {
        rip: entry.instruction,
        rsp: entry.stack,
        rsi: entry.boot_params,
        rflags: RFLAGS,
        ..Default::default()
    })
    .map_err(KvmError::ioctl("setting general registers"))?;
    fd.set_fpu(&kvm_fpu {
        fcw: FPU_CONTROL,
        mxcsr: MXCSR,
        ..Default::default()
    })
    .map_err(KvmError::ioctl("setting the FPU"))
}

/// A flat segment of ring 0. `code_or_data` is the descriptor's S bit.
fn segment(selector: u16, kind: u8, code_or_data: u8, long: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(code_or_data == 1 && long == 0),
        s: code_or_data,
        l: long,
        g: 1,
        ..Default::default()
    }
}
