//! The suite for every store, and what can happen to files.

mod faults;
mod survive;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tempfile::TempDir;

use super::index::Segment;
use super::inspect::{inspect, verify};
use super::*;
use crate::compress::Compressor;
use crate::conformance::{self, Place, sample_batches};
use crate::position::Term;
use crate::store::{Damage, DamageReason};
use faults::{Faults, open_faulty};

/// For the tests that open many logs: what a sync does is not what they are about.
const UNSYNCED: FileOptions = FileOptions {
    sync: SyncPolicy::Never,
    ..SMALL
};

/// Segments and checkpoints so small that a few samples fill several.
const SMALL: FileOptions = FileOptions {
    sync: SyncPolicy::Explicit,
    segment_bytes: 1500,
    checkpoint_bytes: 400,
};

struct Folder {
    dir: TempDir,
    options: FileOptions,
    faults: Arc<Faults>,
}

impl Place for Folder {
    fn open(&mut self) -> Box<dyn Store> {
        Box::new(open_faulty(self.dir.path(), self.options, &self.faults))
    }

    fn fill(&mut self, full: bool) {
        self.faults.set_room(full.then_some(0));
    }

    fn break_syncs(&mut self, broken: bool) {
        self.faults.fail_syncs.store(broken, Ordering::Relaxed);
    }
}

fn fill(dir: &Path, options: FileOptions, count: usize) -> Vec<Batch> {
    let mut store = FileStore::open(dir, options).unwrap();
    let batches = sample_batches(3, Term(1), store.tip().index, count);
    for batch in &batches {
        store.append(batch).unwrap();
    }
    batches
}

/// Every file of a folder with its contents.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    fs::read_dir(dir)
        .unwrap()
        .map(|file| file.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

fn last_file(dir: &Path) -> (PathBuf, Vec<u8>) {
    contents(dir).pop_last().unwrap()
}

fn read_all(store: &FileStore) -> Result<Vec<Batch>, ReadError> {
    let mut reader = store.read_from(store.first())?;
    std::iter::from_fn(|| reader.next_batch().transpose()).collect()
}

/// The batches that can be read without opening the log, and the error after them.
fn inspect_all(dir: &Path) -> (Vec<Batch>, Option<OpenError>) {
    let mut batches = Vec::new();
    for found in inspect(dir).unwrap() {
        match found {
            Ok(found) => batches.push(found.batch),
            Err(error) => return (batches, Some(error)),
        }
    }
    (batches, None)
}

fn damage(error: OpenError) -> Damage {
    match error {
        OpenError::Damaged(damage) => damage,
        other => panic!("expected damage, not {other}"),
    }
}

#[test]
fn keeps_what_every_store_promises() {
    for sync in [SyncPolicy::Explicit, SyncPolicy::EveryBatch] {
        conformance::all(&mut || {
            Box::new(Folder {
                dir: TempDir::new().unwrap(),
                options: FileOptions { sync, ..SMALL },
                faults: Arc::default(),
            })
        });
    }
}

#[test]
fn policies_say_when_the_tip_is_durable() {
    let durable_after = |sync| {
        let dir = TempDir::new().unwrap();
        let mut store = FileStore::open(dir.path(), FileOptions { sync, ..SMALL }).unwrap();
        let batch = &sample_batches(3, Term(1), LogIndex::START, 1)[0];
        let tip = store.append(batch).unwrap();
        let after_append = store.durable_tip() == tip;
        let after_sync = store.sync().unwrap() == tip;
        (after_append, after_sync)
    };
    assert_eq!(durable_after(SyncPolicy::Never), (false, false));
    assert_eq!(durable_after(SyncPolicy::Explicit), (false, true));
    let hour = Duration::from_hours(1);
    assert_eq!(durable_after(SyncPolicy::Interval(hour)), (false, true));
    let always = SyncPolicy::Interval(Duration::ZERO);
    assert_eq!(durable_after(always), (true, true));
    assert_eq!(durable_after(SyncPolicy::EveryBatch), (true, true));
}

#[test]
fn the_kernel_has_what_append_returned_for() {
    let (dir, copy) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut store = FileStore::open(dir.path(), SMALL).unwrap();
    let batches = sample_batches(3, Term(1), LogIndex::START, 40);
    for (i, batch) in batches.iter().enumerate() {
        store.append(batch).unwrap();
        // What another process finds while this one still has the log open and unsynced is what
        // would be left of it after SIGKILL.
        let (found, error) = inspect_all(dir.path());
        assert!(error.is_none());
        assert_eq!(found, batches[..=i]);
    }
    for (path, bytes) in contents(dir.path()) {
        fs::write(copy.path().join(path.file_name().unwrap()), bytes).unwrap();
    }
    let copied = FileStore::open(copy.path(), SMALL).unwrap();
    assert_eq!(copied.tip(), store.tip());
}

#[test]
fn a_torn_end_is_cut_off_at_every_byte() {
    let dir = TempDir::new().unwrap();
    let options = FileOptions {
        segment_bytes: 1 << 20,
        ..UNSYNCED
    };
    let batches = fill(dir.path(), options, 12);
    let (path, whole) = last_file(dir.path());
    let ends: Vec<_> = inspect(dir.path())
        .unwrap()
        .map(|found| found.unwrap().offset as usize)
        .skip(1)
        .chain([whole.len()])
        .collect();
    for len in 0..whole.len() {
        fs::write(&path, &whole[..len]).unwrap();
        // A checkpoint before a batch belongs to neither: hence at least, and at most one less.
        let whole_batches = ends.iter().filter(|end| **end <= len).count();
        let (seen, error) = inspect_all(dir.path());
        assert!(error.is_none(), "cut at {len}: {error:?}");
        assert_eq!(fs::read(&path).unwrap(), &whole[..len], "inspecting reads");
        let mut store = FileStore::open(dir.path(), options).unwrap();
        let kept = read_all(&store).unwrap();
        assert_eq!(seen, kept);
        assert_eq!(kept, batches[..kept.len()], "cut at {len}");
        assert!(kept.len() == whole_batches || kept.len() == whole_batches + 1);
        store.append(&batches[kept.len()]).unwrap();
        drop(store);
        let store = FileStore::open(dir.path(), options).unwrap();
        assert_eq!(read_all(&store).unwrap(), batches[..=kept.len()]);
        drop(store);
        // Cut to nothing the segment was made anew.
        fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn a_hole_at_the_end_is_a_torn_end() {
    let dir = TempDir::new().unwrap();
    let batches = fill(dir.path(), SMALL, 3);
    let (path, whole) = last_file(dir.path());
    for hole in [1, 11, 12, 700, 5000] {
        let mut torn = whole.clone();
        torn.resize(whole.len() + hole, 0);
        fs::write(&path, &torn).unwrap();
        let report = verify(dir.path(), |_| {}).unwrap();
        assert_eq!(report.torn.unwrap().bytes, hole as u64);
        let store = FileStore::open(dir.path(), SMALL).unwrap();
        assert_eq!(read_all(&store).unwrap(), batches);
        assert_eq!(fs::read(&path).unwrap(), whole);
    }
}

#[test]
fn a_flipped_bit_anywhere_is_named_and_nothing_is_written() {
    let dir = TempDir::new().unwrap();
    let batches = fill(dir.path(), UNSYNCED, 40);
    let files = contents(dir.path());
    assert!(files.len() >= 3);
    let newest = files.last_key_value().unwrap().0.clone();
    for (path, whole) in &files {
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            fs::write(path, &flipped).unwrap();

            let (seen, error) = inspect_all(dir.path());
            let found = damage(error.unwrap_or_else(|| panic!("byte {at} of {path:?}")));
            assert_eq!(&found.segment, path);
            assert!(found.offset <= at as u64);
            assert_eq!(seen, batches[..seen.len()], "the good prefix is readable");
            let report = verify(dir.path(), |_| {}).unwrap();
            assert_eq!(
                report.tip.index,
                seen.last().map_or(LogIndex::START, Batch::end)
            );
            assert!(report.damage.is_some() && report.torn.is_none());

            // The newest segment is read wholly on opening, the others when they are read.
            match FileStore::open(dir.path(), UNSYNCED) {
                Err(error) => assert_eq!(&damage(error).segment, path),
                Ok(store) => {
                    assert_ne!(path, &newest);
                    let error = read_all(&store).unwrap_err();
                    assert!(error.to_string().contains("is damaged at byte"), "{error}");
                }
            }
            assert_eq!(fs::read(path).unwrap(), flipped);
        }
        fs::write(path, whole).unwrap();
    }
    let store = FileStore::open(dir.path(), UNSYNCED).unwrap();
    assert_eq!(read_all(&store).unwrap(), batches);
}

/// What a log of several segments looks like after something was done to one of its files.
fn refused_after(change: impl FnOnce(&[PathBuf])) -> OpenError {
    let dir = TempDir::new().unwrap();
    fill(dir.path(), SMALL, 60);
    let files: Vec<_> = contents(dir.path()).into_keys().collect();
    assert!(files.len() >= 4);
    change(&files);
    let before = contents(dir.path());
    let error = FileStore::open(dir.path(), SMALL).unwrap_err();
    assert_eq!(contents(dir.path()), before, "refusing writes nothing");
    error
}

#[test]
fn what_is_not_this_log_is_refused() {
    let newer = refused_after(|files| {
        let last = files.last().unwrap();
        let mut bytes = fs::read(last).unwrap();
        bytes[8] += 1;
        fs::write(last, bytes).unwrap();
    });
    assert!(newer.to_string().contains("format version 2"), "{newer}");
    assert!(matches!(
        damage(newer).reason,
        DamageReason::Version { found: 2 }
    ));

    let foreign = refused_after(|files| fs::write(&files[1], "something else").unwrap());
    assert!(matches!(damage(foreign).reason, DamageReason::NotASegment));

    let missing = refused_after(|files| fs::remove_file(&files[1]).unwrap());
    let reason = damage(missing).reason;
    assert!(matches!(reason, DamageReason::Misplaced { .. }));

    let renamed = refused_after(|files| fs::rename(&files[1], &files[2]).unwrap());
    let reason = damage(renamed).reason;
    assert!(matches!(reason, DamageReason::Misplaced { .. }));

    // A sealed segment that ends early was not torn by a crash.
    let short = refused_after(|files| {
        let file = OpenOptions::new().write(true).open(&files[1]).unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    });
    assert!(matches!(damage(short).reason, DamageReason::NoTrailer));

    let strange = refused_after(|files| {
        fs::write(files[0].with_file_name("my.seg"), "mine").unwrap();
    });
    assert!(matches!(strange, OpenError::StrangeFile { .. }));

    // Another log's segment in the place of this one's.
    let other = TempDir::new().unwrap();
    let mut store = FileStore::open(other.path(), SMALL).unwrap();
    for batch in sample_batches(3, Term(2), LogIndex::START, 60) {
        store.append(&batch).unwrap();
    }
    let theirs: Vec<_> = contents(other.path()).into_keys().collect();
    let mixed = refused_after(|files| {
        assert_eq!(files[1].file_name(), theirs[1].file_name());
        fs::copy(&theirs[1], &files[1]).unwrap();
    });
    assert!(matches!(damage(mixed).reason, DamageReason::Chain));
}

#[test]
fn chunks_with_right_checksums_and_wrong_contents_are_damage_even_at_the_end() {
    type Put = Box<dyn Fn(u64, LogTip, &mut Vec<u8>)>;
    let put_batch = |batch: Batch| -> Put {
        Box::new(move |offset, tip, out| {
            format::put_checkpoint(offset, tip, out);
            let at = offset + out.len() as u64;
            format::put_batch_chunk(at, out, |out| {
                let mut frame = Vec::new();
                batch.encode_frame(&mut frame);
                Compressor::new().compress(&frame, out);
            });
        })
    };
    let garbage: Put = Box::new(|offset, _, out| {
        format::put_batch_chunk(offset, out, |out| out.extend([0x55; 40]));
    });
    let other_chain = |tip: LogTip| LogTip {
        chain: crate::Chain([9; 32]),
        ..tip
    };
    let checkpoint: Put = Box::new(move |offset, tip, out| {
        format::put_checkpoint(offset, other_chain(tip), out);
    });
    let trailer: Put = Box::new(move |offset, tip, out| {
        out.extend(format::trailer(offset, other_chain(tip)));
    });
    let end = sample_batches(3, Term(1), LogIndex::START, 1)[0].end();
    let gap = put_batch(sample_batches(4, Term(1), LogIndex(999), 1).remove(0));
    let old_term = put_batch(sample_batches(4, Term(0), end, 1).remove(0));
    let puts: [(Put, &str); 5] = [
        (garbage, "cannot be decompressed"),
        (checkpoint, "hash chain"),
        (trailer, "hash chain"),
        (gap, "cannot follow"),
        (old_term, "cannot follow"),
    ];
    for (put, expected) in puts {
        let dir = TempDir::new().unwrap();
        let batches = fill(dir.path(), SMALL, 1);
        let tip = batches[0].tip(crate::Chain::default());
        let (path, mut bytes) = last_file(dir.path());
        let offset = bytes.len() as u64;
        let mut chunk = Vec::new();
        put(offset, tip, &mut chunk);
        bytes.extend(chunk);
        fs::write(&path, &bytes).unwrap();
        let error = FileStore::open(dir.path(), SMALL).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(inspect_all(dir.path()).0, batches);
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

#[test]
fn two_processes_cannot_have_it_open() {
    let dir = TempDir::new().unwrap();
    let store = FileStore::open(dir.path(), SMALL).unwrap();
    let error = FileStore::open(dir.path(), SMALL).unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }));
    drop(store);
    FileStore::open(dir.path(), SMALL).unwrap();
}

#[test]
fn whatever_step_of_sealing_was_the_last_the_log_is_whole() {
    let dir = TempDir::new().unwrap();
    let batches = fill(dir.path(), SMALL, 40);
    let sealed: Vec<_> = contents(dir.path()).into_keys().collect();
    let (open, before) = sealed.split_last().unwrap();
    let sealed_last = before.last().unwrap();
    // The trailer is written, the name not changed, the next segment being made.
    fs::rename(open, open.with_extension("tmp")).unwrap();
    fs::rename(sealed_last, sealed_last.with_extension("open")).unwrap();
    let mut store = FileStore::open(dir.path(), SMALL).unwrap();
    assert!(sealed_last.exists());
    assert!(!open.with_extension("tmp").exists());
    let kept = read_all(&store).unwrap();
    assert_eq!(kept, batches[..kept.len()]);
    for batch in &batches[kept.len()..] {
        store.append(batch).unwrap();
    }
    assert_eq!(read_all(&store).unwrap(), batches);
}

#[test]
fn reading_begins_near_what_is_wanted_in_segments_of_an_earlier_run() {
    let dir = TempDir::new().unwrap();
    let batches = fill(dir.path(), SMALL, 200);
    let store = FileStore::open(dir.path(), SMALL).unwrap();
    for (i, batch) in batches.iter().enumerate().rev() {
        let mut reader = store.read_from(batch.first()).unwrap();
        assert_eq!(reader.next_batch().unwrap().as_ref(), Some(batch));
        assert_eq!(reader.next_batch().unwrap().as_ref(), batches.get(i + 1));
    }
    let known = store.index.lock();
    let learnt = |s: &Segment| s.checkpoints.as_ref().is_some_and(|c| c.len() > 1);
    assert!(known.segments.iter().filter(|s| s.sealed).all(learnt));
}

/// What an earlier process wrote and did not sync is not durable because another one opens it.
#[test]
fn what_is_found_on_opening_is_durable_once_it_is_synced() {
    let dir = TempDir::new().unwrap();
    fill(dir.path(), UNSYNCED, 40);
    let segments = contents(dir.path()).len() as u32;
    assert!(segments > 2);
    let faults = Arc::new(Faults::default());
    let store = open_faulty(dir.path(), SMALL, &faults);
    assert_eq!(store.durable_tip(), store.tip());
    assert_eq!(faults.syncs.load(Ordering::Relaxed), segments);
    drop(store);

    // Ended between the trailer and the sync before the new name: it is complete by its bytes.
    let (open, before) = last_two(dir.path());
    fs::remove_file(open).unwrap();
    fs::rename(&before, before.with_extension("open")).unwrap();
    let faults = Arc::new(Faults::default());
    let store = open_faulty(dir.path(), SMALL, &faults);
    assert!(before.exists(), "it got its name");
    assert_eq!(store.durable_tip(), store.tip());
    assert_eq!(faults.syncs.load(Ordering::Relaxed), segments - 1);
}

/// The newest file of a folder and the one before it.
fn last_two(dir: &Path) -> (PathBuf, PathBuf) {
    let mut files = contents(dir).into_keys();
    let newest = files.next_back().unwrap();
    (newest, files.next_back().unwrap())
}

/// Where nothing is synced, a loss of power may leave the newest sealed segment its name and a part
/// of its bytes. That ends the log there; where segments are synced first it is damage.
#[test]
fn a_sealed_segment_that_was_never_synced_may_be_torn() {
    let original = TempDir::new().unwrap();
    let batches = fill(original.path(), UNSYNCED, 40);
    let (_, before) = last_two(original.path());
    let whole = fs::read(&before).unwrap();
    for (len, followed) in [
        (whole.len() - 1, true),
        (whole.len() - 1, false),
        (whole.len() / 2, true),
        (format::HEADER_LEN, false),
        (30, true),
        (0, true),
        (0, false),
    ] {
        let dir = TempDir::new().unwrap();
        for (path, bytes) in contents(original.path()) {
            fs::write(dir.path().join(path.file_name().unwrap()), bytes).unwrap();
        }
        let (open, before) = last_two(dir.path());
        fs::write(&before, &whole[..len]).unwrap();
        if !followed {
            fs::remove_file(&open).unwrap();
        }
        let found = contents(dir.path());
        FileStore::open(dir.path(), SMALL).unwrap_err();
        assert_eq!(contents(dir.path()), found, "refusing writes nothing");

        let mut store = FileStore::open(dir.path(), UNSYNCED).unwrap();
        let kept = read_all(&store).unwrap();
        assert_eq!(kept, batches[..kept.len()], "cut at {len}");
        let first = before.file_stem().unwrap().to_str().unwrap();
        let first: u64 = first.parse().unwrap();
        assert!(store.tip().index >= LogIndex(first), "cut at {len}");
        for batch in &batches[kept.len()..] {
            store.append(batch).unwrap();
        }
        drop(store);
        let store = FileStore::open(dir.path(), SMALL).unwrap();
        assert_eq!(read_all(&store).unwrap(), batches);
    }
    // An older one was sealed long before.
    let oldest = contents(original.path()).into_keys().next().unwrap();
    let whole = fs::read(&oldest).unwrap();
    fs::write(&oldest, &whole[..whole.len() - 1]).unwrap();
    let error = FileStore::open(original.path(), UNSYNCED).unwrap_err();
    assert!(matches!(damage(error).reason, DamageReason::NoTrailer));
}

/// An earlier version dropped the oldest segments of a log that was too large.
#[test]
fn a_log_without_its_beginning_is_read_from_where_it_begins() {
    let dir = TempDir::new().unwrap();
    let batches = fill(dir.path(), SMALL, 60);
    let (oldest, _) = contents(dir.path()).pop_first().unwrap();
    fs::remove_file(oldest).unwrap();
    let mut store = FileStore::open(dir.path(), SMALL).unwrap();
    let kept = read_all(&store).unwrap();
    assert_eq!(kept, batches[batches.len() - kept.len()..]);
    assert_eq!(store.first(), kept[0].first());
    let chain = store.chain_at(store.first()).unwrap();
    assert_eq!(chain, Some(store.base().chain));
    for gone in [LogIndex::START, LogIndex(store.first().0 - 1)] {
        assert_eq!(store.floor(gone).unwrap(), None);
        let read = store.read_from(gone);
        assert!(matches!(read, Err(ReadError::Dropped { .. })));
        assert!(store.truncate(gone).is_err());
    }
    // The base is all that tells of what was before: it outlives even the last batch.
    let base = store.base();
    store.truncate(base.index).unwrap();
    drop(store);
    let mut store = FileStore::open(dir.path(), SMALL).unwrap();
    assert_eq!((store.base(), store.tip()), (base, base));
    for batch in &kept {
        store.append(batch).unwrap();
    }
}
