//! What the log says happened: the outcome of a write, not the command. Applying a record twice is
//! the same as once, which lets a compaction copy data while it changes.

use alloc::vec::Vec;

/// One change of the data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record<'a> {
    /// The key has this value now.
    Set {
        /// The key.
        key: &'a [u8],
        /// Its value.
        value: &'a [u8],
    },
    /// The key is gone.
    Delete {
        /// The key.
        key: &'a [u8],
    },
    /// All keys are gone.
    Clear,
}

/// A payload that a checksum vouches for is not a list of records: a defect, never a torn write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

const SET: u8 = 1;
const DELETE: u8 = 2;
const CLEAR: u8 = 3;
/// A tag and two lengths.
const SET_HEAD: usize = 1 + 4 + 4;

impl<'a> Record<'a> {
    /// How many bytes a `Set` takes in the log.
    pub const fn set_len(key: usize, value: usize) -> usize {
        SET_HEAD + key + value
    }

    /// Appends it to a payload.
    pub fn encode(&self, payload: &mut Vec<u8>) {
        match self {
            Self::Set { key, value } => {
                payload.push(SET);
                encode_len(key, payload);
                encode_len(value, payload);
                payload.extend_from_slice(key);
                payload.extend_from_slice(value);
            }
            Self::Delete { key } => {
                payload.push(DELETE);
                encode_len(key, payload);
                payload.extend_from_slice(key);
            }
            Self::Clear => payload.push(CLEAR),
        }
    }

    /// Takes the first record off a payload.
    fn decode(payload: &mut &'a [u8]) -> Result<Self, Malformed> {
        let tag = take(payload, 1)?;
        match tag {
            [SET] => {
                let key = decode_len(payload)?;
                let value = decode_len(payload)?;
                Ok(Self::Set {
                    key: take(payload, key)?,
                    value: take(payload, value)?,
                })
            }
            [DELETE] => {
                let key = decode_len(payload)?;
                Ok(Self::Delete {
                    key: take(payload, key)?,
                })
            }
            [CLEAR] => Ok(Self::Clear),
            _ => Err(Malformed),
        }
    }
}

/// The records of a payload, in order. After an error comes nothing.
pub fn records(mut payload: &[u8]) -> impl Iterator<Item = Result<Record<'_>, Malformed>> {
    core::iter::from_fn(move || {
        if payload.is_empty() {
            return None;
        }
        let record = Record::decode(&mut payload);
        if record.is_err() {
            payload = &[];
        }
        Some(record)
    })
}

fn encode_len(bytes: &[u8], payload: &mut Vec<u8>) {
    // Keys and values are bounded far below 4 GiB before they come here.
    payload.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
}

fn decode_len(payload: &mut &[u8]) -> Result<usize, Malformed> {
    let bytes = take(payload, 4)?.try_into().map_err(|_| Malformed)?;
    Ok(u32::from_le_bytes(bytes) as usize)
}

fn take<'a>(payload: &mut &'a [u8], len: usize) -> Result<&'a [u8], Malformed> {
    let (taken, rest) = payload.split_at_checked(len).ok_or(Malformed)?;
    *payload = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_round_trips_and_a_cut_one_is_malformed() {
        let wrote = [
            Record::Set {
                key: b"k",
                value: b"",
            },
            Record::Delete { key: b"gone" },
            Record::Clear,
            Record::Set {
                key: b"",
                value: b"v\0",
            },
        ];
        let mut payload = Vec::new();
        for record in &wrote {
            record.encode(&mut payload);
        }
        let read: Result<Vec<_>, _> = records(&payload).collect();
        assert_eq!(read.unwrap(), wrote);
        assert!(records(&payload[..payload.len() - 1]).any(|record| record.is_err()));
        assert_eq!(records(&[9]).next(), Some(Err(Malformed)));
    }
}
