//! Reads the log back on boot.
//!
//! An area is read from its first sector while batches follow each other. Where they stop, one of
//! three things is true: nothing was written there, a batch was torn by the end of the last boot,
//! or a batch was damaged later. As there is only one commit at a time, a torn batch is the last:
//! a whole batch of the same area *behind* the gap proves damage, and the ledger refuses to go on.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use super::batch::{Flags, Head};
use super::{
    Area, Generation, Journal, MAX_PAYLOAD, MIN_SECTORS, NonceSequence, SECTOR, Sector, Sequence,
    Tail,
};
use crate::keyspace::Keyspace;
use crate::record::{Malformed, records};

/// The disk, before the service runs.
pub trait Disk {
    /// How many sectors it has.
    fn sectors(&self) -> u64;
    /// Reads whole sectors, waiting for them.
    fn read(&mut self, from: Sector, buffer: &mut [u8]) -> Result<(), DiskFailed>;
    /// Writes whole sectors and makes them durable, waiting for that.
    fn write(&mut self, to: Sector, data: &[u8]) -> Result<(), DiskFailed>;
}

/// The device refused a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFailed;

/// Why the log cannot be used. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecoveryError {
    /// The disk is too small.
    TooSmall {
        /// Its sectors.
        sectors: u64,
    },
    /// The device refused.
    Disk(DiskFailed),
    /// The disk holds something that is not a ledger's log.
    Foreign,
    /// A batch in the middle of the log is damaged: acknowledged writes are missing.
    Corrupt {
        /// Where it should be.
        at: Sector,
        /// Its number.
        missing: Sequence,
        /// A later batch that is whole.
        later: Sequence,
    },
    /// A whole batch holds no records: a defect of the ledger that wrote it.
    Malformed {
        /// Where it is.
        at: Sector,
    },
}

impl From<DiskFailed> for RecoveryError {
    fn from(failed: DiskFailed) -> Self {
        Self::Disk(failed)
    }
}

impl fmt::Display for RecoveryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooSmall { sectors } => write!(
                f,
                "the disk has {sectors} sectors; give it at least {MIN_SECTORS}"
            ),
            Self::Disk(DiskFailed) => f.write_str("the disk refused a request"),
            Self::Foreign => {
                f.write_str("the disk holds something else; give an empty (zeroed) disk")
            }
            Self::Corrupt { at, missing, later } => write!(
                f,
                "the log is damaged: batch {} at sector {} is not whole, but batch {} is; restore the disk",
                missing.0, at.0, later.0
            ),
            Self::Malformed { at } => write!(
                f,
                "the batch at sector {} is whole but holds no records; restore the disk",
                at.0
            ),
        }
    }
}

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Batches read.
    pub batches: u64,
    /// The last batch was torn (it was never acknowledged) and is dropped.
    pub torn: bool,
}

/// Reads the log into `keyspace` and goes on behind it. An empty disk is given its first batch.
pub fn recover(
    disk: &mut dyn Disk,
    keyspace: &mut Keyspace,
    mut nonces: NonceSequence,
) -> Result<(Journal, Found), RecoveryError> {
    let sectors = disk.sectors();
    if sectors < MIN_SECTORS {
        return Err(RecoveryError::TooSmall { sectors });
    }
    let area_sectors = sectors / 2;
    let mut reader = Reader::new(disk, area_sectors);
    let mut firsts = Vec::new();
    let mut blank = true;
    for area in Area::BOTH {
        blank &= reader.first_is_zero(area)?;
        if let Some(first) = reader.batch(area, 0)? {
            firsts.push((area, first));
        }
    }
    if firsts.is_empty() {
        if !blank {
            return Err(RecoveryError::Foreign);
        }
        let mut tail = Tail::empty(Area(0), Generation(1), nonces.draw());
        if let Some(write) = tail.append(area_sectors, Flags::COMPLETE, &[]) {
            disk.write(write.sector, &write.data)?;
        }
        let journal = Journal::new(area_sectors, tail, Generation(1), nonces);
        return Ok((journal, Found::default()));
    }
    // The newest complete area counts; one that is not complete is a compaction that never ended.
    firsts.sort_by_key(|(_, head)| core::cmp::Reverse(head.generation));
    let newest = firsts[0].1.generation;
    if let [(whole, _)] = firsts[..] {
        // Torn before its first batch was durable, or damaged since?
        if let Some(later) = reader.orphan(whole.other(), newest)? {
            return Err(RecoveryError::Corrupt {
                at: whole.other().start(area_sectors),
                missing: Sequence(0),
                later,
            });
        }
    }
    for (area, first) in firsts {
        let walked = walk(&mut reader, area, first, keyspace)?;
        if !walked.complete {
            keyspace.forget_all();
            continue;
        }
        let found = Found {
            batches: walked.tail.next.0,
            torn: walked.torn,
        };
        let journal = Journal::new(area_sectors, walked.tail, newest, nonces);
        return Ok((journal, found));
    }
    // Without a complete area something acknowledged is gone.
    Err(RecoveryError::Foreign)
}

/// An area, read to its end.
struct Walked {
    tail: Tail,
    complete: bool,
    torn: bool,
}

/// Applies an area batch by batch and finds out how it ends.
fn walk(
    reader: &mut Reader<'_>,
    area: Area,
    first: Head,
    keyspace: &mut Keyspace,
) -> Result<Walked, RecoveryError> {
    let mut walked = Walked {
        tail: Tail::empty(area, first.generation, first.nonce),
        complete: false,
        torn: false,
    };
    loop {
        let at = walked.tail.used;
        let sector = Sector(area.start(reader.area_sectors).0 + at);
        let head = reader.batch(area, at)?;
        let Some(head) = head.filter(|head| follows(&walked.tail, head)) else {
            if let Some(later) = reader.later_batch(&walked.tail)? {
                return Err(RecoveryError::Corrupt {
                    at: sector,
                    missing: walked.tail.next,
                    later,
                });
            }
            walked.torn = !reader.is_free(&walked.tail)?;
            return Ok(walked);
        };
        let payload = head.vouches_for(reader.sectors(area, at, head.sectors())?);
        for record in records(payload.unwrap_or_default()) {
            let record = record.map_err(|Malformed| RecoveryError::Malformed { at: sector })?;
            keyspace.replay(record);
        }
        walked.complete |= head.flags == Flags::COMPLETE;
        walked.tail.used += head.sectors();
        walked.tail.next = Sequence(walked.tail.next.0 + 1);
    }
}

fn follows(tail: &Tail, head: &Head) -> bool {
    (head.generation, head.nonce, head.sequence) == (tail.generation, tail.nonce, tail.next)
}

/// How many sectors are read ahead.
const READ_AHEAD: u64 = 256;

/// How far behind a gap a later batch is looked for: no batch is longer, so one would begin there.
const SEARCH: u64 = (MAX_PAYLOAD / SECTOR) as u64 + 2;

/// Reads an area with read-ahead.
struct Reader<'a> {
    disk: &'a mut dyn Disk,
    area_sectors: u64,
    window: Vec<u8>,
    /// The first sector in the window, of the whole disk.
    from: u64,
}

impl<'a> Reader<'a> {
    fn new(disk: &'a mut dyn Disk, area_sectors: u64) -> Self {
        Self {
            disk,
            area_sectors,
            window: Vec::new(),
            from: 0,
        }
    }

    /// Sectors of an area, `at` counted from its start; fewer where it ends.
    fn sectors(&mut self, area: Area, at: u64, count: u64) -> Result<&[u8], RecoveryError> {
        let count = count.min(self.area_sectors.saturating_sub(at));
        let start = area.start(self.area_sectors).0 + at;
        let have = (self.window.len() / SECTOR) as u64;
        if start < self.from || start + count > self.from + have {
            let ahead = count
                .max(READ_AHEAD)
                .min(self.area_sectors.saturating_sub(at));
            self.window = vec![0; ahead as usize * SECTOR];
            self.from = start;
            for (index, part) in self
                .window
                .chunks_mut(READ_AHEAD as usize * SECTOR)
                .enumerate()
            {
                let from = Sector(start + index as u64 * READ_AHEAD);
                self.disk.read(from, part)?;
            }
        }
        let offset = (start - self.from) as usize * SECTOR;
        Ok(&self.window[offset..offset + count as usize * SECTOR])
    }

    /// The head of the whole batch that begins here, if one does.
    fn batch(&mut self, area: Area, at: u64) -> Result<Option<Head>, RecoveryError> {
        let Some(head) = Head::decode(self.sectors(area, at, 1)?) else {
            return Ok(None);
        };
        let batch = self.sectors(area, at, head.sectors())?;
        Ok(head.vouches_for(batch).map(|_| head))
    }

    /// A whole batch of the same area that comes after the one missing at its tail.
    fn later_batch(&mut self, tail: &Tail) -> Result<Option<Sequence>, RecoveryError> {
        let end = self.area_sectors.min(tail.used + SEARCH);
        for at in tail.used..end {
            let Some(head) = Head::decode(self.sectors(tail.area, at, 1)?) else {
                continue;
            };
            let same = (head.generation, head.nonce) == (tail.generation, tail.nonce);
            if same && head.sequence > tail.next && self.batch(tail.area, at)?.is_some() {
                return Ok(Some(head.sequence));
            }
        }
        Ok(None)
    }

    /// A whole batch of a generation beyond `newest` in an area whose first batch is not whole.
    fn orphan(
        &mut self,
        area: Area,
        newest: Generation,
    ) -> Result<Option<Sequence>, RecoveryError> {
        for at in 0..self.area_sectors.min(SEARCH) {
            let Some(head) = Head::decode(self.sectors(area, at, 1)?) else {
                continue;
            };
            if head.generation > newest && self.batch(area, at)?.is_some() {
                return Ok(Some(head.sequence));
            }
        }
        Ok(None)
    }

    /// Whether nothing of this area's next batch is there: its head would be the first to see.
    fn is_free(&mut self, tail: &Tail) -> Result<bool, RecoveryError> {
        let sector = self.sectors(tail.area, tail.used, 1)?;
        Ok(!Head::decode(sector).is_some_and(|head| follows(tail, &head)))
    }

    fn first_is_zero(&mut self, area: Area) -> Result<bool, RecoveryError> {
        let sector = self.sectors(area, 0, 1)?;
        Ok(sector.iter().all(|&byte| byte == 0))
    }
}
