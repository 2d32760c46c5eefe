//! Loading an ELF kernel. Headers are checked here before the loader follows them.

use std::io::Cursor;

use bytes::Bytes;
use linux_loader::elf::{EI_CLASS, Elf64_Ehdr, Elf64_Phdr, PT_LOAD, PT_NOTE};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::Elf;
use vm_memory::ByteValued;

use super::{BootError, KERNEL_MIN, Kernel};
use crate::GuestMemory;

/// `EI_CLASS` of 64-bit files, `e_machine` of x86-64, `e_type` of executables.
const CLASS_64: u8 = 2;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;

/// Loads `kernel` at the physical addresses it asks for.
pub(super) fn load(
    memory: &GuestMemory,
    memory_size: u64,
    kernel: &Bytes,
) -> Result<Kernel, BootError> {
    let header: Elf64_Ehdr = read(kernel, 0, "header")?;
    check_header(&header)?;
    let mut entry_is_inside = false;
    let mut highest = KERNEL_MIN;
    for i in 0..u64::from(header.e_phnum) {
        let at = i
            .checked_mul(size_of::<Elf64_Phdr>() as u64)
            .and_then(|offset| offset.checked_add(header.e_phoff))
            .ok_or_else(|| cut_off(kernel, "program headers"))?;
        let segment: Elf64_Phdr = read(kernel, at, "program headers")?;
        if segment.p_type == PT_LOAD || segment.p_type == PT_NOTE {
            within_file(kernel, segment.p_offset, segment.p_filesz)?;
        }
        if segment.p_type == PT_LOAD {
            let (start, end) = within_memory(&segment, memory_size)?;
            highest = highest.max(end);
            entry_is_inside |= (start..end).contains(&header.e_entry);
        }
    }
    if !entry_is_inside {
        return Err(BootError::NoEntry {
            entry: header.e_entry,
        });
    }
    Elf::load(memory, None, &mut Cursor::new(kernel.as_ref()), None)?;
    Ok(Kernel {
        entry: header.e_entry,
        end: highest,
        header: setup_header::default(),
    })
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), BootError> {
    let why = if header.e_ident[..4] != *b"\x7fELF" {
        "it does not begin with the mark of one"
    } else if header.e_ident[EI_CLASS] != CLASS_64 {
        "it is one for 32-bit machines"
    } else if header.e_machine != MACHINE_X86_64 {
        "it is one for another CPU"
    } else if header.e_type != TYPE_EXECUTABLE {
        "it is no executable with fixed addresses"
    } else {
        return Ok(());
    };
    Err(BootError::NotElf { why })
}

fn within_file(kernel: &Bytes, offset: u64, len: u64) -> Result<(), BootError> {
    match offset.checked_add(len) {
        Some(end) if end <= kernel.len() as u64 => Ok(()),
        _ => Err(cut_off(kernel, "segment")),
    }
}

/// The memory a segment occupies, its zeroes included.
fn within_memory(segment: &Elf64_Phdr, memory_size: u64) -> Result<(u64, u64), BootError> {
    let start = segment.p_paddr;
    let end = start.checked_add(segment.p_memsz.max(segment.p_filesz));
    match end {
        Some(end) if start >= KERNEL_MIN && end <= memory_size => Ok((start, end)),
        _ => Err(BootError::Outside {
            start,
            end: end.unwrap_or(u64::MAX),
            lowest: KERNEL_MIN,
            highest: memory_size,
        }),
    }
}

fn read<T: ByteValued>(kernel: &Bytes, offset: u64, what: &'static str) -> Result<T, BootError> {
    let mut value = T::zeroed();
    let target = value.as_mut_slice();
    usize::try_from(offset)
        .ok()
        .and_then(|start| kernel.get(start..start.checked_add(target.len())?))
        .map(|bytes| target.copy_from_slice(bytes))
        .ok_or_else(|| cut_off(kernel, what))?;
    Ok(value)
}

fn cut_off(kernel: &Bytes, what: &'static str) -> BootError {
    BootError::CutOff {
        what,
        len: kernel.len(),
    }
}
