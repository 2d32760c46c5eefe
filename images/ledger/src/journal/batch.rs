//! One batch on disk: a head, a payload of records, zeros up to the end of the sector.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | magic |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | flags: 1 = this area is complete from here on |
//! | 16 | 8 | generation |
//! | 24 | 8 | nonce of the area |
//! | 32 | 8 | sequence number |
//! | 40 | 4 | length of the payload |
//! | 44 | 4 | CRC-32 of bytes 0..44 and the payload |

use alloc::vec::Vec;

use super::{Generation, MAX_PAYLOAD, SECTOR, Sequence};

/// The first bytes of every batch.
const MAGIC: [u8; 8] = *b"LEDGRLOG";
/// The format version.
const VERSION: u32 = 1;
/// The length of the head.
pub const HEAD: usize = 48;
/// What the checksum covers of it.
const CHECKED: usize = 44;

/// A number drawn for every new area, in each of its batches: what is in a value is never taken for
/// a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nonce(pub u64);

/// What a batch is besides its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags(pub u32);

impl Flags {
    /// Records, nothing else.
    pub const CHANGES: Self = Self(0);
    /// With this batch the area holds all data; until it is durable the older area counts.
    pub const COMPLETE: Self = Self(1);
}

/// The head of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What it is besides its records.
    pub flags: Flags,
    /// Of its area.
    pub generation: Generation,
    /// Of its area.
    pub nonce: Nonce,
    /// Its number in the area.
    pub sequence: Sequence,
    /// The length of the payload in bytes.
    pub len: u32,
}

impl Head {
    /// How many sectors the batch takes.
    pub const fn sectors(&self) -> u64 {
        (HEAD + self.len as usize).div_ceil(SECTOR) as u64
    }

    /// The whole batch, in whole sectors.
    pub fn encode(&self, payload: &[u8]) -> Vec<u8> {
        let size = self.sectors() as usize * SECTOR;
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.flags.0.to_le_bytes());
        bytes.extend_from_slice(&self.generation.0.to_le_bytes());
        bytes.extend_from_slice(&self.nonce.0.to_le_bytes());
        bytes.extend_from_slice(&self.sequence.0.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        let checksum = checksum(&bytes, payload);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(size, 0);
        bytes
    }

    /// Reads a head; nothing vouches for it before [`Head::vouches_for`] does.
    pub fn decode(sector: &[u8]) -> Option<Self> {
        let mut rest = sector.strip_prefix(&MAGIC)?;
        if take_u32(&mut rest)? != VERSION {
            return None;
        }
        let head = Self {
            flags: Flags(take_u32(&mut rest)?),
            generation: Generation(take_u64(&mut rest)?),
            nonce: Nonce(take_u64(&mut rest)?),
            sequence: Sequence(take_u64(&mut rest)?),
            len: take_u32(&mut rest)?,
        };
        (head.len as usize <= MAX_PAYLOAD).then_some(head)
    }

    /// The payload, if `batch` (this head's sectors) is what was written.
    pub fn vouches_for<'a>(&self, batch: &'a [u8]) -> Option<&'a [u8]> {
        let (head, rest) = batch.split_at_checked(HEAD)?;
        let payload = rest.get(..self.len as usize)?;
        let (checked, mut stored) = head.split_at(CHECKED);
        (take_u32(&mut stored)? == checksum(checked, payload)).then_some(payload)
    }
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*taken))
}

fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    let (taken, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*taken))
}
