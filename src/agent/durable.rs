//! Small files that are either the old ones or the new ones, whatever happens in between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Replaces `path` by a file with these contents: written beside it, synced, renamed over it, and
/// the folder synced. When this returns, the contents survive a power failure.
///
/// Blocks for as long as the disk takes.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "a file needs a name to be replaced",
        )
    })?;
    let mut beside = name.to_os_string();
    beside.push(".new");
    let beside = folder.join(beside);
    let mut file = File::create(&beside)?;
    file.write_all(contents)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&beside, path)?;
    File::open(folder)?.sync_all()
}

/// Reads a file, refusing one that is longer than `limit` bytes; `None` when there is none.
pub fn read_bounded(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if length > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{} is {length} bytes long, more than {limit}",
                path.display()
            ),
        ));
    }
    fs::read(path).map(Some)
}

/// Writes a file that must not exist yet, with the permissions `mode`, and syncs it.
pub fn create_new(path: &Path, contents: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(contents)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_leaves_the_new_contents_and_nothing_beside_them() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("record");
        replace(&path, b"one").expect("the first write");
        replace(&path, b"two").expect("the second write");
        assert_eq!(
            read_bounded(&path, 3).expect("readable"),
            Some(b"two".to_vec())
        );
        assert!(read_bounded(&path, 2).is_err());
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 1);
    }

    #[test]
    fn a_new_file_never_overwrites() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("key");
        create_new(&path, b"one", 0o600).expect("the first write");
        assert!(create_new(&path, b"two", 0o600).is_err());
        assert_eq!(fs::read(&path).expect("readable"), b"one");
    }
}
