//! What the VMM tells at boot: Linux boot parameters (the "zero page").

use alloc::string::String;
use core::fmt;

use ledger::command_line::{self, CommandLineError, Network};

use super::heap;

/// Offsets within the boot parameters.
const E820_COUNT: u64 = 0x1e8;
const COMMAND_LINE: u64 = 0x228;
const E820_TABLE: u64 = 0x2d0;
/// The size of a memory map entry, and the type of usable memory.
const E820_ENTRY: u64 = 20;
const E820_RAM: u32 = 1;
const E820_MAX: u8 = 128;

unsafe extern "C" {
    /// The end of the image, from the linker script.
    static __image_end: u8;
}

/// What was told.
pub struct Boot {
    command_line: String,
    /// Bytes of heap.
    pub heap: usize,
}

/// Why the ledger cannot start.
#[derive(Debug)]
pub enum BootError {
    /// The command line says nothing usable.
    CommandLine(CommandLineError),
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine(error) => error.fmt(f),
        }
    }
}

impl Boot {
    /// Reads the boot parameters and gives the allocator its memory.
    ///
    /// # Safety
    /// Called once, first, with the address that the VMM passed.
    pub unsafe fn take(params: u64) -> Self {
        // SAFETY: the VMM put boot parameters there, a map of memory in them, and a command line
        // that ends with a zero; nothing has been allocated before.
        unsafe {
            let start = (&raw const __image_end) as u64;
            let mut end = start;
            for entry in 0..u64::from(load::<u8>(params + E820_COUNT).min(E820_MAX)) {
                let at = params + E820_TABLE + entry * E820_ENTRY;
                let from = load::<u64>(at);
                let to = from.saturating_add(load::<u64>(at + 8));
                if load::<u32>(at + 16) == E820_RAM && (from..to).contains(&start) {
                    end = to;
                }
            }
            heap::claim(start, end);
            let mut text = u64::from(load::<u32>(params + COMMAND_LINE));
            let mut command_line = String::new();
            while text != 0 && load::<u8>(text) != 0 {
                command_line.push(char::from(load::<u8>(text)));
                text += 1;
            }
            Self {
                command_line,
                heap: (end - start) as usize,
            }
        }
    }

    /// What the command line says.
    pub fn network(&self) -> Result<Network, BootError> {
        command_line::parse(&self.command_line).map_err(BootError::CommandLine)
    }
}

/// # Safety
/// A value of this type is there, and nothing writes it.
unsafe fn load<T: Copy>(address: u64) -> T {
    // SAFETY: as the caller vouches.
    unsafe { (address as *const T).read_unaligned() }
}
