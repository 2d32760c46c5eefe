//! Starting a lab: the hosts' image, the keeper, and how it goes.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use thiserror::Error;

use super::image::{self, ImageError};
use super::keeper::SUBCOMMAND;
use super::needs::{self, Missing};
use super::state::{HostId, LabFolder, MAX_HOSTS, Setup};
use super::wire::{self, FromStarter, Progress, WireError};

/// What a lab is to be.
#[derive(Clone, Debug)]
pub struct Config {
    /// This program: it is the keeper, too.
    pub program: PathBuf,
    /// The program that the hosts run, where it is another one.
    pub binary: Option<PathBuf>,
    /// The lab's folder.
    pub dir: PathBuf,
    /// How many hosts.
    pub hosts: u8,
    /// The memory of each, in MiB.
    pub memory_mib: u32,
    /// The disk of each, in GiB. Only what is written takes room.
    pub disk_gib: u32,
}

impl Config {
    /// Three hosts in the folder where a lab is when none is named.
    pub fn new(program: &Path) -> Self {
        Self {
            program: program.to_owned(),
            binary: None,
            dir: LabFolder::default_dir(),
            hosts: 3,
            memory_mib: 1500,
            disk_gib: 4,
        }
    }
}

/// What happens while a lab starts.
#[derive(Clone, Debug)]
pub enum Event {
    /// Something worth a line.
    Note(String),
    /// A host answers.
    HostUp {
        /// Which.
        host: HostId,
        /// How long after it was powered on.
        after: Duration,
    },
}

/// Why there is no lab.
#[derive(Debug, Error)]
pub enum StartError {
    /// The number of hosts.
    #[error("a lab has from 1 to {MAX_HOSTS} hosts, not {0}")]
    Hosts(u8),
    /// The memory.
    #[error("a host needs 512 MiB of memory at least, not {0}")]
    Memory(u32),
    /// What the machine lacks.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// The hosts' image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A path that leads nowhere.
    #[error("{} cannot be found", path.display())]
    Path {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The keeper does not start.
    #[error("the keeper of the lab cannot be started from {}", program.display())]
    Keeper {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The keeper cannot be talked to.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The keeper says why.
    #[error("{0}")]
    Refused(String),
    /// The keeper has gone without a word.
    #[error("the keeper of the lab has ended without a word; {} may have some", log.display())]
    Gone {
        /// What it said.
        log: PathBuf,
    },
}

/// A keeper that was started here. When this goes, the lab ends.
pub struct Starter {
    keeper: Child,
    lifeline: UnixStream,
    stays: bool,
}

impl Starter {
    /// Starts a keeper, which then says how it goes.
    pub fn spawn(config: &Config) -> Result<(Self, PathBuf), StartError> {
        if !(1..=MAX_HOSTS).contains(&config.hosts) {
            return Err(StartError::Hosts(config.hosts));
        }
        if config.memory_mib < 512 {
            return Err(StartError::Memory(config.memory_mib));
        }
        needs::check()?;
        let binary = config.binary.as_ref().unwrap_or(&config.program);
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|source| StartError::Path {
                path: path.to_owned(),
                source,
            })
        };
        let setup = Setup {
            dir: absolute(&config.dir)?,
            hosts: config.hosts,
            memory_mib: config.memory_mib,
            disk_gib: config.disk_gib.max(1),
            image: image::find_or_build()?,
            binary: binary.canonicalize().map_err(|source| StartError::Path {
                path: binary.clone(),
                source,
            })?,
        };
        let failed = |source| StartError::Keeper {
            program: config.program.clone(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let keeper = Command::new(&config.program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let mut starter = Self {
            keeper,
            lifeline: ours,
            stays: false,
        };
        let dir = setup.dir.clone();
        wire::write(&mut starter.lifeline, &FromStarter::Setup(setup))?;
        Ok((starter, dir))
    }

    /// Waits until all hosts answer.
    pub fn ready(&mut self, dir: &Path, tell: &mut dyn FnMut(Event)) -> Result<(), StartError> {
        loop {
            let progress = wire::read(&mut self.lifeline)?.ok_or_else(|| StartError::Gone {
                log: LabFolder::new(dir).keeper_log(),
            })?;
            match progress {
                Progress::Note(note) => tell(Event::Note(note)),
                Progress::HostUp { host, after_ms } => tell(Event::HostUp {
                    host,
                    after: Duration::from_millis(after_ms),
                }),
                Progress::Ready => return Ok(()),
                Progress::Failed(why) => return Err(StartError::Refused(why)),
            }
        }
    }

    /// The lab stays when this process goes.
    pub fn stay(mut self) -> Result<(), WireError> {
        wire::write(&mut self.lifeline, &FromStarter::Stay)?;
        self.stays = true;
        Ok(())
    }

    /// Waits for the end of a keeper that was told to end.
    pub fn wait(mut self) {
        // Fails only when somebody else has waited.
        let _ = self.keeper.wait();
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        // Without the line the keeper ends, and everything with it.
        let _ = self.lifeline.shutdown(Shutdown::Both);
        let _ = self.keeper.wait();
    }
}
