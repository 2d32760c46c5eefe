//! Guest memory: one region from address 0, anonymous, registered as one slot.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::KvmError;
use crate::GuestMemory;

/// The size of a page of guest memory.
pub const PAGE: u64 = 4096;

/// The only memory slot.
const SLOT: u32 = 0;

/// Maps `bytes` of zeroed memory; the configuration they are from was checked.
pub(super) fn allocate(bytes: u64) -> Result<GuestMemory, KvmError> {
    // Its bounds fit a usize on x86-64. The mapping is private, anonymous and not reserved.
    GuestMemory::from_ranges(&[(GuestAddress(0), bytes as usize)])
        .map_err(|source| KvmError::Memory { bytes, source })
}

/// Tells KVM about guest memory, with or without its dirty log.
pub(super) fn register(vm: &VmFd, memory: &GuestMemory, log_dirty: bool) -> Result<(), KvmError> {
    for region in memory.iter() {
        let slot = kvm_userspace_memory_region {
            slot: SLOT,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: if log_dirty {
                KVM_MEM_LOG_DIRTY_PAGES
            } else {
                0
            },
        };
        // SAFETY: the machine drops the VM before the memory, and there is one region, one slot.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(KvmError::ioctl("registering guest memory"))?;
    }
    Ok(())
}

/// The pages KVM saw written since the last call, one bit each (needs the dirty log).
pub(super) fn dirty_log(
    vm: &VmFd,
    memory: &GuestMemory,
) -> Result<Vec<u64>, vmm_sys_util::errno::Error> {
    let bytes: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    vm.get_dirty_log(SLOT, bytes as usize)
}
