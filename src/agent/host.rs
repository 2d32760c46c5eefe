//! The agent of one host: a driver for each VM, and what they share.

mod peers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::budget::Budget;
use super::bulk;
use super::certs::{Identity, Name};
use super::clock;
use super::driver::{DriverError, HostMessage, Surroundings, ToDriver, VmDriver};
use super::frame_streams::{GatewayStream, greet};
use super::introduction::Introduction;
use super::journal::{Incident, Journal, OpenJournalError};
use super::library::{Library, LibraryError};
use super::link::{BindError, Endpoint, Link, LinkEvent, StreamKind};
use super::lock::{FolderLock, LockFolderError};
use super::metrics::{self, ServeMetricsError};
use super::operator::{
    self, Answer, Asked, HostStatus, LinkFigures, Request, VmAnswer, VmQuestion,
};
use super::thread::on_own_thread;
use super::witness::client::WitnessClient;
use crate::config::{Config, ConfigError};
use crate::doctor::offer;
use crate::protocol::{HostName, Input, Operator, Span, Time, VmName};
use crate::sentence::sentence;

/// How many inputs may wait for a driver; then the link waits, and with it the peer.
const INBOX: usize = 4_096;
/// The record of a VM that another host speaks of is asked for no more often than this.
const ASK_AGAIN: Span = Span::from_millis(300);
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
    /// The address for metrics is taken.
    #[error(transparent)]
    Metrics(#[from] ServeMetricsError),
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

/// Why a VM cannot be looked after here.
#[derive(Debug, Error)]
enum TakeError {
    #[error(transparent)]
    Driver(#[from] DriverError),
    #[error("this host looks after {limit} VMs already: raise limits.vms in its configuration")]
    TooMany { limit: u32 },
}

struct Running {
    inbox: mpsc::Sender<ToDriver>,
    task: JoinHandle<()>,
}

/// What the agent's own tasks want of it.
enum Wish {
    /// The record of this VM names this host.
    Take { vm: VmName, why: String },
    /// The record of this VM does not name this host, and an operator wants it gone.
    Remove {
        vm: VmName,
        reply: oneshot::Sender<Answer>,
    },
    /// An operator asks for a VM, and its image was looked for.
    Create {
        asked: Asked,
        found: Result<(), String>,
    },
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
    let host = HostName::from(&config.name);
    let journal = Arc::new(Journal::open(&config.data.join("journal"), host.clone())?);
    let version = env!("CARGO_PKG_VERSION").to_owned();
    journal.write(None, Incident::AgentStarted { version });
    let (link, events) = Link::start(&endpoint, config.other_hosts());
    let library = Library::new(
        &config.data,
        endpoint.clone(),
        config.other_hosts(),
        offer::Host::introduced(&introduction),
    );
    let witness = config
        .witness()
        .map(|peer| WitnessClient::new(&endpoint, peer));
    let metrics_at = config.metrics;
    let env = Arc::new(Surroundings {
        vmm_binary: vmm_binary.or_else(|| config.vmm_binary.clone()),
        memory: Budget::new(config.limits.guest_memory),
        config,
        host,
        link,
        witness,
        journal,
        library,
    });
    let (wishes, wished) = mpsc::channel(64);
    let mut agent = Agent {
        env,
        endpoint: endpoint.clone(),
        drivers: BTreeMap::new(),
        introduction,
        up: BTreeSet::new(),
        unfit: BTreeMap::new(),
        asked: BTreeMap::new(),
        wishes: wishes.clone(),
    };
    agent.take_known();
    let outcome = tokio::select! {
        () = agent.serve(events, wished) => Ok(()),
        () = bulk::serve_bases(&endpoint, bases) => Ok(()),
        failed = serve_metrics(metrics_at, wishes) => failed.map_err(AgentError::from),
        () = stop => Ok(()),
    };
    agent.end().await;
    endpoint.close().await;
    outcome
}

/// Ends only with a failure.
async fn serve_metrics(
    address: Option<SocketAddr>,
    wishes: mpsc::Sender<Wish>,
) -> Result<(), ServeMetricsError> {
    let Some(address) = address else {
        return std::future::pending().await;
    };
    metrics::serve(address, move || {
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
    /// Looks after every VM that this host has a folder of.
    fn take_known(&mut self) {
        let folder = self.env.config.data.join("vms");
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let names: Vec<VmName> = entries
            .filter_map(|entry| VmName::new(&entry.file_name().to_string_lossy()).ok())
            .collect();
        for vm in names {
            if let Err(error) = self.take(&vm, "it has a folder here") {
                tracing::error!(%vm, %error, "this VM is not looked after");
                let why = sentence(&error);
                self.env
                    .journal
                    .write(Some(&vm), Incident::VmUnreadable { why });
            }
        }
    }

    /// The driver of a VM; it is begun if there is none.
    fn take(&mut self, vm: &VmName, why: &str) -> Result<(), TakeError> {
        let limit = self.env.config.limits.vms;
        if self.drivers.contains_key(vm) {
            return Ok(());
        }
        if self.drivers.len() >= limit as usize {
            return Err(TakeError::TooMany { limit });
        }
        let (inbox, heard) = mpsc::channel(INBOX);
        let driver = VmDriver::open(vm.clone(), Arc::clone(&self.env), heard)?;
        let why = why.to_owned();
        self.env.journal.write(Some(vm), Incident::VmTaken { why });
        for peer in &self.up {
            // The inbox is empty and holds more than there are hosts.
            let _ = inbox.try_send(ToDriver::Heard(Input::PeerUp(peer.clone())));
        }
        let task = tokio::spawn(driver.run());
        self.drivers.insert(vm.clone(), Running { inbox, task });
        Ok(())
    }

    async fn serve(
        &mut self,
        mut events: mpsc::Receiver<LinkEvent<HostMessage>>,
        mut wished: mpsc::Receiver<Wish>,
    ) {
        let mut frames = self.endpoint.serve(StreamKind::Frames, 16);
        let mut orders = operator::serve(&self.endpoint, &self.env.journal);
        let (opened, mut gateways) = mpsc::channel(16);
        // Nothing here waits for a driver's answer: what is awaited is room in its inbox.
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.link_event(event).await,
                Some(stream) = frames.recv() => {
                    let opened = opened.clone();
                    tokio::spawn(async move {
                        if let Some(gateway) = greet(stream).await {
                            // Only an agent that ends does not take it.
                            let _ = opened.send(gateway).await;
                        }
                    });
                }
                Some((vm, who, stream)) = gateways.recv() => self.gateway(&vm, who, stream).await,
                Some(asked) = orders.recv() => {
                    if let Some(asked) = self.asked(asked) {
                        self.order(asked);
                    }
                }
                Some(wish) = wished.recv() => self.grant(wish),
                else => return,
            }
        }
    }

    /// Another host speaks of a VM that is not looked after here. What counts is the record.
    fn spoken_of(&mut self, vm: VmName, by: &HostName) {
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
            match witness.read(&vm).await {
                Ok(Some(record)) if record.concerns(&host) => {
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
            Wish::Remove { vm, reply } => self.remove(vm, reply),
            Wish::Create { asked, found } => match found {
                Ok(()) => self.order(asked),
                Err(why) => drop(asked.reply.send(Answer::Refused { why })),
            },
            Wish::Status(reply) => {
                let status = self.status();
                tokio::spawn(async move { reply.send(status.await) });
            }
        }
    }

    async fn gateway(&self, vm: &VmName, who: Name, stream: GatewayStream) {
        // For a VM that is not looked after here the stream is dropped, and the gateway asks again
        // when the record's keeper names another host.
        if let Some(running) = self.drivers.get(vm) {
            let _ = running.inbox.send(ToDriver::Gateway(who, stream)).await;
        }
    }

    // ---- operators ----

    /// Takes an operator's request. A VM's image is looked for first, and read for that: heartbeats
    /// do not wait for a disk.
    fn asked(&self, asked: Asked) -> Option<Asked> {
        let Request::Run { image, .. } = &asked.request else {
            return Some(asked);
        };
        let (env, image) = (Arc::clone(&self.env), image.clone());
        let wishes = self.wishes.clone();
        tokio::task::spawn_blocking(move || {
            let found = env.library.image_named(&image).map(drop);
            let found = found.map_err(|error: LibraryError| sentence(&error));
            // Without the agent there is nobody to create it.
            let _ = wishes.blocking_send(Wish::Create { asked, found });
        });
        None
    }

    /// Begins what is asked for. Answers that have to be waited for come from a task.
    fn order(&mut self, asked: Asked) {
        let Asked {
            who,
            request,
            reply,
        } = asked;
        match self.obey(&who, request) {
            // An operator who does not wait any more needs no answer.
            Ok(answer) => drop(tokio::spawn(answer(reply))),
            Err(why) => drop(reply.send(Answer::Refused { why })),
        }
    }

    fn obey(&mut self, who: &Identity, request: Request) -> Result<Answering, String> {
        let (vm, order) = match request {
            Request::Status => {
                let status = self.status();
                return Ok(answering(
                    async move { Answer::Status(Box::new(status.await)) },
                ));
            }
            Request::Run {
                vm,
                image,
                hosts,
                policy,
            } => {
                self.check_fit(&hosts)?;
                self.prepare(&vm, &image)?;
                (vm, Operator::Create { hosts, policy })
            }
            Request::Pair { vm, hosts, policy } => {
                self.check_fit(&hosts)?;
                (vm, Operator::Pair { hosts, policy })
            }
            Request::Switchover { vm, to } => (vm, Operator::Switchover { to }),
            Request::AcceptLoss { vm } => (vm, Operator::AcceptLoss),
            Request::Remove { vm } => return Ok(self.check_removal(vm)),
            Request::Events { .. } | Request::Metrics => {
                return Err("this is answered elsewhere".to_owned());
            }
        };
        let journal = *self.env.journal.written().borrow();
        let ordered = Incident::Ordered {
            operator: who.to_string(),
            order: format!("{order:?}"),
        };
        self.env.journal.write(Some(&vm), ordered);
        let asked = self.ask(&vm, VmQuestion::Do(order));
        Ok(answering(async move {
            match asked.await {
                Some(_) => Answer::Taken { journal },
                None => Answer::Refused { why: not_here(&vm) },
            }
        }))
    }

    /// Notes the image, which is here, that a VM is to be created from.
    fn prepare(&mut self, vm: &VmName, image: &str) -> Result<(), String> {
        let home = super::driver::Home::open(&self.env.config.data, vm);
        let home = home.map_err(|error| sentence(&error))?;
        // A VM that has run here keeps what it was created from: the order will be refused.
        if home.header().map_err(|error| sentence(&error))?.is_none() {
            home.set_image(image).map_err(|error| sentence(&error))?;
        }
        self.take(vm, "an operator creates it")
            .map_err(|error| sentence(&error))
    }

    /// Removes a VM once it is known that its record does not name this host.
    fn check_removal(&self, vm: VmName) -> Answering {
        let (asked, wishes) = (self.ask(&vm, VmQuestion::Status), self.wishes.clone());
        let host = self.env.host.clone();
        Box::new(move |reply: oneshot::Sender<Answer>| {
            Box::pin(async move {
                let Some(VmAnswer::Status(status)) = asked.await else {
                    let why = not_here(&vm);
                    return drop(reply.send(Answer::Refused { why }));
                };
                let record = status.node.record;
                if record.is_some_and(|record| record.copy_on(&host).is_some()) {
                    let why =
                        format!("the record of {vm} names {host}: pair it without {host} first");
                    return drop(reply.send(Answer::Refused { why }));
                }
                // Fails only when the agent ends.
                let _ = wishes.send(Wish::Remove { vm, reply }).await;
            })
        })
    }

    fn remove(&mut self, vm: VmName, reply: oneshot::Sender<Answer>) {
        let running = self.drivers.remove(&vm);
        let env = Arc::clone(&self.env);
        tokio::spawn(async move {
            if let Some(Running { inbox, task }) = running {
                drop(inbox);
                // It has ended, in whatever way.
                let _ = task.await;
            }
            let folder = env.config.data.join("vms").join(vm.as_str());
            let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder));
            let answer = match removed.await {
                Ok(Err(error)) => Answer::Refused {
                    why: format!("the folder of {vm} cannot be removed: {error}"),
                },
                _ => Answer::Done,
            };
            let why = "an operator removed it".to_owned();
            env.journal.write(Some(&vm), Incident::VmRemoved { why });
            // An operator who does not wait any more needs no answer.
            let _ = reply.send(answer);
        });
    }

    /// Asks every driver, and puts together what they answer.
    fn status(&self) -> impl Future<Output = HostStatus> + Send + 'static {
        let counters = self.endpoint.counters();
        let hosts = self.env.config.other_hosts();
        let peers = hosts.iter().map(|peer| {
            let name = HostName::from(&peer.identity.name);
            let up = self.up.contains(&name);
            (name, up)
        });
        let status = HostStatus {
            host: self.env.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now: clock::now(),
            peers: peers.collect(),
            journal: *self.env.journal.written().borrow(),
            vms: Vec::new(),
            link: LinkFigures {
                log_bytes_raw: counters.log_bytes_raw.get(),
                log_bytes_sent: counters.log_bytes_sent.get(),
                log_bytes_received: counters.log_bytes_received.get(),
                refused_certificates: counters.refused_certificates.get(),
                refused_peers: counters.refused_peers.get(),
                closed_for_garbage: counters.closed_for_garbage.get(),
            },
        };
        let vms = self.drivers.keys();
        let asked: Vec<_> = vms.map(|vm| self.ask(vm, VmQuestion::Status)).collect();
        async move {
            let mut status = status;
            for asked in asked {
                if let Some(VmAnswer::Status(vm)) = asked.await {
                    status.vms.push(*vm);
                }
            }
            status
        }
    }

    /// Asks a driver; `None` when there is none or it has ended.
    fn ask(
        &self,
        vm: &VmName,
        question: VmQuestion,
    ) -> impl Future<Output = Option<VmAnswer>> + Send + 'static {
        let inbox = self.drivers.get(vm).map(|running| running.inbox.clone());
        async move {
            let (reply, answer) = oneshot::channel();
            let asked = ToDriver::Operator(question, reply);
            inbox?.send(asked).await.ok()?;
            answer.await.ok()
        }
    }

    /// Ends every driver and its VMM process.
    async fn end(self) {
        for (_, running) in self.drivers {
            drop(running.inbox);
            let _ = running.task.await;
        }
    }
}

/// An answer that has to be waited for, and where it goes.
type Answering =
    Box<dyn FnOnce(oneshot::Sender<Answer>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

fn answering(answer: impl Future<Output = Answer> + Send + 'static) -> Answering {
    Box::new(move |reply| {
        Box::pin(async move {
            // An operator who does not wait any more needs no answer.
            let _ = reply.send(answer.await);
        })
    })
}

fn not_here(vm: &VmName) -> String {
    format!("this host does not look after {vm}: ask its primary, which 'understudy status' names")
}
