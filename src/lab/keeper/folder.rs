//! The lab's folder: one keeper at a time holds it, and what a keeper that was killed has left in
//! it is cleaned up.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;

use super::host::Host;
use crate::lab::machine;
use crate::lab::state::{HostId, Kept, LabFolder, MAX_HOSTS, ProcessId};

/// Why a lab cannot have its folder.
#[derive(Debug, Error)]
pub enum FolderError {
    /// Another one has it.
    #[error("a lab is running in {} already{}: end it with 'understudy lab down', or name another folder with --dir", dir.display(), keeper(*pid))]
    Taken {
        /// The folder.
        dir: PathBuf,
        /// The keeper of that lab.
        pid: Option<u32>,
    },
    /// It cannot be used.
    #[error("the lab's folder {} cannot be used: name another one with --dir", dir.display())]
    Unusable {
        /// The folder.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It has other things in it.
    #[error("{} is no lab's folder, as it has {found} in it: name another one with --dir", dir.display())]
    Foreign {
        /// The folder.
        dir: PathBuf,
        /// Something in it.
        found: String,
    },
}

fn keeper(pid: Option<u32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (process {pid})"))
}

/// A lab's folder, held.
pub struct Folder {
    files: LabFolder,
    _lock: File,
}

impl Folder {
    /// Takes a folder for this process; what there is to tell, if somebody has left something.
    /// From here on standard error goes to a file in it.
    pub fn take(dir: &Path) -> Result<(Self, Option<String>), FolderError> {
        let unusable = |source| FolderError::Unusable {
            dir: dir.to_owned(),
            source,
        };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(unusable)?;
        let files = LabFolder::new(dir);
        only_ours(&files)?;
        // Whoever may connect to the keeper's socket commands the lab.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        let lock = lock(&files)?;
        let note = clean_up(&files).map_err(unusable)?;
        let log = File::create(files.keeper_log()).map_err(unusable)?;
        nix::unistd::dup2_stderr(&log).map_err(|error| unusable(error.into()))?;
        let kept = Kept {
            keeper: ProcessId::of(std::process::id()),
            ..Kept::default()
        };
        write(&files, &kept).map_err(unusable)?;
        Ok((Self { files, _lock: lock }, note))
    }

    /// Leaves nothing behind.
    pub fn leave(self) {
        if let Err(error) = remove_files(&self.files) {
            eprintln!("files of the lab stay: {error}");
        }
        // The lock last, as whoever gets it believes that nobody else is here.
        let _ = fs::remove_file(self.files.lock());
        // Not empty when somebody else has put something into it.
        let _ = fs::remove_dir(self.files.path());
    }
}

/// Removes what a lab that is no more has left; whether there was anything.
pub fn clean(dir: &Path) -> Result<bool, FolderError> {
    let files = LabFolder::new(dir);
    if !files.kept().exists() {
        return Ok(false);
    }
    let lock = lock(&files)?;
    let unusable = |source| FolderError::Unusable {
        dir: dir.to_owned(),
        source,
    };
    let cleaned = clean_up(&files).map_err(unusable)?.is_some();
    Folder { files, _lock: lock }.leave();
    Ok(cleaned)
}

/// A folder with something else in it may be meant for something else.
fn only_ours(files: &LabFolder) -> Result<(), FolderError> {
    let dir = files.path();
    let unusable = |source| FolderError::Unusable {
        dir: dir.to_owned(),
        source,
    };
    let ours = ours(files);
    for entry in fs::read_dir(dir).map_err(unusable)? {
        let path = entry.map_err(unusable)?.path();
        if !ours.contains(&path) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            return Err(FolderError::Foreign {
                dir: dir.to_owned(),
                found: name.into_owned(),
            });
        }
    }
    Ok(())
}

fn ours(files: &LabFolder) -> Vec<PathBuf> {
    let consoles = HostId::first(MAX_HOSTS).map(|host| files.console(host));
    let rest = [
        files.socket(),
        files.kept(),
        files.keeper_log(),
        files.lock(),
    ];
    consoles.chain(rest).collect()
}

fn lock(files: &LabFolder) -> Result<File, FolderError> {
    let unusable = |source| FolderError::Unusable {
        dir: files.path().to_owned(),
        source,
    };
    loop {
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(files.lock())
            .map_err(unusable)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(FolderError::Taken {
                    dir: files.path().to_owned(),
                    pid: read(files).keeper.map(|keeper| keeper.pid),
                });
            }
            Err(TryLockError::Error(error)) => return Err(unusable(error)),
        }
        // It is another file when the last holder has just removed it.
        let held = lock.metadata().map_err(unusable)?.ino();
        if fs::metadata(files.lock()).is_ok_and(|named| named.ino() == held) {
            return Ok(lock);
        }
    }
}

fn read(files: &LabFolder) -> Kept {
    let text = fs::read(files.kept()).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

fn write(files: &LabFolder, kept: &Kept) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(kept).map_err(io::Error::other)?;
    fs::write(files.kept(), text)
}

/// Writes down which processes a lab has.
pub fn write_kept<'a>(
    dir: &Path,
    hosts: impl Iterator<Item = &'a Rc<Host>>,
) -> Result<(), FolderError> {
    let kept = Kept {
        keeper: ProcessId::of(std::process::id()),
        hosts: hosts
            .filter_map(|host| Some((host.id().to_string(), host.process()?)))
            .collect(),
    };
    write(&LabFolder::new(dir), &kept).map_err(|source| FolderError::Unusable {
        dir: dir.to_owned(),
        source,
    })
}

/// Ends what a keeper that is no more has left, and removes its files. The lock is held.
fn clean_up(files: &LabFolder) -> io::Result<Option<String>> {
    if !files.kept().exists() {
        return Ok(None);
    }
    let kept = read(files);
    // They die with their keeper; this waits for those that are about to.
    for process in kept.hosts.values() {
        end(*process)?;
    }
    remove_files(files)?;
    let keeper = kept.keeper.map_or(String::new(), |keeper| {
        format!(" (its keeper was process {})", keeper.pid)
    });
    Ok(Some(format!(
        "cleaned up after a lab in {} that had ended without 'understudy lab down'{keeper}",
        files.path().display()
    )))
}

fn remove_files(files: &LabFolder) -> io::Result<()> {
    for file in ours(files) {
        if file == files.lock() {
            continue;
        }
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Kills a process, unless the number is another one's by now, and waits for its end.
fn end(process: ProcessId) -> io::Result<()> {
    let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // The handle first: the process that it means is the one that is looked at.
    if process.lives() {
        pidfd_send_signal(&handle, Signal::KILL)?;
        machine::wait_for(&handle)?;
    }
    Ok(())
}
