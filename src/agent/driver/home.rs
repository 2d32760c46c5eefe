//! The folder of one VM on this host.
//!
//! ```text
//!   vms/<vm>/state.json     what the protocol must find again (promise, holding)
//!            image          the name of the image it was created from
//!            header         the log's header, for a cold boot after the log is gone
//!            log/           the log's segments
//!            disks/<n>/     the overlay of disk n
//!            console.log    what the guest said, as far as it was let out
//! ```

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use replay_log::{DiskBase, FileOptions, Header, SyncPolicy, Term};
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;
use vmm::config::MachineConfig;
use vmm::disk::{Base, Durability, Overlay, OverlayError};

use super::keeper::{Keeping, OLD};
use crate::agent::durable;
use crate::agent::library::{Library, LibraryError};
use crate::agent::vm_process::{DiskSetup, DiskSetupError};
use crate::config::{Config, SyncWhen};
use crate::images::{FillError, Image};
use crate::protocol::{Acks, Durable, VmName};

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

/// The folder of one VM. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Home {
    dir: Arc<PathBuf>,
    bases: Arc<PathBuf>,
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
        budget: spread(config.log.retention.0, config.name.as_str()),
    }
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
        };
        home.sweep();
        Ok(home)
    }

    /// Removes logs that were given up when the process ended. They only take room.
    fn sweep(&self) {
        let entries = fs::read_dir(self.dir.as_path())
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries {
            if entry
                .file_name()
                .to_string_lossy()
                .starts_with(&format!("log.{OLD}"))
            {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Where the log is.
    pub fn log_dir(&self) -> PathBuf {
        self.dir.join("log")
    }

    fn state_path(&self) -> PathBuf {
        self.dir.join("state.json")
    }

    /// What the protocol has persisted; the default on a host that has never known the VM.
    pub fn durable(&self) -> Result<Durable, HomeError> {
        let path = self.state_path();
        match durable::read_bounded(&path, SMALL_FILE).map_err(io_error("read", &path))? {
            None => Ok(Durable::default()),
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|_| HomeError::Garbled { path }),
        }
    }

    /// Replaces it, durably. Blocks.
    pub fn persist(&self, durable: &Durable) -> Result<(), HomeError> {
        let path = self.state_path();
        let text = serde_json::to_vec_pretty(durable).expect("plain data always encodes");
        durable::replace(&path, &text).map_err(io_error("replace", &path))
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
        let path = self.dir.join("header");
        match durable::read_bounded(&path, SMALL_FILE).map_err(io_error("read", &path))? {
            None => Ok(None),
            Some(bytes) => postcard::from_bytes(&bytes)
                .map(Some)
                .map_err(|_| HomeError::Garbled { path }),
        }
    }

    /// Keeps the header of the log that begins.
    pub fn keep_header(&self, header: &Header) -> Result<(), HomeError> {
        let path = self.dir.join("header");
        let bytes = postcard::to_stdvec(header).expect("plain data always encodes");
        durable::replace(&path, &bytes).map_err(io_error("write", &path))
    }

    fn overlay(&self, disk: usize) -> PathBuf {
        self.dir.join("disks").join(disk.to_string())
    }

    /// Disks at these bases, with nothing written to them.
    pub fn fresh_disks(&self, bases: Vec<DiskBase>) -> Result<Vec<DiskSetup>, HomeError> {
        let disks = self.dir.join("disks");
        match fs::remove_dir_all(&disks) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &disks)(error));
            }
            _ => {}
        }
        let setup = |(disk, _): (usize, DiskBase)| DiskSetup {
            bases: self.bases.to_path_buf(),
            overlay: self.overlay(disk),
            durable: true,
        };
        Ok(bases.into_iter().enumerate().map(setup).collect())
    }

    /// The bases of the image's own disks. Blocks where they have content.
    pub fn image_disks(&self, image: &Image) -> Result<Vec<DiskBase>, HomeError> {
        let sealed = image.disks.iter().map(|disk| disk.seal(&self.bases));
        Ok(sealed.collect::<Result<_, _>>()?)
    }

    /// Makes bases of the disks as the last run left them. Blocks, for as long as the disks are
    /// large.
    pub fn seal_disks(&self) -> Result<Vec<DiskBase>, HomeError> {
        let header = self.header()?.ok_or(HomeError::NeverRan)?;
        let seal = |(disk, name): (usize, &DiskBase)| {
            let base = Base::open(&self.bases, *name).map_err(DiskSetupError::Base)?;
            let overlay = match Overlay::open(&self.overlay(disk), base, Durability::Sync) {
                // The process ended after the header had named the sealed base, and before the
                // overlay that was sealed into it was removed.
                Err(OverlayError::OtherBase { .. }) => return Ok(*name),
                opened => opened.map_err(DiskSetupError::Overlay)?,
            };
            let sealed = overlay
                .seal_into_base(&self.bases)
                .map_err(DiskSetupError::Overlay)?;
            Ok(sealed.name())
        };
        header.disks.iter().enumerate().map(seal).collect()
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
