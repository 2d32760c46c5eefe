//! The driver of one VM on one host: turns the protocol's actions into files, processes and
//! connections, and what happens there into the protocol's inputs. One task owns all of it.
//!
//! ```text
//!   other hosts ──link──┐                             ┌──► log store, streams to replicas
//!   witness ────────────┤                             ├──► VMM process: boot, feed, go live
//!   VMM process ────────┼──► inputs ─► Node ─► actions┼──► witness: read, swap
//!   gateways ───────────┤                             ├──► outbox ─► gateways
//!   operators ──────────┘                             └──► journal
//! ```

mod act;
mod aside;
mod console;
mod gather;
mod guest;
mod hear;
mod home;
mod keeper;
mod parts;
mod reaper;
mod status;
mod streams;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, Header, LogIndex, LogTip, OpenError, Term};
use thiserror::Error;
use tokio::sync::mpsc::{Receiver, UnboundedReceiver, UnboundedSender, unbounded_channel};
use vmm::outbox::Outbox;

use crate::agent::budget::Budget;
use crate::agent::certs::Name;
use crate::agent::clock::now;
use crate::agent::frame_streams::{FrameStreams, GatewayStream};
use crate::agent::frames::{FrameLimits, FramePort};
use crate::agent::introduction::Introduction;
use crate::agent::journal::{Incident, Journal};
use crate::agent::link::Link;
use crate::agent::operator::{VmAnswer, VmQuestion};
use crate::agent::vm_process::{FromVm, Starter};
use crate::agent::witness::client::WitnessClient;
use crate::agent::witness::reporter::Reports;
use crate::config::Config;
use crate::gateway::frames::Boot;
use crate::protocol::{self, HostName, Input, Message, Node, Span, Time, VmName};
use crate::sentence::sentence;

use guest::Guest;
pub use guest::{Doing, GuestError};
pub use home::{Home, HomeError, log_budget};
use keeper::{FromStore, LogKeeper, LogNews};
use reaper::Reaper;
pub use reaper::does_not_die;
use streams::Streams;

/// So many ready inputs are taken before actions are carried out.
const INPUTS_AT_ONCE: usize = 64;

/// What nobody outside waits for is done this often.
const CHORES: Span = Span::from_millis(4);

/// So many orders wait for the first word of the keeper of records.
const EARLY_ORDERS: usize = 64;

/// When a driver ends, what the guest has said last may take so long to be written.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(2);

/// A VM that this host lets go waits for so long until what it logged is written.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// A message between the agents of two hosts.
#[expect(
    clippy::large_enum_variant,
    reason = "all but the first message of a connection are about a VM"
)]
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub enum HostMessage {
    /// Who they are: the first that each says.
    Introduction(Box<Introduction>),
    /// About a VM.
    Vm {
        /// Which.
        vm: VmName,
        /// What.
        message: Message,
    },
}

impl crate::agent::link::LinkMessage for HostMessage {
    fn lane(&self) -> crate::agent::link::Lane {
        use crate::agent::link::Lane;
        match self {
            Self::Introduction(_) => Lane::Control,
            Self::Vm { message, .. } => match message.lane() {
                protocol::Lane::Control => Lane::Control,
                protocol::Lane::Log => Lane::Log,
                protocol::Lane::Datagram => Lane::Datagram,
            },
        }
    }
}

/// What all drivers of a host share.
pub struct Surroundings {
    /// The host's configuration.
    pub config: Config,
    /// This host.
    pub host: HostName,
    /// The connections to the other hosts.
    pub link: Link<HostMessage>,
    /// Who keeps the records; a cluster without one changes no records.
    pub witness: Option<WitnessClient>,
    /// What this host has seen of records, and whether a record is to be believed.
    pub reports: Arc<Reports>,
    /// Where decisions are written down.
    pub journal: Arc<Journal>,
    /// The memory that all guests may have together.
    pub memory: Budget,
    /// The room where it keeps everything.
    pub space: crate::agent::space::SpaceFigures,
    /// The images and disk bases this host has, and how it gets those it lacks.
    pub library: crate::agent::library::Library,
    /// The program that is a VMM process; `None`: this program itself.
    pub vmm_binary: Option<PathBuf>,
    /// Where VMM processes are started.
    pub starter: Starter,
}

/// What reaches a driver from the agent.
pub enum ToDriver {
    /// Another host is connected, or not any more, or says something.
    Heard(Input),
    /// The gateway of this name, by its certificate, opened a stream for this VM.
    Gateway(Name, GatewayStream),
    /// An operator asks.
    Operator(VmQuestion, tokio::sync::oneshot::Sender<VmAnswer>),
}

/// What reaches a driver from its own background work.
enum Back {
    Input(Input),
    /// What came of making something durable.
    Persist(protocol::Durable, Result<(), String>),
    Parts(crate::protocol::VmRun, bool, Result<parts::Parts, String>),
    /// What the console was to write is written.
    Console,
}

/// What takes nothing more at the moment. The protocol is told that there is room when all do again.
#[derive(Default)]
struct Full {
    /// The durable state.
    state: bool,
    /// The log.
    log: bool,
}

impl Full {
    const fn is_anything(&self) -> bool {
        self.state || self.log
    }
}

/// That the VMM or the store failed. Told until a VMM has come beyond that place: where a disk is
/// full, the next one fails there again, and in between nothing is well.
struct Failure {
    /// In the journal's words.
    text: String,
    /// The end of the log by then.
    log: LogIndex,
}

/// Why a driver ended.
#[derive(Debug, Error)]
pub enum DriverError {
    /// The VM's folder.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The VM's log.
    #[error("the log of this VM cannot be opened: {0}")]
    Log(#[from] replay_log::OpenError),
}

/// The driver of one VM.
pub struct VmDriver {
    vm: VmName,
    env: Arc<Surroundings>,
    node: Node,
    home: Home,
    console: console::Console,
    log: LogKeeper,
    returns: UnboundedReceiver<FromStore>,
    streams: Streams,
    guest: Option<Guest>,
    /// Its predecessors that are not gone yet.
    reaper: Reaper,
    outbox: Outbox,
    /// Outputs may be let out whose log ends here.
    committed: LogIndex,
    gateways: FrameStreams<GatewayStream>,
    /// The highest term known to reign, for the gateways.
    known_term: Term,
    /// The header of the log, once there is one.
    header: Option<Header>,
    /// A run that waits for its header: the log is empty as yet.
    awaiting_header: Option<crate::protocol::VmRun>,
    /// The run whose parts are being put together.
    awaiting_parts: Option<crate::protocol::VmRun>,
    /// What that run is to do as soon as it has started.
    live_when_started: Option<(Term, LogTip)>,
    /// Frames for the guest that wait for others.
    arrivals: gather::Gather<(FrameSource, Bytes)>,
    /// When the chores were done last.
    chores_done: Time,
    told_received: FrameNumber,
    told_waiting: u64,
    inbox: Receiver<ToDriver>,
    back: UnboundedReceiver<Back>,
    to_back: UnboundedSender<Back>,
    inputs: VecDeque<Input>,
    /// The keeper of records has been asked and has answered, or could not be reached.
    asked_keeper: bool,
    /// Orders that came before that: the protocol could only refuse them.
    early_orders: Vec<protocol::Operator>,
    persisting: bool,
    persist_failed: bool,
    /// The newest durable state that is not being made durable yet: what came before it matters no
    /// more.
    to_persist: Option<crate::protocol::Durable>,
    acks: crate::protocol::Acks,
    full: Full,
    /// For `status`.
    failure: Option<Failure>,
}

impl VmDriver {
    /// The driver of a VM, with what this host has kept of it.
    pub fn open(
        vm: VmName,
        env: Arc<Surroundings>,
        inbox: Receiver<ToDriver>,
    ) -> Result<Self, DriverError> {
        let home = Home::open(&env.config.data, &vm)?;
        let durable = home.durable()?;
        let (to_returns, returns) = unbounded_channel();
        let options = home::log_options(&env.config, durable.acks);
        let (dir, held) = (home.log_dir(), durable.incarnation);
        let (log, damaged) = match LogKeeper::open(&dir, options, held, to_returns.clone()) {
            Ok(log) => (log, false),
            Err(error @ (OpenError::Damaged(_) | OpenError::Doubtful { .. })) => {
                // Whatever ends this process next, the empty log is never taken for what was held.
                home.persist(&protocol::Durable {
                    incarnation: protocol::Incarnation(0),
                    ..durable.clone()
                })?;
                let why = sentence(&error);
                let (anew, aside) = LogKeeper::open_anew(&dir, options, held, to_returns)?;
                let incident = Incident::LogSetAside { why };
                env.journal.write(Some(&vm), incident);
                if let Some(folder) = aside {
                    env.journal.write(Some(&vm), Incident::set_aside(&folder));
                }
                (anew, true)
            }
            Err(other) => return Err(other.into()),
        };
        if let Some(seen) = &durable.seen {
            env.reports.saw(&vm, seen);
        }
        let fresh = home::fresh()?;
        let restored = protocol::Restored {
            durable: durable.clone(),
            log: log.tip(),
            damaged,
            disk: home.disk_id(fresh)?,
            fresh,
        };
        let config = protocol::Config::new(env.host.clone(), vm.clone());
        let node = Node::new(config, restored, now());
        // The one beside the log may be that of the log before: it is for a cold boot alone.
        // That a log cannot be replayed is told when it is to be.
        let header = log.header().ok().flatten().cloned();
        let boot = Boot(header.as_ref().map_or([0; 16], |header| header.boot));
        let (to_back, back) = unbounded_channel();
        Ok(Self {
            gateways: FrameStreams::new(FramePort::new(vm.clone(), boot, FrameLimits::default())),
            vm,
            env,
            node,
            console: console::Console::new(home.clone()),
            home,
            log,
            returns,
            streams: Streams::default(),
            guest: None,
            reaper: Reaper::default(),
            outbox: Outbox::new(),
            committed: LogIndex::START,
            known_term: Term(0),
            header,
            awaiting_header: None,
            awaiting_parts: None,
            live_when_started: None,
            arrivals: gather::Gather::default(),
            chores_done: Time::default(),
            told_received: FrameNumber(0),
            told_waiting: 0,
            inbox,
            back,
            to_back,
            inputs: VecDeque::new(),
            asked_keeper: false,
            early_orders: Vec::new(),
            persisting: false,
            persist_failed: false,
            to_persist: None,
            acks: durable.acks,
            full: Full::default(),
            failure: None,
        })
    }

    /// Runs until the agent drops its end of the inbox. What is given is an error if a VMM process
    /// is not gone by then: a sentence that says so.
    pub async fn run(mut self) -> Result<(), String> {
        let mut shipped = false;
        loop {
            self.settle();
            if shipped && self.guest.as_ref().is_some_and(Guest::has_said_more) {
                // The connections send the batch before the outputs are looked at that wait for it.
                tokio::task::yield_now().await;
            }
            self.catch_up().await;
            let mut news = Vec::new();
            self.log.watch(now(), &mut news);
            self.log_news(news);
            // Whatever keeps this loop busy, the other drivers and the link have their turn.
            tokio::task::consume_budget().await;
            let due = self.due();
            shipped = false;
            let open = tokio::select! {
                biased;
                // First, because polling it also writes out what the port has to say.
                () = std::future::poll_fn(|context| self.gateways.poll(context, now())) => {
                    self.hear_gateways();
                    true
                }
                said = Self::guest_says(&mut self.guest) => {
                    shipped = matches!(said, Ok(Some(FromVm::Shipped { .. })));
                    self.hear_guest(said);
                    true
                }
                heard = self.inbox.recv() => match heard {
                    Some(heard) => { self.hear(heard); true }
                    None => false,
                },
                Some(returned) = self.returns.recv() => {
                    self.hear_store(returned);
                    true
                }
                Some(back) = self.back.recv() => {
                    self.hear_back(back);
                    true
                }
                () = tokio::time::sleep(due) => true,
            };
            if !open {
                break;
            }
            shipped = self.take_what_is_ready(shipped).await;
            self.look_after_guest();
            let now = now();
            while let Some(input) = self.inputs.pop_front() {
                self.node.handle(now, input);
            }
            if self.node.poll_timeout().is_some_and(|at| at <= now) {
                self.node.handle_timeout(now);
            }
        }
        self.end_guest();
        let gone = self.reaper.all_gone(reaper::PATIENCE).await;
        self.end_console().await;
        self.log.close(CLOSE_PATIENCE).await;
        gone
    }

    /// Waits a little for what the guest has said to be written.
    async fn end_console(&mut self) {
        let written = async {
            self.write_console();
            while !self.console.is_idle()
                && let Some(back) = self.back.recv().await
            {
                if matches!(back, Back::Console) {
                    self.console.written();
                    self.write_console();
                }
            }
        };
        if tokio::time::timeout(CONSOLE_PATIENCE, written)
            .await
            .is_err()
        {
            tracing::warn!("the end of a console is lost: the host's disk is busy");
        }
    }

    /// How long until there is something to do by itself.
    fn due(&self) -> Duration {
        if !self.inputs.is_empty() {
            return Duration::ZERO;
        }
        let chores = self.has_chores().then(|| self.chores_done.plus(CHORES));
        let arrivals = self.arrivals.poll_timeout();
        let look = self.guest.as_ref().map(Guest::look_due);
        let next = [self.node.poll_timeout(), chores, arrivals, look]
            .into_iter()
            .flatten();
        next.min().map_or(Duration::from_secs(1), |at| {
            Duration::from_nanos(at.since(now()).as_nanos())
        })
    }

    async fn guest_says(guest: &mut Option<Guest>) -> hear::GuestSaid {
        match guest {
            Some(guest) => guest.recv().await,
            None => std::future::pending().await,
        }
    }

    /// Takes what has arrived already, so that a late driver does not believe in a silence that is
    /// only its own. Nothing more is taken of a guest that has shipped a batch: that is sent on first.
    /// Says whether it has.
    async fn take_what_is_ready(&mut self, mut shipped: bool) -> bool {
        for _ in 0..INPUTS_AT_ONCE {
            let Ok(heard) = self.inbox.try_recv() else {
                break;
            };
            self.hear(heard);
        }
        for _ in 0..INPUTS_AT_ONCE {
            if shipped {
                break;
            }
            let said = tokio::select! {
                biased;
                said = Self::guest_says(&mut self.guest) => Some(said),
                () = std::future::ready(()) => None,
            };
            let Some(said) = said else { break };
            shipped = matches!(said, Ok(Some(FromVm::Shipped { .. })));
            self.hear_guest(said);
        }
        while let Ok(returned) = self.returns.try_recv() {
            self.hear_store(returned);
        }
        while let Ok(back) = self.back.try_recv() {
            self.hear_back(back);
        }
        shipped
    }

    fn log_news(&mut self, news: Vec<LogNews>) {
        for news in news {
            self.inputs.push_back(match news {
                LogNews::Stored(incarnation, tip) => Input::Stored { incarnation, tip },
                LogNews::Synced(incarnation, tip) => Input::Synced { incarnation, tip },
                LogNews::TipAt(peer, index, tip) => Input::TipAt { peer, index, tip },
                LogNews::Full(reason) => {
                    self.full.log = true;
                    Input::StoreFull { reason }
                }
                LogNews::Short(incarnation, tip) => Input::StoreShort { incarnation, tip },
                LogNews::Room => {
                    self.full.log = false;
                    if self.full.is_anything() {
                        continue;
                    }
                    Input::StoreRoom
                }
                LogNews::Failed(reason) => Input::StoreFailed { reason },
                LogNews::SetAside(folder) => {
                    let incident = Incident::set_aside(&folder);
                    self.env.journal.write(Some(&self.vm), incident);
                    continue;
                }
                LogNews::Filling {
                    percent,
                    used,
                    budget,
                } => {
                    let filling = Incident::LogFilling {
                        percent,
                        used,
                        budget,
                    };
                    self.env.journal.write(Some(&self.vm), filling);
                    continue;
                }
            });
        }
    }
}
