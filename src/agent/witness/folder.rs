//! The witness's folder: who may use it, and whether it is still the one it was.
//!
//! A folder that was copied, or put back from a backup, is an older state of the records or one of
//! two. The file `identity` names itself by what a copy does not have: its number on the file
//! system, and when it was made. Where it is another, the keeper changes no record until
//! `understudy witness recover`.
//! A block device that was set back as a whole is not noticed here, but by what hosts have seen.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};

use super::keeper::OpenError;
use super::store::{Entries, Entry, Found, Store, StoreError};
use crate::agent::durable;
use crate::agent::lock::{FolderLock, LockFolderError};
use crate::protocol::VmName;

/// More than any small file here.
const FILE_MAX: u64 = 64 * 1024;
/// How long another process may take to let go of the folder.
const TAKE_WITHIN: Duration = Duration::from_millis(500);
/// Where earlier versions' files, one for each record, are put.
const BEFORE: &str = "before";

/// The folder, ours for as long as this lives.
pub(super) struct Folder {
    path: PathBuf,
    _lock: FolderLock,
}

/// What was found in it.
pub(super) struct Opened {
    pub(super) folder: Folder,
    pub(super) store: Store,
    pub(super) entries: Entries,
    /// It is not where it was made: it was copied or put back.
    pub(super) copied: bool,
}

/// What the file `identity` says of itself.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    /// Drawn at random; the files of records carry it, too.
    id: u64,
    /// The file's number on its file system.
    inode: u64,
    /// When the file was made, in nanoseconds since 1970, where the file system tells.
    born: Option<u64>,
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Unreadable { path, source }
}

impl From<StoreError> for OpenError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Io { path, source } => Self::Unreadable { path, source },
            StoreError::Damaged { path, what } => Self::Damaged { path, what },
        }
    }
}

impl Folder {
    /// Opens the folder; makes it, and the files in it, when they are not there.
    pub(super) fn open(path: &Path) -> Result<Opened, OpenError> {
        let lock = take(path)?;
        let folder = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        let before = folder.files_of_before()?;
        let identity = folder.identity()?;
        let found = Store::open(path)?;
        match (identity, found) {
            (Some(_), Found::Nothing) => Err(OpenError::Damaged {
                path: path.to_owned(),
                what: "the files of the records are gone or unreadable",
            }),
            (identity, Found::Whole { store, entries })
                if identity.is_some() || before.is_empty() =>
            {
                // Without an identity it is one that was just made, or not all of one.
                let made_here = match identity {
                    Some(known) => known.id == store.id() && folder.is_at_home(&known)?,
                    None => entries.is_empty(),
                };
                let opened = Opened {
                    folder,
                    store,
                    entries,
                    copied: !made_here,
                };
                if identity_is_missing(&opened.folder)? && made_here {
                    opened
                        .folder
                        .settle(opened.store.id())
                        .map_err(unreadable(path))?;
                }
                opened.folder.put_aside(&before)?;
                Ok(opened)
            }
            // The first start, or the first of this version.
            _ => {
                let entries = before
                    .iter()
                    .map(|file| Ok((file.vm.clone(), file.read()?)))
                    .collect::<Result<Entries, OpenError>>()?;
                let id = draw().map_err(unreadable(path))?;
                let store = Store::create(path, id, &entries)?;
                folder.settle(id).map_err(unreadable(path))?;
                folder.put_aside(&before)?;
                Ok(Opened {
                    folder,
                    store,
                    entries,
                    copied: false,
                })
            }
        }
    }

    fn identity_path(&self) -> PathBuf {
        self.path.join("identity")
    }

    fn identity(&self) -> Result<Option<Identity>, OpenError> {
        let path = self.identity_path();
        let bytes = durable::read_bounded(&path, FILE_MAX).map_err(unreadable(&path))?;
        // One that cannot be read fits nothing: the folder counts as copied.
        Ok(bytes.map(|bytes| {
            serde_json::from_slice(&bytes).unwrap_or(Identity {
                id: 0,
                inode: 0,
                born: None,
            })
        }))
    }

    /// Whether the file `identity` is the one that was written here.
    fn is_at_home(&self, known: &Identity) -> Result<bool, OpenError> {
        let path = self.identity_path();
        let (inode, born) = signs(&path).map_err(unreadable(&path))?;
        Ok(known.inode == inode && known.born == born)
    }

    /// Says durably that this is where the records of this identity are.
    pub(super) fn settle(&self, id: u64) -> io::Result<()> {
        let path = self.identity_path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = File::create_new(&path)?;
        let (inode, born) = signs(&path)?;
        let text = serde_json::to_vec_pretty(&Identity { id, inode, born })?;
        io::Write::write_all(&mut &file, &text)?;
        file.sync_all()?;
        File::open(&self.path)?.sync_all()
    }

    /// The files of earlier versions, one for each record.
    fn files_of_before(&self) -> Result<Vec<Before>, OpenError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unreadable(&self.path))? {
            let path = entry.map_err(unreadable(&self.path))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let vm = name.and_then(|name| name.strip_suffix(".json"));
            if let Some(Ok(vm)) = vm.map(VmName::new) {
                found.push(Before { vm, path });
            }
        }
        Ok(found)
    }

    fn put_aside(&self, files: &[Before]) -> Result<(), OpenError> {
        if files.is_empty() {
            return Ok(());
        }
        let before = self.path.join(BEFORE);
        fs::create_dir_all(&before).map_err(unreadable(&before))?;
        for file in files {
            let to = before.join(format!("{}.json", file.vm));
            fs::rename(&file.path, to).map_err(unreadable(&file.path))?;
        }
        Ok(())
    }
}

/// Takes the folder. Who has it for a moment only is waited for: a process that ends, or a child of
/// ours that has not become another program yet.
fn take(path: &Path) -> Result<FolderLock, LockFolderError> {
    let until = Instant::now() + TAKE_WITHIN;
    loop {
        match FolderLock::take(path) {
            Err(LockFolderError::Taken { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            taken => return taken,
        }
    }
}

fn identity_is_missing(folder: &Folder) -> Result<bool, OpenError> {
    let path = folder.identity_path();
    path.try_exists()
        .map(|there| !there)
        .map_err(unreadable(&path))
}

/// What tells a file from a copy of it.
fn signs(path: &Path) -> io::Result<(u64, Option<u64>)> {
    let metadata = fs::metadata(path)?;
    let born = metadata.created().ok();
    let born = born.and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    let born = born.and_then(|born| u64::try_from(born.as_nanos()).ok());
    Ok((metadata.ino(), born))
}

/// A new identity for a folder.
pub(super) fn draw() -> io::Result<u64> {
    let mut bytes = [0; 8];
    let drawn = SystemRandom::new().fill(&mut bytes);
    drawn.map_err(|_| io::Error::other("the system gives no random numbers"))?;
    // Below 2⁵² every reader of JSON keeps it whole.
    Ok(u64::from_le_bytes(bytes) >> 12)
}

/// A record in the file of an earlier version.
struct Before {
    vm: VmName,
    path: PathBuf,
}

impl Before {
    fn read(&self) -> Result<Entry, OpenError> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let bytes = durable::read_bounded(&self.path, FILE_MAX)
            .and_then(|bytes| bytes.ok_or_else(missing))
            .map_err(unreadable(&self.path))?;
        let record = serde_json::from_slice(&bytes).map_err(|_| OpenError::Damaged {
            path: self.path.clone(),
            what: "it is no record",
        })?;
        Ok(Entry {
            record: Some(record),
            set_back: None,
            named_by: None,
        })
    }
}

#[cfg(test)]
#[path = "folder_tests.rs"]
mod tests;
