//! A log on a real file system that is full. In a process of its own: it starts others, and those hold
//! the locks of logs for a moment.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::process::Command;

use replay_log::conformance::sample_batches;
use replay_log::{
    AppendError, Batch, FileOptions, FileStore, LogIndex, ReadError, Store as _, SyncPolicy, Term,
};
use tempfile::TempDir;

fn read_all(store: &FileStore) -> Result<Vec<Batch>, ReadError> {
    let mut reader = store.read_from(store.first())?;
    std::iter::from_fn(|| reader.next_batch().transpose()).collect()
}

/// A small file system of its own, unmounted when the test ends.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Result<Self, String> {
        let dir = TempDir::new().map_err(|error| error.to_string())?;
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", size, "tmpfs"])
            .arg(dir.path())
            .output()
            .map_err(|error| error.to_string())?;
        if mounted.status.success() {
            Ok(Self(dir))
        } else {
            Err(String::from_utf8_lossy(&mounted.stderr).trim().to_owned())
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A folder that stays mounted stays, and nothing else comes of it.
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

/// Says aloud, and where `tests/run` counts it, that a test could not run.
fn skipped(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    let _ = io::Write::write_all(&mut io::stderr(), line.as_bytes());
    if let Some(file) = std::env::var_os("UNDERSTUDY_SKIPS") {
        let file = OpenOptions::new().append(true).create(true).open(file);
        io::Write::write_all(&mut file.unwrap(), line.as_bytes()).unwrap();
    }
}

/// The same with a real file system: no space for bytes, and no space for another file.
#[test]
fn a_real_file_system_that_is_full_loses_nothing() {
    let disk = match SmallDisk::mount("size=256k,nr_inodes=64") {
        Ok(disk) => disk,
        Err(why) => return skipped("a_real_file_system_that_is_full_loses_nothing", &why),
    };
    let dir = disk.0.path().join("log");
    let options = FileOptions {
        segment_bytes: 20_000,
        sync: SyncPolicy::Explicit,
        checkpoint_bytes: 400,
    };
    let mut store = FileStore::open(&dir, options).unwrap();
    let batches = sample_batches(3, Term(1), LogIndex::START, 3000);
    let mut taken = 0;
    let mut append_until_full = |store: &mut FileStore| {
        let error = loop {
            match store.append(&batches[taken]) {
                Ok(_) => taken += 1,
                Err(error) => break error,
            }
        };
        let AppendError::Full(failure) = error else {
            panic!("not {error}");
        };
        assert_eq!(failure.source.kind(), io::ErrorKind::StorageFull);
        assert_eq!(read_all(store).unwrap(), batches[..taken]);
        assert_eq!(store.sync().unwrap(), store.tip());
        (taken, failure.action)
    };
    let ballast = disk.0.path().join("ballast");
    fs::write(&ballast, vec![1; 150 << 10]).unwrap();
    let full = append_until_full(&mut store);
    // A process that starts on a full disk finds all of it.
    drop(store);
    let mut store = FileStore::open(&dir, options).unwrap();
    assert_eq!(append_until_full(&mut store), full);
    fs::remove_file(&ballast).unwrap();
    let files = (0..).map(|i| disk.0.path().join(i.to_string()));
    let files: Vec<_> = files
        .map_while(|path| File::create(&path).ok().map(|_| path))
        .collect();
    assert!(!files.is_empty());
    let (further, action) = append_until_full(&mut store);
    assert!(further > full.0, "it goes on when there is room");
    assert_eq!(action, "create", "but not with another segment");
    for path in files {
        fs::remove_file(path).unwrap();
    }
    store.append(&batches[further]).unwrap();
    drop(store);
    let store = FileStore::open(&dir, options).unwrap();
    assert_eq!(read_all(&store).unwrap(), batches[..=further]);
}
