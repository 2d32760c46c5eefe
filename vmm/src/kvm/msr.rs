//! Model-specific registers: which the guest may use, and which belong to its state.
//!
//! Listed registers are pure state (what is read is what was written). All others, time stamp
//! counter, clocks and counters among them, are denied: the guest gets #GP, at a numbered exit
//! where KVM offers one.

use kvm_bindings::{Msrs, kvm_enable_cap, kvm_msr_entry};
use kvm_ioctls::{
    Cap, Kvm, MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd,
    VmFd,
};
use vmm_sys_util::errno;

use super::KvmError;

/// SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP.
const SYSENTER: u32 = 0x174;
/// Page attribute table.
const PAT: u32 = 0x277;
/// EFER, STAR, LSTAR, CSTAR, SFMASK.
const EFER: u32 = 0xc000_0080;
/// FS base, GS base, kernel GS base.
const FS_BASE: u32 = 0xc000_0100;

/// What the guest may read and write: first register, how many.
const ALLOWED: [(u32, u32); 4] = [(SYSENTER, 3), (PAT, 1), (EFER, 5), (FS_BASE, 3)];

/// What is part of the state beyond the system registers (EFER, FS and GS base are there).
const STATE: [u32; 9] = [
    SYSENTER,
    SYSENTER + 1,
    SYSENTER + 2,
    PAT,
    EFER + 1,
    EFER + 2,
    EFER + 3,
    EFER + 4,
    FS_BASE + 2,
];

/// Denies every register that is not listed; that KVM can do so was checked. Says whether denied
/// accesses are exits: otherwise KVM raises #GP by itself.
pub(super) fn restrict(kvm: &Kvm, vm: &VmFd) -> Result<bool, KvmError> {
    let exits = kvm.check_extension(Cap::X86UserSpaceMsr);
    if exits {
        let mut cap = kvm_enable_cap {
            cap: Cap::X86UserSpaceMsr as u32,
            ..Default::default()
        };
        cap.args[0] = u64::from(MsrExitReason::all().bits());
        vm.enable_cap(&cap)
            .map_err(KvmError::ioctl("turning denied MSR accesses into exits"))?;
    }
    let ranges = ALLOWED.map(|(base, count)| MsrFilterRange {
        flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
        base,
        msr_count: count,
        bitmap: &[0xff],
    });
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(KvmError::ioctl("setting the MSR filter"))?;
    Ok(exits)
}

/// The registers of the state that this KVM lets us read, with room for their values.
pub(super) fn readable_state(vcpu: &VcpuFd) -> Result<Msrs, KvmError> {
    let readable: Vec<kvm_msr_entry> = STATE
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .filter(|entry| {
            Msrs::from_entries(std::slice::from_ref(entry))
                .is_ok_and(|mut one| vcpu.get_msrs(&mut one) == Ok(1))
        })
        .collect();
    Msrs::from_entries(&readable).map_err(|_| KvmError::Ioctl {
        doing: "listing the MSRs of the state",
        source: errno::Error::new(libc::E2BIG),
    })
}
