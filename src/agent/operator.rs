//! What operators ask of hosts, and how they ask it: one QUIC stream for each request, with an
//! operator's certificate. The command line is a client of this.
//!
//! An order ([`Request::Run`], [`Request::Pair`], …) is answered as soon as the VM's driver has
//! taken it, with the number of the host's last journal line before it: what comes of it stands in
//! the lines that follow (`operator_refused`, `record_committed`, `switchover_failed`, `went_live`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use vmm::tape::Ending;

use super::certs::{Credentials, Identity, Role};
use super::journal::{Journal, Line};
use super::link::{
    Answers, BindError, Channel, Endpoint, Peer, Reply, RequestError, StreamKind, serve_requests,
};
use super::metrics;
use super::space::{SetAside, Space};
use super::witness::client::{AskError, WitnessClient};
use super::witness::reporter::WitnessHealth;
use crate::config::{Config, ConfigError};
use crate::protocol::{Committed, HostName, Operator, Policy, Record, Span, Status, Time, VmName};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the answer to an order may take: whoever gives it up does not know whether it was taken.
const ORDER_PATIENCE: Duration = Duration::from_secs(10);
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

    const fn patience(&self) -> Duration {
        if self.may_be_repeated() {
            PATIENCE
        } else {
            ORDER_PATIENCE
        }
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

/// Why an operator got no good answer.
#[derive(Debug, Error)]
pub enum OperatorError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The socket.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The host could not be asked.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The witness could not be asked.
    #[error(transparent)]
    Witness(#[from] AskError),
    /// The host said no.
    #[error("{why}")]
    Refused {
        /// Its own words.
        why: String,
    },
    /// It answered another question.
    #[error("{host} answered another question: use the same version of Understudy everywhere")]
    Confused {
        /// Who.
        host: HostName,
    },
    /// The configuration names no such host.
    #[error("there is no host '{name}' in this cluster; its hosts are {known}")]
    NoHost {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The configuration names no witness.
    #[error("the configuration names no witness: add one under [witness]")]
    NoWitness,
    /// Nobody knows the VM.
    #[error(
        "there is no VM '{vm}' in this cluster: start it with 'understudy pair', or see 'understudy status'"
    )]
    NoVm {
        /// Which.
        vm: VmName,
    },
}

impl OperatorError {
    /// Whether the same question may have an answer a moment later: who was asked was silent or cut
    /// off, and said nothing that is final.
    pub const fn may_pass(&self) -> bool {
        matches!(
            self,
            Self::Request(error) | Self::Witness(AskError::Request(error)) if error.may_pass()
        )
    }
}

/// Asks the hosts of a cluster. Keeps its connections.
pub struct Client {
    channels: BTreeMap<HostName, Channel>,
    /// The same hosts, as they relay what they have seen of records.
    relays: BTreeMap<HostName, WitnessClient>,
    witness: Option<WitnessClient>,
}

impl Client {
    /// A client by an operator's configuration. Call it on a tokio runtime. Nothing is dialled yet.
    pub fn new(config: &Config) -> Result<Self, OperatorError> {
        Self::with(config, &config.credentials()?)
    }

    /// The same with credentials from elsewhere.
    pub fn with(config: &Config, credentials: &Credentials) -> Result<Self, OperatorError> {
        let endpoint = Endpoint::client(credentials)?;
        let channel = |peer: Peer| {
            let host = HostName::from(&peer.identity.name);
            (host, Channel::new(&endpoint, peer))
        };
        let peers = config
            .hosts
            .keys()
            .filter_map(|name| config.host(name.as_str()));
        let peers: Vec<Peer> = peers.collect();
        let relay = |peer: &Peer| {
            let host = HostName::from(&peer.identity.name);
            (host, WitnessClient::new(&endpoint, peer.clone()))
        };
        Ok(Self {
            relays: peers.iter().map(relay).collect(),
            channels: peers.into_iter().map(channel).collect(),
            witness: config
                .witness()
                .map(|witness| WitnessClient::new(&endpoint, witness)),
        })
    }

    /// The hosts of the cluster.
    pub fn hosts(&self) -> impl Iterator<Item = &HostName> {
        self.channels.keys()
    }

    /// The keeper of the records.
    pub fn witness(&self) -> Result<&WitnessClient, OperatorError> {
        self.witness.as_ref().ok_or(OperatorError::NoWitness)
    }

    fn channel(&self, host: &HostName) -> Result<&Channel, OperatorError> {
        let known = || {
            let names: Vec<_> = self.hosts().map(HostName::as_str).collect();
            names.join(", ")
        };
        self.channels
            .get(host)
            .ok_or_else(|| OperatorError::NoHost {
                name: host.to_string(),
                known: known(),
            })
    }

    async fn ask(&self, host: &HostName, request: &Request) -> Result<Answer, OperatorError> {
        let channel = self.channel(host)?;
        let ask = || channel.request(StreamKind::Operator, request, request.patience());
        let answer = match ask().await {
            // A connection that was kept may have ended without our knowing.
            Err(RequestError::Refused { .. }) if request.may_be_repeated() => ask().await?,
            answer => answer?,
        };
        match answer {
            Answer::Refused { why } => Err(OperatorError::Refused { why }),
            answer => Ok(answer),
        }
    }

    fn confused(host: &HostName) -> OperatorError {
        OperatorError::Confused { host: host.clone() }
    }

    /// How a host does.
    pub async fn status(&self, host: &HostName) -> Result<HostStatus, OperatorError> {
        match self.ask(host, &Request::Status).await? {
            Answer::Status(status) => Ok(*status),
            _ => Err(Self::confused(host)),
        }
    }

    /// How every host does; those that do not answer with the reason. Asked all at once.
    pub async fn status_of_all(&self) -> BTreeMap<HostName, Result<HostStatus, OperatorError>> {
        let mut asked = Vec::new();
        for host in self.hosts() {
            asked.push(async move { (host.clone(), self.status(host).await) });
        }
        join_all(asked).await.into_iter().collect()
    }

    /// What every host has seen of records; those that do not answer with the reason. Asked all at
    /// once.
    pub async fn seen_by_all(
        &self,
    ) -> BTreeMap<HostName, Result<BTreeMap<VmName, Committed>, OperatorError>> {
        let ask = |(host, relay): (&HostName, &WitnessClient)| {
            let (host, relay) = (host.clone(), relay.clone());
            async move {
                let seen = relay.list_kept().await.map_err(OperatorError::from);
                let committed = seen.map(|seen| {
                    let known = seen.into_iter();
                    let known = known.filter_map(|(vm, kept)| Some((vm, kept.committed?)));
                    known.collect()
                });
                (host, committed)
            }
        };
        join_all(self.relays.iter().map(ask).collect())
            .await
            .into_iter()
            .collect()
    }

    /// Gives an order; the number of the host's last journal line before it.
    pub async fn order(&self, host: &HostName, order: &Request) -> Result<u64, OperatorError> {
        match self.ask(host, order).await? {
            Answer::Taken { journal } => Ok(journal),
            _ => Err(Self::confused(host)),
        }
    }

    /// Lets a host forget a VM.
    pub async fn remove(&self, host: &HostName, vm: VmName) -> Result<(), OperatorError> {
        match self.ask(host, &Request::Remove { vm }).await? {
            Answer::Done => Ok(()),
            _ => Err(Self::confused(host)),
        }
    }

    /// The metrics of a host.
    pub async fn metrics(&self, host: &HostName) -> Result<String, OperatorError> {
        match self.ask(host, &Request::Metrics).await? {
            Answer::Metrics(text) => Ok(text),
            _ => Err(Self::confused(host)),
        }
    }

    /// The journal's lines after a number, at most [`EVENTS_MAX`].
    pub async fn events(&self, host: &HostName, after: u64) -> Result<Vec<Line>, OperatorError> {
        let request = Request::Events {
            after,
            limit: EVENTS_MAX,
            follow: false,
        };
        match self.ask(host, &request).await? {
            Answer::Events(lines) => read_lines(host, &lines),
            _ => Err(Self::confused(host)),
        }
    }

    /// The journal's lines after a number and then as they are written.
    pub async fn follow(&self, host: &HostName, after: u64) -> Result<Lines, OperatorError> {
        let request = Request::Events {
            after,
            limit: EVENTS_MAX,
            follow: true,
        };
        let channel = self.channel(host)?;
        Ok(Lines {
            host: host.clone(),
            answers: channel.ask(StreamKind::Operator, &request).await?,
        })
    }

    /// The record of a VM.
    pub async fn record(&self, vm: &VmName) -> Result<Record, OperatorError> {
        let kept = self.witness()?.kept(vm).await?;
        let record = kept.committed.map(|committed| committed.record);
        record.ok_or_else(|| OperatorError::NoVm { vm: vm.clone() })
    }
}

/// The lines of a journal, as they are written.
pub struct Lines {
    host: HostName,
    answers: Answers<Answer>,
}

impl Lines {
    /// The next lines; `None` when the host ends. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<Vec<Line>>, OperatorError> {
        match self.answers.next().await? {
            Some(Answer::Events(lines)) => read_lines(&self.host, &lines).map(Some),
            Some(Answer::Refused { why }) => Err(OperatorError::Refused { why }),
            Some(_) => Err(Client::confused(&self.host)),
            None => Ok(None),
        }
    }
}

fn read_lines(host: &HostName, lines: &[String]) -> Result<Vec<Line>, OperatorError> {
    let read = lines.iter().map(|line| serde_json::from_str(line));
    read.collect::<Result<_, _>>()
        .map_err(|_| Client::confused(host))
}

/// Runs futures together on this task.
async fn join_all<F: Future>(futures: Vec<F>) -> Vec<F::Output> {
    let mut running: Vec<_> = futures
        .into_iter()
        .map(|future| (Box::pin(future), None))
        .collect();
    std::future::poll_fn(|cx| {
        let mut all = true;
        for (future, outcome) in &mut running {
            if outcome.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(done) => *outcome = Some(done),
                    std::task::Poll::Pending => all = false,
                }
            }
        }
        if all {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    running.into_iter().filter_map(|(_, done)| done).collect()
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
