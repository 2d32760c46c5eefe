//! The simulated world: what happens next, and to whom. [`actions`](super::actions) carries out
//! what nodes want done, [`faults`](super::faults) breaks things.

use replay_log::{FrameNumber, LogIndex, Store};

use super::facts::{Checker, Fact, HostView};
use super::faults::{Fault, Faults};
use super::gateway::{CLIENTS, Gateway, Heard, Session, ToGateway, ToHost};
use super::host::Host;
use super::network::{LaneKey, LinkChange, Network};
use super::options::{Counts, Options, Report, Violation};
use super::queue::{MICRO, MILLI, Moment, Queue, SECOND};
use super::random::Random;
use super::setup::Setup;
use super::trace::Trace;
use super::vm::{Bases, Disk};
use super::witness::{Answer, Ask, Witness};
use crate::protocol::{Input, Message, Operator, Record, RoleName, Swapped, VmRun};
use vmm::model::DISK_SIZE;

/// How long nothing is broken at first: time to pair.
const CALM: Moment = SECOND;
/// After everything is repaired, progress must come within this.
const PATIENCE: Moment = 20 * SECOND;
/// How long a host's question to the keeper waits for its answer.
const ASK_TIMEOUT: Moment = 150 * MILLI;

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
    },
    Answered {
        host: usize,
        life: u32,
        id: u64,
        answer: Option<Answer>,
        swap: bool,
    },
    Links,
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
    checker: Checker,
    violation: Option<Violation>,
    healed: Option<Moment>,
    fresh_answers: [u32; CLIENTS],
    next_ask: u64,
    to_gateway_at: Moment,
    to_host_at: Moment,
    pub(super) gateway_blocks: Vec<u32>,
    pub(super) witness_blocks: Vec<u32>,
    pub(super) next_machine: u64,
}

impl World {
    pub(super) fn new(seed: u64, options: Options) -> Self {
        let mut random = Random::new(seed);
        let setup = Setup::choose(&mut random);
        let hosts: Vec<_> = (0..setup.hosts)
            .map(|n| Host::new(n, &mut random))
            .collect();
        let network = Network::new(setup.hosts, setup.delay, setup.loss, random.fork());
        let faults = Faults::choose(&mut random);
        let zeros = vec![0; DISK_SIZE as usize];
        let bases = Bases::from([(Disk::base(&zeros).digest, zeros)]);
        Self {
            now: 0,
            queue: Queue::new(),
            options,
            random,
            network,
            witness: Witness::default(),
            gateway: Gateway::new(),
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
                && self.now > healed + PATIENCE
            {
                self.violation = Some(Violation {
                    invariant: "progress",
                    at: self.now,
                    what: self.stuck(),
                });
            }
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
                if self.network.is_current(link, from, to) && !self.network.blocked(from, to) {
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
            } => self.asked(host, life, id, ask),
            Event::Answered {
                host,
                life,
                id,
                answer,
                swap,
            } => self.answered(host, life, id, answer, swap),
            Event::Links => self.links(),
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
        while let Some(action) = self.hosts[host]
            .node
            .as_mut()
            .and_then(|node| node.poll_action())
        {
            self.perform(host, action);
        }
        let here = &mut self.hosts[host];
        let Some(timeout) = here.node.as_ref().and_then(|node| node.poll_timeout()) else {
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
    }

    fn lane(&mut self, key: LaneKey) {
        match self.network.arrive(self.now, key) {
            Ok(Some(message)) => self.deliver(key.from, key.to, message),
            Ok(None) => {}
            Err(later) => self.queue.plan(later, Event::Lane(key)),
        }
    }

    fn deliver(&mut self, from: usize, to: usize, message: Message) {
        if self.hosts[to].is_up() {
            let from = self.hosts[from].name.clone();
            self.input(to, Input::Message { from, message });
        }
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
                    let peer = self.hosts[peer].name.clone();
                    let input = if up {
                        Input::PeerUp(peer)
                    } else {
                        Input::PeerDown(peer)
                    };
                    // A frozen host hears of it when it thaws, in order.
                    self.plan_input(0, host, input);
                }
            }
        }
    }

    // --- the store ---------------------------------------------------------------------------

    fn persisted(&mut self, host: usize, life: u32) {
        if !self.lives(host, life) {
            return;
        }
        if let Some(durable) = self.hosts[host].persisting.pop_front() {
            self.hosts[host].durable = durable.clone();
            self.facts.push(Fact::Persisted {
                host,
                durable: durable.clone(),
            });
            self.input(host, Input::Persisted(durable));
        }
    }

    fn stored(&mut self, host: usize, life: u32) {
        if self.lives(host, life) {
            let here = &mut self.hosts[host];
            here.stored_planned = false;
            let (incarnation, tip) = (here.tag, here.store.tip());
            self.input(host, Input::Stored { incarnation, tip });
        }
    }

    fn synced(&mut self, host: usize, life: u32, incarnation: crate::protocol::Incarnation) {
        if !self.lives(host, life) {
            return;
        }
        let input = match self.hosts[host].store.sync() {
            Ok(tip) => Input::Synced { incarnation, tip },
            Err(error) => Input::StoreFailed {
                reason: error.to_string(),
            },
        };
        self.input(host, input);
    }

    // --- the keeper --------------------------------------------------------------------------

    pub(super) fn ask(&mut self, host: usize, ask: Ask) {
        self.next_ask += 1;
        let (id, life) = (self.next_ask, self.hosts[host].life);
        let swap = matches!(ask, Ask::Swap { .. });
        self.hosts[host].asked.insert(id);
        let timeout = Event::Answered {
            host,
            life,
            id,
            answer: None,
            swap,
        };
        self.queue.plan(self.now + ASK_TIMEOUT, timeout);
        if self.witness_blocks[host] > 0 || self.network.lost() {
            return;
        }
        // Now and then a question is carried out long after its asker has given it up.
        let late = if self.random.chance(20) {
            self.random.below(600 * MILLI)
        } else {
            0
        };
        let write = if swap { self.setup.keeper } else { 0 };
        let at = self.now + self.network.flight() + write + late;
        self.queue.plan(
            at,
            Event::Asked {
                host,
                life,
                id,
                ask,
            },
        );
    }

    fn asked(&mut self, host: usize, life: u32, id: u64, ask: Ask) {
        if self.witness.down > 0 || self.witness_blocks[host] > 0 {
            return;
        }
        let swap = matches!(ask, Ask::Swap { .. });
        let before = self.witness.record.clone();
        let (answer, changed) = self.witness.ask(ask);
        if changed && let Some(record) = self.witness.record.clone() {
            self.counts.records += 1;
            self.history_ends(host, before, &record);
            self.facts.push(Fact::Recorded(record));
        }
        if self.network.lost() {
            return;
        }
        let at = self.now + self.network.flight();
        let answer = Some(answer);
        self.queue.plan(
            at,
            Event::Answered {
                host,
                life,
                id,
                answer,
                swap,
            },
        );
    }

    /// A new reign does not always go on with the history of the last one.
    fn history_ends(&mut self, host: usize, before: Option<Record>, record: &Record) {
        let Some(before) = before.filter(|before| before.term < record.term) else {
            return;
        };
        if std::mem::take(&mut self.hosts[host].accepts_loss) {
            self.counts.losses_accepted += 1;
            let tip = self.hosts[host].store.tip();
            self.facts.push(Fact::LossAccepted { tip });
            // Gateways may be ahead of the guest: they begin anew.
            self.gateway.forget_answers();
            self.gateway.restart();
        } else if !before.all_copies().any(|copy| *copy == record.primary) {
            self.facts.push(Fact::Lost { before });
        }
    }

    fn answered(&mut self, host: usize, life: u32, id: u64, answer: Option<Answer>, swap: bool) {
        if !self.lives(host, life) || !self.hosts[host].asked.remove(&id) {
            return;
        }
        let reason = || "no answer in time".to_owned();
        let input = match answer {
            Some(Answer::Read(record)) => Input::RecordRead(record),
            Some(Answer::Swapped(swapped)) => Input::RecordSwapped(swapped),
            None if swap => Input::RecordSwapped(Swapped::Unknown { reason: reason() }),
            None => Input::ReadFailed { reason: reason() },
        };
        self.input(host, input);
    }

    // --- the gateway -------------------------------------------------------------------------

    fn gateway_tick(&mut self) {
        self.queue.plan(self.now + 20 * MILLI, Event::GatewayTick);
        if self.witness.down == 0 {
            let record = self.witness.record.clone();
            let at = self.now + self.network.flight();
            self.queue.plan(at, Event::GatewayRead(record));
        }
        let say = self.gateway.tick(self.now);
        self.say_all(say);
    }

    fn gateway_read(&mut self, record: Option<&Record>) {
        if let Some(record) = record
            && let Some(primary) = self.number_of(&record.primary.host)
        {
            self.gateway.learn(record.term, primary);
        }
    }

    pub(super) fn number_of(&self, name: &crate::protocol::HostName) -> Option<usize> {
        self.hosts.iter().position(|host| host.name == *name)
    }

    fn say_all(&mut self, say: Vec<ToHost>) {
        let (Some(session), Some(host)) = (self.gateway.session(), self.gateway.primary) else {
            return;
        };
        for message in say {
            self.to_host_at = self.to_host_at.max(self.now + self.network.flight());
            if self.gateway_blocks[host] == 0 {
                let event = Event::ToHost {
                    host,
                    session,
                    message,
                };
                self.queue.plan(self.to_host_at, event);
            }
        }
    }

    fn gateway_says(&mut self, host: usize, session: Session, message: ToHost) {
        if self.gateway_blocks[host] > 0 || !self.hosts[host].is_up() {
            return;
        }
        let here = &mut self.hosts[host];
        let Some(vm) = here.vm.as_mut().filter(|vm| vm.records()) else {
            return;
        };
        if here.reign != Some(session.term) {
            return;
        }
        let mut answers = Vec::new();
        match message {
            ToHost::Attach { last } => {
                here.session = Some(session);
                let released = vm.outbox.released();
                let last = last.unwrap_or(released);
                answers.push(ToGateway::Welcome {
                    machine: here.machine,
                    accepted: vm.accepted(session.gateway),
                    next: FrameNumber(last.0 + 1),
                });
                for output in vm.outbox.released_after(last) {
                    answers.push(ToGateway::Output {
                        number: output.number,
                        content: content(&output.bytes),
                        bytes: output.bytes.clone(),
                    });
                }
            }
            _ if here.session != Some(session) => {}
            ToHost::Frame { source, bytes } => {
                vm.frame(source, bytes);
                self.plan_turn(host, 5 * MICRO);
            }
            ToHost::Received { through } => self.input(host, Input::GatewayReceived { through }),
            ToHost::Ping => answers.push(ToGateway::Pong {
                accepted: vm.accepted(session.gateway),
                released: vm.outbox.released(),
            }),
        }
        for answer in answers {
            self.to_gateway(host, session, answer);
        }
    }

    pub(super) fn to_gateway(&mut self, from: usize, session: Session, message: ToGateway) {
        self.to_gateway_at = self.to_gateway_at.max(self.now + self.network.flight());
        if self.gateway_blocks[from] == 0 {
            let event = Event::ToGateway {
                from,
                session,
                message,
            };
            self.queue.plan(self.to_gateway_at, event);
        }
    }

    fn gateway_hears(&mut self, from: usize, session: Session, message: ToGateway) {
        if self.gateway_blocks[from] > 0 || self.gateway.primary != Some(from) {
            return;
        }
        let mut say = Vec::new();
        let heard = self.gateway.hear(self.now, session, message, &mut say);
        self.say_all(say);
        if let Heard::Passed {
            gateway,
            term,
            number,
            content,
            answered,
        } = heard
        {
            self.facts.push(Fact::Passed {
                gateway,
                term,
                number,
                content,
            });
            if let Some(answered) = answered {
                self.counts.answers += 1;
                if self.healed.is_some_and(|healed| answered.sent >= healed) {
                    self.fresh_answers[answered.client] += 1;
                }
                self.facts.push(Fact::Answered {
                    key: answered.key,
                    value: answered.value,
                    floor: answered.floor,
                });
            }
        }
    }

    fn client(&mut self, client: usize) {
        let say = self.gateway.client(self.now, client, &mut self.random);
        self.say_all(say.into_iter().collect());
        let pause = self.random.between(5, 40) * MILLI;
        self.queue.plan(self.now + pause, Event::Client(client));
    }

    // --- the end -----------------------------------------------------------------------------

    fn heal(&mut self) {
        self.healed = Some(self.now);
        self.network.heal();
        self.network.loss = 2;
        self.witness.down = 0;
        self.gateway_blocks.fill(0);
        self.witness_blocks.fill(0);
        for host in 0..self.hosts.len() {
            let here = &mut self.hosts[host];
            here.slow_disk = 0;
            here.slow_vm = 0;
            if !here.is_up() {
                self.start_host(host);
            }
        }
        self.queue.plan(self.now + 3 * SECOND, Event::Rescue);
    }

    pub(super) fn is_healed(&self) -> bool {
        self.healed.is_some()
    }

    /// Some losses are more than the rule survives: then an operator has to accept them. The
    /// simulation knows when, and plays the operator.
    fn rescue(&mut self) {
        self.queue.plan(self.now + 3 * SECOND, Event::Rescue);
        let Some(record) = self.witness.record.clone() else {
            let hosts = self.hosts.iter().map(|host| host.name.clone()).collect();
            let policy = self.setup.policy;
            let create = Operator::Create { hosts, policy };
            self.plan_input(0, 0, Input::Operator(create));
            return;
        };
        let reigns = self
            .hosts
            .iter()
            .any(|host| host.reign == Some(record.term));
        let intact = record.all_copies().filter(|copy| {
            let host = self.hosts.iter().find(|host| host.name == copy.host);
            host.is_some_and(|host| host.durable.incarnation == copy.incarnation)
        });
        if reigns || intact.count() >= record.seals() {
            return;
        }
        let best = (0..self.hosts.len()).max_by_key(|host| {
            let tip = self.hosts[*host].store.tip();
            (tip.term, tip.index)
        });
        if let Some(best) =
            best.filter(|best| self.hosts[*best].store.tip().index > LogIndex::START)
        {
            self.hosts[best].accepts_loss = true;
            self.plan_input(0, best, Input::Operator(Operator::AcceptLoss));
        }
    }

    /// Healed, protected again, and serving everybody.
    fn done(&self) -> bool {
        self.healed.is_some()
            && self.fresh_answers.iter().all(|answers| *answers >= 2)
            && self.protected()
    }

    fn protected(&self) -> bool {
        let Some(record) = &self.witness.record else {
            return false;
        };
        let Some(primary) = self.number_of(&record.primary.host) else {
            return false;
        };
        record.copies() == record.hosts.len()
            && self.hosts[primary]
                .node
                .as_ref()
                .is_some_and(|node| node.status().role == RoleName::Primary)
    }

    fn stuck(&self) -> String {
        let mut what = format!(
            "after the repair {:?} fresh answers; the record is {:?}",
            self.fresh_answers, self.witness.record
        );
        for host in &self.hosts {
            if let Some(node) = &host.node {
                let status = node.status();
                what += &format!(
                    "\n  {}#{}: {:?} knows {:?}, log {:?} stored {} synced {} executed {} committed {} promise {:?} followers {:?}",
                    host.name,
                    status.incarnation,
                    status.role,
                    status.record.as_ref().map(Record::version),
                    status.tip,
                    status.stored,
                    status.synced,
                    status.executed,
                    status.committed,
                    status.promise,
                    status.followers,
                );
            }
        }
        what
    }

    fn check(&mut self) {
        if self.facts.is_empty() || self.violation.is_some() {
            return;
        }
        let views: Vec<HostView> = self.hosts.iter().map(Host::view).collect();
        for fact in std::mem::take(&mut self.facts) {
            let record = self.witness.record.as_ref();
            if let Err(violation) = self.checker.check(self.now, &fact, &views, record) {
                self.trace.say(self.now, &violation.to_string());
                self.violation = Some(violation);
                return;
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
        Event::Datagram { to, .. } => Some(*to),
        _ => None,
    }
}
