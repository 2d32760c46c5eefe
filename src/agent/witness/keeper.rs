//! What keeps records: the trait, what is asked of it and what it says. The keeper that is used is
//! [`super::file_keeper::FileKeeper`].

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;

use crate::agent::certs::Identity;
use crate::agent::certs::proof::SignError;
use crate::agent::lock::LockFolderError;
use crate::protocol::{Committed, Record, Seen, Version, VmName};

/// The most VMs that one keeper takes.
pub(super) const VMS_MAX: usize = 65_536;
/// The most of them that one host may have brought in: what it says is not to take the room of all
/// others.
pub(super) const VMS_OF_A_HOST: usize = 4_096;

/// What came of a compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Swap {
    /// The new record is kept, durably.
    Done(Committed),
    /// The record was not as expected: this is what it is.
    Conflict(Option<Committed>),
    /// A host has seen a newer record than is kept: nothing is changed.
    SetBack(SetBack),
    /// The records were copied or put back: nothing is changed.
    Copied,
}

/// That a keeper has less than a host has seen: its disk was set back, or lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetBack {
    /// What is kept; `None` if nothing is.
    pub kept: Option<Seen>,
    /// What a host has seen.
    pub seen: Seen,
}

impl SetBack {
    /// Whether a keeper that has `kept` has less than a host that has seen `seen`.
    pub fn judge(kept: Option<Seen>, seen: Seen) -> Option<Self> {
        let equal_or_newer =
            kept.is_some_and(|kept| kept.lineage == seen.lineage && kept.version >= seen.version);
        (!equal_or_newer).then_some(Self { kept, seen })
    }
}

impl fmt::Display for SetBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = self.seen.version;
        match self.kept {
            None => write!(
                f,
                "the witness has no record of this VM, and a host has seen {seen}"
            )?,
            Some(kept) if kept.lineage == self.seen.lineage => write!(
                f,
                "the witness's record of this VM is of {}, and a host has seen {seen}",
                kept.version
            )?,
            Some(_) => f.write_str(
                "the witness's record is of another VM of this name than a host has seen",
            )?,
        }
        f.write_str(": its disk was set back or lost; run 'understudy witness recover'")
    }
}

/// What the keeper has of one VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its record, if there is one.
    pub committed: Option<Committed>,
    /// That a host has seen a newer one.
    pub set_back: Option<SetBack>,
}

/// How the keeper itself does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeeperHealth {
    /// Why records cannot be written at the moment, in the system's words.
    pub refuses_writes: Option<String>,
    /// The folder was copied or put back from a backup.
    pub copied: bool,
}

/// What a recovery did for one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restored {
    /// What was kept is the newest.
    Kept(Version),
    /// The newest that a host has seen was put in the place of this.
    Replaced(Option<Version>, Version),
    /// What is kept is of another VM of this name: nothing was changed.
    OtherLineage,
    /// A host has seen a newer one than was given: nothing was changed.
    TooOld(SetBack),
}

/// A change of a record.
#[derive(Clone, Debug)]
pub struct Change {
    /// Of which VM.
    pub vm: VmName,
    /// What it must be now; `None` if the VM must be unknown.
    pub expect: Option<Version>,
    /// What it shall be.
    pub new: Record,
    /// What the asker has seen.
    pub seen: Option<Seen>,
    /// Who asks.
    pub by: Identity,
}

/// Keeps the records of all VMs. Whoever implements it promises: a swap that was answered with
/// [`Swap::Done`] is never lost, and of two swaps that expect the same only one is done. A swap to
/// the record that is kept already is done.
pub trait RecordKeeper: Send + Sync + 'static {
    /// What is kept of a VM.
    fn read(&self, vm: &VmName) -> impl Future<Output = Result<Kept, KeeperError>> + Send;

    /// Compare and set. An error means that nobody knows.
    fn swap(&self, change: Change) -> impl Future<Output = Result<Swap, KeeperError>> + Send;

    /// A host has seen this of a VM, and it is newer than what is kept: from now on, over restarts,
    /// the record is not changed. `by` says so.
    fn set_back(
        &self,
        vm: VmName,
        seen: Seen,
        by: Identity,
    ) -> impl Future<Output = Result<(), KeeperError>> + Send;

    /// Puts the newest that hosts have seen in the place of what is kept, where it is newer. With
    /// `settle` the folder is where the records are from now on, whether it was copied or not; with
    /// `forced` although a newer state of these VMs may have been seen.
    fn restore(
        &self,
        newest: BTreeMap<VmName, Record>,
        forced: bool,
        settle: bool,
    ) -> impl Future<Output = Result<BTreeMap<VmName, Restored>, KeeperError>> + Send;

    /// The record of a VM, and every change of it from now on.
    fn watch(&self, vm: &VmName) -> watch::Receiver<Kept>;

    /// Everything.
    fn list(&self) -> impl Future<Output = Result<BTreeMap<VmName, Kept>, KeeperError>> + Send;

    /// How the keeper itself does.
    fn health(&self) -> KeeperHealth;
}

/// Why a record could not be kept.
#[derive(Clone, Debug, Error)]
pub enum KeeperError {
    /// The disk failed.
    #[error(
        "the witness cannot write records ({reason}): see to its disk; it tries again by itself"
    )]
    Disk {
        /// What the system said.
        reason: String,
    },
    /// It cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// The keeper's thread is gone.
    #[error("the witness ends")]
    Ended,
    /// There are too many VMs.
    #[error("the witness keeps {VMS_MAX} records and no more: start another cluster")]
    TooMany,
    /// One host has brought in too many of them.
    #[error(
        "the witness keeps {VMS_OF_A_HOST} VMs that {by} has named, and takes no new name from it: start \
         the VM with another host as its primary, or use the name of one that is not needed any more \
         ('understudy pair --start-over')"
    )]
    TooManyOfOne {
        /// Which host.
        by: Identity,
    },
}

/// Why records could not be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The folder or a file cannot be read or made.
    #[error(
        "cannot open the records in {path}: run as the user who owns them, on a disk with space"
    )]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another process has the folder.
    #[error(transparent)]
    Locked(#[from] LockFolderError),
    /// A file is no record. Nothing is guessed: a witness without its records could let two reign.
    #[error(
        "the records in {path} are damaged: {what}; move the folder away, start the witness without it, and run 'understudy witness recover', which asks the hosts"
    )]
    Damaged {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// They cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// No thread.
    #[error("the witness's thread cannot be started: see to the limits of this user")]
    Thread(#[source] io::Error),
}
