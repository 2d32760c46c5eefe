//! Putting an image into guest memory, and the state in which a guest starts.
//!
//! ```text
//! 0x0000_1000  GDT: null, null, code 0x10, data 0x18
//! 0x0000_5000  stack of the first instructions, grows down from 0x7000
//! 0x0000_7000  boot_params (the "zero page"), RSI points here
//! 0x0000_9000  PML4, 0xa000 PDPT, 0xb000 to 0xf000 four page directories: the first 4 GiB
//!              identity mapped with 2-MiB pages, A and D set, ring 0 only
//! 0x0002_0000  command line, at most 2,047 bytes and a zero
//! 0x000e_0000  ACPI tables, if the machine is to have them
//! 0x0010_0000  the kernel: an ELF says where its segments go, a bzImage where it prefers to be,
//!              never below
//! top          the initial RAM disk ends here, or where the kernel can read it at most
//! ```
//!
//! All of it is part of the machine model: a log counts on every byte.

mod acpi;
mod bzimage;
mod elf;
mod image;
mod initrd;
mod tables;

pub use image::BootImage;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress};

use crate::GuestMemory;
use crate::config::MachineConfig;

/// Where the boot parameters are.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Where the stack of the first instructions begins; it grows down.
pub const BOOT_STACK: u64 = 0x7000;
/// Where the command line is.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line in bytes, its zero not counted.
pub const COMMAND_LINE_MAX: usize = 2047;
/// The lowest address a kernel may occupy.
pub const KERNEL_MIN: u64 = 0x10_0000;

/// Where conventional memory ends.
const LOW_MEMORY_END: u64 = 0xa_0000;
/// Memory in the e820 map that is free for use.
const E820_RAM: u32 = 1;
/// `boot_params.hdr`: boot sector signature, "HdrS", a loader without a number of its own.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const LOADER_OTHER: u8 = 0xff;

/// A kernel in guest memory.
struct Kernel {
    /// Its first instruction.
    entry: u64,
    /// Nothing else may lie below, down to where it begins.
    end: u64,
    /// What it says of itself; all zero if it says nothing (ELF).
    header: setup_header,
}

/// The state of the vCPU at the first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryState {
    /// RIP.
    pub instruction: u64,
    /// RSP.
    pub stack: u64,
    /// RSI.
    pub boot_params: u64,
    /// CR3.
    pub page_tables: u64,
    /// The base of the GDT.
    pub gdt: u64,
    /// The limit of the GDT.
    pub gdt_limit: u16,
    /// CS.
    pub code_selector: u16,
    /// All other segments.
    pub data_selector: u16,
}

/// Why an image cannot be started.
#[derive(Debug, Error)]
pub enum BootError {
    /// Not what we can load.
    #[error("the kernel is neither a bzImage nor an ELF file for x86-64: {why}")]
    NotElf {
        /// What is wrong with it.
        why: &'static str,
    },
    /// A Linux kernel that cannot be started in 64-bit mode.
    #[error("the kernel is a bzImage that cannot be started here: {why}")]
    OldKernel {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The RAM disk and the kernel do not fit together.
    #[error(
        "the initial RAM disk has {len} bytes, and {room} are left for it above the kernel: give the guest more memory"
    )]
    Initrd {
        /// Its length.
        len: usize,
        /// The room there is.
        room: u64,
    },
    /// The file ends before its own headers say.
    #[error(
        "the kernel's {what} lies outside its file of {len} bytes: the file is cut off or damaged"
    )]
    CutOff {
        /// Which part.
        what: &'static str,
        /// How long the file is.
        len: usize,
    },
    /// A segment that does not fit guest memory.
    #[error(
        "the kernel wants bytes {start:#x} to {end:#x} of guest memory: only {lowest:#x} to {highest:#x} are there for it"
    )]
    Outside {
        /// Where the segment begins.
        start: u64,
        /// Where it ends.
        end: u64,
        /// The first address it may use.
        lowest: u64,
        /// The end of guest memory.
        highest: u64,
    },
    /// An entry point that no segment contains.
    #[error("the kernel's entry point {entry:#x} lies in none of its segments")]
    NoEntry {
        /// The entry point.
        entry: u64,
    },
    /// The loader refused for a reason of its own.
    #[error("the kernel cannot be loaded")]
    Load(#[from] linux_loader::loader::Error),
    /// A command line that is too long or holds a zero byte.
    #[error(
        "the command line has {len} bytes: at most {COMMAND_LINE_MAX} are possible, none of them zero"
    )]
    CommandLine {
        /// Its length.
        len: usize,
    },
    /// Guest memory too small for the boot data.
    #[error("the boot data do not fit guest memory: give the guest at least 2 MiB")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The boot parameters could not be written.
    #[error("the boot parameters do not fit guest memory")]
    Parameters(#[from] linux_loader::configurator::Error),
}

/// Loads an image and everything a guest finds at its start.
pub fn load(
    memory: &GuestMemory,
    config: &MachineConfig,
    image: &BootImage,
) -> Result<EntryState, BootError> {
    let kernel = if bzimage::is_one(&image.kernel) {
        bzimage::load(memory, config.memory, &image.kernel)?
    } else {
        elf::load(memory, config.memory, &image.kernel)?
    };
    let initrd = match &image.initrd {
        Some(initrd) => {
            let start = initrd::load(memory, config.memory, &kernel, initrd)?;
            Some((start, initrd.len() as u32))
        }
        None => None,
    };
    write_command_line(memory, &config.command_line)?;
    write_boot_params(memory, config, kernel.header, initrd)?;
    if config.acpi {
        acpi::write(memory, config)?;
    }
    tables::write_page_tables(memory)?;
    tables::write_gdt(memory)?;
    Ok(EntryState {
        instruction: kernel.entry,
        stack: BOOT_STACK,
        boot_params: BOOT_PARAMS,
        page_tables: tables::PML4,
        gdt: tables::GDT,
        gdt_limit: tables::GDT_LIMIT,
        code_selector: tables::CODE_SELECTOR,
        data_selector: tables::DATA_SELECTOR,
    })
}

fn write_command_line(memory: &GuestMemory, line: &str) -> Result<(), BootError> {
    if line.len() > COMMAND_LINE_MAX || line.contains('\0') {
        return Err(BootError::CommandLine { len: line.len() });
    }
    memory.write_slice(line.as_bytes(), GuestAddress(COMMAND_LINE))?;
    memory.write_slice(&[0], GuestAddress(COMMAND_LINE + line.len() as u64))?;
    Ok(())
}

/// `header` is the kernel's own, `initrd` where its RAM disk is and how long.
fn write_boot_params(
    memory: &GuestMemory,
    config: &MachineConfig,
    header: setup_header,
    initrd: Option<(u32, u32)>,
) -> Result<(), BootError> {
    let mut params = boot_params {
        hdr: header,
        ..Default::default()
    };
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    params.hdr.cmdline_size = config.command_line.len() as u32;
    (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = initrd.unwrap_or_default();
    if config.acpi {
        params.acpi_rsdp_addr = acpi::RSDP;
    }
    let map = [
        (0, LOW_MEMORY_END),
        (KERNEL_MIN, config.memory.saturating_sub(KERNEL_MIN)),
    ];
    for (slot, (addr, size)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: E820_RAM,
        };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(BOOT_PARAMS)),
        memory,
    )?;
    Ok(())
}

#[cfg(test)]
mod linux_tests;
#[cfg(test)]
mod tests;
