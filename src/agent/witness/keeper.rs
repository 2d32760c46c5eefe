//! What keeps records: the trait, and the keeper that has them in files.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

use crate::agent::durable;
use crate::agent::link::lock;
use crate::protocol::{Record, Version, VmName};

/// More than any record.
const FILE_MAX: u64 = 64 * 1024;
/// The most VMs that one keeper takes.
const VMS_MAX: usize = 65_536;

/// What came of a compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Swap {
    /// The new record is kept, durably.
    Done(Record),
    /// The record was not as expected: this is what it is.
    Conflict(Option<Record>),
}

/// Keeps the records of all VMs. Whoever implements it promises: a swap that was answered with
/// [`Swap::Done`] is never lost, and of two swaps that expect the same only one is done.
pub trait RecordKeeper: Send + Sync + 'static {
    /// The record of a VM.
    fn read(&self, vm: &VmName)
    -> impl Future<Output = Result<Option<Record>, KeeperError>> + Send;

    /// Compare and set. An error means that nobody knows.
    fn swap(
        &self,
        vm: VmName,
        expect: Option<Version>,
        new: Record,
    ) -> impl Future<Output = Result<Swap, KeeperError>> + Send;

    /// The record of a VM, and every change of it from now on.
    fn watch(&self, vm: &VmName) -> watch::Receiver<Option<Record>>;

    /// All records.
    fn list(&self) -> impl Future<Output = Result<BTreeMap<VmName, Record>, KeeperError>> + Send;
}

/// Why a record could not be kept.
#[derive(Clone, Debug, Error)]
pub enum KeeperError {
    /// The disk failed.
    #[error("the witness cannot write records ({reason}): see to its disk, then start it again")]
    Disk {
        /// What the system said.
        reason: String,
    },
    /// A write failed before, so that memory and disk may differ.
    #[error(
        "the witness failed to write a record before and takes no more: see to its disk, then start it again"
    )]
    Stopped,
    /// There are too many VMs.
    #[error("the witness keeps {VMS_MAX} records and no more: start another cluster")]
    TooMany,
}

/// Why records could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The folder or a file cannot be read or made.
    #[error("cannot open the records in {path}: run as the user who owns them")]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is no record. Nothing is guessed: a witness without its records could let two reign.
    #[error(
        "the record in {path} is damaged: restore the witness's data folder from its disk's last good state"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A file that is named like no VM.
    #[error("{path} is no record: move it out of the folder")]
    Foreign {
        /// Which.
        path: PathBuf,
    },
}

/// Keeps every record in a file of its own, written anew and synced for each change.
pub struct FileKeeper {
    shared: Arc<Shared>,
}

struct Shared {
    folder: PathBuf,
    /// Changes are made one at a time; the lock is held while the disk writes.
    writing: Mutex<Writing>,
    records: Mutex<BTreeMap<VmName, watch::Sender<Option<Record>>>>,
}

#[derive(Default)]
struct Writing {
    stopped: bool,
}

impl FileKeeper {
    /// Opens the records in a folder; makes the folder when it is not there.
    pub fn open(folder: &Path) -> Result<Self, OpenError> {
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            |source| OpenError::Unreadable { path, source }
        };
        fs::create_dir_all(folder).map_err(unreadable(folder))?;
        let mut records = BTreeMap::new();
        for file in fs::read_dir(folder).map_err(unreadable(folder))? {
            let path = file.map_err(unreadable(folder))?.path();
            let foreign = || OpenError::Foreign { path: path.clone() };
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(foreign)?;
            if name.ends_with(".json.new") {
                // A change that was never finished, and so never answered.
                fs::remove_file(&path).map_err(unreadable(&path))?;
                continue;
            }
            let vm = name.strip_suffix(".json").map(VmName::new);
            let vm = vm.and_then(Result::ok).ok_or_else(foreign)?;
            let bytes = durable::read_bounded(&path, FILE_MAX)
                .and_then(|bytes| bytes.ok_or_else(|| io::ErrorKind::NotFound.into()))
                .map_err(unreadable(&path))?;
            let record = serde_json::from_slice(&bytes).map_err(|source| OpenError::Damaged {
                path: path.clone(),
                source,
            })?;
            records.insert(vm, watch::Sender::new(Some(record)));
        }
        let shared = Arc::new(Shared {
            folder: folder.to_owned(),
            writing: Mutex::default(),
            records: Mutex::new(records),
        });
        Ok(Self { shared })
    }
}

impl Shared {
    fn current(&self, vm: &VmName) -> Option<Record> {
        let records = lock(&self.records);
        records.get(vm).and_then(|record| record.borrow().clone())
    }

    /// Blocks for as long as the disk takes.
    fn swap(&self, vm: VmName, expect: Option<Version>, new: Record) -> Result<Swap, KeeperError> {
        let mut writing = lock(&self.writing);
        if writing.stopped {
            return Err(KeeperError::Stopped);
        }
        let current = self.current(&vm);
        if current.as_ref().map(Record::version) != expect {
            return Ok(Swap::Conflict(current));
        }
        if current.is_none() && lock(&self.records).len() >= VMS_MAX {
            return Err(KeeperError::TooMany);
        }
        let write = serde_json::to_vec_pretty(&new)
            .map_err(io::Error::other)
            .and_then(|bytes| durable::replace(&self.folder.join(format!("{vm}.json")), &bytes));
        if let Err(error) = write {
            // What is on the disk now is not known, so nothing more is promised.
            writing.stopped = true;
            return Err(KeeperError::Disk {
                reason: error.to_string(),
            });
        }
        match lock(&self.records).entry(vm) {
            Entry::Occupied(slot) => drop(slot.get().send_replace(Some(new.clone()))),
            Entry::Vacant(slot) => drop(slot.insert(watch::Sender::new(Some(new.clone())))),
        }
        Ok(Swap::Done(new))
    }
}

impl RecordKeeper for FileKeeper {
    async fn read(&self, vm: &VmName) -> Result<Option<Record>, KeeperError> {
        Ok(self.shared.current(vm))
    }

    async fn swap(
        &self,
        vm: VmName,
        expect: Option<Version>,
        new: Record,
    ) -> Result<Swap, KeeperError> {
        let shared = Arc::clone(&self.shared);
        let done = tokio::task::spawn_blocking(move || shared.swap(vm, expect, new)).await;
        done.unwrap_or(Err(KeeperError::Stopped))
    }

    fn watch(&self, vm: &VmName) -> watch::Receiver<Option<Record>> {
        let mut records = lock(&self.shared.records);
        if let Some(record) = records.get(vm) {
            return record.subscribe();
        }
        // Slots without a record that nobody watches any more make room for others.
        records.retain(|_, slot| slot.borrow().is_some() || slot.receiver_count() > 0);
        if records.len() < VMS_MAX {
            let slot = records.entry(vm.clone());
            return slot.or_insert_with(|| watch::Sender::new(None)).subscribe();
        }
        watch::Sender::new(None).subscribe()
    }

    async fn list(&self) -> Result<BTreeMap<VmName, Record>, KeeperError> {
        let records = lock(&self.shared.records);
        let known = records
            .iter()
            .filter_map(|(vm, record)| Some((vm.clone(), record.borrow().clone()?)));
        Ok(known.collect())
    }
}
