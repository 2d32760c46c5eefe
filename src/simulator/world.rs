//! The simulated world: what happens next, and to whom. [`actions`](super::actions) carries out
//! what nodes want done, [`faults`](super::faults) breaks things.

use super::facts::Fact;
use super::faults::{Fault, Faults};
use super::gateway::{CLIENTS, Session, ToGateway, ToHost};
use super::gray::Gray;
use super::guest::Guest;
use super::host::Host;
use super::ids::{GatewayId, SeatId};
use super::network::{LaneKey, LinkChange, Network};
use super::options::{Counts, Options, Report, Violation};
use super::queue::{MICRO, MILLI, Moment, Queue, SECOND};
use super::random::Random;
use super::seat::{Seat, Seats};
use super::setup::{SLOW_KEEPER, Setup, Several};
use super::trace::Trace;
use super::vm::{Bases, Disk};
use super::witness::{Answer, Question, Witness};
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
        seat: SeatId,
        life: u32,
    },
    Lane(LaneKey),
    Datagram {
        link: u64,
        from: usize,
        to: SeatId,
        message: Box<Message>,
    },
    Input {
        seat: SeatId,
        life: u32,
        input: Box<Input>,
    },
    Persisted {
        seat: SeatId,
        life: u32,
    },
    Stored {
        seat: SeatId,
        life: u32,
    },
    Synced {
        seat: SeatId,
        life: u32,
        tag: crate::protocol::Incarnation,
    },
    VmTurn {
        seat: SeatId,
        life: u32,
        run: VmRun,
    },
    Asked {
        seat: SeatId,
        life: u32,
        question: Box<Question>,
    },
    Answered {
        seat: SeatId,
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
        to: SeatId,
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
    Switchover {
        vm: usize,
    },
    GatewayTick(GatewayId),
    GatewayRead(GatewayId, Option<Record>),
    ToHost {
        host: usize,
        gateway: GatewayId,
        session: Session,
        message: ToHost,
    },
    ToGateway {
        from: usize,
        gateway: GatewayId,
        session: Session,
        message: ToGateway,
    },
    Client(GatewayId, usize),
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
    pub(super) guests: Vec<Guest>,
    /// What each host has of each guest.
    pub(super) seats: Seats,
    pub(super) network: Network,
    pub(super) witness: Witness,
    pub(super) bases: Bases,
    /// What has happened, and to which VM.
    pub(super) facts: Vec<(usize, Fact)>,
    pub(super) counts: Counts,
    pub(super) trace: Trace,
    pub(super) faults: Faults,
    pub(super) violation: Option<Violation>,
    pub(super) healed: Option<Moment>,
    pub(super) next_ask: u64,
    pub(super) witness_blocks: Vec<u32>,
    /// What stays broken in the end.
    pub(super) gray: Option<Gray>,
}

impl World {
    pub(super) fn new(seed: u64, options: Options) -> Self {
        let mut several = Several::new(seed);
        let mut random = Random::new(seed);
        let mut setup = Setup::choose(&mut random);
        if several.slow_keeper {
            setup.keeper = SLOW_KEEPER;
        }
        let mut hosts = Vec::new();
        let mut seats = Vec::new();
        for number in 0..setup.hosts {
            let host = Host::new(number, &mut random);
            seats.push(Seat::new(0, &host, &mut random));
            hosts.push(host);
        }
        let mut guests = vec![Guest::new(setup.policy, several.gateways, &setup)];
        let mut seats = vec![seats];
        for vm in 1..several.vms {
            let policy = several.policy(&setup);
            guests.push(Guest::new(policy, several.gateways, &setup));
            let here = |host| Seat::new(vm, host, &mut several.random);
            seats.push(hosts.iter().map(here).collect());
        }
        let network = Network::new(&setup, random.fork());
        let witness = Witness::new(guests.len(), &mut random);
        let mut faults = Faults::choose(&mut random);
        if several.put_backs {
            faults.put_folders_back();
        }
        let zeros = vec![0; DISK_SIZE as usize];
        let bases = Bases::from([(Disk::base(&zeros).digest, zeros)]);
        Self {
            now: 0,
            queue: Queue::new(),
            options,
            random,
            network,
            witness,
            bases,
            facts: Vec::new(),
            counts: Counts::default(),
            trace: Trace::new(options.trace),
            faults,
            violation: None,
            healed: None,
            next_ask: 0,
            witness_blocks: vec![0; setup.hosts],
            gray: None,
            hosts,
            guests,
            seats: Seats::new(seats),
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
        self.counts.vms = self.guests.len() as u64;
        self.counts.gateways = self.gateways().len() as u64;
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
        for vm in 0..self.guests.len() {
            // The second VM begins where the first has its first copy.
            let seat = SeatId { vm, host: vm };
            let create = self.creation(vm);
            self.plan_input(50 * MILLI, seat, Input::Operator(create));
        }
        self.queue.plan(0, Event::Links);
        self.queue.plan(CALM, Event::Watch);
        for id in self.gateways() {
            self.queue.plan(MILLI, Event::GatewayTick(id));
            for client in 0..CLIENTS {
                self.queue.plan(100 * MILLI, Event::Client(id, client));
            }
        }
        self.queue.plan(CALM, Event::Break);
        self.queue.plan(CALM + self.faults.phase, Event::Heal);
    }

    /// The order that starts a VM for the first time, with copies everywhere.
    pub(super) fn creation(&self, vm: usize) -> Operator {
        Operator::Create {
            hosts: self.hosts.iter().map(|host| host.name.clone()).collect(),
            policy: self.guests[vm].policy,
        }
    }

    /// All gateways of all VMs.
    fn gateways(&self) -> Vec<GatewayId> {
        let all = self.guests.iter().enumerate();
        let ids = |(vm, guest): (usize, &Guest)| {
            (0..guest.gateways.len()).map(move |number| GatewayId { vm, number })
        };
        all.flat_map(ids).collect()
    }

    /// Something was broken or repaired that may concern every VM.
    pub(super) fn disturbed(&mut self) {
        let all = 0..self.guests.len();
        self.facts.extend(all.map(|vm| (vm, Fact::Disturbed)));
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
            Event::NodeDue { seat, life } => self.node_due(seat, life),
            Event::Lane(key) => self.lane(key),
            Event::Datagram {
                link,
                from,
                to,
                message,
            } => {
                let takes = self.network.takes(from, to.host);
                if self.network.is_current(link, from, to.host) && takes {
                    self.deliver(from, to, *message);
                }
            }
            Event::Input { seat, life, input } => {
                if self.lives(seat, life) {
                    self.input(seat, *input);
                }
            }
            Event::Persisted { seat, life } => self.persisted(seat, life),
            Event::Stored { seat, life } => self.stored(seat, life),
            Event::Synced { seat, life, tag } => self.synced(seat, life, tag),
            Event::VmTurn { seat, life, run } => self.vm_turn(seat, life, run),
            Event::Asked {
                seat,
                life,
                question,
            } => self.asked(seat, life, question),
            Event::Answered {
                seat,
                life,
                id,
                answer,
                swap,
                asked,
            } => {
                if self.lives(seat, life) {
                    self.answered(seat, id, answer, swap, asked);
                }
            }
            Event::Links => self.links(),
            Event::Watch => self.watch(),
            Event::Forged { to, from, message } => self.hear(to, &from, *message),
            Event::Fill { host, span } => self.fill(host, span),
            Event::Recover => self.recover(),
            Event::KeeperAway => self.witness.down += 1,
            Event::KeeperBack => self.keeper_back(),
            Event::Switchover { vm } => self.switch_over(vm),
            Event::GatewayTick(id) => self.gateway_tick(id),
            Event::GatewayRead(id, record) => self.gateway_read(id, record.as_ref()),
            Event::ToHost {
                host,
                gateway,
                session,
                message,
            } => self.gateway_says(host, gateway, session, message),
            Event::ToGateway {
                from,
                gateway,
                session,
                message,
            } => self.gateway_hears(from, gateway, session, message),
            Event::Client(id, client) => self.client(id, client),
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

    pub(super) fn lives(&self, seat: SeatId, life: u32) -> bool {
        let host = &self.hosts[seat.host];
        host.life == life && host.is_up()
    }

    pub(super) fn plan_input(&mut self, after: Moment, seat: SeatId, input: Input) {
        let life = self.hosts[seat.host].life;
        let input = Box::new(input);
        self.queue
            .plan(self.now + after, Event::Input { seat, life, input });
    }

    /// Hands something to a node and does what it wants done.
    pub(super) fn input(&mut self, seat: SeatId, input: Input) {
        let here = &mut self.seats[seat];
        let time = here.time(self.now);
        if let Some(node) = &mut here.node {
            node.handle(time, input);
            self.drive(seat);
        }
    }

    fn node_due(&mut self, seat: SeatId, life: u32) {
        if !self.lives(seat, life) {
            return;
        }
        let here = &mut self.seats[seat];
        here.due = None;
        let time = here.time(self.now);
        if let Some(node) = &mut here.node
            && node.poll_timeout().is_some_and(|at| at <= time)
        {
            node.handle_timeout(time);
        }
        self.drive(seat);
    }

    /// Carries out a node's actions, and plans its next timeout.
    pub(super) fn drive(&mut self, seat: SeatId) {
        while let Some(action) = self.seats[seat].node.as_mut().and_then(Node::poll_action) {
            self.perform(seat, action);
        }
        self.pump(seat);
        let here = &mut self.seats[seat];
        let Some(timeout) = here.node.as_ref().and_then(Node::poll_timeout) else {
            return;
        };
        let at = here.clock.moment(timeout.as_nanos()).max(self.now);
        if here.due.is_none_or(|due| at < due) {
            here.due = Some(at);
            let life = self.hosts[seat.host].life;
            self.queue.plan(at, Event::NodeDue { seat, life });
        }
    }

    /// One process for all VMs: they start together.
    pub(super) fn start_host(&mut self, host: usize) {
        self.hosts[host].begin(true);
        for vm in 0..self.guests.len() {
            let seat = SeatId { vm, host };
            self.seats[seat].start(self.now, self.options.mutation);
            self.drive(seat);
            if let Some(stranger) = self.faults.stranger.clone() {
                self.plan_input(MILLI, seat, Input::PeerUp(stranger));
            }
        }
    }

    /// And they end together.
    pub(super) fn stop_host(&mut self, host: usize, power: bool) {
        let takes = self.hosts[host].drive.is_well();
        for seat in self.seats.on_host_mut(host) {
            seat.stop(power, takes);
        }
        self.hosts[host].begin(false);
    }

    fn lane(&mut self, key: LaneKey) {
        match self.network.arrive(self.now, key) {
            Ok(Some((vm, message))) => {
                let to = SeatId { vm, host: key.to };
                self.deliver(key.from, to, message);
            }
            Ok(None) => {}
            Err(later) => self.queue.plan(later, Event::Lane(key)),
        }
    }

    fn deliver(&mut self, from: usize, to: SeatId, message: Message) {
        if !self.hosts[to.host].is_up() {
            return;
        }
        let sender = SeatId {
            host: from,
            vm: to.vm,
        };
        match &message {
            Message::Ack(ack) | Message::Report(ack) => {
                self.seats[to].streams.acknowledged(from, ack.held);
            }
            Message::Heartbeat {
                version, committed, ..
            } if version.term <= self.seats[to].store.tip().term => {
                let knew = &mut self.seats[to].knew;
                *knew = (*knew).max(*committed);
            }
            Message::Hello { .. } if self.seats[sender].lies() && self.reigns(to) => {
                self.seats[sender].storage.found_out = true;
            }
            _ => {}
        }
        let from = self.hosts[from].name.clone();
        self.hear(to, &from, message);
    }

    /// The driver hands a message in, and nothing that is said to be of the keeper and is not.
    fn hear(&mut self, to: SeatId, from: &HostName, message: Message) {
        let forged = |committed: &Committed| !self.witness.vouches(to.vm, committed);
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
        if self.hosts[to.host].is_up() {
            let from = from.clone();
            self.input(to, Input::Message { from, message });
        }
    }

    fn reigns(&self, seat: SeatId) -> bool {
        let node = self.seats[seat].node.as_ref();
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
                    for vm in 0..self.guests.len() {
                        self.link_changed(SeatId { vm, host }, peer, up);
                    }
                }
            }
        }
    }

    /// There is a connection, or none any more. A frozen host hears of it when it thaws, in order.
    fn link_changed(&mut self, seat: SeatId, peer: usize, up: bool) {
        let name = self.hosts[peer].name.clone();
        if up {
            self.plan_input(0, seat, Input::PeerUp(name.clone()));
            let far = Input::Distance {
                host: name,
                rtt: self.setup.round_trip(),
            };
            self.plan_input(self.setup.delay, seat, far);
        } else {
            self.seats[seat].streams.stop(peer);
            self.plan_input(0, seat, Input::PeerDown(name));
        }
    }
}

/// The host whose freezing holds an event up.
fn host_of(event: &Event) -> Option<usize> {
    match event {
        Event::NodeDue { seat, .. }
        | Event::Input { seat, .. }
        | Event::Persisted { seat, .. }
        | Event::Stored { seat, .. }
        | Event::Synced { seat, .. }
        | Event::VmTurn { seat, .. }
        | Event::Answered { seat, .. } => Some(seat.host),
        Event::ToHost { host, .. } => Some(*host),
        Event::Lane(key) => Some(key.to),
        Event::Datagram { to, .. } | Event::Forged { to, .. } => Some(to.host),
        _ => None,
    }
}
