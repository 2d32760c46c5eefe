//! How an operator asks the hosts of a cluster: one stream for each request, on connections that are kept.

use std::collections::BTreeMap;
use std::time::Duration;

use thiserror::Error;

use super::{Answer, EVENTS_MAX, HostStatus, Request};
use crate::agent::certs::Credentials;
use crate::agent::journal::Line;
use crate::agent::link::{Answers, BindError, Channel, Endpoint, Peer, RequestError, StreamKind};
use crate::agent::witness::client::{AskError, WitnessClient};
use crate::config::{Config, ConfigError};
use crate::protocol::{Committed, HostName, Record, VmName};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the answer to an order may take: whoever gives it up does not know whether it was taken.
const ORDER_PATIENCE: Duration = Duration::from_secs(10);

impl Request {
    /// How long its answer may take.
    const fn patience(&self) -> Duration {
        if self.may_be_repeated() {
            PATIENCE
        } else {
            ORDER_PATIENCE
        }
    }
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
