//! Which disk a VM's folder lies on, so that a folder that was put back from a backup, copied or moved
//! is not taken for the one it is a copy of.
//!
//! A file of random bytes is the folder's identity, together with what a copy of it does not share: its
//! inode and when it was made. Its name changes at every start, so that an older copy that is laid over
//! the folder brings a second one with it. What is found otherwise than that is another folder.
//!
//! | what was done to the folder | seen |
//! |---|---|
//! | copied, restored or moved to another file system, whichever way | yes |
//! | removed or renamed, and a copy put in its place | yes |
//! | files of an older copy laid over those that are there (`cp`, `rsync`, `tar`) | yes, if the agent has started since the copy was made |
//! | renamed and renamed back, moved within its file system | no, and nothing is lost by that |
//! | the whole disk set back: a snapshot of a volume or a virtual machine | no |

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::agent::durable;
use crate::protocol::DiskId;

/// What the file's name begins with.
const NAME: &str = "identity.";
/// Only whom the folder belongs to has to read it.
const MODE: u32 = 0o600;

/// The identity of the disk that a folder lies on. `random` is new at every start.
pub(super) fn disk_id(folder: &Path, random: u64) -> io::Result<DiskId> {
    let mut found = Vec::new();
    for file in fs::read_dir(folder)? {
        let file = file?;
        if file.file_name().to_string_lossy().starts_with(NAME) {
            found.push(file.path());
        }
    }
    let path = folder.join(format!("{NAME}{random:016x}"));
    match &found[..] {
        [one] if *one == path => {}
        [one] => fs::rename(one, &path)?,
        others => begin(&path, others, random)?,
    }
    File::open(folder)?.sync_all()?;
    read(&path)
}

/// Begins another identity in the place of none, or of several.
fn begin(path: &Path, others: &[PathBuf], random: u64) -> io::Result<()> {
    for other in others {
        fs::remove_file(other)?;
    }
    let mut contents = [0; 24];
    let (bytes, rest) = contents.split_at_mut(16);
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), bytes)
        .map_err(|_| io::Error::other("the kernel gives no random bytes"))?;
    rest.copy_from_slice(&random.to_le_bytes());
    durable::create_new(path, &contents, MODE)
}

fn read(path: &Path) -> io::Result<DiskId> {
    let file = fs::metadata(path)?;
    // A file system that does not know when files were made has inodes at least.
    let made = file
        .created()
        .ok()
        .and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    let made = made.map_or(0, |since| since.as_nanos());
    let mut hasher = blake3::Hasher::new();
    hasher.update(&file.ino().to_le_bytes());
    hasher.update(&made.to_le_bytes());
    hasher.update(&fs::read(path)?);
    let mut id = [0; 8];
    hasher.finalize_xof().fill(&mut id);
    // 0 is what hosts have that never knew.
    Ok(DiskId(u64::from_le_bytes(id).max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).expect("a folder");
        for file in fs::read_dir(from).expect("listed").flatten() {
            fs::copy(file.path(), to.join(file.file_name())).expect("copied");
        }
    }

    #[test]
    fn a_folder_that_stays_is_known_again_and_a_copy_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let (here, backup) = (dir.path().join("vm"), dir.path().join("backup"));
        fs::create_dir(&here).expect("a folder");
        let mut start = 0;
        let mut id = |folder: &Path| {
            start += 1;
            disk_id(folder, start).expect("readable")
        };
        let ours = id(&here);
        assert_ne!(ours, DiskId(0));
        copy(&here, &backup);
        for _ in 0..3 {
            assert_eq!(id(&here), ours, "restarts are none of its business");
        }
        let moved = dir.path().join("moved");
        fs::rename(&here, &moved).expect("moved");
        assert_eq!(id(&moved), ours);
        fs::rename(&moved, &here).expect("moved back");
        assert_ne!(id(&backup), ours, "a copy elsewhere");

        // An older copy laid over what is there.
        copy(&backup, &here);
        let now = id(&here);
        assert_ne!(now, ours);
        assert_eq!(id(&here), now);

        // What was there replaced by a copy.
        copy(&here, &dir.path().join("second"));
        fs::remove_dir_all(&here).expect("removed");
        fs::rename(dir.path().join("second"), &here).expect("put back");
        assert_ne!(id(&here), now);

        // The file alone removed.
        let before = id(&here);
        let files = fs::read_dir(&here).expect("listed").flatten();
        files.for_each(|file| fs::remove_file(file.path()).expect("removed"));
        assert_ne!(id(&here), before);
    }
}
