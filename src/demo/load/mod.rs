//! A load of Redis clients that checks every acknowledgement: each connection increments counters
//! of its own, so every answer must be one more than the last. At the end everything is read back.

mod client;
mod ledger;
mod resp;
#[cfg(test)]
mod tests;
mod timing;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::task::JoinSet;

pub use client::Broken;
pub use ledger::{Counter, Verdict};
pub use timing::{Gap, Histogram, Timeline};

use client::{Findings, Ready};

/// What the load does.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Where the Redis-speaking service is.
    pub address: SocketAddr,
    /// How many connections.
    pub connections: usize,
    /// How many counters each connection has.
    pub keys: usize,
    /// How many increments each connection sends before it waits for their answers.
    pub pipeline: usize,
    /// What the counters' names begin with.
    pub prefix: String,
    /// How long to rest after each round of answers.
    pub pause: Option<Duration>,
    /// How long an answer may take before the connection counts as broken.
    pub patience: Duration,
}

impl LoadConfig {
    /// Ten connections with ten counters each, one increment at a time.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            connections: 10,
            keys: 10,
            pipeline: 1,
            prefix: "load".into(),
            pause: None,
            patience: Duration::from_secs(15),
        }
    }
}

/// The load could not begin.
#[derive(Debug, Error)]
#[error("client {client} of the load cannot read its counters from {address}")]
pub struct LoadError {
    client: usize,
    address: SocketAddr,
    #[source]
    source: Broken,
}

/// How long each client rests after an answer while the load is eased.
const EASED: Duration = Duration::from_millis(100);

/// What the clients have in common.
#[derive(Debug)]
struct Shared {
    config: LoadConfig,
    stopping: AtomicBool,
    eased: AtomicBool,
    acknowledged: AtomicU64,
    broken: AtomicU64,
    timeline: Mutex<Timeline>,
}

impl Shared {
    fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// How long to rest after a round of answers.
    fn pause(&self) -> Option<Duration> {
        let eased = self.eased.load(Ordering::Relaxed).then_some(EASED);
        self.config.pause.max(eased)
    }

    fn count_broken(&self) {
        self.broken.fetch_add(1, Ordering::Relaxed);
    }

    fn count_answer(&self, at: Instant) {
        self.acknowledged.fetch_add(1, Ordering::Relaxed);
        self.timeline().answer(at);
    }

    fn timeline(&self) -> std::sync::MutexGuard<'_, Timeline> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A load that runs.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    clients: JoinSet<Findings>,
}

/// What the load found.
#[derive(Clone, Debug)]
pub struct LoadReport {
    /// Increments that were answered.
    pub acknowledged: u64,
    /// Acknowledged increments that the final reading did not find.
    pub lost: u64,
    /// Acknowledged increments that a later answer took back.
    pub undone: u64,
    /// Increments that were executed more than once.
    pub repeated: u64,
    /// Connections that broke, each with the reason.
    pub broken: Vec<String>,
    /// The longest time a client waited for its next answer.
    pub longest_gap: Option<Gap>,
    /// From sending an increment to its answer.
    pub latencies: Histogram,
}

impl LoadReport {
    /// Nothing lost, undone or repeated, and no connection broken.
    pub fn is_flawless(&self) -> bool {
        self.lost == 0 && self.undone == 0 && self.repeated == 0 && self.broken.is_empty()
    }
}

impl Load {
    /// Connects every client, reads what its counters hold, and lets all of them go.
    pub async fn start(config: LoadConfig) -> Result<Self, LoadError> {
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            eased: AtomicBool::new(false),
            acknowledged: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            timeline: Mutex::default(),
            config,
        });
        let mut ready = Vec::new();
        for index in 0..shared.config.connections {
            let client = Ready::prepare(Arc::clone(&shared), index)
                .await
                .map_err(|source| LoadError {
                    client: index,
                    address: shared.config.address,
                    source,
                })?;
            ready.push(client);
        }
        let mut clients = JoinSet::new();
        for client in ready {
            clients.spawn(client.run());
        }
        Ok(Self { shared, clients })
    }

    /// Lets the clients rest between their requests, or not any more. A new replica executes the log
    /// from power-on: on a machine that it shares with all others it would run after a full load
    /// for longer each time.
    pub fn ease(&self, eased: bool) {
        self.shared.eased.store(eased, Ordering::Relaxed);
    }

    /// Increments answered so far.
    pub fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Connections broken so far.
    pub fn broken(&self) -> u64 {
        self.shared.broken.load(Ordering::Relaxed)
    }

    /// When any client got its first answer after this instant, to a millisecond; `None` when none
    /// has yet. Answers that were on their way at that instant count: see
    /// [`Load::longest_gap_between`] for the pause that a failure makes.
    pub fn first_answer_after(&self, instant: Instant) -> Option<Instant> {
        self.shared.timeline().first_answer_after(instant)
    }

    /// The longest time in which no client at all got an answer, among those that touch these
    /// instants.
    pub fn longest_gap_between(&self, from: Instant, until: Instant) -> Option<Gap> {
        self.shared.timeline().longest_gap_between(from, until)
    }

    /// Lets every client get the answers that it waits for, reads everything back, and reports.
    pub async fn finish(mut self) -> LoadReport {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let mut report = LoadReport {
            acknowledged: 0,
            lost: 0,
            undone: 0,
            repeated: 0,
            broken: Vec::new(),
            longest_gap: None,
            latencies: Histogram::default(),
        };
        while let Some(joined) = self.clients.join_next().await {
            match joined {
                Ok(findings) => report.add(findings),
                Err(error) => report.broken.push(error.to_string()),
            }
        }
        report
    }
}

impl LoadReport {
    fn add(&mut self, findings: Findings) {
        self.acknowledged += findings.acknowledged;
        self.lost += findings.lost;
        self.undone += findings.undone;
        self.repeated += findings.repeated;
        self.broken.extend(findings.broken);
        self.latencies.merge(&findings.latencies);
        let longest = [self.longest_gap, findings.longest_gap];
        self.longest_gap = longest.into_iter().flatten().max_by_key(Gap::length);
    }
}
