//! Folders that are given up: set aside under a number that was never used, or deleted.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use replay_log::IoFailure;

/// The ending of a folder that is set aside, before its number. Nothing deletes those by itself.
const ASIDE: &str = "aside-";
/// The ending of a folder that is being deleted.
const OLD: &str = "old-";

/// Sets a folder aside as evidence, under the next number that was never used. `None`: there is none.
pub(super) fn set_aside(folder: &Path) -> Result<Option<PathBuf>, IoFailure> {
    move_away(folder, ASIDE, "set aside")
}

/// Moves a folder away, and deletes it in its own time.
pub(super) fn delete(folder: &Path) -> Result<(), IoFailure> {
    let gone = move_away(folder, OLD, "delete")?;
    // What stays is removed at the next start.
    drop(gone.map(|gone| std::thread::spawn(move || fs::remove_dir_all(gone))));
    Ok(())
}

/// Removes what was being deleted when the process ended. It only takes room.
pub(super) fn sweep(parent: &Path) {
    for file in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = file.path();
        let ending = path.extension().unwrap_or_default().to_string_lossy();
        if ending.starts_with(OLD) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Makes what was named in a folder durable.
pub(super) fn sync_names(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn move_away(
    folder: &Path,
    ending: &str,
    action: &'static str,
) -> Result<Option<PathBuf>, IoFailure> {
    let failed = |source| IoFailure {
        action,
        path: folder.to_owned(),
        source,
    };
    let parent = folder.parent().unwrap_or(Path::new("."));
    let stem = folder.file_stem().unwrap_or_default().to_string_lossy();
    let prefix = format!("{stem}.{ending}");
    let mut last = 0;
    for file in fs::read_dir(parent).map_err(failed)? {
        let file = file.map_err(failed)?.file_name();
        let file = file.to_string_lossy();
        let number = file.strip_prefix(&prefix).and_then(|n| n.parse().ok());
        last = number.unwrap_or(0).max(last);
    }
    let to = folder.with_extension(format!("{ending}{}", last + 1_u64));
    match fs::rename(folder, &to) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    }
    // A name that a power failure takes back would be the folder's again.
    sync_names(parent).map_err(failed)?;
    Ok(Some(to))
}
