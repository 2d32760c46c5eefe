//! A host as its keeper has it: whether it has power, whether it answers, and the line to its agent.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::rc::Rc;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::UnixStream;
use tokio::process::Child;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::link::{Link, RemoteJob};
use super::machine::{self, MachineError, Parts};
use super::shaping;
use crate::lab::state::{Delay, End, HostId, HostStatus, LabFolder, Power, ProcessId, Setup};
use crate::lab::wire::{Done, FromHost, FromJob, Job, PROTOCOL};

/// How long a host may take to boot: ten times what it takes on idle cores.
const BOOT_LIMIT: Duration = Duration::from_mins(2);
/// How many lines of a console are quoted.
const QUOTED_LINES: usize = 5;

/// Why something cannot be done with a host.
#[derive(Debug, Error)]
pub enum HostError {
    /// It has power already.
    #[error("{0} is running already")]
    Running(HostId),
    /// It has no power.
    #[error("{host} is off ({why}): start it with 'understudy lab start {host}'")]
    Off {
        /// Which.
        host: HostId,
        /// Why.
        why: String,
    },
    /// It does not answer yet.
    #[error("{0} is booting: wait until it is up")]
    Booting(HostId),
    /// It ended before it answered.
    #[error("{host} does not come up: {why}")]
    Ended {
        /// Which.
        host: HostId,
        /// Why.
        why: String,
    },
    /// It does not answer.
    #[error("{host} has not answered within {} s; its console says: {console}", BOOT_LIMIT.as_secs())]
    Silent {
        /// Which.
        host: HostId,
        /// Its last words.
        console: String,
    },
    /// No process.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Its links cannot be shaped.
    #[error("the links of {host} cannot be delayed: {said}")]
    Shaping {
        /// Which.
        host: HostId,
        /// What tc said.
        said: String,
    },
}

#[derive(Clone, Debug)]
enum State {
    Off(String),
    Booting,
    Up { boot_ms: u64 },
}

/// A host.
pub struct Host {
    id: HostId,
    setup: Rc<Setup>,
    initramfs: Rc<File>,
    disk: File,
    console: PathBuf,
    state: watch::Sender<State>,
    delays: RefCell<Vec<(End, Delay)>>,
    power: RefCell<Option<Powered>>,
}

/// What there is only while a host has power.
struct Powered {
    process: Option<ProcessId>,
    link: Link,
    cut: Option<oneshot::Sender<()>>,
}

impl Host {
    /// A host without power.
    pub fn new(id: HostId, setup: Rc<Setup>, initramfs: Rc<File>, disk: File) -> Rc<Self> {
        let console = LabFolder::new(&setup.dir).console(id);
        Rc::new(Self {
            id,
            setup,
            initramfs,
            disk,
            console,
            state: watch::Sender::new(State::Off("it was never started".into())),
            delays: RefCell::default(),
            power: RefCell::default(),
        })
    }

    /// Which one it is.
    pub fn id(&self) -> HostId {
        self.id
    }

    /// Its process, while it has power.
    pub fn process(&self) -> Option<ProcessId> {
        self.power.borrow().as_ref()?.process
    }

    /// How it does.
    pub fn status(&self) -> HostStatus {
        let state = self.state.borrow().clone();
        let (power, boot_ms, why_off) = match state {
            State::Off(why) => (Power::Off, None, Some(why)),
            State::Booting => (Power::Booting, None, None),
            State::Up { boot_ms } => (Power::Up, Some(boot_ms), None),
        };
        HostStatus {
            name: self.id,
            address: self.id.address(),
            state: power,
            boot_ms,
            why_off,
            pid: self.process().map(|process| process.pid),
            console: self.console.clone(),
        }
    }

    /// Powers it on.
    pub fn power_on(self: &Rc<Self>) -> Result<(), HostError> {
        if self.power.borrow().is_some() {
            return Err(HostError::Running(self.id));
        }
        let parts = Parts {
            setup: &self.setup,
            initramfs: &self.initramfs,
            disk: &self.disk,
            console: &self.console,
        };
        let (child, stream) = machine::start(self.id, &parts)?;
        let failed = |source| MachineError::Start {
            host: self.id,
            source,
        };
        stream.set_nonblocking(true).map_err(failed)?;
        let (link, said) = Link::new(UnixStream::from_std(stream).map_err(failed)?);
        let (cut, is_cut) = oneshot::channel();
        *self.power.borrow_mut() = Some(Powered {
            process: child.id().and_then(ProcessId::of),
            link,
            cut: Some(cut),
        });
        self.state.send_replace(State::Booting);
        spawn_local(Rc::clone(self).attend(child, said, is_cut));
        Ok(())
    }

    /// Listens to a host from power-on to power-off.
    async fn attend(
        self: Rc<Self>,
        mut child: Child,
        mut said: mpsc::Receiver<FromHost>,
        mut is_cut: oneshot::Receiver<()>,
    ) {
        let started = Instant::now();
        let mut cut = false;
        let status = loop {
            tokio::select! {
                status = child.wait() => break status,
                _ = &mut is_cut, if !cut => {
                    cut = true;
                    // Fails only for a process that has ended.
                    let _ = child.start_kill();
                }
                Some(message) = said.recv() => self.said(message, started),
            }
        };
        self.power.borrow_mut().take();
        let why = match status {
            _ if cut => "its power was cut".to_owned(),
            Ok(status) => format!("{}; its console says: {}", how(status), self.last_words()),
            Err(error) => format!("its process cannot be awaited: {error}"),
        };
        self.state.send_replace(State::Off(why));
    }

    fn said(self: &Rc<Self>, message: FromHost, started: Instant) {
        match message {
            FromHost::Job(id, what) => {
                if let Some(power) = &*self.power.borrow() {
                    power.link.said(id, what);
                }
            }
            FromHost::Hello { protocol } if protocol != PROTOCOL => {
                eprintln!(
                    "{} speaks version {protocol} of the lab's protocol, not {PROTOCOL}: give 'lab up' a --binary of this version",
                    self.id
                );
                self.cut_power();
            }
            FromHost::Hello { .. } => {
                let host = Rc::clone(self);
                spawn_local(async move {
                    let mut shaped = Vec::new();
                    // They may be changed while they are set.
                    while *host.delays.borrow() != shaped {
                        shaped.clone_from(&host.delays.borrow());
                        if let Err(error) = host.shape(&shaped).await {
                            eprintln!("{error}");
                        }
                    }
                    let boot_ms = started.elapsed().as_millis() as u64;
                    host.state.send_if_modified(|state| {
                        let booting = matches!(state, State::Booting);
                        if booting {
                            *state = State::Up { boot_ms };
                        }
                        booting
                    });
                });
            }
        }
    }

    /// Waits until it answers; how long it took.
    pub async fn up(&self) -> Result<u64, HostError> {
        let mut state = self.state.subscribe();
        let settled = state.wait_for(|state| !matches!(state, State::Booting));
        let settled = match timeout(BOOT_LIMIT, settled).await {
            Ok(settled) => settled.map(|state| state.clone()).ok(),
            Err(_) => None,
        };
        match settled {
            Some(State::Up { boot_ms }) => Ok(boot_ms),
            Some(State::Off(why)) => Err(HostError::Ended { host: self.id, why }),
            Some(State::Booting) | None => Err(HostError::Silent {
                host: self.id,
                console: self.last_words(),
            }),
        }
    }

    /// Cuts its power and waits until it has none.
    pub async fn power_off(&self) -> Result<(), HostError> {
        if let State::Off(why) = self.state.borrow().clone() {
            return Err(HostError::Off { host: self.id, why });
        }
        self.cut_power();
        let mut state = self.state.subscribe();
        // The sender lives as long as this.
        let _ = state.wait_for(|state| matches!(state, State::Off(_))).await;
        Ok(())
    }

    fn cut_power(&self) {
        if let Some(power) = &mut *self.power.borrow_mut()
            && let Some(cut) = power.cut.take()
        {
            // Fails only when it has ended by itself.
            let _ = cut.send(());
        }
    }

    /// Starts a job in it.
    pub fn job(&self, job: Job) -> Result<RemoteJob, HostError> {
        match &*self.state.borrow() {
            State::Booting => return Err(HostError::Booting(self.id)),
            State::Off(why) => {
                return Err(HostError::Off {
                    host: self.id,
                    why: why.clone(),
                });
            }
            State::Up { .. } => {}
        }
        self.link_job(job)
    }

    fn link_job(&self, job: Job) -> Result<RemoteJob, HostError> {
        match &*self.power.borrow() {
            Some(power) => Ok(power.link.start(job)),
            None => Err(HostError::Off {
                host: self.id,
                why: "it has just ended".into(),
            }),
        }
    }

    /// Sets the delay of its link to another end: at once if it is up, in any case when it boots.
    pub async fn set_delay(&self, to: End, delay: Delay) -> Result<(), HostError> {
        {
            let mut delays = self.delays.borrow_mut();
            delays.retain(|(other, _)| *other != to);
            if !delay.is_none() {
                delays.push((to, delay));
            }
        }
        let up = matches!(*self.state.borrow(), State::Up { .. });
        if up {
            self.shape(&[(to, delay)]).await?;
        }
        Ok(())
    }

    async fn shape(&self, delays: &[(End, Delay)]) -> Result<(), HostError> {
        if delays.is_empty() {
            return Ok(());
        }
        let mut job = self.link_job(Job::Run(shaping::words(self.id, delays)))?;
        let mut said = Vec::new();
        let failure = |said: String| HostError::Shaping {
            host: self.id,
            said,
        };
        while let Some(event) = job.next().await {
            match event {
                FromJob::Err(bytes) => said.extend_from_slice(&bytes),
                FromJob::Out(_) | FromJob::Took(_) => {}
                FromJob::Done(Ok(Done::Exited(0))) => return Ok(()),
                FromJob::Done(Ok(_)) => break,
                FromJob::Done(Err(why)) => return Err(failure(why)),
            }
        }
        Err(failure(String::from_utf8_lossy(&said).trim().to_owned()))
    }

    /// The last lines on its console.
    fn last_words(&self) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let printable =
            |line: &str| -> String { line.chars().filter(|c| !c.is_control()).collect() };
        let lines: Vec<String> = text
            .lines()
            .map(printable)
            .filter(|line| !line.trim().is_empty())
            .collect();
        let quoted = &lines[lines.len().saturating_sub(QUOTED_LINES)..];
        if quoted.is_empty() {
            return "nothing".into();
        }
        quoted.join("; ")
    }
}

fn how(status: ExitStatus) -> String {
    match status.signal() {
        Some(signal) => format!("QEMU was ended by signal {signal}"),
        None => format!(
            "QEMU has ended by itself with exit code {}",
            status.code().unwrap_or_default()
        ),
    }
}
