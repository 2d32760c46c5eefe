//! Loading a Linux bzImage by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! The header is checked here before the loader follows it; the kernel is put where it prefers to
//! be, so that it never has to move itself.

use std::io::Cursor;

use bytes::Bytes;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress};

use super::{BootError, HEADER_MAGIC, KERNEL_MIN, Kernel};
use crate::GuestMemory;

/// Where the setup header is in the file.
const HEADER_AT: usize = 0x1f1;
/// Where its magic is.
const MAGIC_AT: usize = 0x202;
/// The first version of the protocol with a 64-bit entry that says so, 2.12.
const VERSION_MIN: u16 = 0x20c;
/// `loadflags`: the protected-mode code belongs above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `xloadflags`: the kernel has a 64-bit entry, 0x200 bytes behind its beginning.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// Sectors of setup code when the header says 0, and the boot sector.
const SETUP_SECTS_DEFAULT: usize = 4;
const SECTOR: usize = 512;

/// Whether the file says of itself that it is one.
pub(super) fn is_one(kernel: &Bytes) -> bool {
    kernel.get(MAGIC_AT..MAGIC_AT + 4) == Some(&HEADER_MAGIC.to_le_bytes())
}

/// Loads `kernel` where its header prefers.
pub(super) fn load(
    memory: &GuestMemory,
    memory_size: u64,
    kernel: &Bytes,
) -> Result<Kernel, BootError> {
    let header = check_header(kernel)?;
    let start = header.pref_address;
    let end = start.checked_add(u64::from(header.init_size));
    let fits = end.filter(|end| start >= KERNEL_MIN && *end <= memory_size);
    let end = fits.ok_or(BootError::Outside {
        start,
        end: end.unwrap_or(u64::MAX),
        lowest: KERNEL_MIN,
        highest: memory_size,
    })?;
    let mut file = Cursor::new(kernel.as_ref());
    BzImage::load(memory, Some(GuestAddress(start)), &mut file, None)?;
    Ok(Kernel {
        entry: start + ENTRY_64,
        end,
        header,
    })
}

fn check_header(kernel: &Bytes) -> Result<setup_header, BootError> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    let cut_off = |what| BootError::CutOff {
        what,
        len: kernel.len(),
    };
    let found = kernel
        .get(HEADER_AT..HEADER_AT + bytes.len())
        .ok_or_else(|| cut_off("setup header"))?;
    bytes.copy_from_slice(found);
    let refuse = |why| Err(BootError::OldKernel { why });
    if header.version < VERSION_MIN {
        return refuse("its boot protocol is older than 2.12");
    }
    if header.xloadflags & KERNEL_64 == 0 {
        return refuse("it has no 64-bit entry");
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return refuse("it wants to be loaded below 1 MiB");
    }
    let setup = match usize::from(header.setup_sects) {
        0 => SETUP_SECTS_DEFAULT,
        sectors => sectors,
    };
    let code = kernel.len().checked_sub((setup + 1) * SECTOR);
    let room = header.init_size as usize;
    match code {
        Some(len) if len > ENTRY_64 as usize && len <= room => Ok(header),
        Some(len) if len > room => refuse("it is longer than its header says"),
        _ => Err(cut_off("protected-mode code")),
    }
}
