//! What a disk contained when the machine was powered on: a sealed file, named by its BLAKE3, that
//! nobody writes again; or zeros, which need no file.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use replay_log::DiskBase;
use thiserror::Error;

use crate::config::DISK_MAX;

/// How much is read, hashed and written at a time.
const BLOCK: usize = 64 << 10;
const SECTOR: u64 = 512;

/// Tells the drafts of one process apart.
static DRAFTS: AtomicU64 = AtomicU64::new(0);

/// Why a disk base cannot be used or made.
#[derive(Debug, Error)]
pub enum BaseError {
    /// There is no such file, or it cannot be read or written.
    #[error("cannot {doing} the disk base {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// The file has another size than the log says.
    #[error(
        "the disk base {} has {found} bytes instead of {expected}: fetch it again",
        path.display()
    )]
    Size {
        /// Which file.
        path: PathBuf,
        /// The size in the log's header.
        expected: u64,
        /// The file's size.
        found: u64,
    },
    /// The file's content is not what its name says.
    #[error(
        "the disk base {} is corrupt (its content hashes to {}): fetch it again",
        path.display(),
        blake3::Hash::from_bytes(*found).to_hex()
    )]
    Corrupt {
        /// Which file.
        path: PathBuf,
        /// The hash of its content.
        found: [u8; 32],
    },
    /// A disk has whole sectors.
    #[error("a disk has a multiple of 512 bytes, not {found}: pad the image")]
    PartialSector {
        /// The size found.
        found: u64,
    },
    /// No disk is as large.
    #[error("a disk has at most 64 GiB, not {found} bytes: it is not a machine of this version")]
    TooLarge {
        /// The size asked for.
        found: u64,
    },
}

#[derive(Clone, Debug)]
enum Content {
    Zeros,
    File { file: Arc<File>, path: PathBuf },
}

/// A sealed disk base.
#[derive(Clone, Debug)]
pub struct Base {
    name: DiskBase,
    content: Content,
}

impl Base {
    /// A base of zeros.
    pub fn empty(size: u64) -> Self {
        Self {
            name: DiskBase {
                digest: digest_of_zeros(size),
                size,
            },
            content: Content::Zeros,
        }
    }

    /// Opens the base of that name in `folder`. A base of zeros needs no file there. The content
    /// is not read: see [`Base::verify`].
    pub fn open(folder: &Path, name: DiskBase) -> Result<Self, BaseError> {
        if name.size > DISK_MAX {
            return Err(BaseError::TooLarge { found: name.size });
        }
        let path = Self::path(folder, name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    && name.digest == digest_of_zeros(name.size) =>
            {
                return Ok(Self::empty(name.size));
            }
            Err(source) => return Err(at(&path, "open")(source)),
        };
        let found = file.metadata().map_err(at(&path, "open"))?.len();
        if found != name.size {
            return Err(BaseError::Size {
                path,
                expected: name.size,
                found,
            });
        }
        let file = Arc::new(file);
        Ok(Self {
            name,
            content: Content::File { file, path },
        })
    }

    /// Where the base of that name lies in `folder`.
    pub fn path(folder: &Path, name: DiskBase) -> PathBuf {
        let digest = blake3::Hash::from_bytes(name.digest).to_hex();
        folder.join(format!("{digest}.base"))
    }

    /// Seals what `source` yields as a base in `folder`. The file appears there whole or not at
    /// all, and survives a power failure afterwards. Stretches of zeros take no room.
    pub fn seal(folder: &Path, source: &mut dyn Read) -> Result<Self, BaseError> {
        let (process, draft) = (std::process::id(), DRAFTS.fetch_add(1, Ordering::Relaxed));
        let draft = folder.join(format!("draft-{process}-{draft}.tmp"));
        let sealed = Self::write_draft(folder, &draft, source);
        if sealed.is_err() {
            // The error says what matters; a draft that stays behind only takes room.
            let _ = fs::remove_file(&draft);
        }
        sealed
    }

    fn write_draft(folder: &Path, draft: &Path, source: &mut dyn Read) -> Result<Self, BaseError> {
        let mut file = File::create(draft).map_err(at(draft, "create"))?;
        let (digest, size) = copy_hashed(source, &mut file).map_err(at(draft, "write"))?;
        if !size.is_multiple_of(SECTOR) {
            return Err(BaseError::PartialSector { found: size });
        }
        file.set_len(size).map_err(at(draft, "write"))?;
        file.sync_all().map_err(at(draft, "sync"))?;
        let name = DiskBase { digest, size };
        let path = Self::path(folder, name);
        fs::rename(draft, &path).map_err(at(&path, "rename"))?;
        sync_folder(folder).map_err(at(folder, "sync the folder of"))?;
        Self::open(folder, name)
    }

    /// Its name: what the log's header carries.
    pub const fn name(&self) -> DiskBase {
        self.name
    }

    /// Its size in bytes.
    pub const fn size(&self) -> u64 {
        self.name.size
    }

    /// Whether it is known to hold nothing but zeros.
    pub const fn is_empty(&self) -> bool {
        matches!(self.content, Content::Zeros)
    }

    /// Reads the whole base and compares its hash with its name.
    pub fn verify(&self) -> Result<(), BaseError> {
        let Content::File { file, path } = &self.content else {
            return Ok(());
        };
        let mut hasher = blake3::Hasher::new();
        let mut block = vec![0; BLOCK];
        let mut offset = 0;
        while offset < self.name.size {
            let count = block.len().min((self.name.size - offset) as usize);
            let block = &mut block[..count];
            file.read_exact_at(block, offset)
                .map_err(at(path, "read"))?;
            hasher.update(block);
            offset += count as u64;
        }
        let found = *hasher.finalize().as_bytes();
        if found == self.name.digest {
            Ok(())
        } else {
            let path = path.clone();
            Err(BaseError::Corrupt { path, found })
        }
    }

    /// Fills `data` from `offset`; the caller stays within the size.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match &self.content {
            Content::Zeros => {
                data.fill(0);
                Ok(())
            }
            Content::File { file, .. } => file.read_exact_at(data, offset),
        }
    }
}

fn at(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> BaseError {
    let path = path.to_owned();
    move |source| BaseError::Io {
        doing,
        path,
        source,
    }
}

/// Makes the names in a folder survive a power failure.
pub(super) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn copy_hashed(source: &mut dyn Read, target: &mut File) -> io::Result<([u8; 32], u64)> {
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    let mut size = 0;
    loop {
        let count = read_block(source, &mut block)?;
        if count == 0 {
            return Ok((*hasher.finalize().as_bytes(), size));
        }
        let block = &block[..count];
        hasher.update(block);
        if block.iter().all(|byte| *byte == 0) {
            target.seek(SeekFrom::Current(count.cast_signed() as i64))?;
        } else {
            target.write_all(block)?;
        }
        size += count as u64;
    }
}

/// Reads until `block` is full or the source has ended.
fn read_block(source: &mut dyn Read, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match source.read(&mut block[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Hashing gigabytes of zeros takes a while, and the sizes of a process's disks are few.
static ZEROS: Mutex<Option<HashMap<u64, [u8; 32]>>> = Mutex::new(None);

fn digest_of_zeros(size: u64) -> [u8; 32] {
    let mut known = ZEROS.lock().unwrap_or_else(PoisonError::into_inner);
    *known
        .get_or_insert_default()
        .entry(size)
        .or_insert_with(|| {
            let block = vec![0; BLOCK];
            let mut hasher = blake3::Hasher::new();
            let mut left = size;
            while left > 0 {
                let count = left.min(BLOCK as u64);
                hasher.update(&block[..count as usize]);
                left -= count;
            }
            *hasher.finalize().as_bytes()
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_by_its_name_and_verifies() {
        let folder = tempfile::tempdir().unwrap();
        let mut content = vec![0; 3 * BLOCK + 512];
        content[BLOCK + 5] = 7;
        let base = Base::seal(folder.path(), &mut content.as_slice()).unwrap();
        assert_eq!(base.name().digest, *blake3::hash(&content).as_bytes());
        let base = Base::open(folder.path(), base.name()).unwrap();
        base.verify().unwrap();
        let mut got = vec![1; content.len()];
        base.read(0, &mut got).unwrap();
        assert!(got == content);
        let files = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(files, 1, "a draft was left behind");
    }

    #[test]
    fn a_changed_base_is_found_out() {
        let folder = tempfile::tempdir().unwrap();
        let content = vec![1; 4096];
        let name = Base::seal(folder.path(), &mut content.as_slice())
            .unwrap()
            .name();
        let path = Base::path(folder.path(), name);
        let mut changed = content.clone();
        changed[4095] ^= 1;
        fs::write(&path, &changed).unwrap();
        let base = Base::open(folder.path(), name).unwrap();
        assert!(matches!(base.verify(), Err(BaseError::Corrupt { .. })));
        fs::write(&path, &changed[1..]).unwrap();
        let opened = Base::open(folder.path(), name);
        assert!(matches!(opened, Err(BaseError::Size { found: 4095, .. })));
        fs::remove_file(&path).unwrap();
        let opened = Base::open(folder.path(), name);
        assert!(matches!(opened, Err(BaseError::Io { .. })));
    }

    #[test]
    fn zeros_need_no_file_and_have_the_name_of_a_file_of_zeros() {
        let folder = tempfile::tempdir().unwrap();
        let size = 2 * BLOCK as u64 + 512;
        let empty = Base::empty(size);
        let zeros = vec![0; size as usize];
        assert_eq!(empty.name().digest, *blake3::hash(&zeros).as_bytes());
        assert!(Base::open(folder.path(), empty.name()).unwrap().is_empty());
        let sealed = Base::seal(folder.path(), &mut zeros.as_slice()).unwrap();
        assert_eq!(sealed.name(), empty.name());
        sealed.verify().unwrap();
    }

    /// To find out whether so many zeros are meant would take for ever.
    #[test]
    fn a_size_is_not_believed_beyond_what_a_disk_can_have() {
        let folder = tempfile::tempdir().unwrap();
        let name = DiskBase {
            digest: [0; 32],
            size: 1 << 60,
        };
        let opened = Base::open(folder.path(), name);
        assert!(matches!(opened, Err(BaseError::TooLarge { found }) if found == name.size));
    }

    #[test]
    fn a_base_has_whole_sectors() {
        let folder = tempfile::tempdir().unwrap();
        let sealed = Base::seal(folder.path(), &mut [1; 513].as_slice());
        assert!(matches!(
            sealed,
            Err(BaseError::PartialSector { found: 513 })
        ));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
