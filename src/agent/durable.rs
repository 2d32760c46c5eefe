//! Small files that are either the old ones or the new ones, whatever happens in between.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use replay_log::disk;
use thiserror::Error;

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

/// The length of one slot in bytes.
const SLOT: u64 = 64 << 10;
/// What a slot begins with.
const MAGIC: [u8; 8] = *b"ustate1\n";
/// Magic, number, length, BLAKE3 of all but itself.
const SLOT_HEADER: usize = 8 + 8 + 8 + 32;

/// A small file whose space is reserved: two slots, of which the one with the higher number counts. A
/// write replaces the other one in place, so that it needs no space, and one that is torn leaves what
/// was. (A file system that never writes in place, as btrfs, may need space all the same.)
#[derive(Debug)]
pub struct Slots {
    file: File,
    /// The number of the newest write that is whole.
    number: u64,
}

/// Why there are no contents.
#[derive(Debug, Error)]
pub enum OpenSlotsError {
    /// The system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Neither slot is whole.
    #[error("neither of its two slots is what was written")]
    Damaged,
}

/// Why contents were not replaced.
#[derive(Debug, Error)]
pub enum WriteSlotError {
    /// They could not be written; what was there before still is.
    #[error("it cannot be written")]
    Refused(#[source] io::Error),
    /// They could not be made durable: after a power failure they may be there or not. The next write
    /// replaces them wholly.
    #[error("it cannot be made durable")]
    Unsynced(#[source] io::Error),
}

impl Slots {
    /// Makes a file with these contents, durably; one that is there is replaced.
    pub fn create(path: &Path, contents: &[u8]) -> io::Result<Self> {
        let mut whole = slot(1, contents)?;
        whole.resize(2 * SLOT as usize, 0);
        replace(path, &whole)?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        Ok(Self { file, number: 1 })
    }

    /// Opens a file, with its contents as the disk has them; `None` when there is none.
    pub fn open(path: &Path) -> Result<Option<(Self, Vec<u8>)>, OpenSlotsError> {
        let opened = OpenOptions::new().read(true).write(true).open(path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // What another process wrote and could not make durable is no promise.
        disk::forget_cached(&file)?;
        let mut newest = None;
        for at in [0, SLOT] {
            let found = read_slot(&file, at)?;
            newest = newest.max(found);
        }
        let (number, contents) = newest.ok_or(OpenSlotsError::Damaged)?;
        Ok(Some((Self { file, number }, contents)))
    }

    /// Replaces the contents, durably. Blocks for as long as the disk takes.
    pub fn write(&mut self, contents: &[u8]) -> Result<(), WriteSlotError> {
        let number = self.number + 1;
        let slot = slot(number, contents).map_err(WriteSlotError::Refused)?;
        // Numbers take turns: this is the slot that does not count.
        let at = (number + 1) % 2 * SLOT;
        self.file
            .write_all_at(&slot, at)
            .map_err(WriteSlotError::Refused)?;
        self.file.sync_data().map_err(WriteSlotError::Unsynced)?;
        self.number = number;
        Ok(())
    }
}

fn slot(number: u64, contents: &[u8]) -> io::Result<Vec<u8>> {
    if contents.len() + SLOT_HEADER > SLOT as usize {
        let most = SLOT as usize - SLOT_HEADER;
        let why = format!("{} bytes are more than a slot's {most}", contents.len());
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    let mut slot = Vec::with_capacity(SLOT_HEADER + contents.len());
    slot.extend(MAGIC);
    slot.extend(number.to_le_bytes());
    slot.extend((contents.len() as u64).to_le_bytes());
    let hash = slot_hash(&slot, contents);
    slot.extend(hash.as_bytes());
    slot.extend(contents);
    Ok(slot)
}

fn slot_hash(begin: &[u8], contents: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(begin).update(contents);
    hasher.finalize()
}

/// What a slot holds; `None` when it is not whole.
fn read_slot(file: &File, at: u64) -> io::Result<Option<(u64, Vec<u8>)>> {
    let mut slot = vec![0; SLOT as usize];
    match file.read_exact_at(&mut slot, at) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(parse_slot(&slot))
}

fn parse_slot(slot: &[u8]) -> Option<(u64, Vec<u8>)> {
    let (begin, rest) = slot.split_at_checked(24)?;
    let (hash, rest) = rest.split_first_chunk::<32>()?;
    let (magic, numbers) = begin.split_first_chunk::<8>()?;
    let (number, length) = numbers.split_first_chunk::<8>()?;
    let length = u64::from_le_bytes(*length.first_chunk()?);
    let contents = rest.get(..usize::try_from(length).ok()?)?;
    let whole = *magic == MAGIC && slot_hash(begin, contents) == *hash;
    whole.then(|| (u64::from_le_bytes(*number), contents.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &Path) -> Vec<u8> {
        Slots::open(path).expect("whole").expect("there").1
    }

    #[test]
    fn the_newest_whole_slot_counts_wherever_a_write_is_torn() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("state");
        assert!(Slots::open(&path).expect("readable").is_none());
        let mut slots = Slots::create(&path, b"one").expect("room");
        assert_eq!(read(&path), b"one");
        for (last, next) in [(&b"one"[..], &b"number two"[..]), (b"number two", b"3")] {
            let before = fs::read(&path).expect("readable");
            slots.write(next).expect("room");
            assert_eq!(read(&path), next);
            let after = fs::read(&path).expect("readable");
            assert_eq!(after.len(), before.len(), "it takes no more room");
            let changed: Vec<_> = (0..after.len())
                .filter(|at| before[*at] != after[*at])
                .collect();
            let (first, end) = (changed[0], changed[changed.len() - 1]);
            for torn in first..end {
                // What came before is new, what comes after is old; and the other way around.
                let one = [&after[..=torn], &before[torn + 1..]].concat();
                let other = [&before[..=torn], &after[torn + 1..]].concat();
                for bytes in [one, other] {
                    fs::write(&path, bytes).expect("written");
                    assert_eq!(read(&path), last, "torn at {torn}");
                }
            }
            fs::write(&path, &after).expect("written");
        }
        // Nothing is made up where nothing is left.
        let mut bytes = fs::read(&path).expect("readable");
        bytes[30] ^= 1;
        bytes[SLOT as usize + 30] ^= 1;
        fs::write(&path, &bytes).expect("written");
        let damaged = Slots::open(&path);
        assert!(matches!(damaged, Err(OpenSlotsError::Damaged)));
        fs::write(&path, b"short").expect("written");
        assert!(matches!(Slots::open(&path), Err(OpenSlotsError::Damaged)));
        let long = slots.write(&vec![7; SLOT as usize]);
        assert!(matches!(long, Err(WriteSlotError::Refused(_))));
    }

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
