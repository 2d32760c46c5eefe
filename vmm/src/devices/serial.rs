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
///
/// The crate shows its registers only together with a copy of its queue, and the run loop asks for
/// line and room at every landmark: both are looked up once an access is done instead.
pub struct Serial {
    uart: Uart<LevelIsRead, NoEvents, Vec<u8>>,
    line: bool,
    loopback: bool,
}

impl Serial {
    /// As at power-on.
    pub fn new() -> Self {
        let mut serial = Self {
            uart: Uart::new(LevelIsRead, Vec::new()),
            line: false,
            loopback: false,
        };
        serial.look();
        serial
    }

    /// The guest reads register `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.uart.read(offset);
        self.look();
        value
    }

    /// The guest writes register `offset` (0 to 7). Output is kept until [`Serial::flush`], and what
    /// it does to line and room shows then: one exit may write hundreds of bytes.
    pub fn write(&mut self, offset: u8, value: u8) {
        // A Vec takes every byte and the trigger cannot fail; the receive queue of a loopback
        // drops what does not fit, like the real one.
        let _ = self.uart.write(offset, value);
    }

    /// Notes what the last access has left.
    fn look(&mut self) {
        let state = self.uart.state();
        self.line = state.interrupt_identification & NOTHING_PENDING == 0;
        self.loopback = state.modem_control & LOOPBACK != 0;
    }

    /// Hands on what the guest wrote during this exit.
    pub fn flush(&mut self, tape: &mut dyn Tape) -> Result<(), TapeError> {
        self.look();
        let written = self.uart.writer_mut();
        if written.is_empty() {
            return Ok(());
        }
        tape.command(Command::Console(Bytes::from(std::mem::take(written))))
    }

    /// How many typed bytes fit the receive queue now.
    pub fn room(&self) -> usize {
        if self.loopback {
            0
        } else {
            self.uart.fifo_capacity()
        }
    }

    /// Takes typed bytes; false, and nothing taken, when there is no room for all of them.
    #[must_use]
    pub fn receive(&mut self, bytes: &[u8]) -> bool {
        let taken = bytes.len() <= self.room() && self.uart.enqueue_raw_bytes(bytes).is_ok();
        self.look();
        taken
    }

    /// The level of the interrupt line.
    pub const fn line(&self) -> bool {
        self.line
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
