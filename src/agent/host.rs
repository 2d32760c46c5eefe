//! The agent of one host: a driver for each VM, and what they share.

mod inbox;
mod orders;
mod peers;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::time::MissedTickBehavior;

use super::budget::Budget;
use super::bulk;
use super::certs::Name;
use super::certs::proof::{Verifier, VerifierError};
use super::clock;
use super::driver::{HostMessage, Surroundings, ToDriver, VmDriver};
use super::frame_streams::{GatewayStream, greet};
use super::introduction::Introduction;
use super::journal::{Incident, Journal, OpenJournalError};
use super::library::Library;
use super::link::{BindError, Endpoint, Link, LinkEvent, StreamKind};
use super::lock::{FolderLock, LockFolderError};
use super::metrics::{self, ServeMetricsError};
use super::operator::{self, Answer, Asked, HostStatus};
use super::thread::on_own_thread;
use super::vm_process::Starter;
use super::witness::client::WitnessClient;
use super::witness::reporter::{self, Opening, Reports};
use crate::config::{Config, ConfigError};
use crate::doctor::offer;
use crate::protocol::{HostName, Input, Span, Time, VmName};
use crate::sentence::sentence;
use inbox::{INBOX, Running};

/// The record of a VM that another host speaks of is asked for no more often than this.
const ASK_AGAIN: Span = Span::from_millis(300);
/// How often the protocol is told how far the other hosts are.
const DISTANCE_EVERY: Duration = Duration::from_secs(1);
/// A VM that could not be opened is not opened again before.
const OPEN_AGAIN: Span = Span::from_millis(10_000);
/// So many VMs that are not looked after here are remembered.
const ASKED_MAX: usize = 256;

/// Why an agent cannot run.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The configuration is no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Another agent runs on the same data.
    #[error(transparent)]
    Lock(#[from] LockFolderError),
    /// The address is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No journal.
    #[error(transparent)]
    Journal(#[from] OpenJournalError),
    /// Records' signatures cannot be checked.
    #[error(transparent)]
    Verifier(#[from] VerifierError),
    /// No thread.
    #[error("the agent's thread cannot be started: see to the limits of this user")]
    Thread(#[from] std::io::Error),
    /// The data folder.
    #[error(
        "the data folder {folder} cannot be used: run as the user who owns it, on a disk with space"
    )]
    Data {
        /// Which.
        folder: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// Why a VM is not taken.
#[derive(Debug, Error)]
enum TakeError {
    #[error("this host looks after {limit} VMs already: raise limits.vms in its configuration")]
    TooMany { limit: u32 },
    #[error("this VM is being removed from this host: try again when that is done")]
    BeingRemoved,
    #[error("{why}")]
    Unreadable { why: String },
}

/// What the agent's own tasks want of it.
enum Wish {
    /// The record of this VM names this host.
    Take { vm: VmName, why: String },
    /// The driver of this VM did not listen, and has room now.
    Listens { vm: VmName },
    /// What is kept of this VM cannot be used.
    Unreadable { vm: VmName, why: String },
    /// The record of this VM does not name this host, and an operator wants it gone.
    Remove {
        vm: VmName,
        reply: oneshot::Sender<Answer>,
    },
    /// That was done, or could not be done.
    Removed { vm: VmName },
    /// An operator asks for a VM, and its image was looked for.
    Create {
        asked: Asked,
        found: Result<(), String>,
    },
    /// Metrics cannot be served, or can again.
    Trouble { why: Option<String> },
    /// Somebody reads the metrics.
    Status(oneshot::Sender<HostStatus>),
}

struct Agent {
    env: Arc<Surroundings>,
    endpoint: Endpoint,
    drivers: BTreeMap<VmName, Running>,
    /// What this host tells others of itself.
    introduction: Introduction,
    /// The hosts that are connected, have introduced themselves, and can share VMs with this one.
    up: BTreeSet<HostName>,
    /// Those that cannot, and why.
    unfit: BTreeMap<HostName, String>,
    /// VMs that another host speaks of: when their record was last asked for.
    asked: BTreeMap<VmName, Time>,
    /// VMs whose folders could not be used: when, and why.
    unreadable: BTreeMap<VmName, (Time, String)>,
    /// VMs whose folders are being removed: nobody may begin with them anew meanwhile.
    removing: BTreeSet<VmName>,
    /// What of the host itself does not work: about what, and a sentence.
    troubles: BTreeMap<String, String>,
    wishes: mpsc::Sender<Wish>,
}

/// Runs the agent of a host until `stop` resolves: on a thread of its own, so that heartbeats wait
/// for nothing else, and VMM processes die with nothing less than the agent.
pub async fn run(
    config: Config,
    vmm_binary: Option<PathBuf>,
    stop: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    run_as(config, vmm_binary, Introduction::of_this_host(), stop).await
}

/// The same for a host that says this of itself.
pub async fn run_as(
    config: Config,
    vmm_binary: Option<PathBuf>,
    introduction: Introduction,
    stop: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    let (tell, told) = oneshot::channel::<()>();
    let told = async move {
        // To be dropped is to be told, too.
        let _ = told.await;
    };
    let running = on_own_thread("agent", move || {
        run_here(config, vmm_binary, introduction, told)
    });
    let mut running = std::pin::pin!(running);
    tokio::select! {
        ended = &mut running => ended?,
        () = stop => {
            drop(tell);
            running.await?
        }
    }
}

async fn run_here(
    config: Config,
    vmm_binary: Option<PathBuf>,
    introduction: Introduction,
    stop: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    let credentials = config.credentials()?;
    let address = config.listen.ok_or(ConfigError::Missing {
        file: config.folder.join(crate::config::FILE_NAME),
        key: "listen",
        role: super::certs::Role::Host,
    })?;
    // Before anything is read or written there; held until everything else has ended.
    let _only = FolderLock::take(&config.data)?;
    let bases = config.data.join("bases");
    std::fs::create_dir_all(&bases).map_err(|source| AgentError::Data {
        folder: config.data.clone(),
        source,
    })?;
    let endpoint = Endpoint::bind(&credentials, address)?;
    let (wishes, wished) = mpsc::channel(64);
    let metrics_at = config.metrics;
    let (mut agent, events) = Agent::new(
        config,
        vmm_binary,
        introduction,
        &endpoint,
        Verifier::new(&credentials.authority)?,
        wishes.clone(),
    )?;
    agent.take_known().await;
    let journal = Arc::clone(&agent.env.journal);
    let reporting = agent.report();
    let relaying = reporter::relay(&endpoint, Arc::clone(&agent.env.reports));
    let env = Arc::clone(&agent.env);
    let name = env.host.as_str();
    let budget = super::driver::log_budget(&env.config);
    let outcome = tokio::select! {
        () = super::space::watch(&env.config.data, name, budget, &env.journal, &env.space) => Ok(()),
        () = agent.serve(events, wished) => Ok(()),
        () = bulk::serve_bases(&endpoint, bases) => Ok(()),
        () = reporting => Ok(()),
        () = relaying => Ok(()),
        never = serve_metrics(metrics_at, wishes, &journal) => match never {},
        () = stop => Ok(()),
    };
    agent.end().await;
    endpoint.close().await;
    outcome
}

/// Serves metrics where they are wanted. Where they cannot be had, the journal and the status say so.
async fn serve_metrics(
    address: Option<SocketAddr>,
    wishes: mpsc::Sender<Wish>,
    journal: &Journal,
) -> Infallible {
    let Some(address) = address else {
        return std::future::pending().await;
    };
    let trouble = wishes.clone();
    let tell = |error: Option<&ServeMetricsError>| {
        let why = error.map(|error| sentence(error));
        if let Some(why) = why.clone() {
            journal.write(None, Incident::MetricsUnserved { why });
        }
        // Fails when the agent is busy or ends: the journal has it.
        let _ = trouble.try_send(Wish::Trouble { why });
    };
    metrics::serve(address, metrics::TRY_AGAIN, tell, move || {
        let wishes = wishes.clone();
        async move {
            let (reply, status) = oneshot::channel();
            // Without an answer the agent ends.
            let _ = wishes.send(Wish::Status(reply)).await;
            status
                .await
                .map_or_else(|_| String::new(), |status| metrics::render(&status))
        }
    })
    .await
}

impl Agent {
    /// The agent of a host that speaks through this endpoint, and what it hears of the other hosts.
    fn new(
        config: Config,
        vmm_binary: Option<PathBuf>,
        introduction: Introduction,
        endpoint: &Endpoint,
        verifier: Verifier,
        wishes: mpsc::Sender<Wish>,
    ) -> Result<(Self, mpsc::Receiver<LinkEvent<HostMessage>>), AgentError> {
        let host = HostName::from(&config.name);
        let journal = Arc::new(Journal::open(&config.data.join("journal"), host.clone())?);
        let version = env!("CARGO_PKG_VERSION").to_owned();
        journal.write(None, Incident::AgentStarted { version });
        let (link, events) = Link::start(endpoint, config.other_hosts());
        let library = Library::new(
            &config.data,
            endpoint.clone(),
            config.other_hosts(),
            offer::Host::introduced(&introduction),
        );
        let witness = config
            .witness()
            .map(|peer| WitnessClient::new(endpoint, peer));
        let env = Arc::new(Surroundings {
            vmm_binary: vmm_binary.or_else(|| config.vmm_binary.clone()),
            starter: Starter::new()?,
            memory: Budget::new(config.limits.guest_memory),
            space: super::space::SpaceFigures::default(),
            config,
            host,
            link,
            witness,
            reports: Arc::new(Reports::new(verifier)),
            journal,
            library,
        });
        let agent = Self {
            env,
            endpoint: endpoint.clone(),
            drivers: BTreeMap::new(),
            introduction,
            up: BTreeSet::new(),
            unfit: BTreeMap::new(),
            asked: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            removing: BTreeSet::new(),
            troubles: BTreeMap::new(),
            wishes,
        };
        Ok((agent, events))
    }

    /// Tells the witness what this host has seen, for as long as there is one.
    fn report(&self) -> impl Future<Output = ()> + Send + 'static {
        let (reports, journal) = (Arc::clone(&self.env.reports), Arc::clone(&self.env.journal));
        let witness = self.env.witness.clone();
        async move {
            match witness {
                Some(witness) => reporter::report(reports, witness, journal).await,
                None => std::future::pending().await,
            }
        }
    }

    /// Looks after every VM that this host has a folder of.
    async fn take_known(&mut self) {
        let folder = self.env.config.data.join("vms");
        let list = move || -> Vec<VmName> {
            let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
            entries
                .filter_map(|entry| VmName::new(&entry.file_name().to_string_lossy()).ok())
                .collect()
        };
        // Only a runtime that ends does not list them.
        let names = tokio::task::spawn_blocking(list).await.unwrap_or_default();
        for vm in names {
            if let Err(error) = self.take(&vm, "it has a folder here") {
                self.is_unreadable(&vm, sentence(&error));
            }
        }
    }

    /// Whether this host may look after a VM.
    fn may_take(&self, vm: &VmName) -> Result<(), TakeError> {
        let limit = self.env.config.limits.vms;
        if self.removing.contains(vm) {
            return Err(TakeError::BeingRemoved);
        }
        if !self.drivers.contains_key(vm) && self.drivers.len() >= limit as usize {
            return Err(TakeError::TooMany { limit });
        }
        let lately = |at: Time| clock::now().since(at) < OPEN_AGAIN;
        match self.unreadable.get(vm) {
            Some((at, why)) if lately(*at) => Err(TakeError::Unreadable { why: why.clone() }),
            _ => Ok(()),
        }
    }

    /// Begins a driver for this VM if there is none. What is kept of the VM is read on a thread that
    /// may wait for a disk; meanwhile the driver's inbox keeps what it is told.
    fn take(&mut self, vm: &VmName, why: &str) -> Result<(), TakeError> {
        self.may_take(vm)?;
        if self.drivers.contains_key(vm) {
            return Ok(());
        }
        let (inbox, heard) = mpsc::channel(INBOX);
        let (env, wishes) = (Arc::clone(&self.env), self.wishes.clone());
        let opening = self.env.reports.opening();
        let task = tokio::spawn(look_after(vm.clone(), env, heard, wishes, opening));
        let mut running = Running::new(inbox, task);
        let why = why.to_owned();
        self.env.journal.write(Some(vm), Incident::VmTaken { why });
        for peer in &self.up {
            // The inbox is empty and holds more than there are hosts.
            running.tell(peer, Input::PeerUp(peer.clone()));
        }
        self.drivers.insert(vm.clone(), running);
        Ok(())
    }

    /// What is kept of a VM cannot be used. It is tried again when somebody speaks of the VM.
    fn is_unreadable(&mut self, vm: &VmName, why: String) {
        tracing::error!(%vm, why, "this VM is not looked after");
        self.drivers.remove(vm);
        let before = self
            .unreadable
            .insert(vm.clone(), (clock::now(), why.clone()));
        if before.is_none_or(|(_, before)| before != why) {
            let unreadable = Incident::VmUnreadable { why };
            self.env.journal.write(Some(vm), unreadable);
        }
    }

    async fn serve(
        &mut self,
        mut events: mpsc::Receiver<LinkEvent<HostMessage>>,
        mut wished: mpsc::Receiver<Wish>,
    ) {
        let mut frames = self.endpoint.serve(StreamKind::Frames, 16);
        let mut orders = operator::serve(&self.endpoint, &self.env.journal);
        let (opened, mut gateways) = mpsc::channel(16);
        let mut measure = tokio::time::interval(DISTANCE_EVERY);
        measure.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Nothing here waits for a driver, not even for room in its inbox.
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.link_event(event),
                Some(stream) = frames.recv() => {
                    let opened = opened.clone();
                    tokio::spawn(async move {
                        if let Some(gateway) = greet(stream).await {
                            // Only an agent that ends does not take it.
                            let _ = opened.send(gateway).await;
                        }
                    });
                }
                Some((vm, who, stream)) = gateways.recv() => self.gateway(&vm, &who, stream),
                Some(asked) = orders.recv() => {
                    if let Some(asked) = self.asked(asked) {
                        self.order(asked);
                    }
                }
                Some(wish) = wished.recv() => self.grant(wish),
                _ = measure.tick() => self.tell_distances(),
                else => return,
            }
        }
    }

    /// Another host speaks of a VM that is not looked after here. What counts is the record.
    fn spoken_of(&mut self, vm: VmName, by: &HostName) {
        if self.may_take(&vm).is_err() {
            return;
        }
        let now = clock::now();
        let lately = |asked: &Time| now.since(*asked) < ASK_AGAIN;
        if self.asked.get(&vm).is_some_and(lately) {
            return;
        }
        if self.asked.len() >= ASKED_MAX {
            self.asked.retain(|_, asked| lately(asked));
        }
        let Some(witness) = self.env.witness.clone() else {
            return;
        };
        self.asked.insert(vm.clone(), now);
        let (host, wishes) = (self.env.host.clone(), self.wishes.clone());
        let why = format!("{by} speaks of it, and its record names this host");
        tokio::spawn(async move {
            match witness.read(&vm, None).await {
                Ok(Some(committed)) if committed.record.concerns(&host) => {
                    // Fails only when the agent ends.
                    let _ = wishes.send(Wish::Take { vm, why }).await;
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(%vm, %error, "its record cannot be read"),
            }
        });
    }

    fn grant(&mut self, wish: Wish) {
        match wish {
            Wish::Take { vm, why } => {
                if let Err(error) = self.take(&vm, &why) {
                    tracing::error!(%vm, %error, "this VM is not looked after");
                }
            }
            Wish::Listens { vm } => self.listens(&vm),
            Wish::Unreadable { vm, why } => self.is_unreadable(&vm, why),
            Wish::Remove { vm, reply } => self.remove(vm, reply),
            Wish::Removed { vm } => drop(self.removing.remove(&vm)),
            Wish::Create { asked, found } => match found {
                Ok(()) => self.order(asked),
                Err(why) => drop(asked.reply.send(Answer::Refused { why })),
            },
            Wish::Trouble { why: Some(why) } => {
                self.troubles.insert("metrics".to_owned(), why);
            }
            Wish::Trouble { why: None } => drop(self.troubles.remove("metrics")),
            Wish::Status(reply) => {
                let status = self.status();
                tokio::spawn(async move { reply.send(status.await) });
            }
        }
    }

    fn gateway(&self, vm: &VmName, who: &Name, stream: GatewayStream) {
        // For a VM that is not looked after here the stream is dropped, and the gateway asks again
        // when the record's keeper names another host.
        if let Some(running) = self.drivers.get(vm) {
            running.gateway(who, stream);
        }
    }

    /// Ends every driver and its VMM process.
    async fn end(self) {
        // Their inboxes are dropped, all of them before any end is waited for.
        let drivers = self.drivers.into_iter();
        let tasks: Vec<_> = drivers.map(|(vm, running)| (vm, running.end())).collect();
        for (vm, task) in tasks {
            if let Ok(Err(why)) = task.await {
                tracing::warn!(%vm, "{why}");
            }
        }
    }
}

/// Looks after a VM until its inbox is dropped.
async fn look_after(
    vm: VmName,
    env: Arc<Surroundings>,
    inbox: mpsc::Receiver<ToDriver>,
    wishes: mpsc::Sender<Wish>,
    opening: Opening,
) -> Result<(), String> {
    let name = vm.clone();
    let opened = tokio::task::spawn_blocking(move || VmDriver::open(name, env, inbox)).await;
    drop(opening);
    let why = match opened {
        Ok(Ok(driver)) => return driver.run().await,
        Ok(Err(error)) => sentence(&error),
        // Only a runtime that ends lets it go, or a bug.
        Err(ended) => ended.to_string(),
    };
    // Fails only when the agent ends.
    let _ = wishes.send(Wish::Unreadable { vm, why }).await;
    Ok(())
}
