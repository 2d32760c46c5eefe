//! The journal over a disk in memory that loses power at any sector.

use super::recovery::{Disk, DiskFailed, RecoveryError, recover};
use super::*;
use crate::keyspace::Capacity;

/// A disk whose content survives.
#[derive(Clone)]
struct MemoryDisk(Vec<u8>);

impl MemoryDisk {
    fn new() -> Self {
        Self(vec![0; MIN_SECTORS as usize * SECTOR])
    }

    fn apply(&mut self, write: &DiskWrite) {
        let start = write.sector.0 as usize * SECTOR;
        self.0[start..start + write.data.len()].copy_from_slice(&write.data);
    }
}

impl Disk for MemoryDisk {
    fn sectors(&self) -> u64 {
        (self.0.len() / SECTOR) as u64
    }
    fn read(&mut self, from: Sector, buffer: &mut [u8]) -> Result<(), DiskFailed> {
        let start = from.0 as usize * SECTOR;
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        Ok(())
    }
    fn write(&mut self, to: Sector, data: &[u8]) -> Result<(), DiskFailed> {
        let data = data.to_vec();
        self.apply(&DiskWrite { sector: to, data });
        Ok(())
    }
}

fn boot(disk: &mut MemoryDisk, seed: u64) -> Result<(Journal, Keyspace, bool), RecoveryError> {
    let mut keyspace = Keyspace::new(Capacity {
        memory: usize::MAX,
        log: Journal::live_capacity(disk.sectors()),
    });
    let (journal, found) = recover(disk, &mut keyspace, NonceSequence::new(seed))?;
    Ok((journal, keyspace, found.torn))
}

/// Writes and flushes everything that waits.
fn settle(journal: &mut Journal, keyspace: &mut Keyspace, disk: &mut MemoryDisk) {
    while let Some(commit) = journal.next_commit(keyspace) {
        commit.writes.iter().for_each(|write| disk.apply(write));
        journal.committed();
    }
}

fn contents(keyspace: &Keyspace) -> Vec<(Vec<u8>, Vec<u8>)> {
    let pair = |key: &[u8]| (key.to_vec(), keyspace.get(key).unwrap().to_vec());
    keyspace.keys().map(pair).collect()
}

/// A small generator of repeatable test traffic.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

#[test]
fn what_is_durable_is_read_back() {
    let mut disk = MemoryDisk::new();
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    keys.set(b"a", b"1").unwrap();
    assert_eq!(journal.gate(&keys), Some(CommitNumber(1)));
    let commit = journal.next_commit(&mut keys).unwrap();
    keys.set(b"b", b"2").unwrap();
    assert_eq!(journal.next_commit(&mut keys), None, "one commit at a time");
    assert_eq!(journal.gate(&keys), Some(CommitNumber(2)));
    commit.writes.iter().for_each(|write| disk.apply(write));
    journal.committed();
    assert_eq!(journal.durable(), CommitNumber(1));
    let (_, read, torn) = boot(&mut disk.clone(), 2).unwrap();
    assert_eq!((contents(&read).len(), torn), (1, false));
    settle(&mut journal, &mut keys, &mut disk);
    assert_eq!(journal.gate(&keys), None);
    let (_, read, _) = boot(&mut disk, 3).unwrap();
    assert_eq!(contents(&read), contents(&keys));
}

#[test]
fn a_torn_tail_ends_the_log_and_is_written_over() {
    let mut disk = MemoryDisk::new();
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    keys.set(b"a", b"1").unwrap();
    settle(&mut journal, &mut keys, &mut disk);
    keys.set(b"b", &[7; 4000]).unwrap();
    let commit = journal.next_commit(&mut keys).unwrap();
    let mut torn = commit.writes[0].clone();
    torn.data.truncate(2 * SECTOR);
    disk.apply(&torn);
    let (mut journal, mut keys, was_torn) = boot(&mut disk, 2).unwrap();
    assert!(was_torn);
    assert_eq!(contents(&keys), [(b"a".to_vec(), b"1".to_vec())]);
    keys.set(b"c", b"3").unwrap();
    settle(&mut journal, &mut keys, &mut disk);
    let (_, read, was_torn) = boot(&mut disk, 3).unwrap();
    assert_eq!(contents(&read), contents(&keys));
    assert!(!was_torn);
}

#[test]
fn damage_in_the_middle_is_refused() {
    let mut disk = MemoryDisk::new();
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    for key in [b"a", b"b", b"c"] {
        keys.set(key, b"1").unwrap();
        settle(&mut journal, &mut keys, &mut disk);
    }
    // Batch 0 is the area's first, 1 to 3 are the keys. A flipped bit in the last is a torn tail…
    let flip = |batch: usize, byte: usize| {
        let mut damaged = disk.clone();
        damaged.0[batch * SECTOR + byte] ^= 0x10;
        boot(&mut damaged, 2).map(|(_, keys, torn)| (keys.len(), torn))
    };
    assert_eq!(flip(3, 50), Ok((2, true)));
    // …in any other it is damage, wherever in the batch it is, the first batch included.
    for batch in 1..3 {
        for byte in 0..59 {
            let error = flip(batch, byte).unwrap_err();
            assert!(
                matches!(error, RecoveryError::Corrupt { missing, .. } if missing.0 == batch as u64)
            );
        }
    }
    assert_eq!(flip(0, 50), Ok((3, false)), "padding");
    assert!(flip(0, 20).is_err());
}

#[test]
fn a_value_that_looks_like_a_batch_is_none() {
    let mut disk = MemoryDisk::new();
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    // A forged later batch, at the start of a sector within a value that is then torn.
    let head = Head {
        flags: Flags::CHANGES,
        generation: Generation(1),
        nonce: Nonce(0),
        sequence: Sequence(9),
        len: 0,
    };
    let forged = head.encode(&[]).repeat(4);
    let mut value = vec![0; SECTOR - 48 - 9 - 1];
    value.extend_from_slice(&forged);
    keys.set(b"k", &value).unwrap();
    let commit = journal.next_commit(&mut keys).unwrap();
    disk.apply(&commit.writes[0]);
    let at = SECTOR + 60;
    disk.0[at] ^= 1;
    assert_eq!(
        Head::decode(&disk.0[2 * SECTOR..]),
        Some(head),
        "the forgery is in place"
    );
    let (_, keys, torn) = boot(&mut disk, 2).unwrap();
    assert!(keys.is_empty() && torn);
}

#[test]
fn foreign_and_small_disks_are_refused() {
    let mut disk = MemoryDisk::new();
    disk.0[3] = 1;
    assert_eq!(boot(&mut disk, 1).unwrap_err(), RecoveryError::Foreign);
    disk.0.truncate(SECTOR * 100);
    assert_eq!(
        boot(&mut disk, 1).unwrap_err(),
        RecoveryError::TooSmall { sectors: 100 }
    );
}

/// Fills the log many times over; after every commit power may fail with any part of the commit
/// written. What was acknowledged must be there, and nothing that was never asked for.
#[test]
fn compaction_survives_power_failure_at_any_commit() {
    let mut disk = MemoryDisk::new();
    let mut random = Random(42);
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    let mut compactions = 0;
    let mut crashes = 0;
    for step in 0..2500_u64 {
        for _ in 0..random.below(4) {
            let key = random.below(64).to_le_bytes();
            match random.below(20) {
                0 => _ = keys.delete(&key),
                1 if random.below(50) == 0 => keys.clear(),
                _ => {
                    let value = vec![step as u8; random.below(30_000) as usize];
                    let _ = keys.set(&key, &value);
                }
            }
        }
        let before = journal.durable();
        let Some(commit) = journal.next_commit(&mut keys) else {
            continue;
        };
        if random.below(40) == 0 {
            // Power fails: every write of the commit may be there, missing, or cut short.
            let mut survived = disk.clone();
            let mut partial = false;
            for write in &commit.writes {
                let mut write = write.clone();
                let sectors = (write.data.len() / SECTOR) as u64;
                let kept = random.below(sectors + 1);
                partial |= kept < sectors;
                write.data.truncate(kept as usize * SECTOR);
                survived.apply(&write);
            }
            let (_, acknowledged, _) = boot(&mut disk.clone(), step).unwrap();
            let (new_journal, read, _) = boot(&mut survived, step).unwrap();
            let read_back = contents(&read);
            assert!(
                read_back == contents(&acknowledged) || read_back == contents(&keys),
                "step {step}: neither before nor after the commit"
            );
            assert!(partial || read_back == contents(&keys));
            compactions += journal.stats().compactions;
            crashes += 1;
            (journal, keys, disk) = (new_journal, read, survived);
            continue;
        }
        commit.writes.iter().for_each(|write| disk.apply(write));
        journal.committed();
        assert!(journal.durable() > before);
        if random.below(60) == 0 {
            let (_, read, torn) = boot(&mut disk.clone(), step).unwrap();
            assert_eq!(contents(&read), contents(&keys), "step {step}");
            assert!(!torn);
        }
    }
    compactions += journal.stats().compactions;
    assert!(
        compactions >= 3 && crashes >= 15,
        "{compactions} compactions, {crashes} crashes"
    );
}

/// Data as full as it may be, and changes as large as they may be: the areas always have room.
#[test]
fn the_fullest_log_finds_room() {
    let mut disk = MemoryDisk::new();
    let mut random = Random(7);
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    let value = vec![9; crate::limits::MAX_BULK];
    let mut full = 0;
    while keys
        .set(&random.below(1 << 30).to_le_bytes(), &value)
        .is_ok()
    {
        settle(&mut journal, &mut keys, &mut disk);
    }
    for step in 0..200_u64 {
        // Few large values, or many small ones: each taxes another part of the arithmetic.
        let len = if step / 25 % 2 == 0 { value.len() } else { 40 };
        while Journal::admits(&keys) {
            let key = random.below(96).to_le_bytes();
            if keys.set(&key, &value[..len]).is_err() {
                full += 1;
                let first = keys.keys().next().unwrap().to_vec();
                keys.delete(&first);
            }
        }
        let commit = journal.next_commit(&mut keys).unwrap();
        commit.writes.iter().for_each(|write| disk.apply(write));
        journal.committed();
    }
    assert!(
        full > 20 && journal.stats().compactions > 3,
        "{full} {:?}",
        journal.stats()
    );
    let (_, read, _) = boot(&mut disk, 2).unwrap();
    assert_eq!(contents(&read), contents(&keys));
}

/// After a compaction the older area still holds old data: losing the first batch of the current
/// one must not bring that back.
#[test]
fn damage_at_the_start_of_the_newer_area_is_refused() {
    let mut disk = MemoryDisk::new();
    let (mut journal, mut keys, _) = boot(&mut disk, 1).unwrap();
    let value = vec![9; 100_000];
    while journal.stats().compactions == 0 {
        keys.set(b"k", &value).unwrap();
        settle(&mut journal, &mut keys, &mut disk);
    }
    keys.set(b"k", b"newest").unwrap();
    settle(&mut journal, &mut keys, &mut disk);
    disk.0[MIN_SECTORS as usize / 2 * SECTOR + 60] ^= 1;
    let error = boot(&mut disk, 2).unwrap_err();
    assert!(
        matches!(
            error,
            RecoveryError::Corrupt {
                missing: Sequence(0),
                ..
            }
        ),
        "{error}"
    );
}
