//! The serial console: a 16550 of vm-superio, its interrupt as a level, its output as a command.

use std::convert::Infallible;

use bytes::Bytes;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart};

use crate::tape::{Command, Tape, TapeError};

/// Set in the interrupt identification register while nothing is pending.
const NOTHING_PENDING: u8 = 1;
/// Set in the modem control register while output is turned round into input.
const LOOPBACK: u8 = 0x10;

/// The line's level is read off the registers after each access, so nothing needs triggering.
struct LevelIsRead;

impl Trigger for LevelIsRead {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// A 16550 whose other end is the console.
pub struct Serial {
    uart: Uart<LevelIsRead, NoEvents, Vec<u8>>,
}

impl Serial {
    /// As at power-on.
    pub fn new() -> Self {
        Self {
            uart: Uart::new(LevelIsRead, Vec::new()),
        }
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// The guest writes register `offset` (0 to 7). Output is kept until [`Serial::flush`].
    pub fn write(&mut self, offset: u8, value: u8) {
        // A Vec takes every byte and the trigger cannot fail; the receive queue of a loopback
        // drops what does not fit, like the real one.
        let _ = self.uart.write(offset, value);
    }

    /// Hands on what the guest wrote during this exit.
    pub fn flush(&mut self, tape: &mut dyn Tape) -> Result<(), TapeError> {
        let written = self.uart.writer_mut();
        if written.is_empty() {
            return Ok(());
        }
        tape.command(Command::Console(Bytes::from(std::mem::take(written))))
    }

    /// How many typed bytes fit the receive queue now.
    pub fn room(&self) -> usize {
        if self.uart.state().modem_control & LOOPBACK == 0 {
            self.uart.fifo_capacity()
        } else {
            0
        }
    }

    /// Takes typed bytes; false, and nothing taken, when there is no room for all of them.
    #[must_use]
    pub fn receive(&mut self, bytes: &[u8]) -> bool {
        bytes.len() <= self.room() && self.uart.enqueue_raw_bytes(bytes).is_ok()
    }

    /// The level of the interrupt line.
    pub fn line(&self) -> bool {
        self.uart.state().interrupt_identification & NOTHING_PENDING == 0
    }

    /// Adds the registers and the receive queue.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        let state = self.uart.state();
        hasher.update(&[
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
            // At most 64 bytes.
            state.in_buffer.len() as u8,
        ]);
        hasher.update(&state.in_buffer);
    }
}
