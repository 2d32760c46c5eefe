//! Putting the initial RAM disk into guest memory: as high as the kernel can read it, so that it is
//! in nobody's way.

use bytes::Bytes;
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Kernel};
use crate::GuestMemory;

/// How high a kernel that does not say otherwise reads its RAM disk (`initrd_addr_max`).
const HIGHEST: u32 = 0x37ff_ffff;
const PAGE: u64 = 4096;

/// Loads it above the kernel; says where it begins.
pub(super) fn load(
    memory: &GuestMemory,
    memory_size: u64,
    kernel: &Kernel,
    initrd: &Bytes,
) -> Result<u32, BootError> {
    let highest = match kernel.header.initrd_addr_max {
        0 => HIGHEST,
        stated => stated,
    };
    let limit = memory_size.min(u64::from(highest) + 1);
    let too_large = || BootError::Initrd {
        len: initrd.len(),
        room: limit.saturating_sub(kernel.end),
    };
    let start = limit
        .checked_sub(initrd.len() as u64)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= kernel.end)
        .ok_or_else(too_large)?;
    memory.write_slice(initrd, GuestAddress(start))?;
    u32::try_from(start).map_err(|_| too_large())
}
