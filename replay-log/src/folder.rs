//! Making folders whose names survive a power failure.

use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Makes a folder and those above it as far as they are missing. What is made here is still there
/// after a power failure: a file that was synced in a folder whose own name is lost is lost with it.
pub fn make(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = match dir.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return fs::create_dir(dir),
    };
    make(parent)?;
    match fs::create_dir(dir) {
        // Somebody else was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        made => made?,
    }
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_made_and_what_is_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("one/two/three");
        make(&deep).unwrap();
        fs::write(deep.join("file"), "kept").unwrap();
        make(&deep).unwrap();
        assert_eq!(fs::read_to_string(deep.join("file")).unwrap(), "kept");
        let error = make(&deep.join("file/four")).unwrap_err();
        assert_ne!(error.kind(), io::ErrorKind::NotFound, "{error}");
    }
}
