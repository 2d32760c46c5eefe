//! What operators ask of hosts, and how they ask it: one QUIC stream for each request, with an
//! operator's certificate. The command line is a client of this.
//!
//! An order ([`Request::Run`], [`Request::Pair`], …) is answered as soon as the VM's driver has
//! taken it, with the number of the host's last journal line before it: what comes of it stands in
//! the lines that follow (`operator_refused`, `record_committed`, `switchover_failed`, `went_live`).

mod client;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use vmm::tape::Ending;

use super::certs::{Identity, Role};
use super::journal::{Journal, Line};
use super::link::{Endpoint, Reply, StreamKind, serve_requests};
use super::metrics;
use super::space::{SetAside, Space};
use super::witness::reporter::WitnessHealth;
use crate::protocol::{HostName, Operator, Policy, Span, Status, Time, VmName};
pub use client::{Client, Lines, OperatorError};

/// How many lines of the journal come in one answer.
pub const EVENTS_MAX: u32 = 1_000;
/// How many bytes of lines come in one answer; more than the longest line.
const EVENTS_BYTES: usize = 512 * 1024;

/// A request to a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// How does the host do? One [`Answer::Status`].
    Status,
    /// The journal's lines after this number. [`Answer::Events`]: one, or again and again.
    Events {
        /// The last line that is known; 0 for all that are kept.
        after: u64,
        /// How many at a time, at most [`EVENTS_MAX`].
        limit: u32,
        /// Whether to go on with lines as they are written.
        follow: bool,
    },
    /// Start a VM for the first time, with this host as its primary. An order.
    Run {
        /// What it shall be called.
        vm: VmName,
        /// The image's name.
        image: String,
        /// Where copies are wanted; the host itself is added.
        hosts: Vec<HostName>,
        /// Who must hold the log before output.
        policy: Policy,
    },
    /// Start a VM of which no log and no disk is left again from its image, with this host as its
    /// primary, and copies where its record wants them. Everything it had is lost. An order.
    StartOver {
        /// Which VM.
        vm: VmName,
        /// The image's name.
        image: String,
    },
    /// Of the primary: have copies on exactly these hosts. An order.
    Pair {
        /// Which VM.
        vm: VmName,
        /// Where copies are wanted; the host itself is added.
        hosts: Vec<HostName>,
        /// Who must hold the log before output.
        policy: Policy,
    },
    /// Of the primary: let a replica reign, with nothing lost. An order.
    Switchover {
        /// Which VM.
        vm: VmName,
        /// To whom; the first replica that can when nobody is named.
        to: Option<HostName>,
    },
    /// Go live with what this host holds, though it may not be all that was acknowledged. An order.
    AcceptLoss {
        /// Which VM.
        vm: VmName,
    },
    /// Look after this VM no more and delete what this host has of it. Refused while the record
    /// names this host. One [`Answer::Done`].
    Remove {
        /// Which VM.
        vm: VmName,
    },
    /// The metrics as Prometheus reads them. One [`Answer::Metrics`].
    Metrics,
}

impl Request {
    /// Whether asking twice is the same as asking once.
    const fn may_be_repeated(&self) -> bool {
        matches!(self, Self::Status | Self::Events { .. } | Self::Metrics)
    }
}

/// An answer of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// How the host does.
    Status(Box<HostStatus>),
    /// Lines of the journal, each as JSON ([`Line`]).
    Events(Vec<String>),
    /// The order is given.
    Taken {
        /// The number of the journal's last line before it.
        journal: u64,
    },
    /// It is done.
    Done,
    /// The metrics.
    Metrics(String),
    /// It is not done.
    Refused {
        /// One sentence that says what to do.
        why: String,
    },
}

/// How a host does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Its name.
    pub host: HostName,
    /// The version of its program.
    pub version: String,
    /// Its clock (`CLOCK_BOOTTIME`), to which all times in the answer belong.
    pub now: Time,
    /// The other hosts, and whether they are connected.
    pub peers: BTreeMap<HostName, bool>,
    /// The number of the journal's last line.
    pub journal: u64,
    /// How the witness does, seen from there; `None` in a cluster without one.
    pub witness: Option<WitnessHealth>,
    /// The VMs it looks after.
    pub vms: Vec<VmStatus>,
    /// VMs that it can tell nothing of, and why: what is kept of them cannot be used, or their drivers
    /// do not answer.
    pub silent: BTreeMap<VmName, String>,
    /// What of the host itself does not work, and what to do, in sentences.
    pub troubles: Vec<String>,
    /// The room where it keeps everything, once that is known.
    #[serde(default)]
    pub space: Option<Space>,
    /// The logs and disks that were set aside there: they take room until somebody deletes them.
    #[serde(default)]
    pub aside: Vec<SetAside>,
    /// What the link has counted.
    pub link: LinkFigures,
}

/// What the link has counted since the agent started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkFigures {
    /// Log bytes before compression.
    pub log_bytes_raw: u64,
    /// Log bytes as they were sent.
    pub log_bytes_sent: u64,
    /// Log bytes as they were received.
    pub log_bytes_received: u64,
    /// Handshakes refused because of a certificate.
    pub refused_certificates: u64,
    /// Peers refused for another reason.
    pub refused_peers: u64,
    /// Connections closed for what came on them.
    pub closed_for_garbage: u64,
}

/// How a VM does on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    /// Which VM.
    pub vm: VmName,
    /// What the protocol knows.
    pub node: Status,
    /// The guest, while there is one.
    pub guest: Option<GuestStatus>,
    /// That the VMM or the store failed here, and why, if no VMM has come beyond that place since.
    pub failure: Option<String>,
    /// How far the disks have come that the guest begins with, while they are fetched from other hosts.
    pub fetching: Option<Fetching>,
    /// What the log takes on disk, in bytes, when it is known.
    pub log_bytes: Option<u64>,
    /// How the log's store does.
    pub store: StoreFigures,
    /// Output that waits for its commit, in bytes.
    pub waiting_output: u64,
    /// How many gateways are served.
    pub gateways: usize,
}

/// How the store of a VM's log does on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreFigures {
    /// How many bytes the log may take. It is never made smaller; at its budget nothing more is
    /// logged.
    pub budget: u64,
    /// Whether it has come to that.
    pub over_budget: bool,
    /// How many bytes of the log wait for the disk.
    pub waiting: u64,
    /// For how long the oldest sync that has not come back has been asked for.
    pub oldest_sync: Option<Span>,
    /// Why the store takes nothing more at the moment, if it does not.
    pub full: Option<String>,
}

/// How far a transfer between hosts has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetching {
    /// So many bytes are here, stretches of zeros included.
    pub bytes: u64,
    /// Of so many.
    pub of: u64,
}

/// The guest's VMM process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// Its process id, while it lives.
    pub pid: Option<u32>,
    /// Whether it records, as a primary's does; otherwise it replays.
    pub recording: bool,
    /// The longest that something which arrived has waited because the guest made no exit or took no
    /// interrupts, since it has been recorded here.
    pub longest_deferral: Span,
    /// While it is recorded: how long it has come past no landmark. A guest that waits for something
    /// comes past several a second.
    pub silence: Span,
    /// How the guest ended by its own doing, if it did: the same on every copy that has executed so
    /// far.
    pub ended: Option<Ending>,
}

/// What the agent asks the driver of one VM on behalf of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmQuestion {
    /// How does it do?
    Status,
    /// An operator's wish; what comes of it is in the journal and the status.
    Do(Operator),
}

/// The answer of a driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmAnswer {
    /// How it does.
    Status(Box<VmStatus>),
    /// The order is given.
    Taken,
}

/// A request that the agent has to answer, from an operator.
#[derive(Debug)]
pub struct Asked {
    /// Who asks.
    pub who: Identity,
    /// What: never [`Request::Events`] or [`Request::Metrics`], which are served here.
    pub request: Request,
    /// Where the answer goes.
    pub reply: oneshot::Sender<Answer>,
}

/// Serves operators on this endpoint: what only the agent can answer comes out of the receiver.
/// Call it on the runtime that runs the endpoint.
pub fn serve(endpoint: &Endpoint, journal: &Arc<Journal>) -> mpsc::Receiver<Asked> {
    let (ask, asked) = mpsc::channel(16);
    let streams = endpoint.serve(StreamKind::Operator, 16);
    let server = Server {
        ask,
        journal: Arc::clone(journal),
    };
    tokio::spawn(serve_requests(streams, move |who, request, reply| {
        let server = server.clone();
        async move { server.serve(who, request, reply).await }
    }));
    asked
}

#[derive(Clone)]
struct Server {
    ask: mpsc::Sender<Asked>,
    journal: Arc<Journal>,
}

impl Server {
    async fn serve(self, who: Identity, request: Request, mut reply: Reply) {
        if let Request::Events {
            after,
            limit,
            follow,
        } = request
            && who.role == Role::Operator
        {
            let answer = self.events(after, limit, follow, reply);
            if follow {
                // It takes no place that other requests need.
                tokio::spawn(answer);
            } else {
                answer.await;
            }
            return;
        }
        let answer = match request {
            _ if who.role != Role::Operator => Answer::Refused {
                why: format!(
                    "a {} may not give orders: use the operator's folder",
                    who.role
                ),
            },
            Request::Metrics => match self.ask(who, Request::Status).await {
                Answer::Status(status) => Answer::Metrics(metrics::render(&status)),
                other => other,
            },
            request => self.ask(who, request).await,
        };
        // Fails only when the operator is gone.
        let _ = reply.send(&answer).await;
    }

    async fn ask(&self, who: Identity, request: Request) -> Answer {
        let (reply, answer) = oneshot::channel();
        let asked = Asked {
            who,
            request,
            reply,
        };
        let ends = || Answer::Refused {
            why: "the agent of this host ends: ask again when it is back".to_owned(),
        };
        if self.ask.send(asked).await.is_err() {
            return ends();
        }
        answer.await.unwrap_or_else(|_| ends())
    }

    async fn events(self, mut after: u64, limit: u32, follow: bool, mut reply: Reply) {
        let mut written = self.journal.written();
        loop {
            written.mark_unchanged();
            let (lines, whole) = match self
                .journal
                .read(after, limit.min(EVENTS_MAX) as usize)
                .await
            {
                Ok(lines) => lines_that_fit(&lines),
                Err(error) => {
                    let why = error.to_string();
                    // Fails only when the operator is gone.
                    let _ = reply.send(&Answer::Refused { why }).await;
                    return;
                }
            };
            after = lines.last().map_or(after, |(number, _)| *number);
            let more = !whole || lines.len() as u32 >= limit.min(EVENTS_MAX);
            let lines: Vec<_> = lines.into_iter().map(|(_, line)| line).collect();
            let news = !lines.is_empty() || !follow;
            if news && reply.send(&Answer::Events(lines)).await.is_err() || !follow {
                return;
            }
            if more && limit > 0 {
                continue;
            }
            tokio::select! {
                changed = written.changed() => if changed.is_err() { return },
                () = reply.unwanted() => return,
            }
        }
    }
}

/// As many lines as one answer takes, with their numbers, and whether that was all.
fn lines_that_fit(lines: &[Line]) -> (Vec<(u64, String)>, bool) {
    let (mut fit, mut bytes) = (Vec::new(), 0);
    for line in lines {
        let text = serde_json::to_string(line).expect("a line can be written as JSON");
        bytes += text.len() + 8;
        if bytes > EVENTS_BYTES {
            return (fit, false);
        }
        fit.push((line.number, text));
    }
    (fit, true)
}

#[cfg(test)]
mod tests;
