//! The hosts of a cluster as a gateway sees them: warm QUIC connections, frame streams on them, and
//! the record that says which of them reigns.
//!
//! The record is the witness's, whoever tells of it: the witness itself, or a host that has seen it
//! and relays it with the witness's signature. So a gateway that is cut off from the witness finds
//! the new primary all the same.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::time::Duration;

use quinn::{RecvStream, SendStream};
use thiserror::Error;
use tokio::io::Join;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};

use super::{Dial, Gateway, GatewayError, Reign};
use crate::agent::certs::proof::Verifier;
use crate::agent::link::{Channel, Endpoint, StreamKind};
use crate::agent::witness::client::{Following, WitnessClient};
use crate::config::{Config, ConfigError};
use crate::protocol::{Committed, HostName, Record, VmName};

/// How long after a failed attempt a warm connection is tried again.
const WARM_RETRY: Duration = Duration::from_millis(250);

/// The configuration names no address for a host of the record.
#[derive(Debug, Error)]
#[error("the configuration has no address for host {host}: add it to [hosts]")]
struct UnknownHost {
    host: HostName,
}

/// Opens frame streams to the hosts of a cluster.
#[derive(Clone)]
pub struct Hosts {
    channels: BTreeMap<String, Channel>,
}

impl Hosts {
    /// All hosts that the configuration knows. Nothing is dialled yet.
    pub fn new(endpoint: &Endpoint, config: &Config) -> Self {
        let channels = config
            .other_hosts()
            .into_iter()
            .map(|peer| {
                let name = peer.identity.name.as_str().to_owned();
                (name, Channel::new(endpoint, peer))
            })
            .collect();
        Self { channels }
    }
}

impl Dial for Hosts {
    type Host = HostName;
    type Stream = Join<RecvStream, SendStream>;

    fn open(&self, host: &HostName) -> impl Future<Output = io::Result<Self::Stream>> + use<> {
        let channel = self.channels.get(host.as_str()).cloned();
        let host = host.clone();
        async move {
            let channel = channel.ok_or_else(|| io::Error::other(UnknownHost { host }))?;
            let opened = channel.open(StreamKind::Frames).await;
            let (send, recv) = opened.map_err(io::Error::other)?;
            Ok(tokio::io::join(recv, send))
        }
    }
}

/// Keeps connections to the hosts of one VM warm, so that a change of primary costs one round trip.
struct Warmth {
    hosts: Hosts,
    tasks: JoinSet<()>,
    kept: BTreeMap<String, AbortHandle>,
}

impl Warmth {
    fn new(hosts: Hosts) -> Self {
        Self {
            hosts,
            tasks: JoinSet::new(),
            kept: BTreeMap::new(),
        }
    }

    fn keep(&mut self, record: &Record) {
        let wanted: BTreeSet<&str> = record
            .members
            .iter()
            .chain([&record.primary])
            .map(|member| member.host.as_str())
            .chain(record.hosts.iter().map(HostName::as_str))
            .collect();
        self.kept.retain(|host, task| {
            let keep = wanted.contains(host.as_str());
            if !keep {
                task.abort();
            }
            keep
        });
        for host in wanted {
            if let Some(channel) = self.hosts.channels.get(host)
                && !self.kept.contains_key(host)
            {
                let task = self.tasks.spawn(keep_warm(channel.clone()));
                self.kept.insert(host.to_owned(), task);
            }
        }
    }
}

async fn keep_warm(channel: Channel) {
    loop {
        if let Ok(connection) = channel.connection().await {
            connection.closed().await;
        }
        tokio::time::sleep(WARM_RETRY).await;
    }
}

/// Who tells of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Teller {
    /// The witness itself.
    Witness,
    /// A host that has seen it.
    Host,
}

/// The newest record that anybody has told of.
struct News {
    vm: VmName,
    verifier: Verifier,
    newest: Option<Record>,
}

impl News {
    /// What was told, if it is news and a witness of this cluster has signed it.
    fn hear(&mut self, teller: Teller, told: Committed) -> Option<&Record> {
        let news = self.newest.as_ref().is_none_or(|known| {
            if known.lineage == told.record.lineage {
                known.version() < told.record.version()
            } else {
                // Another VM of this name: hosts may still tell of the one before.
                teller == Teller::Witness
            }
        });
        if !news {
            return None;
        }
        if let Err(error) = self.verifier.verify(&self.vm, &told) {
            tracing::warn!(?teller, %error, "a record is not believed");
            return None;
        }
        Some(self.newest.insert(told.record))
    }
}

/// Passes on what one of them tells, for as long as anybody listens.
async fn listen(
    teller: Teller,
    mut following: Following,
    heard: mpsc::Sender<(Teller, Committed)>,
) {
    loop {
        if let Some(told) = following.latest()
            && heard.send((teller, told)).await.is_err()
        {
            return;
        }
        following.changed().await;
    }
}

/// Passes on who reigns, for as long as anybody listens.
async fn tell_reigns(
    mut news: News,
    mut heard: mpsc::Receiver<(Teller, Committed)>,
    mut warmth: Warmth,
    reigns: mpsc::Sender<Reign<HostName>>,
) {
    while let Some((teller, told)) = heard.recv().await {
        let Some(record) = news.hear(teller, told) else {
            continue;
        };
        warmth.keep(record);
        let reign = Reign {
            term: record.term,
            primary: record.primary.host.clone(),
        };
        if reigns.send(reign).await.is_err() {
            return;
        }
    }
}

impl Gateway {
    /// Serves clients of a VM of the cluster that a configuration describes, until something breaks
    /// that cannot be mended. Who reigns is told by the witness and, while that is away, by the
    /// hosts.
    pub async fn run_in_cluster(self, config: &Config, vm: VmName) -> GatewayError {
        match self.join_cluster(config, vm).await {
            Ok(error) | Err(error) => error,
        }
    }

    async fn join_cluster(self, config: &Config, vm: VmName) -> Result<GatewayError, GatewayError> {
        let credentials = config.credentials()?;
        let endpoint = Endpoint::client(&credentials)?;
        let witness = config.witness().ok_or_else(|| ConfigError::Missing {
            file: config.folder.join(crate::config::FILE_NAME),
            key: "witness",
            role: config.role,
        })?;
        let news = News {
            vm: vm.clone(),
            verifier: Verifier::new(&credentials.authority)?,
            newest: None,
        };
        let hosts = Hosts::new(&endpoint, config);
        let mut tasks = JoinSet::new();
        let (tell, heard) = mpsc::channel(4);
        let keeper = WitnessClient::new(&endpoint, witness);
        let following = keeper.follow(vm.clone());
        tasks.spawn(listen(Teller::Witness, following, tell.clone()));
        for channel in hosts.channels.values() {
            let following = WitnessClient::over(channel.clone()).follow(vm.clone());
            tasks.spawn(listen(Teller::Host, following, tell.clone()));
        }
        let (sender, reigns) = mpsc::channel(4);
        let warmth = Warmth::new(hosts.clone());
        tasks.spawn(tell_reigns(news, heard, warmth, sender));
        let name = config.name.clone();
        let error = self.run(vm, name, hosts, reigns).await;
        endpoint.close().await;
        Ok(error)
    }
}

#[cfg(test)]
mod tests {
    use replay_log::{LogIndex, Term};

    use super::*;
    use crate::agent::certs::authority::Authority;
    use crate::agent::certs::proof::Signer;
    use crate::agent::certs::{Identity, Role};
    use crate::protocol::{Epoch, Incarnation, Lineage, Member, Policy, Proof};

    fn record(lineage: u64, term: u64) -> Record {
        Record {
            lineage: Lineage(lineage),
            term: Term(term),
            epoch: Epoch(term),
            primary: Member {
                host: HostName::new("a").expect("a name"),
                incarnation: Incarnation(1),
            },
            members: vec![],
            hosts: vec![],
            policy: Policy::default(),
            through: LogIndex::START,
            begins: LogIndex::START,
            follows: replay_log::Term(0),
            loss: false,
            failed: None,
        }
    }

    #[test]
    fn only_what_is_newer_and_signed_is_news() {
        let authority = Authority::generate().expect("an authority");
        let name = "w".parse().expect("a name");
        let role = Role::Witness;
        let witness = authority
            .issue(&Identity { role, name })
            .expect("a certificate");
        let signer = Signer::new(&witness).expect("a signer");
        let vm = VmName::new("shop").expect("a name");
        let sign = |record: Record| signer.sign(&vm, record).expect("signed");
        let mut news = News {
            vm: vm.clone(),
            verifier: Verifier::new(&witness.authority).expect("a verifier"),
            newest: None,
        };
        assert!(news.hear(Teller::Host, sign(record(1, 2))).is_some());
        assert!(news.hear(Teller::Host, sign(record(1, 2))).is_none());
        assert!(news.hear(Teller::Witness, sign(record(1, 1))).is_none());
        let forged = Committed {
            record: record(1, 9),
            proof: Proof::default(),
        };
        assert!(news.hear(Teller::Host, forged).is_none());
        // A host may still tell of a VM that is gone; the witness knows.
        assert!(news.hear(Teller::Host, sign(record(2, 9))).is_none());
        assert!(news.hear(Teller::Witness, sign(record(2, 1))).is_some());
        assert!(news.hear(Teller::Host, sign(record(2, 3))).is_some());
    }
}
