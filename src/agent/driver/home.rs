//! The folder of one VM on this host.
//!
//! ```text
//!   vms/<vm>/state           what the protocol must find again (promise, holding); room is reserved
//!            state.json      the same, by an earlier version
//!            identity.*      which disk the folder lies on
//!            image           the name of the image it was created from
//!            header          the log's header
//!            log/            the log's segments
//!            disks/<n>/      the overlay of disk n
//!            disks.recorded/ those of the last run that recorded here, while another one replays
//!            console.log     what the guest said, as far as it was let out
//!            *.aside-<n>     logs and disks that were set aside; nothing deletes those by itself
//!            *.old-<n>       logs and disks that are being deleted
//! ```

mod disks;
mod identity;

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use replay_log::{DiskBase, FileOptions, Header, IoFailure, SyncPolicy, Term};
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;
use vmm::config::MachineConfig;

use super::aside;
use super::keeper::Keeping;
use crate::agent::durable::{self, OpenSlotsError, Slots, WriteSlotError};
use crate::agent::library::{Library, LibraryError};
use crate::agent::vm_process::DiskSetupError;
use crate::config::{Config, SyncWhen};
use crate::images::{FillError, Image};
use crate::protocol::{Acks, DiskId, Durable, VmName};
use crate::sentence::sentence;

/// The longest small file.
const SMALL_FILE: u64 = 1 << 20;
/// The console log is begun anew beyond this many bytes.
const CONSOLE_MAX: u64 = 16 << 20;

/// Why a VM's folder cannot be used.
#[derive(Debug, Error)]
pub enum HomeError {
    /// A file or folder.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was to be done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file that is not what this program wrote.
    #[error(
        "{} cannot be understood: it was written by another version, or damaged; move the folder away to start this copy anew",
        path.display()
    )]
    Garbled {
        /// Which.
        path: PathBuf,
    },
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskSetupError),
    /// The image, or a base.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// What an image's disk holds.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// The durable state.
    #[error("cannot replace {}", path.display())]
    State {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: WriteSlotError,
    },
    /// Logs or disks cannot be moved away.
    #[error(transparent)]
    Aside(#[from] IoFailure),
    /// No entropy.
    #[error("the kernel gives no random bytes")]
    NoRandom,
    /// There is nothing to boot.
    #[error("this host has never run this VM, so it has no disks of it to boot from")]
    NeverRan,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HomeError {
    let path = path.to_owned();
    move |source| HomeError::Io {
        action,
        path,
        source,
    }
}

/// The folder of one VM. Cheap to clone; the clones know of each other.
#[derive(Clone, Debug)]
pub struct Home {
    dir: Arc<PathBuf>,
    bases: Arc<PathBuf>,
    /// The durable state's file, once it has been opened.
    state: Arc<Mutex<Option<Slots>>>,
    /// One at a time changes the folders of the disks.
    disks_turn: Arc<Mutex<()>>,
    /// The run that has `disks` has gone live, and that is not noted there yet.
    live: Arc<AtomicBool>,
}

/// How a log is kept for a VM whose copies acknowledge like this.
pub fn log_options(config: &Config, acks: Acks) -> Keeping {
    let sync = match (config.log.sync, acks) {
        (SyncWhen::Always, _) => SyncPolicy::EveryBatch,
        (SyncWhen::Asked, Acks::Disk) => SyncPolicy::Explicit,
        (SyncWhen::Asked, Acks::Memory) => SyncPolicy::Never,
    };
    Keeping {
        files: FileOptions {
            sync,
            ..FileOptions::default()
        },
        budget: log_budget(config),
    }
}

/// How many bytes the log of a VM may take on this host.
pub fn log_budget(config: &Config) -> u64 {
    spread(config.log.retention.0, config.name.as_str())
}

/// A limit as it holds on this host: up to 5 % lower, by the host's name. Copies hold the same bytes,
/// and equal hosts should not all come to the same limit in the same second.
pub fn spread(limit: u64, host: &str) -> u64 {
    let hash = blake3::hash(host.as_bytes());
    let per_mille = u64::from(hash.as_bytes()[0]) * 50 / 256;
    limit - limit / 1000 * per_mille
}

/// The header of a log that begins now.
pub fn new_header(image: &Image, disks: &[DiskBase], term: Term) -> Result<Header, HomeError> {
    let mut boot = [0; 16];
    SystemRandom::new()
        .fill(&mut boot)
        .map_err(|_| HomeError::NoRandom)?;
    let config: MachineConfig = image.machine();
    Ok(Header {
        machine_model: vmm::MACHINE_MODEL,
        image: image.digest(),
        config: config.to_bytes(),
        disks: disks.to_vec(),
        term,
        boot,
    })
}

/// Where a host that has never held this VM, or has a new disk, begins to count its incarnations.
pub fn fresh() -> Result<u64, HomeError> {
    let mut bytes = [0; 8];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| HomeError::NoRandom)?;
    Ok(u64::from_le_bytes(bytes))
}

impl Home {
    /// The folder of this VM under a host's data folder; made if it is not there.
    pub fn open(data: &Path, vm: &VmName) -> Result<Self, HomeError> {
        let dir = data.join("vms").join(vm.as_str());
        let bases = data.join("bases");
        for folder in [&dir, &bases] {
            fs::create_dir_all(folder).map_err(io_error("create", folder))?;
        }
        let home = Self {
            dir: Arc::new(dir),
            bases: Arc::new(bases),
            state: Arc::default(),
            disks_turn: Arc::default(),
            live: Arc::default(),
        };
        aside::sweep(&home.dir);
        // Where there is no room for it now, the state is made durable in the old way.
        if let Err(error) = home.reserve() {
            tracing::warn!(error = %sentence(&error), "no space is reserved for a VM's state");
        }
        Ok(home)
    }

    /// Where the log is.
    pub fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn state_path(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// Where an earlier version had it.
    fn old_state_path(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    /// Which disk the folder lies on; `random` is new at every start of the agent, and this is asked
    /// once in each. Blocks.
    pub fn disk_id(&self, random: u64) -> Result<DiskId, HomeError> {
        identity::disk_id(&self.dir, random).map_err(io_error("read the identity of", &self.dir))
    }

    /// What the protocol has persisted; the default on a host that has never known the VM.
    pub fn durable(&self) -> Result<Durable, HomeError> {
        let (path, old) = (self.state_path(), self.old_state_path());
        let (bytes, path) = match open_state(&path)? {
            Some((_, bytes)) => (Some(bytes), path),
            None => (
                durable::read_bounded(&old, SMALL_FILE).map_err(io_error("read", &old))?,
                old,
            ),
        };
        match bytes {
            None => Ok(Durable::default()),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|_| HomeError::Garbled { path }),
        }
    }

    /// Replaces it, durably. Blocks. No room is needed for that once there has been some.
    pub fn persist(&self, durable: &Durable) -> Result<(), HomeError> {
        let text = serde_json::to_vec(durable).expect("plain data always encodes");
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.state_path();
        if state.is_none() {
            *state = open_state(&path)?.map(|(slots, _)| slots);
        }
        let Some(slots) = &mut *state else {
            *state = Some(self.begin_state(&text)?);
            return Ok(());
        };
        slots
            .write(&text)
            .map_err(|source| HomeError::State { path, source })
    }

    /// Sees to it that promises can be made on a full disk, too.
    fn reserve(&self) -> Result<(), HomeError> {
        if open_state(&self.state_path())?.is_none() {
            let text = serde_json::to_vec(&self.durable()?).expect("plain data always encodes");
            self.begin_state(&text)?;
        }
        // What an earlier version wrote is told by the other one from now on.
        match fs::remove_file(self.old_state_path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &self.old_state_path())(error))
            }
            _ => Ok(()),
        }
    }

    fn begin_state(&self, text: &[u8]) -> Result<Slots, HomeError> {
        let path = self.state_path();
        Slots::create(&path, text).map_err(io_error("create", &path))
    }

    /// Remembers the image that this VM is created from.
    pub fn set_image(&self, name: &str) -> Result<(), HomeError> {
        let path = self.dir.join("image");
        durable::replace(&path, name.as_bytes()).map_err(io_error("write", &path))
    }

    /// The image that this VM runs.
    pub fn image(&self, library: &Library) -> Result<Image, HomeError> {
        let path = self.dir.join("image");
        if let Some(name) =
            durable::read_bounded(&path, SMALL_FILE).map_err(io_error("read", &path))?
        {
            let name = String::from_utf8(name).map_err(|_| HomeError::Garbled { path })?;
            return Ok(library.image_named(&name)?);
        }
        let header = self.header()?.ok_or(HomeError::NeverRan)?;
        Ok(library.image(header.image)?)
    }

    /// The header of the last log.
    pub fn header(&self) -> Result<Option<Header>, HomeError> {
        disks::read_header(&self.dir.join("header"))
    }

    /// Keeps the header of the log that begins.
    pub fn keep_header(&self, header: &Header) -> Result<(), HomeError> {
        disks::keep(&self.dir.join("header"), header)
    }

    /// Appends to the console log. What cannot be written is lost: the console is for people.
    pub fn console(&self, bytes: &[u8]) {
        let path = self.dir.join("console.log");
        let full = fs::metadata(&path).is_ok_and(|file| file.len() > CONSOLE_MAX);
        let mut options = fs::OpenOptions::new();
        let options = if full {
            options.write(true).truncate(true)
        } else {
            options.append(true)
        };
        let written = options
            .create(true)
            .open(&path)
            .and_then(|mut log| log.write_all(bytes));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "console output is lost");
        }
    }
}

fn open_state(path: &Path) -> Result<Option<(Slots, Vec<u8>)>, HomeError> {
    match Slots::open(path) {
        Ok(found) => Ok(found),
        Err(OpenSlotsError::Io(source)) => Err(io_error("open", path)(source)),
        Err(OpenSlotsError::Damaged) => Err(HomeError::Garbled {
            path: path.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests;
