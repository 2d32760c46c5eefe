//! One process a folder: who keeps files takes a lock on their folder before anything else.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::durable;

/// The file that is locked, in the folder.
const FILE_NAME: &str = "lock";
/// The longest text in it: a process id.
const TEXT_MAX: u64 = 32;

/// A folder that no other process uses for as long as this lives. The kernel gives the lock back when
/// the process ends, in whatever way.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

/// Why a folder cannot be had alone.
#[derive(Debug, Error)]
pub enum LockFolderError {
    /// Another process has it.
    #[error(
        "{folder} is used by {}: stop that, or give this process a folder of its own ('data' in its understudy.toml)",
        user(*.by)
    )]
    Taken {
        /// The folder.
        folder: PathBuf,
        /// The process, as its own system counts it; `None` if it has not said.
        by: Option<u32>,
    },
    /// It cannot be locked at all.
    #[error(
        "{folder} cannot be locked: run as the user who owns it, on a disk with space whose file system has locks"
    )]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

fn user(by: Option<u32>) -> String {
    by.map_or_else(
        || "another process".to_owned(),
        |by| format!("process {by}"),
    )
}

impl FolderLock {
    /// Takes a folder, and makes it if it is not there. Does not wait.
    pub fn take(folder: &Path) -> Result<Self, LockFolderError> {
        let unusable = |source| LockFolderError::Unusable {
            folder: folder.to_owned(),
            source,
        };
        fs::create_dir_all(folder).map_err(unusable)?;
        let path = folder.join(FILE_NAME);
        // What it says is another's until the lock is ours.
        let opened = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(&path);
        let mut file = opened.map_err(unusable)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockFolderError::Taken {
                    folder: folder.to_owned(),
                    by: read_user(&path),
                });
            }
            Err(TryLockError::Error(source)) => return Err(unusable(source)),
        }
        // Only for the message of whoever comes next: on a full disk the lock holds all the same.
        let said = file
            .set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()));
        if let Err(error) = said {
            tracing::debug!(%error, "the lock does not say whose it is");
        }
        Ok(Self { _file: file })
    }
}

fn read_user(path: &Path) -> Option<u32> {
    let text = durable::read_bounded(path, TEXT_MAX).ok()??;
    String::from_utf8(text).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_user_and_the_error_names_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let data = folder.path().join("data");
        let first = FolderLock::take(&data).expect("nobody has it");
        let error = FolderLock::take(&data).expect_err("it is taken");
        let ours = std::process::id();
        assert!(
            matches!(&error, LockFolderError::Taken { by, .. } if *by == Some(ours)),
            "{error:?}"
        );
        assert!(
            error
                .to_string()
                .contains(&format!("process {ours}: stop that")),
            "{error}"
        );
        drop(first);
        FolderLock::take(&data).expect("it is given back");
    }

    #[test]
    fn a_lock_that_does_not_say_whose_it_is_holds() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let _first = FolderLock::take(folder.path()).expect("nobody has it");
        fs::write(folder.path().join(FILE_NAME), "x".repeat(100)).expect("written");
        let error = FolderLock::take(folder.path()).expect_err("it is taken");
        assert!(error.to_string().contains("another process"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error_that_says_so() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("file");
        fs::write(&file, "").expect("written");
        let error = FolderLock::take(&file.join("data")).expect_err("a file is no folder");
        assert!(
            matches!(error, LockFolderError::Unusable { .. }),
            "{error:?}"
        );
    }
}
