//! The keeper: one small process a lab, which owns the hosts' QEMU processes and the network
//! namespace. What it owns ends with it, however it ends.
//!
//! One thread does everything: the kernel ends the QEMU processes with the thread that started
//! them.

mod folder;
mod host;
mod link;
mod machine;
mod network;
mod serve;
mod shaping;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::rc::Rc;

use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Mutex, watch};
use tokio::task::{LocalSet, spawn_local};

use super::needs::search_path;
use super::program::{self, ProgramError};
use super::state::{Delay, End, HostId, LabStatus, LinkDelay, LinkName, Setup};
use super::wire::{self, FromStarter, Progress, WireError};
use crate::sentence::sentence;

use folder::Folder;
pub use folder::{FolderError, clean};
use host::{Host, HostError};
use network::NetworkError;

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "lab-keeper";

/// Why there is no lab, or no more.
#[derive(Debug, Error)]
enum KeeperError {
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("the image of the hosts in {} cannot be read: remove the folder, so that it is made again", .0.display())]
    Image(PathBuf, #[source] io::Error),
    #[error("the hosts' disks cannot be made: {0}")]
    Disk(String),
    #[error("the keeper of the lab cannot work: {0}")]
    Io(#[from] io::Error),
}

/// Keeps the lab that whoever started this process asks for.
pub fn run() -> ExitCode {
    let starter = io::stdin().as_fd().try_clone_to_owned();
    let Ok(mut starter) = starter.map(StdUnixStream::from) else {
        return ExitCode::FAILURE;
    };
    let Ok(Some(FromStarter::Setup(setup))) = wire::read(&mut starter) else {
        eprintln!("understudy: the keeper of a lab is started by 'understudy lab up', not by hand");
        return ExitCode::from(2);
    };
    match keep(setup, &starter) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let said = sentence(&error);
            if wire::write(&mut starter, &Progress::Failed(said.clone())).is_err() {
                // The starter has gone; its standard error may be there, or the lab's folder.
                eprintln!("{said}");
            }
            ExitCode::FAILURE
        }
    }
}

fn keep(setup: Setup, starter: &StdUnixStream) -> Result<(), KeeperError> {
    // Ctrl-C is for the starter alone.
    let _ = nix::unistd::setsid();
    let (folder, note) = Folder::take(&setup.dir)?;
    if let Some(note) = note {
        // One that has gone is noticed below.
        let _ = wire::write(&mut &*starter, &Progress::Note(note));
    }
    // While there is one thread.
    network::leave()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let ended = LocalSet::new().block_on(&runtime, async {
        starter.set_nonblocking(true)?;
        let starter = UnixStream::from_std(starter.try_clone()?)?;
        let ended = live(setup, starter).await;
        network::kill_all();
        ended
    });
    starter.set_nonblocking(false)?;
    drop(runtime);
    folder.leave();
    ended
}

/// Makes the lab, and keeps it until it is to end.
async fn live(setup: Setup, starter: UnixStream) -> Result<(), KeeperError> {
    network::make(HostId::first(setup.hosts))?;
    let listener = UnixListener::bind(super::state::LabFolder::new(&setup.dir).socket())?;
    let lab = Rc::new(Lab::new(setup)?);
    let (from, mut to) = starter.into_split();
    let mut starter = link::incoming::<FromStarter, _>(from);
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    spawn_local(serve::accept(listener, Rc::clone(&lab)));
    let mut end = lab.end.subscribe();
    let mut ready = Box::pin(boot(&lab, &mut to));
    let (mut booted, mut stays) = (false, false);
    let ended = loop {
        tokio::select! {
            up = &mut ready, if !booted => match up {
                Ok(()) => booted = true,
                Err(error) => break Err(error),
            },
            said = starter.recv(), if !stays => match said {
                Some(FromStarter::Stay) => stays = true,
                _ => break Ok(()),
            },
            _ = end.wait_for(|end| *end) => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            _ = terminate.recv() => break Ok(()),
        }
    };
    drop(ready);
    lab.end().await;
    ended
}

/// Powers all hosts on, and tells as they answer.
async fn boot(lab: &Rc<Lab>, to: &mut tokio::net::unix::OwnedWriteHalf) -> Result<(), KeeperError> {
    let (told, mut up) = tokio::sync::mpsc::unbounded_channel();
    for host in lab.hosts.values() {
        lab.power_on(host)?;
        let (host, told) = (Rc::clone(host), told.clone());
        spawn_local(async move {
            // Nobody listens any more when another one has failed.
            let _ = told.send((host.id(), host.up().await));
        });
    }
    drop(told);
    while let Some((host, booted)) = up.recv().await {
        let after_ms = booted?;
        tell(to, &Progress::HostUp { host, after_ms }).await;
    }
    tell(to, &Progress::Ready).await;
    Ok(())
}

async fn tell(to: &mut tokio::net::unix::OwnedWriteHalf, progress: &Progress) {
    match wire::send(to, progress).await {
        // A starter that has gone is noticed where its messages are read.
        Ok(()) | Err(WireError::Io(_)) => {}
        Err(error) => tracing::warn!(%error, "the starter of the lab is not told"),
    }
}

/// Everything that a keeper keeps.
pub struct Lab {
    setup: Rc<Setup>,
    hosts: BTreeMap<HostId, Rc<Host>>,
    partitions: RefCell<BTreeSet<LinkName>>,
    delays: RefCell<BTreeMap<LinkName, Delay>>,
    /// Links are changed one after the other.
    changing: Mutex<()>,
    end: watch::Sender<bool>,
}

impl Lab {
    fn new(setup: Setup) -> Result<Self, KeeperError> {
        let setup = Rc::new(setup);
        let initramfs = Rc::new(initramfs(&setup)?);
        let mut hosts = BTreeMap::new();
        for id in HostId::first(setup.hosts) {
            let disk = disk(&setup)?;
            let host = Host::new(id, Rc::clone(&setup), Rc::clone(&initramfs), disk);
            hosts.insert(id, host);
        }
        Ok(Self {
            setup,
            hosts,
            partitions: RefCell::default(),
            delays: RefCell::default(),
            changing: Mutex::default(),
            end: watch::Sender::new(false),
        })
    }

    fn status(&self) -> LabStatus {
        let delays = self.delays.borrow();
        let delays = delays.iter().map(|(link, delay)| LinkDelay {
            link: *link,
            delay: *delay,
        });
        LabStatus {
            dir: self.setup.dir.clone(),
            keeper: std::process::id(),
            machine: End::Machine.address(),
            hosts: self.hosts.values().map(|host| host.status()).collect(),
            partitions: self.partitions.borrow().iter().copied().collect(),
            delays: delays.collect(),
        }
    }

    /// Powers a host on, and writes down which process it is.
    fn power_on(&self, host: &Rc<Host>) -> Result<(), KeeperError> {
        host.power_on()?;
        folder::write_kept(&self.setup.dir, self.hosts.values())?;
        Ok(())
    }

    async fn set_cut(&self, link: LinkName, cut: bool) -> Result<(), NetworkError> {
        let _one = self.changing.lock().await;
        if self.partitions.borrow().contains(&link) != cut {
            network::set_cut(link, cut)?;
            let mut partitions = self.partitions.borrow_mut();
            if cut {
                partitions.insert(link);
            } else {
                partitions.remove(&link);
            }
        }
        Ok(())
    }

    async fn set_delay(&self, link: LinkName, delay: Delay) -> Result<(), HostError> {
        let _one = self.changing.lock().await;
        if delay.is_none() {
            self.delays.borrow_mut().remove(&link);
        } else {
            self.delays.borrow_mut().insert(link, delay);
        }
        for host in self.hosts.values() {
            if let Some(other) = link.other(End::Host(host.id())) {
                host.set_delay(other, delay).await?;
            }
        }
        Ok(())
    }

    /// Cuts the power of all hosts and waits until they have none.
    async fn end(&self) {
        for host in self.hosts.values() {
            // One that is off already is as it shall be.
            let _ = host.power_off().await;
        }
    }
}

/// The hosts' initramfs with the program in it: a file without a name.
fn initramfs(setup: &Setup) -> Result<File, KeeperError> {
    let image = setup.image.join("initramfs");
    let unread = |error| KeeperError::Image(setup.image.clone(), error);
    let mut from = File::open(&image).map_err(unread)?;
    let mut to = tempfile::tempfile()?;
    io::copy(&mut from, &mut to).map_err(unread)?;
    program::append(&setup.binary, &mut to)?;
    Ok(to)
}

/// An empty disk with a file system: a file without a name, of which only what is written takes
/// room.
fn disk(setup: &Setup) -> Result<File, KeeperError> {
    let disk = tempfile::tempfile()?;
    disk.set_len(u64::from(setup.disk_gib) << 30)?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-J", "size=16"])
        .arg(machine::held(&disk))
        .env("PATH", search_path())
        .stdin(Stdio::null())
        .output()
        .map_err(|error| KeeperError::Disk(format!("mkfs.ext4 cannot be started: {error}")))?;
    if output.status.success() {
        Ok(disk)
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(KeeperError::Disk(said.trim().replace('\n', "; ")))
    }
}
