//! A mark beside a log whose sync failed, for the process that opens it next.
//!
//! The process that saw the sync fail knows that the log is doubtful, and may die before anything else
//! does. The mark needs no sync of its own: it outlives the process in the kernel's memory, where what
//! is doubtful of the log lies as well, and what outlives the host is read from the disk.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::store::{IoFailure, OpenError};

/// Its name in the log's folder: it goes wherever the log is moved.
const MARK: &str = "doubtful";
/// So many bytes of the reason are read.
const REASON_MAX: u64 = 1 << 10;

fn mark(dir: &Path) -> PathBuf {
    dir.join(MARK)
}

/// Leaves the mark, if the system lets it: the disk that failed may take nothing at all.
pub(super) fn leave(dir: &Path, reason: &str) {
    let _best_effort = fs::write(mark(dir), format!("{reason}\n"));
}

/// Refuses a log that has the mark. One of which nothing is there is not doubtful: what failed then was
/// the beginning of it, which is tried again.
pub(super) fn check(dir: &Path, is_empty: bool) -> Result<(), OpenError> {
    let mark = mark(dir);
    if is_empty {
        return match fs::remove_file(&mark) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(IoFailure::new("remove", mark)(error).into())
            }
            _ => Ok(()),
        };
    }
    let file = match File::open(&mark) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(IoFailure::new("open", mark)(error).into()),
    };
    let mut reason = Vec::new();
    // That it is there says enough, whatever can be read of it.
    let _ = file.take(REASON_MAX).read_to_end(&mut reason);
    let reason = String::from_utf8_lossy(&reason);
    let reason = reason.lines().next().unwrap_or_default();
    Err(OpenError::Doubtful {
        mark,
        reason: reason.to_owned(),
    })
}
