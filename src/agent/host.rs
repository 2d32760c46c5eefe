//! The agent of one host: a driver for each VM, and what they share.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use super::bulk;
use super::certs::Identity;
use super::driver::{DriverError, GatewayOpened, HostMessage, Surroundings, ToDriver, VmDriver};
use super::journal::{Incident, Journal, OpenJournalError};
use super::library::{Library, LibraryError};
use super::link::{BindError, Endpoint, IncomingStream, Link, LinkEvent, StreamKind};
use super::operator::{
    self, Answer, Asked, HostStatus, LinkFigures, Request, VmAnswer, VmQuestion, VmStatus,
};
use super::witness::client::WitnessClient;
use crate::config::{Config, ConfigError};
use crate::gateway::frames::{Message as _, ToAgent, WireError};
use crate::protocol::{HostName, Input, NameError, Operator, VmName};

/// How many inputs may wait for a driver; then the link waits, and with it the peer.
const INBOX: usize = 4_096;
/// The longest first message of a gateway.
const HELLO_MAX: usize = 1_024;

/// Why an agent cannot run.
#[derive(Debug, Error)]
pub enum AgentError {
    /// The configuration is no good.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The address is taken.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// No journal.
    #[error(transparent)]
    Journal(#[from] OpenJournalError),
    /// A name that the protocol does not allow.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The data folder.
    #[error("the data folder {folder} cannot be used: {source}")]
    Data {
        /// Which.
        folder: String,
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

struct Agent {
    env: Arc<Surroundings>,
    drivers: BTreeMap<VmName, Running>,
    /// The hosts that are connected.
    up: BTreeSet<HostName>,
}

/// Runs the agent of a host until `stop` resolves.
///
/// Everything that heartbeats depend on runs on the thread that calls this: VMM processes die with
/// it, and nothing else shares it.
pub async fn run(
    config: Config,
    vmm_binary: Option<std::path::PathBuf>,
    stop: impl Future<Output = ()>,
) -> Result<(), AgentError> {
    let credentials = config.credentials()?;
    let address = config.listen.ok_or(ConfigError::Missing {
        file: config.folder.join(crate::config::FILE_NAME),
        key: "listen",
        role: super::certs::Role::Host,
    })?;
    let bases = config.data.join("bases");
    std::fs::create_dir_all(&bases).map_err(|source| AgentError::Data {
        folder: config.data.display().to_string(),
        source,
    })?;
    let endpoint = Endpoint::bind(&credentials, address)?;
    let host = HostName::new(config.name.as_str())?;
    let journal = Arc::new(Journal::open(&config.data.join("journal"), host.clone())?);
    journal.write(
        None,
        Incident::AgentStarted {
            version: env!("CARGO_PKG_VERSION").to_owned(),
        },
    );
    let (link, events) = Link::start(&endpoint, config.other_hosts());
    let library = Library::new(&config.data, endpoint.clone(), config.other_hosts());
    let witness = config
        .witness()
        .map(|peer| WitnessClient::new(&endpoint, peer));
    let env = Arc::new(Surroundings {
        config,
        host,
        link,
        witness,
        journal,
        library,
        vmm_binary,
    });
    let mut agent = Agent {
        env,
        drivers: BTreeMap::new(),
        up: BTreeSet::new(),
    };
    agent.take_known();
    let bulk = tokio::spawn({
        let endpoint = endpoint.clone();
        async move { bulk::serve_bases(&endpoint, bases).await }
    });
    tokio::select! {
        () = agent.serve(&endpoint, events) => {}
        () = stop => {}
    }
    bulk.abort();
    agent.end().await;
    endpoint.close().await;
    Ok(())
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
            }
        }
    }

    /// The driver of a VM; it is begun if there is none.
    fn take(&mut self, vm: &VmName, why: &str) -> Result<&Running, TakeError> {
        let limit = self.env.config.limits.vms;
        if !self.drivers.contains_key(vm) {
            if self.drivers.len() >= limit as usize {
                return Err(TakeError::TooMany { limit });
            }
            let (inbox, heard) = mpsc::channel(INBOX);
            let driver = VmDriver::open(vm.clone(), Arc::clone(&self.env), heard)?;
            self.env.journal.write(
                Some(vm),
                Incident::VmTaken {
                    why: why.to_owned(),
                },
            );
            for peer in &self.up {
                // The inbox is empty and holds more than there are hosts.
                let _ = inbox.try_send(ToDriver::Heard(Input::PeerUp(peer.clone())));
            }
            let task = tokio::spawn(driver.run());
            self.drivers.insert(vm.clone(), Running { inbox, task });
        }
        Ok(&self.drivers[vm])
    }

    async fn serve(
        &mut self,
        endpoint: &Endpoint,
        mut events: mpsc::Receiver<LinkEvent<HostMessage>>,
    ) {
        let mut frames = endpoint.serve(StreamKind::Frames, 16);
        let mut orders = operator::serve(endpoint, &self.env.journal);
        let (opened, mut gateways) = mpsc::channel(16);
        loop {
            tokio::select! {
                Some(event) = events.recv() => self.link_event(event).await,
                Some(stream) = frames.recv() => {
                    tokio::spawn(greet(stream, opened.clone()));
                }
                Some((vm, gateway)) = gateways.recv() => self.gateway(&vm, gateway).await,
                Some(asked) = orders.recv() => self.order(endpoint, asked).await,
                else => return,
            }
        }
    }

    async fn link_event(&mut self, event: LinkEvent<HostMessage>) {
        match event {
            LinkEvent::PeerUp { peer, .. } => {
                let Ok(peer) = HostName::new(peer.as_str()) else {
                    return;
                };
                self.env
                    .journal
                    .write(None, Incident::HostConnected { peer: peer.clone() });
                self.up.insert(peer.clone());
                self.tell_all(&Input::PeerUp(peer)).await;
            }
            LinkEvent::PeerDown { peer, ended, .. } => {
                let Ok(peer) = HostName::new(peer.as_str()) else {
                    return;
                };
                let (reason, detail) = (ended.word().to_owned(), ended.to_string());
                let lost = Incident::HostLost {
                    peer: peer.clone(),
                    reason,
                    detail,
                };
                self.env.journal.write(None, lost);
                self.up.remove(&peer);
                self.tell_all(&Input::PeerDown(peer)).await;
            }
            LinkEvent::Message {
                peer,
                message: HostMessage { vm, message },
                ..
            } => {
                let Ok(from) = HostName::new(peer.as_str()) else {
                    return;
                };
                let why = format!("{from} speaks of it");
                match self.take(&vm, &why) {
                    Ok(running) => {
                        let heard = ToDriver::Heard(Input::Message { from, message });
                        // A driver that is gone has said why.
                        let _ = running.inbox.send(heard).await;
                    }
                    Err(error) => tracing::warn!(%vm, %error, "a host speaks of a VM"),
                }
            }
        }
    }

    async fn tell_all(&self, input: &Input) {
        for running in self.drivers.values() {
            let _ = running.inbox.send(ToDriver::Heard(input.clone())).await;
        }
    }

    async fn gateway(&self, vm: &VmName, gateway: GatewayOpened) {
        // For a VM that is not looked after here the stream is dropped, and the gateway asks again
        // when the record's keeper names another host.
        if let Some(running) = self.drivers.get(vm) {
            let _ = running.inbox.send(ToDriver::Gateway(gateway)).await;
        }
    }

    async fn order(&mut self, endpoint: &Endpoint, asked: Asked) {
        let Asked {
            who,
            request,
            reply,
        } = asked;
        let answer = match self.obey(endpoint, &who, request).await {
            Ok(answer) => answer,
            Err(why) => Answer::Refused { why },
        };
        // An operator who does not wait any more needs no answer.
        let _ = reply.send(answer);
    }

    async fn obey(
        &mut self,
        endpoint: &Endpoint,
        who: &Identity,
        request: Request,
    ) -> Result<Answer, String> {
        let (vm, order) = match request {
            Request::Status => return Ok(Answer::Status(Box::new(self.status(endpoint).await))),
            Request::Run {
                vm,
                image,
                hosts,
                policy,
            } => {
                self.prepare(&vm, &image)?;
                (vm, Operator::Create { hosts, policy })
            }
            Request::Pair { vm, hosts, policy } => (vm, Operator::Pair { hosts, policy }),
            Request::Switchover { vm, to } => (vm, Operator::Switchover { to }),
            Request::AcceptLoss { vm } => (vm, Operator::AcceptLoss),
            Request::Remove { vm } => return self.remove(&vm).await,
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
        match self.ask(&vm, VmQuestion::Do(order)).await {
            Some(_) => Ok(Answer::Taken { journal }),
            None => Err(format!(
                "this host does not look after {vm}: ask its primary"
            )),
        }
    }

    /// Makes sure that a VM can be created from an image here.
    fn prepare(&mut self, vm: &VmName, image: &str) -> Result<(), String> {
        let found: Result<_, LibraryError> = self.env.library.image_named(image);
        found.map_err(|error| error.to_string())?;
        let home = super::driver::Home::open(&self.env.config.data, vm);
        let home = home.map_err(|error| error.to_string())?;
        home.set_image(image).map_err(|error| error.to_string())?;
        self.take(vm, "an operator creates it")
            .map_err(|error| error.to_string())?;
        Ok(())
    }

    async fn remove(&mut self, vm: &VmName) -> Result<Answer, String> {
        let Some(VmAnswer::Status(status)) = self.ask(vm, VmQuestion::Status).await else {
            return Err(format!("this host does not look after {vm}"));
        };
        let host = &self.env.host;
        let named = status.node.record.is_some_and(|record| {
            record.primary.host == *host || record.members.iter().any(|member| member.host == *host)
        });
        if named {
            return Err(format!(
                "the record of {vm} names this host: pair it without this host first"
            ));
        }
        if let Some(running) = self.drivers.remove(vm) {
            drop(running.inbox);
            let _ = running.task.await;
        }
        let folder = self.env.config.data.join("vms").join(vm.as_str());
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder)).await;
        if let Ok(Err(error)) = removed {
            return Err(format!("its folder cannot be removed: {error}"));
        }
        let why = "an operator removed it".to_owned();
        self.env
            .journal
            .write(Some(vm), Incident::VmRemoved { why });
        Ok(Answer::Done)
    }

    async fn status(&self, endpoint: &Endpoint) -> HostStatus {
        let counters = endpoint.counters();
        let hosts = self.env.config.other_hosts();
        let peers = hosts.iter().filter_map(|peer| {
            let name = HostName::new(peer.identity.name.as_str()).ok()?;
            let up = self.up.contains(&name);
            Some((name, up))
        });
        HostStatus {
            host: self.env.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now: super::clock::now(),
            peers: peers.collect(),
            journal: *self.env.journal.written().borrow(),
            vms: self.statuses().await,
            link: LinkFigures {
                log_bytes_raw: counters.log_bytes_raw.get(),
                log_bytes_sent: counters.log_bytes_sent.get(),
                log_bytes_received: counters.log_bytes_received.get(),
                refused_certificates: counters.refused_certificates.get(),
                refused_peers: counters.refused_peers.get(),
                closed_for_garbage: counters.closed_for_garbage.get(),
            },
        }
    }

    async fn statuses(&self) -> Vec<VmStatus> {
        let mut all = Vec::new();
        for vm in self.drivers.keys() {
            if let Some(VmAnswer::Status(status)) = self.ask(vm, VmQuestion::Status).await {
                all.push(*status);
            }
        }
        all
    }

    async fn ask(&self, vm: &VmName, question: VmQuestion) -> Option<VmAnswer> {
        let running = self.drivers.get(vm)?;
        let (reply, answer) = oneshot::channel();
        running
            .inbox
            .send(ToDriver::Operator(question, reply))
            .await
            .ok()?;
        answer.await.ok()
    }

    /// Ends every driver and its VMM process.
    async fn end(self) {
        for (_, running) in self.drivers {
            drop(running.inbox);
            let _ = running.task.await;
        }
    }
}

/// Reads a gateway's first message, to know which VM it wants, and hands the stream on whole.
async fn greet(mut stream: IncomingStream, opened: mpsc::Sender<(VmName, GatewayOpened)>) {
    let mut head = BytesMut::new();
    loop {
        let mut copy = head.clone();
        let hello: Result<Option<ToAgent>, WireError> = ToAgent::decode(&mut copy);
        match hello {
            Ok(Some(ToAgent::Hello(hello))) => {
                let recv = AsyncReadExt::chain(std::io::Cursor::new(head.freeze()), stream.recv);
                let gateway = tokio::io::join(recv, stream.send);
                // Only an agent that ends does not take it.
                let _ = opened.send((hello.vm, gateway)).await;
                return;
            }
            Ok(None) if head.remaining() < HELLO_MAX => {}
            _ => return,
        }
        match stream.recv.read_buf(&mut head).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
    }
}
