//! The journal: what this host decided and why, one JSON object a line, kept in a few files of
//! bounded size.
//!
//! A thread of its own writes, so that a slow disk never holds up a decision. Lines are numbered
//! without gaps; a line that could not be written is counted and said so by a later one.

mod files;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

use self::files::Files;
use crate::protocol::{Event, HostName, Span, VmName};

/// So many lines wait for the disk at most.
const LINES_WAITING: usize = 8_192;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Counted on this host from 1, over restarts.
    pub number: u64,
    /// When, by the host's calendar clock, in RFC 3339.
    pub at: String,
    /// When, on `CLOCK_BOOTTIME`, in nanoseconds: comparable within one boot of one host.
    pub clock: u64,
    /// Which host.
    pub host: HostName,
    /// About which VM, if about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<VmName>,
    /// What.
    #[serde(flatten)]
    pub what: What,
    /// The same as a sentence without a subject.
    pub text: String,
}

/// What a line is about: `code` and its fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum What {
    /// A decision of the protocol.
    Decision(Event),
    /// Something that happened to the agent.
    Incident(Incident),
}

impl From<Event> for What {
    fn from(event: Event) -> Self {
        Self::Decision(event)
    }
}

impl From<Incident> for What {
    fn from(incident: Incident) -> Self {
        Self::Incident(incident)
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decision(event) => event.fmt(f),
            Self::Incident(incident) => incident.fmt(f),
        }
    }
}

/// Something that happened to the agent, outside the protocol's decisions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum Incident {
    /// The agent has started.
    AgentStarted {
        /// The version of the program.
        version: String,
    },
    /// Another host is connected.
    HostConnected {
        /// Which.
        peer: HostName,
    },
    /// Another host is not connected any more.
    HostLost {
        /// Which.
        peer: HostName,
        /// The word for it (see the link's close reasons).
        reason: String,
        /// The same in a few words.
        detail: String,
    },
    /// Another host has not been connected for some seconds.
    HostUnreachable {
        /// Which.
        peer: HostName,
        /// Where it was looked for and what came of it.
        why: String,
    },
    /// What was kept of a log is damaged: it is set aside, and this copy begins anew.
    LogSetAside {
        /// What is wrong with it, and where.
        why: String,
    },
    /// A log or disks were moved out of the way and kept, because they may be the way back.
    SetAside {
        /// What: `log` or `disks`.
        what: String,
        /// The folder that it is in now.
        folder: String,
    },
    /// The log of a VM has come to a part of its budget, beyond which it takes nothing more.
    LogFilling {
        /// In percent.
        percent: u8,
        /// How many bytes it takes.
        used: u64,
        /// How many it may take.
        budget: u64,
    },
    /// There is little room left where the host keeps everything.
    SpaceLow {
        /// How much is used, in percent.
        percent: u8,
        /// How many bytes are free.
        free: u64,
    },
    /// The logs of the VMs here would not fit if each came to its budget.
    BudgetsExceedSpace {
        /// How many VMs.
        vms: u64,
        /// How many bytes each of their logs may take.
        budget: u64,
        /// How many bytes are lacking.
        lacking: u64,
        /// With this budget they would fit.
        fits: u64,
    },
    /// Another host needs the log from boot, and its beginning is gone.
    CopyTooLate {
        /// Which.
        peer: HostName,
    },
    /// Another host can hold no copy of what runs here, nor this one of what runs there.
    HostIncompatible {
        /// Which.
        peer: HostName,
        /// What differs.
        why: String,
    },
    /// Another host differs in what should not matter.
    HostDiffers {
        /// Which.
        peer: HostName,
        /// In what.
        why: String,
    },
    /// The VMM process was started.
    VmmStarted {
        /// Its process id.
        pid: u32,
        /// What it does: boot or replay.
        doing: String,
    },
    /// The driver of a VM does not take what other hosts say.
    DriverDeaf,
    /// A VMM process was killed and is not gone.
    VmmDoesNotDie {
        /// Its process id.
        pid: u32,
    },
    /// A gateway is served.
    GatewayWelcomed {
        /// Its incarnation.
        gateway: u64,
        /// How many outputs it is sent again.
        resent: u64,
    },
    /// A gateway was turned away or dropped.
    GatewayRefused {
        /// Its incarnation.
        gateway: u64,
        /// Why.
        why: String,
    },
    /// This host begins to look after a VM.
    VmTaken {
        /// How it came to it.
        why: String,
    },
    /// This host has a VM that it cannot look after.
    VmUnreadable {
        /// What is wrong.
        why: String,
    },
    /// This host does not look after a VM any more.
    VmRemoved {
        /// Why.
        why: String,
    },
    /// An operator gave an order.
    Ordered {
        /// Who.
        operator: String,
        /// What.
        order: String,
    },
    /// The witness does not answer: nobody can be promoted, and no copies can change.
    WitnessAway {
        /// Why.
        reason: String,
    },
    /// The witness answers again.
    WitnessBack {
        /// After how long.
        after: Span,
    },
    /// The witness answers, and changes no record.
    WitnessUnwell {
        /// Why, and what ends it.
        why: String,
    },
    /// The witness changes records again.
    WitnessWell,
    /// The witness has less of a VM than a host has seen, and changes its record no more.
    RecordSetBack {
        /// What it has, what was seen, and what ends it.
        why: String,
    },
    /// The witness has what hosts have seen of a VM again.
    RecordRecovered,
    /// The address for metrics cannot be had.
    MetricsUnserved {
        /// Why.
        why: String,
    },
    /// Lines before this one could not be written.
    LinesLost {
        /// How many.
        count: u64,
        /// What the system said.
        reason: String,
    },
}

impl Incident {
    /// That a folder of a VM is where it is from now on.
    pub fn set_aside(folder: &Path) -> Self {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let what = name.split('.').next().unwrap_or_default();
        Self::SetAside {
            what: what.to_owned(),
            folder: folder.display().to_string(),
        }
    }
}

impl fmt::Display for Incident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AgentStarted { version } => write!(f, "the agent has started, version {version}"),
            Self::HostConnected { peer } => write!(f, "is connected with {peer}"),
            Self::HostLost { peer, detail, .. } => write!(f, "has lost {peer}: {detail}"),
            Self::HostUnreachable { peer, why } => write!(f, "cannot reach {peer}: {why}"),
            Self::LogSetAside { why } => {
                write!(
                    f,
                    "sets its damaged log aside as evidence and begins anew: {why}"
                )
            }
            Self::SetAside { what, folder } => write!(
                f,
                "has set the {what} of before aside in {folder}: nothing deletes that folder by itself; \
                 look into it{}, and delete it once another copy of the VM is whole",
                if what == "log" {
                    " ('understudy log stat' reads it)"
                } else {
                    ""
                }
            ),
            Self::LogFilling {
                percent,
                used,
                budget,
            } => write!(
                f,
                "has used {percent} % of its log's budget ({} of {} MiB): raise log.retention, where \
                 there is space, before it can log nothing more",
                used >> 20,
                budget >> 20
            ),
            Self::SpaceLow { percent, free } => write!(
                f,
                "has used {percent} % of the room for its data, {} MiB are free: make room, or its \
                 copies can acknowledge nothing more",
                free >> 20
            ),
            Self::BudgetsExceedSpace {
                vms,
                budget,
                lacking,
                fits,
            } => write!(
                f,
                "has room for less log than it promises: {vms} VMs with a budget of {} MiB each lack {} \
                 MiB; make room, set log.retention to {} MiB or less, or have fewer copies here",
                budget >> 20,
                lacking.div_ceil(1 << 20),
                fits >> 20
            ),
            Self::CopyTooLate { peer } => write!(
                f,
                "cannot give {peer} the log from boot: an earlier version of this program deleted \
                 its beginning; move the VM to a new name to get copies of it"
            ),
            Self::HostIncompatible { peer, why } => {
                write!(f, "cannot share a VM with {peer}: {why}")
            }
            Self::HostDiffers { peer, why } => write!(f, "differs from {peer}: {why}"),
            Self::VmmStarted { pid, doing } => {
                write!(f, "started VMM process {pid} to {doing}")
            }
            Self::DriverDeaf => f.write_str(
                "does not take what other hosts say of this VM as fast as it comes: it will hear \
                 them as if they had connected anew",
            ),
            Self::VmmDoesNotDie { pid } => {
                f.write_str(&super::driver::does_not_die(&pid.to_string()))
            }
            Self::GatewayWelcomed { gateway, resent } => {
                write!(f, "serves gateway {gateway:x}, {resent} outputs again")
            }
            Self::GatewayRefused { gateway, why } => {
                write!(f, "does not serve gateway {gateway:x}: {why}")
            }
            Self::VmTaken { why } => write!(f, "looks after this VM: {why}"),
            Self::VmUnreadable { why } => write!(f, "cannot look after this VM: {why}"),
            Self::VmRemoved { why } => write!(f, "looks after this VM no more: {why}"),
            Self::Ordered { operator, order } => write!(f, "was ordered by {operator}: {order}"),
            Self::WitnessAway { reason } => write!(
                f,
                "has no answer from the witness, so nobody can be promoted: {reason}"
            ),
            Self::WitnessBack { after } => {
                write!(f, "hears the witness again, which was away for {after}")
            }
            Self::WitnessUnwell { why } => write!(f, "has to do without the witness: {why}"),
            Self::WitnessWell => f.write_str("has a witness that changes records again"),
            Self::RecordSetBack { why } => write!(f, "cannot have this VM's record changed: {why}"),
            Self::RecordRecovered => f.write_str("can have this VM's record changed again"),
            Self::MetricsUnserved { why } => f.write_str(why),
            Self::LinesLost { count, reason } => {
                write!(f, "could not write {count} lines of the journal: {reason}")
            }
        }
    }
}

/// Why the journal cannot be opened.
#[derive(Debug, Error)]
#[error("cannot open the journal in {folder}: run as the user who owns it, on a disk with space")]
pub struct OpenJournalError {
    /// The folder.
    pub folder: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Why the journal cannot be read.
#[derive(Debug, Error)]
#[error("the journal cannot be read ({reason}): see to the disk of the host's data folder")]
pub struct ReadJournalError {
    /// What the system said.
    pub reason: String,
}

/// A place among the lines that wait for the disk; given back when the line is written.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

enum Task {
    Write(Box<Line>, Place),
    Read {
        after: u64,
        limit: usize,
        reply: oneshot::Sender<io::Result<Vec<Line>>>,
    },
}

/// The journal of one host. Writing never waits.
pub struct Journal {
    host: HostName,
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<()>>,
    written: watch::Receiver<u64>,
    /// So many lines wait for the disk.
    waiting: Arc<AtomicUsize>,
    /// So many found no place among them.
    lost: AtomicU64,
}

impl Journal {
    /// Opens the journal in a folder, or begins one.
    pub fn open(folder: &Path, host: HostName) -> Result<Self, OpenJournalError> {
        let failed = |source| OpenJournalError {
            folder: folder.to_owned(),
            source,
        };
        let mut files = Files::open(folder).map_err(failed)?;
        let (tasks, received) = channel();
        let (tell, written) = watch::channel(files.last);
        let thread = std::thread::Builder::new()
            .name("journal".to_owned())
            .spawn(move || files.work(&received, &tell))
            .map_err(failed)?;
        Ok(Self {
            host,
            tasks: Some(tasks),
            thread: Some(thread),
            written,
            waiting: Arc::default(),
            lost: AtomicU64::new(0),
        })
    }

    /// Writes a line, about a VM or about the host. One for which there is no room, because the disk
    /// is that busy, is counted, and said so by a later one.
    pub fn write(&self, vm: Option<&VmName>, what: impl Into<What>) {
        let what = what.into();
        let text = what.to_string();
        if let Some(vm) = vm {
            tracing::info!(%vm, "{text}");
        } else {
            tracing::info!("{text}");
        }
        if self.waiting.load(Ordering::Relaxed) >= LINES_WAITING {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let count = self.lost.swap(0, Ordering::Relaxed);
        if count > 0 {
            let reason = "its disk is busy".to_owned();
            let lost = What::Incident(Incident::LinesLost { count, reason });
            self.hand_on(None, lost.to_string(), lost);
        }
        self.hand_on(vm, text, what);
    }

    fn hand_on(&self, vm: Option<&VmName>, text: String, what: What) {
        let line = Line {
            number: 0,
            at: jiff::Timestamp::now().to_string(),
            clock: super::clock::now().as_nanos(),
            host: self.host.clone(),
            vm: vm.cloned(),
            what,
            text,
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let place = Place(Arc::clone(&self.waiting));
        self.ask(Task::Write(Box::new(line), place));
    }

    /// The lines after this number that are kept, at most so many, in order. Everything written
    /// before the call is there.
    pub async fn read(&self, after: u64, limit: usize) -> Result<Vec<Line>, ReadJournalError> {
        let (reply, lines) = oneshot::channel();
        self.ask(Task::Read {
            after,
            limit,
            reply,
        });
        match lines.await {
            Ok(Ok(lines)) => Ok(lines),
            Ok(Err(error)) => Err(ReadJournalError {
                reason: error.to_string(),
            }),
            Err(_) => Err(ReadJournalError {
                reason: "its thread has ended".to_owned(),
            }),
        }
    }

    /// Changes whenever a line is written: its number.
    pub fn written(&self) -> watch::Receiver<u64> {
        self.written.clone()
    }

    fn ask(&self, task: Task) {
        if let Some(tasks) = &self.tasks {
            // The thread ends with us; nothing is lost but the line.
            let _ = tasks.send(task);
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.tasks = None;
        if let Some(thread) = self.thread.take() {
            // What was asked for is written first.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
