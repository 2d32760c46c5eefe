//! The simulated world: what happens next, and to whom. [`actions`](super::actions) carries out
//! what nodes want done, [`faults`](super::faults) breaks things.

use super::facts::{Checker, Fact};
use super::faults::{Fault, Faults};
use super::gateway::{CLIENTS, Gateway, Session, ToGateway, ToHost};
use super::gray::Gray;
use super::host::Host;
use super::network::{LaneKey, LinkChange, Network};
use super::options::{Counts, Options, Report, Violation};
use super::queue::{MICRO, MILLI, Moment, Queue, SECOND};
use super::random::Random;
use super::setup::Setup;
use super::trace::Trace;
use super::vm::{Bases, Disk};
use super::witness::{Answer, Ask, Witness};
use crate::protocol::{
    Committed, HostName, Input, Message, Node, Operator, Record, RoleName, VmRun,
};
use replay_log::Store;
use vmm::model::DISK_SIZE;

/// How long nothing is broken at first: time to pair.
const CALM: Moment = SECOND;
/// How often the whole is looked at.
pub(super) const WATCH: Moment = 50 * MILLI;
/// After everything is repaired, progress must come within this.
const PATIENCE: Moment = 30 * SECOND;

/// Something that is going to happen.
#[derive(Debug)]
pub(super) enum Event {
    NodeDue {
        host: usize,
        life: u32,
    },
    Lane(LaneKey),
    Datagram {
        link: u64,
        from: usize,
        to: usize,
        message: Box<Message>,
    },
    Input {
        host: usize,
        life: u32,
        input: Box<Input>,
    },
    Persisted {
        host: usize,
        life: u32,
    },
    Stored {
        host: usize,
        life: u32,
    },
    Synced {
        host: usize,
        life: u32,
        tag: crate::protocol::Incarnation,
    },
    VmTurn {
        host: usize,
        life: u32,
        run: VmRun,
    },
    Asked {
        host: usize,
        life: u32,
        id: u64,
        ask: Ask,
        asked: Moment,
    },
    Answered {
        host: usize,
        life: u32,
        id: u64,
        answer: Option<Answer>,
        swap: bool,
        asked: Moment,
    },
    Links,
    Watch,
    /// What a hostile peer says.
    Forged {
        to: usize,
        from: HostName,
        message: Box<Message>,
    },
    Fill {
        host: usize,
        span: Moment,
    },
    /// An operator puts the keeper right again.
    Recover,
    KeeperAway,
    KeeperBack,
    /// An operator orders one.
    Switchover,
    GatewayTick,
    GatewayRead(Option<Record>),
    ToHost {
        host: usize,
        session: Session,
        message: ToHost,
    },
    ToGateway {
        from: usize,
        session: Session,
        message: ToGateway,
    },
    Client(usize),
    Thaw(usize),
    Break,
    Repair(Fault),
    Heal,
    Rescue,
}

/// Everything.
pub(super) struct World {
    pub(super) now: Moment,
    pub(super) queue: Queue<Event>,
    pub(super) options: Options,
    pub(super) setup: Setup,
    pub(super) random: Random,
    pub(super) hosts: Vec<Host>,
    pub(super) network: Network,
    pub(super) witness: Witness,
    pub(super) gateway: Gateway,
    pub(super) bases: Bases,
    pub(super) facts: Vec<Fact>,
    pub(super) counts: Counts,
    pub(super) trace: Trace,
    pub(super) faults: Faults,
    pub(super) checker: Checker,
    pub(super) violation: Option<Violation>,
    pub(super) healed: Option<Moment>,
    pub(super) fresh_answers: [u32; CLIENTS],
    pub(super) next_ask: u64,
    pub(super) to_gateway_at: Moment,
    pub(super) to_host_at: Moment,
    pub(super) gateway_blocks: Vec<u32>,
    pub(super) witness_blocks: Vec<u32>,
    pub(super) next_machine: u64,
    /// What stays broken in the end.
    pub(super) gray: Option<Gray>,
    /// An order that only the simulation knew of.
    pub(super) untold: Option<&'static str>,
    /// How often an operator has looked for an order in vain.
    pub(super) unnamed: u32,
    /// What earlier terms than this let out belongs to a history that was given up, in part.
    pub(super) given_up_before: replay_log::Term,
    /// Reigns have failed at one place, and nobody claims any more.
    pub(super) stopped: bool,
}

impl World {
    pub(super) fn new(seed: u64, options: Options) -> Self {
        let mut random = Random::new(seed);
        let setup = Setup::choose(&mut random);
        let hosts: Vec<_> = (0..setup.hosts)
            .map(|n| Host::new(n, &mut random))
            .collect();
        let network = Network::new(&setup, random.fork());
        let witness = Witness::new(&mut random);
        let faults = Faults::choose(&mut random);
        let zeros = vec![0; DISK_SIZE as usize];
        let bases = Bases::from([(Disk::base(&zeros).digest, zeros)]);
        Self {
            now: 0,
            queue: Queue::new(),
            options,
            random,
            network,
            witness,
            gateway: Gateway::new(setup.delay),
            bases,
            facts: Vec::new(),
            counts: Counts::default(),
            trace: Trace::new(options.trace),
            faults,
            checker: Checker::new(),
            violation: None,
            healed: None,
            fresh_answers: [0; CLIENTS],
            next_ask: 0,
            to_gateway_at: 0,
            to_host_at: 0,
            gateway_blocks: vec![0; setup.hosts],
            witness_blocks: vec![0; setup.hosts],
            next_machine: 0,
            gray: None,
            untold: None,
            unnamed: 0,
            given_up_before: replay_log::Term(0),
            stopped: false,
            hosts,
            setup,
        }
    }

    pub(super) fn run(mut self, seed: u64) -> Report {
        self.begin();
        while self.violation.is_none() && !self.done() {
            let Some((at, event)) = self.queue.next() else {
                break;
            };
            self.now = self.now.max(at);
            self.counts.steps += 1;
            self.step(event);
            self.check();
            if let Some(healed) = self.healed
                && self.now > healed + PATIENCE + self.setup.slowness()
            {
                self.violation = Some(Violation {
                    invariant: "progress",
                    at: self.now,
                    what: self.stuck(),
                });
            }
        }
        if self.violation.is_none() {
            self.last_words();
        }
        self.counts.simulated = self.now;
        Report {
            seed,
            options: self.options,
            violation: self.violation,
            counts: self.counts,
            trace_hash: self.trace.hash(),
            trace: self.trace.lines(),
        }
    }

    fn begin(&mut self) {
        for host in 0..self.hosts.len() {
            self.start_host(host);
        }
        let hosts = self.hosts.iter().map(|host| host.name.clone()).collect();
        let policy = self.setup.policy;
        let create = Operator::Create { hosts, policy };
        self.plan_input(50 * MILLI, 0, Input::Operator(create));
        self.queue.plan(0, Event::Links);
        self.queue.plan(CALM, Event::Watch);
        self.queue.plan(MILLI, Event::GatewayTick);
        for client in 0..CLIENTS {
            self.queue.plan(100 * MILLI, Event::Client(client));
        }
        self.queue.plan(CALM, Event::Break);
        self.queue.plan(CALM + self.faults.phase, Event::Heal);
    }

    // --- steps -------------------------------------------------------------------------------

    fn step(&mut self, event: Event) {
        if let Some(host) = host_of(&event)
            && self.hosts[host].paused_until > self.now
        {
            if self.hosts[host].frozen.is_empty() {
                let until = self.hosts[host].paused_until;
                self.queue.plan(until, Event::Thaw(host));
            }
            self.hosts[host].frozen.push(event);
            return;
        }
        self.trace.step(self.now, &event);
        match event {
            Event::NodeDue { host, life } => self.node_due(host, life),
            Event::Lane(key) => self.lane(key),
            Event::Datagram {
                link,
                from,
                to,
                message,
            } => {
                if self.network.is_current(link, from, to) && self.network.takes(from, to) {
                    self.deliver(from, to, *message);
                }
            }
            Event::Input { host, life, input } => {
                if self.lives(host, life) {
                    self.input(host, *input);
                }
            }
            Event::Persisted { host, life } => self.persisted(host, life),
            Event::Stored { host, life } => self.stored(host, life),
            Event::Synced { host, life, tag } => self.synced(host, life, tag),
            Event::VmTurn { host, life, run } => self.vm_turn(host, life, run),
            Event::Asked {
                host,
                life,
                id,
                ask,
                asked,
            } => self.asked(host, life, id, ask, asked),
            Event::Answered {
                host,
                life,
                id,
                answer,
                swap,
                asked,
            } => {
                if self.lives(host, life) {
                    self.answered(host, id, answer, swap, asked);
                }
            }
            Event::Links => self.links(),
            Event::Watch => self.watch(),
            Event::Forged { to, from, message } => self.hear(to, &from, *message),
            Event::Fill { host, span } => self.fill(host, span),
            Event::Recover => self.recover(),
            Event::KeeperAway => self.witness.down += 1,
            Event::KeeperBack => self.keeper_back(),
            Event::Switchover => self.switch_over(),
            Event::GatewayTick => self.gateway_tick(),
            Event::GatewayRead(record) => self.gateway_read(record.as_ref()),
            Event::ToHost {
                host,
                session,
                message,
            } => self.gateway_says(host, session, message),
            Event::ToGateway {
                from,
                session,
                message,
            } => self.gateway_hears(from, session, message),
            Event::Client(client) => self.client(client),
            Event::Thaw(host) => self.thaw(host),
            Event::Break => self.break_something(),
            Event::Repair(fault) => self.repair(fault),
            Event::Heal => self.heal(),
            Event::Rescue => self.rescue(),
        }
    }

    /// A frozen host goes on: everything that came meanwhile, in order. Its driver reads what has
    /// arrived before it looks at the clock.
    fn thaw(&mut self, host: usize) {
        let until = self.hosts[host].paused_until;
        if until > self.now {
            self.queue.plan(until, Event::Thaw(host));
            return;
        }
        for event in std::mem::take(&mut self.hosts[host].frozen) {
            let late = u64::from(matches!(event, Event::NodeDue { .. }));
            self.queue.plan(self.now + late * MICRO, event);
        }
    }

    pub(super) fn lives(&self, host: usize, life: u32) -> bool {
        self.hosts[host].life == life && self.hosts[host].is_up()
    }

    pub(super) fn plan_input(&mut self, after: Moment, host: usize, input: Input) {
        let life = self.hosts[host].life;
        let input = Box::new(input);
        self.queue
            .plan(self.now + after, Event::Input { host, life, input });
    }

    /// Hands something to a node and does what it wants done.
    pub(super) fn input(&mut self, host: usize, input: Input) {
        let time = self.hosts[host].time(self.now);
        if let Some(node) = &mut self.hosts[host].node {
            node.handle(time, input);
            self.drive(host);
        }
    }

    fn node_due(&mut self, host: usize, life: u32) {
        if !self.lives(host, life) {
            return;
        }
        self.hosts[host].due = None;
        let time = self.hosts[host].time(self.now);
        if let Some(node) = &mut self.hosts[host].node
            && node.poll_timeout().is_some_and(|at| at <= time)
        {
            node.handle_timeout(time);
        }
        self.drive(host);
    }

    /// Carries out a node's actions, and plans its next timeout.
    pub(super) fn drive(&mut self, host: usize) {
        while let Some(action) = self.hosts[host].node.as_mut().and_then(Node::poll_action) {
            self.perform(host, action);
        }
        self.pump(host);
        let here = &mut self.hosts[host];
        let Some(timeout) = here.node.as_ref().and_then(Node::poll_timeout) else {
            return;
        };
        let at = here.clock.moment(timeout.as_nanos()).max(self.now);
        if here.due.is_none_or(|due| at < due) {
            here.due = Some(at);
            let life = here.life;
            self.queue.plan(at, Event::NodeDue { host, life });
        }
    }

    pub(super) fn start_host(&mut self, host: usize) {
        let mutation = self.options.mutation;
        self.hosts[host].start(self.now, mutation);
        self.drive(host);
        if let Some(stranger) = self.faults.stranger.clone() {
            self.plan_input(MILLI, host, Input::PeerUp(stranger));
        }
    }

    fn lane(&mut self, key: LaneKey) {
        match self.network.arrive(self.now, key) {
            Ok(Some(message)) => self.deliver(key.from, key.to, message),
            Ok(None) => {}
            Err(later) => self.queue.plan(later, Event::Lane(key)),
        }
    }

    fn deliver(&mut self, from: usize, to: usize, message: Message) {
        if !self.hosts[to].is_up() {
            return;
        }
        match &message {
            Message::Ack(ack) | Message::Report(ack) => {
                self.hosts[to].streams.acknowledged(from, ack.held);
            }
            Message::Heartbeat {
                version, committed, ..
            } if version.term <= self.hosts[to].store.tip().term => {
                let knew = &mut self.hosts[to].knew;
                *knew = (*knew).max(*committed);
            }
            Message::Hello { .. } if self.hosts[from].lies() && self.reigns(to) => {
                self.hosts[from].storage.found_out = true;
            }
            _ => {}
        }
        let from = self.hosts[from].name.clone();
        self.hear(to, &from, message);
    }

    /// The driver hands a message in, and nothing that is said to be of the keeper and is not.
    fn hear(&mut self, to: usize, from: &HostName, message: Message) {
        let forged = |committed: &Committed| !self.witness.vouches(committed);
        let message = match message {
            Message::Record(committed) if forged(&committed) => return,
            Message::Refused {
                term,
                why,
                promise,
                record: Some(committed),
            } if forged(&committed) => Message::Refused {
                term,
                why,
                promise,
                record: None,
            },
            message => message,
        };
        if self.hosts[to].is_up() {
            let from = from.clone();
            self.input(to, Input::Message { from, message });
        }
    }

    fn reigns(&self, host: usize) -> bool {
        let node = self.hosts[host].node.as_ref();
        node.is_some_and(|node| {
            use RoleName::{GoingLive, HandingOver, Primary};
            matches!(node.status().role, GoingLive | Primary | HandingOver)
        })
    }

    fn links(&mut self) {
        self.queue.plan(self.now + 20 * MILLI, Event::Links);
        let lives: Vec<_> = self
            .hosts
            .iter()
            .map(|host| host.is_up().then_some(host.life))
            .collect();
        for change in self.network.keep(self.now, &lives) {
            let (up, a, b) = match change {
                LinkChange::Up(a, b) => (true, a, b),
                LinkChange::Down(a, b) => (false, a, b),
            };
            for (host, peer) in [(a, b), (b, a)] {
                if self.hosts[host].is_up() {
                    if !up {
                        self.hosts[host].streams.stop(peer);
                    }
                    let peer = self.hosts[peer].name.clone();
                    let input = if up {
                        Input::PeerUp(peer.clone())
                    } else {
                        Input::PeerDown(peer.clone())
                    };
                    // A frozen host hears of it when it thaws, in order.
                    let far = Input::Distance {
                        host: peer,
                        rtt: self.setup.round_trip(),
                    };
                    self.plan_input(0, host, input);
                    if up {
                        self.plan_input(self.setup.delay, host, far);
                    }
                }
            }
        }
    }
}

/// What two outputs must have in common to be the same.
pub(super) fn content(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// The host whose freezing holds an event up.
fn host_of(event: &Event) -> Option<usize> {
    match event {
        Event::NodeDue { host, .. }
        | Event::Input { host, .. }
        | Event::Persisted { host, .. }
        | Event::Stored { host, .. }
        | Event::Synced { host, .. }
        | Event::VmTurn { host, .. }
        | Event::Answered { host, .. }
        | Event::ToHost { host, .. } => Some(*host),
        Event::Lane(key) => Some(key.to),
        Event::Datagram { to, .. } | Event::Forged { to, .. } => Some(*to),
        _ => None,
    }
}
