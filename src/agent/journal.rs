//! The journal: what this host decided and why, one JSON object a line, kept in a few files of
//! bounded size.
//!
//! A thread of its own writes, so that a slow disk never holds up a decision. Lines are numbered
//! without gaps; a line that could not be written is counted and said so by a later one.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{oneshot, watch};

use crate::protocol::{Event, HostName, Span, VmName};

/// A file of this size is put aside and a new one begun.
const FILE_BYTES: u64 = 4 << 20;
/// How many files are kept, the one that is written included.
const FILES: u32 = 4;
/// The longest line.
const LINE_MAX: u64 = 256 * 1024;

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
    /// Lines before this one could not be written.
    LinesLost {
        /// How many.
        count: u64,
        /// What the system said.
        reason: String,
    },
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
            Self::CopyTooLate { peer } => write!(
                f,
                "cannot give {peer} the log from boot: its beginning is out of the retention \
                 budget; raise log.retention for VMs that are to get copies later"
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

enum Task {
    Write(Box<Line>),
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
        })
    }

    /// Writes a line, about a VM or about the host.
    pub fn write(&self, vm: Option<&VmName>, what: impl Into<What>) {
        let what = what.into();
        let text = what.to_string();
        if let Some(vm) = vm {
            tracing::info!(%vm, "{text}");
        } else {
            tracing::info!("{text}");
        }
        let line = Line {
            number: 0,
            at: jiff::Timestamp::now().to_string(),
            clock: super::clock::now().as_nanos(),
            host: self.host.clone(),
            vm: vm.cloned(),
            what,
            text,
        };
        self.ask(Task::Write(Box::new(line)));
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

/// The files, owned by the thread.
struct Files {
    folder: PathBuf,
    current: File,
    bytes: u64,
    last: u64,
    lost: u64,
    reason: String,
}

impl Files {
    fn path(folder: &Path, age: u32) -> PathBuf {
        match age {
            0 => folder.join("journal.jsonl"),
            age => folder.join(format!("journal.{age}.jsonl")),
        }
    }

    fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut last = 0;
        for age in (0..FILES).rev() {
            for line in read_file(&Self::path(folder, age))? {
                last = last.max(line.number);
            }
        }
        let mut current = OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(Self::path(folder, 0))?;
        let mut bytes = current.metadata()?.len();
        if bytes > 0 && !ends_with_newline(&Self::path(folder, 0))? {
            // The process died within a line: what follows begins on the next.
            current.write_all(b"\n")?;
            bytes += 1;
        }
        Ok(Self {
            folder: folder.to_owned(),
            current,
            bytes,
            last,
            lost: 0,
            reason: String::new(),
        })
    }

    fn work(&mut self, tasks: &Receiver<Task>, tell: &watch::Sender<u64>) {
        while let Ok(task) = tasks.recv() {
            match task {
                Task::Write(line) => {
                    self.write(*line);
                    tell.send_replace(self.last);
                }
                Task::Read {
                    after,
                    limit,
                    reply,
                } => {
                    // Whoever asked may have gone.
                    let _ = reply.send(self.read(after, limit));
                }
            }
        }
    }

    fn write(&mut self, line: Line) {
        if self.lost > 0 {
            let what = What::Incident(Incident::LinesLost {
                count: self.lost,
                reason: self.reason.clone(),
            });
            let lost = Line {
                text: what.to_string(),
                what,
                vm: None,
                ..line.clone()
            };
            if self.try_write(lost).is_ok() {
                self.lost = 0;
            }
        }
        if let Err(error) = self.try_write(line) {
            self.lost += 1;
            self.reason = error.to_string();
        }
    }

    fn try_write(&mut self, mut line: Line) -> io::Result<()> {
        line.number = self.last + 1;
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        if text.len() as u64 > LINE_MAX {
            return Err(io::Error::other("a line was too long"));
        }
        if self.bytes + text.len() as u64 > FILE_BYTES {
            self.rotate()?;
        }
        self.current.write_all(&text)?;
        self.bytes += text.len() as u64;
        self.last = line.number;
        Ok(())
    }

    fn rotate(&mut self) -> io::Result<()> {
        for age in (0..FILES - 1).rev() {
            let from = Self::path(&self.folder, age);
            if from.exists() {
                fs::rename(from, Self::path(&self.folder, age + 1))?;
            }
        }
        self.current = OpenOptions::new()
            .create(true)
            .append(true)
            .open(Self::path(&self.folder, 0))?;
        self.bytes = 0;
        Ok(())
    }

    fn read(&self, after: u64, limit: usize) -> io::Result<Vec<Line>> {
        let mut lines = VecDeque::new();
        for age in (0..FILES).rev() {
            for line in read_file(&Self::path(&self.folder, age))? {
                if line.number > after && lines.len() < limit {
                    lines.push_back(line);
                }
            }
        }
        Ok(lines.into())
    }
}

fn ends_with_newline(path: &Path) -> io::Result<bool> {
    let mut file = File::open(path)?;
    io::Seek::seek(&mut file, io::SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// The lines of a file that can be read; one that the process died within is left out.
fn read_file(path: &Path) -> io::Result<Vec<Line>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut reader = BufReader::new(file);
    let (mut lines, mut text) = (Vec::new(), Vec::new());
    loop {
        text.clear();
        let read = (&mut reader).take(LINE_MAX).read_until(b'\n', &mut text)?;
        if read == 0 {
            return Ok(lines);
        }
        if let Ok(line) = serde_json::from_slice(&text) {
            lines.push(line);
        }
    }
}

#[cfg(test)]
mod tests;
