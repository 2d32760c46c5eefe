//! Disks that a test breaks under running processes.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

/// What can be wrong with a disk.
#[derive(Clone, Copy)]
pub enum Fault {
    /// A sync does not come back.
    Hangs,
    /// A sync takes so many milliseconds.
    Slow(u32),
    /// A sync fails.
    Fails,
    /// It does not have what was written last, which shows when the page cache forgets it.
    Lost,
}

/// A library that is preloaded into processes, and the file that tells it what is broken.
pub struct FaultyDisks {
    folder: TempDir,
}

impl FaultyDisks {
    /// Compiles the library.
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/doubt/faulty_disk.c");
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(folder.path().join("faulty_disk.so"))
            .arg(source)
            .arg("-ldl")
            .status()
            .expect("a C compiler, which the program's own build needs, too");
        assert!(compiled.success(), "the library compiles");
        let disks = Self { folder };
        disks.repair();
        disks
    }

    fn list(&self) -> PathBuf {
        self.folder.path().join("faults")
    }

    /// The environment of processes whose disks can be broken.
    pub fn environment(&self) -> [(&'static str, OsString); 2] {
        let library = self.folder.path().join("faulty_disk.so");
        [
            ("LD_PRELOAD", library.into_os_string()),
            ("UNDERSTUDY_FAULTS", self.list().into_os_string()),
        ]
    }

    /// From now on the disk that a folder is on is like this, and no other is broken.
    pub fn break_disk(&self, of: &Path, fault: Fault) {
        self.break_disks(&[(of, fault)]);
    }

    /// From now on the disks that these files or folders are on are like this, and no others are
    /// broken.
    pub fn break_disks(&self, faults: &[(&Path, Fault)]) {
        let line = |(of, fault): &(&Path, Fault)| {
            let what = match fault {
                Fault::Hangs => "hang".to_owned(),
                Fault::Slow(millis) => format!("delay:{millis}"),
                Fault::Fails => "fail".to_owned(),
                Fault::Lost => "lost".to_owned(),
            };
            format!("{what} {}\n", of.display())
        };
        let lines: String = faults.iter().map(line).collect();
        // Whole or not at all: it is read at every sync.
        let new = self.folder.path().join("faults.new");
        fs::write(&new, lines).expect("writes");
        fs::rename(new, self.list()).expect("renames");
    }

    /// No disk is broken.
    pub fn repair(&self) {
        fs::write(self.list(), "").expect("writes");
    }
}

/// Small file systems in a mount namespace of this thread and the processes that it starts: the
/// kernel takes them away with the last of them, whatever happens to the test.
pub struct SmallDisks(Vec<PathBuf>);

impl SmallDisks {
    /// Mounts one at each of these folders.
    pub fn mount(at: &[PathBuf], size: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let none = None::<&str>;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(none, "/", none, private, none).expect("mounts of our own");
        for folder in at {
            fs::create_dir_all(folder).expect("a folder");
            tmpfs(folder, size, MsFlags::empty());
        }
        Self(at.to_vec())
    }

    /// Makes all of them larger, as an operator does who makes room.
    pub fn grow(&self, size: &str) {
        for folder in &self.0 {
            tmpfs(folder, size, MsFlags::MS_REMOUNT);
        }
    }
}

fn tmpfs(at: &Path, size: &str, flags: MsFlags) {
    let size = format!("size={size}");
    let (none, kind) = (Some("none"), Some("tmpfs"));
    mount(none, at, kind, flags, Some(size.as_str())).expect("a small file system");
}

impl Drop for SmallDisks {
    fn drop(&mut self) {
        for folder in &self.0 {
            // So that the cluster's folder can be removed, although its processes still live.
            let _ = umount2(folder, MntFlags::MNT_DETACH);
        }
    }
}

/// Copies a folder with everything in it, as a backup is made and put back.
pub fn copy_folder(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(copied.expect("cp").success(), "the folder is copied");
}

/// Puts a folder in the place of another.
pub fn put_back(backup: &Path, folder: &Path) {
    fs::remove_dir_all(folder).expect("removes");
    copy_folder(backup, folder);
}
