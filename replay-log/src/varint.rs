//! Variable-length integers (LEB128, little end first) and a bounded reader over encoded bytes.
//!
//! Every number has exactly one encoding: longer ones than needed are refused, so that what
//! decodes always encodes to the same bytes again.

use bytes::Bytes;
use thiserror::Error;

/// The most bytes a number takes.
pub const MAX_VARINT: usize = 10;

/// Why a number or a field could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FieldError {
    /// The input ends in the middle of a field.
    #[error("the bytes end in the middle of a field")]
    Short,
    /// A number that does not fit, or that is written with more bytes than it needs.
    #[error("a number is not written in its one valid form")]
    BadNumber,
    /// A length or count beyond its bound.
    #[error("{what} of {found} is over the bound of {max}")]
    TooLong {
        /// What it would be the length of.
        what: &'static str,
        /// What the input claims.
        found: u64,
        /// What is allowed.
        max: u64,
    },
}

/// Appends a number.
pub fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads a number from the start of `input`: its value and how many bytes it took.
pub fn get(input: &[u8]) -> Result<(u64, usize), FieldError> {
    let mut value = 0u64;
    for (i, &byte) in input.iter().take(MAX_VARINT).enumerate() {
        let part = u64::from(byte & 0x7f);
        // The tenth byte holds the one bit that is left.
        if i == MAX_VARINT - 1 && part > 1 {
            return Err(FieldError::BadNumber);
        }
        value |= part << (7 * i);
        if byte & 0x80 == 0 {
            let overlong = byte == 0 && i > 0;
            return if overlong {
                Err(FieldError::BadNumber)
            } else {
                Ok((value, i + 1))
            };
        }
    }
    if input.len() >= MAX_VARINT {
        Err(FieldError::BadNumber)
    } else {
        Err(FieldError::Short)
    }
}

/// Maps small numbers of either sign to small numbers.
pub const fn zigzag(value: i64) -> u64 {
    (value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned()
}

/// The inverse of [`zigzag`].
pub const fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -((value & 1).cast_signed())
}

/// Reads fields one after the other; byte strings are slices of the input, not copies.
#[derive(Debug)]
pub struct FieldReader<'a> {
    input: &'a Bytes,
    at: usize,
}

impl<'a> FieldReader<'a> {
    /// Reads on from byte `at` of `input`.
    pub fn new(input: &'a Bytes, at: usize) -> Self {
        Self { input, at }
    }

    /// How many bytes have been read.
    pub fn offset(&self) -> usize {
        self.at
    }

    fn rest(&self) -> &'a [u8] {
        self.input.get(self.at..).unwrap_or_default()
    }

    /// One byte.
    pub fn byte(&mut self) -> Result<u8, FieldError> {
        let byte = *self.rest().first().ok_or(FieldError::Short)?;
        self.at += 1;
        Ok(byte)
    }

    /// A number.
    pub fn number(&mut self) -> Result<u64, FieldError> {
        let (value, len) = get(self.rest())?;
        self.at += len;
        Ok(value)
    }

    /// A number of at most `max`: a length or a count.
    pub fn bounded(&mut self, what: &'static str, max: usize) -> Result<usize, FieldError> {
        let found = self.number()?;
        let max = max as u64;
        if found > max {
            return Err(FieldError::TooLong { what, found, max });
        }
        Ok(found as usize)
    }

    /// Exactly `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FieldError> {
        let array = *self.rest().first_chunk().ok_or(FieldError::Short)?;
        self.at += N;
        Ok(array)
    }

    /// A byte string with its length before it.
    pub fn bytes(&mut self, what: &'static str, max: usize) -> Result<Bytes, FieldError> {
        let len = self.bounded(what, max)?;
        if self.rest().len() < len {
            return Err(FieldError::Short);
        }
        let bytes = self.input.slice(self.at..self.at + len);
        self.at += len;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_survive(value: u64) {
            let mut out = Vec::new();
            put(&mut out, value);
            prop_assert_eq!(get(&out), Ok((value, out.len())));
            prop_assert_eq!(get(&out[..out.len() - 1]), Err(FieldError::Short));
            prop_assert_eq!(unzigzag(zigzag(value.cast_signed())), value.cast_signed());
        }

        #[test]
        fn what_decodes_has_one_form(input in proptest::collection::vec(any::<u8>(), 0..12)) {
            if let Ok((value, len)) = get(&input) {
                let mut out = Vec::new();
                put(&mut out, value);
                prop_assert_eq!(&out[..], &input[..len]);
            }
        }
    }

    #[test]
    fn overlong_and_overflowing_numbers_are_refused() {
        assert_eq!(get(&[0x80, 0x00]), Err(FieldError::BadNumber));
        assert_eq!(get(&[0xff; 10]), Err(FieldError::BadNumber));
        let mut too_big = [0xff; 10];
        too_big[9] = 0x02;
        assert_eq!(get(&too_big), Err(FieldError::BadNumber));
    }
}
