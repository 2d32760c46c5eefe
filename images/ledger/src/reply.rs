//! Writes answers in RESP2.

use alloc::vec::Vec;
use core::fmt::{self, Write};

/// Appends answers to a connection's output.
pub struct Replies<'a>(&'a mut Vec<u8>);

/// Lets `write!` append to bytes.
struct Text<'a>(&'a mut Vec<u8>);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.extend_from_slice(text.as_bytes());
        Ok(())
    }
}

impl<'a> Replies<'a> {
    /// Answers go to the end of `output`.
    pub fn new(output: &'a mut Vec<u8>) -> Self {
        Self(output)
    }

    /// A simple string, for example `OK`.
    pub fn simple(&mut self, text: &str) {
        self.0.push(b'+');
        self.line(text);
    }

    /// `OK`.
    pub fn ok(&mut self) {
        self.simple("OK");
    }

    /// An error; its first word is the code (`ERR`, `OOM`, `NOPROTO`). Line ends become blanks, as
    /// an error is one line.
    pub fn error(&mut self, message: fmt::Arguments<'_>) {
        self.0.push(b'-');
        let start = self.0.len();
        // Writing to a vector cannot fail.
        let _ = Text(self.0).write_fmt(message);
        for byte in &mut self.0[start..] {
            if matches!(byte, b'\r' | b'\n') {
                *byte = b' ';
            }
        }
        self.0.extend_from_slice(b"\r\n");
    }

    /// An integer.
    pub fn integer(&mut self, value: i64) {
        self.number(b':', &Decimal::new(value));
    }

    /// An integer that counts something.
    pub fn count(&mut self, value: usize) {
        self.number(b':', &Decimal::of_len(value));
    }

    /// A string of any bytes.
    pub fn bulk(&mut self, bytes: &[u8]) {
        self.number(b'$', &Decimal::of_len(bytes.len()));
        self.0.extend_from_slice(bytes);
        self.0.extend_from_slice(b"\r\n");
    }

    /// A string, or nil.
    pub fn bulk_or_nil(&mut self, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.bulk(bytes),
            None => self.0.extend_from_slice(b"$-1\r\n"),
        }
    }

    /// The head of an array; its elements follow.
    pub fn array(&mut self, elements: usize) {
        self.number(b'*', &Decimal::of_len(elements));
    }

    fn number(&mut self, sign: u8, value: &Decimal) {
        self.0.push(sign);
        self.0.extend_from_slice(value.as_bytes());
        self.0.extend_from_slice(b"\r\n");
    }

    fn line(&mut self, text: &str) {
        self.0.extend_from_slice(text.as_bytes());
        self.0.extend_from_slice(b"\r\n");
    }
}

/// A number in decimal, without allocation or formatting machinery: every answer has one.
pub struct Decimal {
    digits: [u8; 20],
    start: usize,
}

impl Decimal {
    /// `value` in decimal.
    pub fn new(value: i64) -> Self {
        let mut digits = [0; 20];
        let mut start = digits.len();
        let mut rest = value.unsigned_abs();
        loop {
            start -= 1;
            digits[start] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if value < 0 {
            start -= 1;
            digits[start] = b'-';
        }
        Self { digits, start }
    }

    /// A length in decimal; no memory is long enough to be cut off.
    pub fn of_len(len: usize) -> Self {
        Self::new(i64::try_from(len).unwrap_or(i64::MAX))
    }

    /// Its digits.
    pub fn as_bytes(&self) -> &[u8] {
        &self.digits[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_resp2() {
        let mut output = Vec::new();
        let mut replies = Replies::new(&mut output);
        replies.ok();
        replies.error(format_args!("ERR no\r\nsuch"));
        replies.integer(-7);
        replies.bulk(b"a\r\n");
        replies.bulk_or_nil(None);
        replies.array(0);
        assert_eq!(
            String::from_utf8(output).unwrap(),
            "+OK\r\n-ERR no  such\r\n:-7\r\n$3\r\na\r\n\r\n$-1\r\n*0\r\n"
        );
    }

    #[test]
    fn decimals_reach_both_ends() {
        for value in [0, 9, 10, -1, i64::MAX, i64::MIN] {
            assert_eq!(Decimal::new(value).as_bytes(), value.to_string().as_bytes());
        }
    }
}
