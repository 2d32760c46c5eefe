//! The two files, their failures and their damage.

use std::fs;

use super::*;
use crate::agent::testing::{SmallDisk, skipped};
use crate::agent::witness::testing::record;

fn changes(epoch: u64) -> Entries {
    let vm = VmName::new(&format!("vm{}", epoch % 3)).expect("a name");
    let entry = Entry {
        record: Some(record(1, epoch, "a", &["b"])),
        set_back: None,
        named_by: None,
    };
    Entries::from([(vm, entry)])
}

/// A store as its keeper uses it.
struct Kept {
    store: Store,
    entries: Entries,
}

impl Kept {
    fn append(&mut self, epoch: u64) -> io::Result<()> {
        let changes = changes(epoch);
        self.store.append(&self.entries, &changes)?;
        self.entries.extend(changes);
        Ok(())
    }
}

fn create(folder: &Path) -> Kept {
    let entries = Entries::new();
    let store = Store::create(folder, 7, &entries).expect("made");
    Kept { store, entries }
}

fn reopen(folder: &Path) -> Kept {
    match Store::open(folder).expect("whole") {
        Found::Whole { store, entries } => Kept { store, entries },
        Found::Nothing => panic!("nothing is there"),
    }
}

#[test]
fn what_was_appended_is_found_again_over_many_generations() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut kept = create(folder.path());
    // Three files' worth.
    for epoch in 1..=3 * SLOT_GOOD / BLOCK {
        kept.append(epoch).expect("kept");
        if epoch % 101 == 0 {
            let before = kept.entries.clone();
            drop(kept);
            kept = reopen(folder.path());
            assert_eq!(kept.entries, before);
        }
    }
    assert!(kept.store.generation > 3);
    assert_eq!(kept.store.id(), 7);
    for name in NAMES {
        let length = fs::metadata(folder.path().join(name)).expect("there").len();
        assert_eq!(length, SLOT_GOOD, "{name} does not grow");
    }
}

#[test]
fn a_change_that_a_crash_cut_off_is_none() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut kept = create(folder.path());
    for epoch in 1..=5 {
        kept.append(epoch).expect("kept");
    }
    let before = kept.entries.clone();
    let at = kept.store.at as usize;
    kept.append(6).expect("kept");
    let file = folder.path().join(NAMES[kept.store.active]);
    let mut bytes = fs::read(&file).expect("readable");
    // Torn in the middle of the change.
    bytes[at + 100..at + BLOCK as usize].fill(0);
    fs::write(&file, bytes).expect("written");
    let mut kept = reopen(folder.path());
    assert_eq!(kept.entries, before);
    kept.append(7).expect("kept");
    assert_eq!(reopen(folder.path()).entries, kept.entries);
}

#[test]
fn a_change_in_the_middle_that_cannot_be_read_is_damage() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut kept = create(folder.path());
    let mut starts = Vec::new();
    for epoch in 1..=5 {
        starts.push(kept.store.at as usize);
        kept.append(epoch).expect("kept");
    }
    let file = folder.path().join(NAMES[kept.store.active]);
    let good = fs::read(&file).expect("readable");
    // The first four are followed by others; the snapshot is followed by all.
    for at in starts[..4]
        .iter()
        .copied()
        .chain([BLOCK as usize - HEADER + 1])
    {
        let mut bytes = good.clone();
        bytes[at + HEADER] ^= 1;
        fs::write(&file, bytes).expect("written");
        assert!(
            matches!(Store::open(folder.path()), Err(StoreError::Damaged { .. })),
            "byte {at} does not count"
        );
    }
    fs::write(&file, good).expect("written");
    assert_eq!(reopen(folder.path()).entries, kept.entries);
}

#[test]
fn a_write_that_fails_is_not_the_end_and_what_it_left_is_void() {
    for broken in [Broken::Write, Broken::Sync] {
        let folder = tempfile::tempdir().expect("a folder");
        let mut kept = create(folder.path());
        kept.append(1).expect("kept");
        kept.store.broken = Some(broken);
        assert!(kept.append(2).is_err());
        assert!(kept.append(2).is_err(), "and it goes on failing");
        assert!(kept.store.is_doubtful());
        let before = kept.entries.clone();
        // The disk is well again, and something else is kept: what failed never comes back.
        kept.store.broken = None;
        kept.append(4).expect("kept");
        assert!(!kept.store.is_doubtful());
        let found = reopen(folder.path());
        assert_eq!(found.entries, kept.entries, "{broken:?}");
        assert_ne!(found.entries, before);
    }
}

#[test]
fn a_full_disk_does_not_matter() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut kept = create(folder.path());
    kept.store.broken = Some(Broken::Full);
    for epoch in 1..=3 * SLOT_GOOD / BLOCK {
        kept.append(epoch).expect("kept");
    }
    assert_eq!(reopen(folder.path()).entries, kept.entries);
}

/// A small partition is enough, and what else is written there takes nothing from the records.
#[test]
fn a_tiny_disk_that_others_fill_is_room_enough() {
    let test = "a_tiny_disk_that_others_fill_is_room_enough";
    let disk = match SmallDisk::mount("size=64k") {
        Ok(disk) => disk,
        Err(error) => return skipped(test, &format!("no disk can be mounted: {error}")),
    };
    let folder = disk.path().join("records");
    fs::create_dir(&folder).expect("a folder");
    let mut kept = create(&folder);
    let fill = fs::write(disk.path().join("fill"), vec![1; 64 << 10]);
    let full = fill.expect_err("there is not so much room").kind();
    assert_eq!(full, io::ErrorKind::StorageFull);
    for epoch in 1..=3 * SLOT_GOOD / BLOCK {
        kept.append(epoch).expect("kept");
    }
    assert_eq!(reopen(&folder).entries, kept.entries);
}

#[test]
fn more_entries_than_a_file_began_with_make_it_grow() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut kept = create(folder.path());
    for batch in 0..8 {
        let changes: Entries = (0..500)
            .map(|vm| {
                let vm = VmName::new(&format!("vm{batch}-{vm}")).expect("a name");
                let entry = Entry {
                    record: Some(record(1, 1, "a", &["b"])),
                    set_back: None,
                    named_by: None,
                };
                (vm, entry)
            })
            .collect();
        kept.store.append(&kept.entries, &changes).expect("kept");
        kept.entries.extend(changes);
    }
    assert_eq!(reopen(folder.path()).entries, kept.entries);
}
