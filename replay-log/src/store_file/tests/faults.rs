//! Disks that are full, that cannot be written, and that lose what they were given.

use std::sync::atomic::{AtomicBool, AtomicU32};

use super::*;

/// A disk that fails on command.
pub(super) struct Faults {
    /// How many bytes more it takes before a write stops in the middle.
    room: AtomicU32,
    pub(super) fail_syncs: AtomicBool,
    /// Not even shorter can its files be made.
    fail_cuts: AtomicBool,
    pub(super) syncs: AtomicU32,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            room: AtomicU32::new(u32::MAX),
            fail_syncs: AtomicBool::new(false),
            fail_cuts: AtomicBool::new(false),
            syncs: AtomicU32::new(0),
        }
    }
}

impl Faults {
    /// `None`: as much as is wanted.
    pub(super) fn set_room(&self, room: Option<u32>) {
        self.room.store(room.unwrap_or(u32::MAX), Ordering::Relaxed);
    }
}

struct Faulty(File, Arc<Faults>);

impl SegmentIo for Faulty {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let left = self.1.room.load(Ordering::Relaxed);
        let fits = (left as usize).min(bytes.len());
        if left < u32::MAX {
            self.1.room.store(left - fits as u32, Ordering::Relaxed);
        }
        SegmentIo::write_all(&mut self.0, &bytes[..fits])?;
        if fits < bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        if self.1.fail_syncs.load(Ordering::Relaxed) {
            return Err(io::Error::other("the disk is gone"));
        }
        self.1.syncs.fetch_add(1, Ordering::Relaxed);
        self.0.sync()
    }

    fn set_len(&mut self, len: u64) -> io::Result<()> {
        if self.1.fail_cuts.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        SegmentIo::set_len(&mut self.0, len)
    }
}

pub(super) fn open_faulty(dir: &Path, options: FileOptions, faults: &Arc<Faults>) -> FileStore {
    try_open_faulty(dir, options, faults).unwrap()
}

fn try_open_faulty(
    dir: &Path,
    options: FileOptions,
    faults: &Arc<Faults>,
) -> Result<FileStore, OpenError> {
    let faults = Arc::clone(faults);
    let wrap = move |file| Box::new(Faulty(file, Arc::clone(&faults))) as Box<dyn SegmentIo>;
    FileStore::open_with(dir, options, Box::new(wrap))
}

/// Wherever a write stops, in a batch, a trailer or a header: the log is what it was, for those who
/// read it now and for those who open it later, and it goes on from there when there is room.
#[test]
fn a_full_disk_loses_nothing_and_the_log_goes_on_when_there_is_room() {
    let batches = sample_batches(3, Term(1), LogIndex::START, 60);
    for (turn, room) in (0..4000).step_by(37).enumerate() {
        let dir = TempDir::new().unwrap();
        let faults = Arc::new(Faults::default());
        faults.set_room(Some(room));
        let mut store = open_faulty(dir.path(), UNSYNCED, &faults);
        // What was left of the write may have to stay for a while, too.
        let stays = turn % 2 == 1;
        faults.fail_cuts.store(stays, Ordering::Relaxed);
        let mut taken = 0;
        let error = loop {
            match store.append(&batches[taken]) {
                Ok(_) => taken += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(error, AppendError::Full(_)), "{error}");
        assert_eq!(store.tip().index, batches[taken].first());
        assert!(!store.append(&batches[taken]).unwrap_err().is_doubtful());
        assert_eq!(read_all(&store).unwrap(), batches[..taken]);
        if turn % 4 < 2 {
            faults.fail_cuts.store(false, Ordering::Relaxed);
            faults.set_room(None);
        } else {
            // With room again, the next process goes on from exactly there.
            drop(store);
            store = FileStore::open(dir.path(), UNSYNCED).unwrap();
            assert_eq!(read_all(&store).unwrap(), batches[..taken]);
        }
        for batch in &batches[taken..] {
            store.append(batch).unwrap();
        }
        assert_eq!(read_all(&store).unwrap(), batches);
        drop(store);
        let store = FileStore::open(dir.path(), SMALL).unwrap();
        assert_eq!(read_all(&store).unwrap(), batches);
        assert_eq!(verify(dir.path(), |_| {}).unwrap().tip, store.tip());
    }
}

#[test]
fn a_failed_sync_is_not_acknowledged() {
    for sync in [SyncPolicy::Explicit, SyncPolicy::EveryBatch] {
        let dir = TempDir::new().unwrap();
        let faults = Arc::new(Faults::default());
        let options = FileOptions { sync, ..SMALL };
        let mut store = open_faulty(dir.path(), options, &faults);
        let batches = sample_batches(3, Term(1), LogIndex::START, 3);
        store.append(&batches[0]).unwrap();
        let durable = store.sync().unwrap();
        faults.fail_syncs.store(true, Ordering::Relaxed);
        let appended = store.append(&batches[1]);
        assert_eq!(appended.is_ok(), sync == SyncPolicy::Explicit);
        assert!(store.sync().unwrap_err().is_doubtful());
        assert_eq!(store.durable_tip(), durable);
        faults.fail_syncs.store(false, Ordering::Relaxed);
        let error = store.append(&batches[2]).unwrap_err();
        let gone = "cannot sync";
        assert!(
            error.to_string().contains(gone) || appended.is_err(),
            "{error}"
        );
        assert!(store.sync().is_err(), "a later sync proves nothing");
        assert_eq!(store.durable_tip(), durable);
        drop(store);
        // The process may have ended before anybody else was told: the next one is.
        let refused = FileStore::open(dir.path(), SMALL);
        let Err(OpenError::Doubtful { mark, reason }) = refused else {
            panic!("a doubtful log is opened as if nothing had happened: {refused:?}");
        };
        assert!(reason.contains("the disk is gone"), "{reason}");
        // Who looks into the evidence is not hindered.
        assert!(verify(dir.path(), |_| {}).is_ok());
        fs::remove_file(mark).unwrap();
        // What was not acknowledged is not found again.
        let store = FileStore::open(dir.path(), SMALL).unwrap();
        let acknowledged = 1 + usize::from(appended.is_ok());
        assert_eq!(read_all(&store).unwrap(), batches[..acknowledged]);
    }
}

/// Opening syncs what another process wrote, before any of it is believed. If that fails the log is
/// refused, and is no better at the next attempt, when there is nothing left to sync.
#[test]
fn a_sync_that_fails_on_opening_makes_a_log_doubtful() {
    let dir = TempDir::new().unwrap();
    fill(dir.path(), SMALL, 30);
    let faults = Arc::new(Faults::default());
    faults.fail_syncs.store(true, Ordering::Relaxed);
    let refused = try_open_faulty(dir.path(), SMALL, &faults).unwrap_err();
    assert!(matches!(refused, OpenError::Io(_)), "{refused}");
    faults.fail_syncs.store(false, Ordering::Relaxed);
    let again = try_open_faulty(dir.path(), SMALL, &faults).unwrap_err();
    assert!(matches!(again, OpenError::Doubtful { .. }), "{again}");
}

/// Beginning a log where a doubtful one was is tried until the disk takes it. What failed on the way
/// says nothing of the log that begins.
#[test]
fn a_log_that_has_nothing_is_not_doubtful() {
    let dir = TempDir::new().unwrap();
    let mark = dir.path().join("doubtful");
    fs::write(&mark, "cannot sync the folder\n").unwrap();
    let batches = sample_batches(3, Term(1), LogIndex::START, 1);
    let mut store = FileStore::open(dir.path(), SMALL).unwrap();
    store.append(&batches[0]).unwrap();
    store.sync().unwrap();
    drop(store);
    let store = FileStore::open(dir.path(), SMALL).unwrap();
    assert_eq!(read_all(&store).unwrap(), batches);
    assert!(!mark.exists());
}

/// A copy that never syncs believes nothing of its disk, and does not wait for it.
#[test]
fn a_log_that_is_never_synced_is_opened_without() {
    let dir = TempDir::new().unwrap();
    fill(dir.path(), UNSYNCED, 30);
    let faults = Arc::new(Faults::default());
    faults.fail_syncs.store(true, Ordering::Relaxed);
    drop(open_faulty(dir.path(), UNSYNCED, &faults));
    assert_eq!(faults.syncs.load(Ordering::Relaxed), 0);
}

/// A cut that the system stops leaves a whole log that is longer than wanted, and is done later.
#[test]
fn a_cut_that_is_refused_is_made_good_later() {
    let batches = sample_batches(3, Term(1), LogIndex::START, 60);
    for later in ["cut again", "append", "sync", "open anew"] {
        let dir = TempDir::new().unwrap();
        let faults = Arc::new(Faults::default());
        let mut store = open_faulty(dir.path(), SMALL, &faults);
        for batch in &batches {
            store.append(batch).unwrap();
        }
        store.sync().unwrap();
        let end = batches[20].first();
        faults.fail_cuts.store(true, Ordering::Relaxed);
        let error = store.truncate(end).unwrap_err();
        assert!(matches!(error, TruncateError::Full(_)), "{error}");
        assert!(store.durable_tip().index <= store.tip().index);
        assert_eq!(store.tip().index, end);
        assert_eq!(read_all(&store).unwrap(), batches[..20]);
        let other = sample_batches(9, Term(2), end, 1);
        assert!(store.truncate(end).is_err());
        assert!(!store.append(&other[0]).unwrap_err().is_doubtful());
        faults.fail_cuts.store(false, Ordering::Relaxed);
        let mut expected = batches[..20].to_vec();
        match later {
            "cut again" => drop(store.truncate(end).unwrap()),
            "append" => {
                store.append(&other[0]).unwrap();
                expected.extend(other);
            }
            "sync" => drop(store.sync().unwrap()),
            _ => {}
        }
        drop(store);
        let store = FileStore::open(dir.path(), SMALL).unwrap();
        let found = read_all(&store).unwrap();
        if later == "open anew" {
            // Nobody was told that it had been cut.
            assert!(found.len() >= 20);
            expected = batches[..found.len()].to_vec();
        }
        assert_eq!(found, expected, "{later}");
    }
}
