//! The page tables and the GDT a guest starts with.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::GuestMemory;

/// The GDT and its limit.
pub(super) const GDT: u64 = 0x1000;
pub(super) const GDT_LIMIT: u16 = 31;
pub(super) const CODE_SELECTOR: u16 = 0x10;
pub(super) const DATA_SELECTOR: u16 = 0x18;
/// Null, null, 64-bit code, flat data; both of ring 0 and marked accessed, so that loading them
/// writes nothing.
const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// The top of the page tables.
pub(super) const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const DIRECTORIES: u64 = 0xb000;
const DIRECTORY_COUNT: u64 = 4;
const ENTRIES: u64 = 512;

/// Present, writable, accessed.
const TABLE: u64 = 0x23;
/// Present, writable, accessed, dirty, 2 MiB.
const LARGE_PAGE: u64 = 0xe3;
const LARGE_PAGE_SIZE: u64 = 2 << 20;

/// Identity-maps the first 4 GiB. Accessed and dirty bits are preset, so that no CPU sets them.
pub(super) fn write_page_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_obj(PDPT | TABLE, GuestAddress(PML4))?;
    for directory in 0..DIRECTORY_COUNT {
        let address = DIRECTORIES + directory * 0x1000;
        memory.write_obj(address | TABLE, GuestAddress(PDPT + directory * 8))?;
        for entry in 0..ENTRIES {
            let page = (directory * ENTRIES + entry) * LARGE_PAGE_SIZE;
            memory.write_obj(page | LARGE_PAGE, GuestAddress(address + entry * 8))?;
        }
    }
    Ok(())
}

/// Writes the descriptors.
pub(super) fn write_gdt(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    for (i, descriptor) in (0u64..).zip(DESCRIPTORS) {
        memory.write_obj(descriptor, GuestAddress(GDT + i * 8))?;
    }
    Ok(())
}
