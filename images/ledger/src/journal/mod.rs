//! The log on disk: two areas, one of them current; group commits; compaction into the other area.
//!
//! ```text
//!   disk:  │ area 0: batch 0 │ batch 1 │ … │ free │ area 1: (older generation, or a compaction) │
//!
//!              used > 3/4            COMPLETE batch durable
//!   Appending ───────────► Compacting ─────────────────────► Appending (in the other area)
//!                           every commit writes its changes to both areas,
//!                           and a step of the data to the new one
//! ```
//!
//! The journal does no I/O: it hands out [`Commit`]s and is told when they are durable. There is at
//! most one at a time, so a torn batch can only be the last one ([`recovery`]).

pub mod batch;
pub mod recovery;

use alloc::boxed::Box;
use alloc::vec::Vec;

use batch::{Flags, Head, Nonce};

use crate::keyspace::Keyspace;
use crate::limits::{COMPACTION_STEP, MAX_CHANGE, MAX_PENDING};

/// The size of a sector, in bytes.
pub const SECTOR: usize = 512;

/// The smallest disk the ledger works with, in sectors: 32 MiB.
///
/// With areas of size A, data takes at most 3/8 A and one command more. A compaction begins when
/// 3/4 A are used, exceeded by one commit C at most, and copies at least four times what is
/// written meanwhile, so that is at most a third of the data and 4/3 C: 1/8 A and 2 C in round
/// figures. It has to fit the quarter that is left, less one C: A must be 24 C, and C is bounded by
/// `MAX_PENDING` and `MAX_CHANGE`. The copy, the changes and keys that were added to both take
/// 5/8 A and 4 C of the new area.
pub const MIN_SECTORS: u64 = 32 * 1024 * 1024 / SECTOR as u64;

const _: () = assert!(
    MIN_SECTORS as usize / 2 * SECTOR / 8
        > 7 * (MAX_PENDING + MAX_CHANGE) / 3 + COMMITS_OF_A_COMPACTION * 2 * SECTOR,
    "a compaction must find room in the smallest area"
);

/// How many commits the longest compaction of the smallest disk takes: every one but the last
/// copies a step.
const COMMITS_OF_A_COMPACTION: usize = 256;

/// A sector of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sector(pub u64);

/// How often the log has moved from one area to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Generation(pub u64);

/// The number of a batch within its generation, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sequence(pub u64);

/// The number of a commit since boot, from 1. Everything before a durable commit is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct CommitNumber(pub u64);

impl CommitNumber {
    const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Something to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskWrite {
    /// Where.
    pub sector: Sector,
    /// What: whole sectors.
    pub data: Vec<u8>,
}

/// Writes that become durable together: write them all, then flush, then tell
/// [`Journal::committed`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// In any order; they do not overlap.
    pub writes: Vec<DiskWrite>,
}

/// Which half of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area(u8);

impl Area {
    /// Both.
    pub const BOTH: [Self; 2] = [Self(0), Self(1)];

    const fn other(self) -> Self {
        Self(1 - self.0)
    }

    /// Its first sector, when every area has this many.
    const fn start(self, area_sectors: u64) -> Sector {
        Sector(self.0 as u64 * area_sectors)
    }
}

/// The end of the log in one area: where the next batch goes, and how it will be named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tail {
    area: Area,
    generation: Generation,
    nonce: Nonce,
    next: Sequence,
    /// Sectors of the area that are used.
    used: u64,
}

impl Tail {
    /// An empty area.
    const fn empty(area: Area, generation: Generation, nonce: Nonce) -> Self {
        Self {
            area,
            generation,
            nonce,
            next: Sequence(0),
            used: 0,
        }
    }

    /// Appends a batch, if it fits.
    fn append(&mut self, area_sectors: u64, flags: Flags, payload: &[u8]) -> Option<DiskWrite> {
        let head = Head {
            flags,
            generation: self.generation,
            nonce: self.nonce,
            sequence: self.next,
            len: u32::try_from(payload.len()).ok()?,
        };
        if self.used + head.sectors() > area_sectors {
            return None;
        }
        let sector = Sector(self.area.start(area_sectors).0 + self.used);
        self.used += head.sectors();
        self.next = Sequence(self.next.0 + 1);
        Some(DiskWrite {
            sector,
            data: head.encode(payload),
        })
    }
}

/// A compaction under way.
#[derive(Debug)]
struct Compaction {
    tail: Tail,
    /// The last key that was copied.
    copied: Option<Box<[u8]>>,
    /// The batch with the COMPLETE flag is written (durable once its commit is).
    complete: bool,
}

/// Figures for `INFO`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JournalStats {
    /// Commits that are durable.
    pub commits: u64,
    /// Compactions that were completed since boot.
    pub compactions: u64,
    /// Bytes used in the current area.
    pub used: u64,
    /// Bytes of an area.
    pub capacity: u64,
}

/// The log's writer.
#[derive(Debug)]
pub struct Journal {
    area_sectors: u64,
    tail: Tail,
    compaction: Option<Compaction>,
    /// The last commit that was handed out; it is in flight until it is durable.
    last: CommitNumber,
    durable: CommitNumber,
    /// The highest generation that the disk has ever seen.
    newest: Generation,
    nonces: NonceSequence,
    compactions: u64,
}

/// Nonces for new areas: drawn from one seed of real entropy, so that no client can forge a batch
/// head inside a value.
#[derive(Clone, Copy, Debug)]
pub struct NonceSequence(u64);

impl NonceSequence {
    /// `seed` must not be known to clients.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one (splitmix64).
    fn draw(&mut self) -> Nonce {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Nonce(mixed ^ (mixed >> 31))
    }
}

impl Journal {
    /// Goes on at `tail`; `newest` is the highest generation found on the disk.
    pub(crate) fn new(
        area_sectors: u64,
        tail: Tail,
        newest: Generation,
        nonces: NonceSequence,
    ) -> Self {
        Self {
            area_sectors,
            tail,
            compaction: None,
            last: CommitNumber(0),
            durable: CommitNumber(0),
            newest,
            nonces,
            compactions: 0,
        }
    }

    /// How many bytes of log may hold every key once: three eighths of an area. With compaction
    /// starting at three quarters, and copying at least four times what is written meanwhile, the
    /// old area never overflows and the copy always fits.
    pub const fn live_capacity(disk_sectors: u64) -> usize {
        (disk_sectors / 2 * 3 / 8) as usize * SECTOR
    }

    /// Whether a command may be executed: its changes will find room.
    pub fn admits(keyspace: &Keyspace) -> bool {
        keyspace.pending() < MAX_PENDING
    }

    /// Which commit everything executed so far depends on, `None` when all is durable.
    pub fn gate(&self, keyspace: &Keyspace) -> Option<CommitNumber> {
        if keyspace.pending() > 0 {
            Some(self.last.next())
        } else {
            (self.last > self.durable).then_some(self.last)
        }
    }

    /// Everything up to this commit is durable.
    pub fn durable(&self) -> CommitNumber {
        self.durable
    }

    /// The next commit, if there is something to write and no other commit is in flight.
    pub fn next_commit(&mut self, keyspace: &mut Keyspace) -> Option<Commit> {
        if self.last > self.durable {
            return None;
        }
        self.consider_compaction();
        if keyspace.pending() == 0 && self.compaction.is_none() {
            return None;
        }
        let changes = keyspace.take_changes();
        let mut writes = Vec::new();
        if !changes.is_empty() {
            let write = self
                .tail
                .append(self.area_sectors, Flags::CHANGES, &changes);
            writes.push(write.expect("by MIN_SECTORS, a commit fits what an area has left"));
        }
        self.copy_a_step(changes, keyspace, &mut writes);
        self.last = self.last.next();
        Some(Commit { writes })
    }

    /// The commit in flight is durable.
    pub fn committed(&mut self) {
        if self.last == self.durable {
            return;
        }
        self.durable = self.last;
        if let Some(done) = self.compaction.take_if(|it| it.complete) {
            self.tail = done.tail;
            self.compactions += 1;
        }
    }

    /// Figures for `INFO`.
    pub fn stats(&self) -> JournalStats {
        JournalStats {
            commits: self.durable.0,
            compactions: self.compactions,
            used: self.tail.used * SECTOR as u64,
            capacity: self.area_sectors * SECTOR as u64,
        }
    }

    fn consider_compaction(&mut self) {
        if self.compaction.is_none() && self.tail.used > self.area_sectors / 4 * 3 {
            self.newest = Generation(self.newest.0 + 1);
            self.compaction = Some(Compaction {
                tail: Tail::empty(self.tail.area.other(), self.newest, self.nonces.draw()),
                copied: None,
                complete: false,
            });
        }
    }

    /// Writes the changes and a step of the data to the new area, if there is one.
    fn copy_a_step(&mut self, changes: Vec<u8>, keyspace: &Keyspace, writes: &mut Vec<DiskWrite>) {
        let Some(compaction) = &mut self.compaction else {
            return;
        };
        let step = COMPACTION_STEP.max(changes.len() * 4);
        let mut payload = changes;
        // The data is copied as it is now, changes applied, so it may follow them.
        let left = keyspace.copy_out(compaction.copied.as_deref(), step, &mut payload);
        compaction.complete = left.is_none();
        let flags = if left.is_none() {
            Flags::COMPLETE
        } else {
            Flags::CHANGES
        };
        compaction.copied = left;
        let write = compaction.tail.append(self.area_sectors, flags, &payload);
        writes.push(write.expect("by MIN_SECTORS, data and changes fit an empty area"));
    }
}

/// The largest payload of a batch: changes of one turn and four times as much of the data, which may
/// be exceeded by one key.
pub const MAX_PAYLOAD: usize = 5 * (MAX_PENDING + MAX_CHANGE) + MAX_CHANGE;

#[cfg(test)]
mod tests;
