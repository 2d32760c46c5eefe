//! Print: many bytes for the console in one exit.
//!
//! The guest says once where in its memory it will put what it prints, and then each time how many
//! bytes stand there. A 16550 takes an exit for each byte: KVM leaves `rep outs` after every element.

use bytes::Bytes;
use vm_memory::{Bytes as _, GuestAddress};

use crate::GuestMemory;
use crate::tape::{Command, Tape, TapeError};

/// The most that is printed at a time, in bytes; of more, the beginning.
pub const MAX_TEXT: u32 = 4096;

/// Where the text stands; nowhere at power-on.
#[derive(Debug, Default)]
pub struct Print {
    /// The physical address. 0 is none: what is there belongs to firmware.
    text: u32,
}

impl Print {
    /// The guest says where it puts what it prints.
    pub const fn write_where(&mut self, address: u32) {
        self.text = address;
    }

    /// The guest prints so many bytes. Nothing is printed of a text that is not all in memory.
    pub fn write_length(
        &self,
        length: u32,
        memory: &GuestMemory,
        tape: &mut dyn Tape,
    ) -> Result<(), TapeError> {
        if self.text == 0 || length == 0 {
            return Ok(());
        }
        let mut text = vec![0; length.min(MAX_TEXT) as usize];
        match memory.read_slice(&mut text, GuestAddress(self.text.into())) {
            Ok(()) => tape.command(Command::Console(Bytes::from(text))),
            Err(_) => Ok(()),
        }
    }

    /// Adds where the text stands.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.text.to_le_bytes());
    }
}
