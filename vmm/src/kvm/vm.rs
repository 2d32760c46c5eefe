//! Opening KVM, finding out what it can do, and making an empty VM.

use kvm_ioctls::{Cap, Kvm, VmFd};

use super::KvmError;
use super::fingerprint::{KvmKind, host_kind, required};

/// The interface version of every KVM since 2007.
const API_VERSION: i32 = 12;
/// Where Intel's KVM may keep three pages of its own, below 4 GiB and beside every device.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What this KVM offers beyond the required.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Registers come with `KVM_RUN` (`KVM_CAP_SYNC_REGS`).
    pub sync_regs: bool,
    /// Denied MSR accesses are exits (`KVM_CAP_X86_USER_SPACE_MSR`).
    pub msr_exits: bool,
}

/// Opens KVM and checks that it is one we can use.
pub(super) fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|source| match source.errno() {
        libc::EACCES | libc::EPERM => KvmError::NoPermission { source },
        _ => KvmError::NoDevice { source },
    })?;
    let found = kvm.get_api_version();
    if found != API_VERSION {
        return Err(KvmError::ApiVersion { found });
    }
    match required(&kvm).iter().find(|(_, there)| !there) {
        Some((capability, _)) => Err(KvmError::Missing { capability }),
        None => Ok(kvm),
    }
}

/// Makes a VM with neither memory nor interrupt controller.
pub(super) fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let vm = kvm
        .create_vm()
        .map_err(KvmError::ioctl("creating a virtual machine"))?;
    if host_kind() == KvmKind::Vmx && kvm.check_extension(Cap::SetTssAddr) {
        vm.set_tss_address(TSS_ADDRESS)
            .map_err(KvmError::ioctl("giving KVM its pages"))?;
    }
    Ok(vm)
}
