//! The console: whole lines, formatted without allocation.

use core::fmt::{self, Write};

use super::ports;

/// The longest line; what is longer is cut.
const LINE: usize = 256;

struct Line {
    bytes: [u8; LINE],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // One byte is left for the line's end.
        let room = LINE - 1 - self.len;
        let taken = &text.as_bytes()[..text.len().min(room)];
        self.bytes[self.len..self.len + taken.len()].copy_from_slice(taken);
        self.len += taken.len();
        Ok(())
    }
}

/// Writes a line.
pub fn line(text: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; LINE],
        len: 0,
    };
    // Writing to the buffer cannot fail.
    let _ = line.write_fmt(text);
    line.bytes[line.len] = b'\n';
    ports::console(&line.bytes[..=line.len]);
}
