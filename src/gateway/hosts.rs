//! The hosts of a cluster as a gateway sees them: warm QUIC connections, frame streams on them, and
//! the record's keeper who says which of them reigns.

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

/// Passes on what the keeper says, for as long as anybody listens.
async fn tell_reigns(
    mut following: Following,
    mut warmth: Warmth,
    reigns: mpsc::Sender<Reign<HostName>>,
) {
    loop {
        if let Some(Committed { record, .. }) = following.latest() {
            warmth.keep(&record);
            let reign = Reign {
                term: record.term,
                primary: record.primary.host.clone(),
            };
            if reigns.send(reign).await.is_err() {
                return;
            }
        }
        following.changed().await;
    }
}

impl Gateway {
    /// Serves clients of a VM of the cluster that a configuration describes, with the witness as
    /// the record's keeper, until something breaks that cannot be mended. While the witness is away
    /// it goes on with the primary that it knows.
    pub async fn run_in_cluster(self, config: &Config, vm: VmName) -> GatewayError {
        match self.join_cluster(config, vm).await {
            Ok(error) | Err(error) => error,
        }
    }

    async fn join_cluster(self, config: &Config, vm: VmName) -> Result<GatewayError, GatewayError> {
        let endpoint = Endpoint::client(&config.credentials()?)?;
        let witness = config.witness().ok_or_else(|| ConfigError::Missing {
            file: config.folder.join(crate::config::FILE_NAME),
            key: "witness",
            role: config.role,
        })?;
        let keeper = WitnessClient::new(&endpoint, witness);
        let hosts = Hosts::new(&endpoint, config);
        let (sender, reigns) = mpsc::channel(4);
        let news = tell_reigns(
            keeper.follow(vm.clone()),
            Warmth::new(hosts.clone()),
            sender,
        );
        let mut tasks = JoinSet::new();
        tasks.spawn(news);
        let name = config.name.clone();
        let error = self.run(vm, name, hosts, reigns).await;
        endpoint.close().await;
        Ok(error)
    }
}
