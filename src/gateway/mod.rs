//! The gateway: a process beside the clients that publishes TCP ports of a guest and survives every
//! change of its primary. See README.md.

mod cluster;
mod device;
#[cfg(test)]
mod exactly_once;
pub mod frames;
mod hosts;
mod local;
mod metrics;
mod patience;
pub mod port;
mod pump;
pub mod ready;
pub mod stack;
pub mod stream;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use replay_log::GatewayIncarnation;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

pub use cluster::{Dial, Reign};
pub use hosts::Hosts;
pub use local::LocalGateway;
pub use metrics::{GatewayCounts, GatewayMetrics};
pub use stack::{StackConfig, StackError};

use cluster::ClusterCarrier;
use frames::incarnation_of;
use pump::{Carrier, Published, Pump};

use crate::agent::certs::Name;
use crate::agent::certs::proof::VerifierError;
use crate::agent::link::BindError;
use crate::config::ConfigError;
use crate::protocol::{Span, VmName};

/// One TCP port of the guest that is published on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Publish {
    /// Where clients connect.
    pub host: SocketAddr,
    /// The port they reach in the guest.
    pub guest_port: u16,
}

/// How many clients a gateway serves at the same time, unless it is told otherwise.
pub const MOST_CLIENTS: usize = 4_096;

/// What a gateway is to do.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// What is published.
    pub publish: Vec<Publish>,
    /// Where the guest is.
    pub stack: StackConfig,
    /// How many clients are served at the same time; others wait to be accepted.
    pub most_clients: usize,
    /// How many of them may come from one address; more are reset.
    pub most_clients_each: usize,
    /// How often clients are looked at that nothing is heard of: a connection that the kernel has
    /// given up must not keep its place.
    pub look_after_every: Span,
    /// Bytes of frames that may be on their way to a committed log. Beyond it nothing is read from
    /// clients.
    pub most_uncommitted: usize,
}

impl GatewayConfig {
    /// The usual bounds.
    pub const fn new(publish: Vec<Publish>, stack: StackConfig) -> Self {
        Self {
            publish,
            stack,
            most_clients: MOST_CLIENTS,
            most_clients_each: MOST_CLIENTS,
            look_after_every: Span::from_millis(30_000),
            most_uncommitted: 16 << 20,
        }
    }
}

/// Why a gateway cannot start, or has ended.
#[derive(Debug, Error)]
pub enum GatewayError {
    /// A port is taken or not ours.
    #[error("cannot publish {address}: choose another port or stop who uses it")]
    Bind {
        /// Which.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A published port stopped working.
    #[error("clients of the guest's port {guest_port} cannot be accepted any more")]
    Accept {
        /// The guest's port.
        guest_port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest-side stack cannot be set up.
    #[error(transparent)]
    Stack(#[from] StackError),
    /// The configuration is no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The certificates are no good, or there is no socket.
    #[error(transparent)]
    Endpoint(#[from] BindError),
    /// Records' signatures cannot be checked.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
    /// The VMM of a local gateway has ended.
    #[error("the machine has ended")]
    VmmGone,
}

/// A gateway that has bound its ports and serves nobody yet.
#[derive(Debug)]
pub struct Gateway {
    config: GatewayConfig,
    listeners: Vec<TcpListener>,
    metrics: Arc<GatewayMetrics>,
}

impl Gateway {
    /// Binds the published ports. Clients can connect from now on; they are served by
    /// [`Gateway::run`].
    pub async fn bind(config: GatewayConfig) -> Result<Self, GatewayError> {
        let mut listeners = Vec::new();
        for publish in &config.publish {
            let address = publish.host;
            let listener = TcpListener::bind(address)
                .await
                .map_err(|source| GatewayError::Bind { address, source })?;
            listeners.push(listener);
        }
        Ok(Self {
            config,
            listeners,
            metrics: Arc::default(),
        })
    }

    /// Where clients can connect, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners
            .iter()
            .filter_map(|listener| listener.local_addr().ok())
            .collect()
    }

    /// What is counted, for status and metrics.
    pub fn metrics(&self) -> Arc<GatewayMetrics> {
        Arc::clone(&self.metrics)
    }

    /// Serves clients of a VM of a cluster, as the gateway `name` of the certificate, until something
    /// breaks that cannot be mended. Streams to hosts come from `dial`, news of who reigns from
    /// `reigns` (from the record's keeper only).
    /// Cheapest on a runtime with one thread, which `dial`'s connections share.
    pub async fn run<D: Dial>(
        self,
        vm: VmName,
        name: Name,
        dial: D,
        reigns: mpsc::Receiver<Reign<D::Host>>,
    ) -> GatewayError {
        let most = self.config.most_uncommitted;
        let carrier = ClusterCarrier::new(vm, most, dial, reigns);
        self.pump(carrier, name).await
    }

    async fn pump(self, carrier: impl Carrier, name: Name) -> GatewayError {
        let published = self
            .listeners
            .into_iter()
            .zip(&self.config.publish)
            .map(|(listener, publish)| Published {
                listener,
                guest_port: publish.guest_port,
            })
            .collect();
        let pump = Pump::new(carrier, name, self.config, published, self.metrics);
        match pump {
            Ok(mut pump) => poll_fn(|cx| pump.poll(cx)).await,
            Err(error) => error,
        }
    }
}

/// A number that no other run of this gateway has, for all practical purposes.
fn fresh_incarnation(name: &Name) -> GatewayIncarnation {
    // The keys of a `RandomState` come from the operating system's random numbers.
    let clock = std::time::SystemTime::now();
    let run = RandomState::new().hash_one((std::process::id(), clock));
    incarnation_of(name, run as u32)
}
