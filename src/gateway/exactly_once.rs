//! Tests of both ends of the numbered frames together: several gateways, several copies of one
//! machine, and anything that can go wrong between them, in an order that proptest chooses.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv4Addr;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, LogIndex, Term};

use super::frames::{Boot, Mac, Message, SessionId, ToAgent, ToGateway, incarnation_of};
use super::port::{GatewayPort, PortAction};
use crate::agent::certs::Name;
use crate::agent::frames::{FrameLimits, FramePort};
use crate::protocol::{Span, Time, VmName};

const COPIES: usize = 3;
const GATEWAYS: u64 = 2;
const BOOT: Boot = Boot([7; 16]);

/// A machine that answers every frame with one to its sender, and every third one with a
/// broadcast before it; every fourth answer is followed by a number that no frame has.
#[derive(Clone, Default)]
struct Machine {
    arrivals: u64,
    outputs: u64,
}

impl Machine {
    fn arrive(&mut self, frame: &Bytes) -> Vec<(FrameNumber, Bytes)> {
        self.arrivals += 1;
        let mut made = Vec::new();
        if self.arrivals.is_multiple_of(3) {
            made.push(self.output(&[0xff; 6], b"broadcast"));
        }
        let sender: Vec<u8> = frame[6..12].to_vec();
        made.push(self.output(&sender, &frame[12..]));
        if self.arrivals.is_multiple_of(4) {
            self.outputs += 1;
        }
        made
    }

    fn output(&mut self, to: &[u8], payload: &[u8]) -> (FrameNumber, Bytes) {
        self.outputs += 1;
        let frame = [to, &[2, 0, 0, 0, 0, 99], payload].concat();
        (FrameNumber(self.outputs), frame.into())
    }
}

/// A stream between a gateway and a copy, with what is under way on it.
struct Pipe {
    copy: usize,
    to_agent: BytesMut,
    to_gateway: BytesMut,
    at_agent: SessionId,
}

struct Copy {
    port: FramePort,
    machine: Machine,
    /// The log, as far as this copy holds it.
    log: Vec<(FrameSource, Bytes)>,
    /// How much of it the machine has executed.
    executed: usize,
    /// On the primary: outputs with the log index that must be committed before they are released.
    unreleased: VecDeque<(LogIndex, FrameNumber, Bytes)>,
}

impl Copy {
    fn new() -> Self {
        Self {
            port: FramePort::new(vm(), BOOT, FrameLimits::default()),
            machine: Machine::default(),
            log: Vec::new(),
            executed: 0,
            unreleased: VecDeque::new(),
        }
    }

    fn append(&mut self, source: FrameSource, frame: Bytes) {
        self.log.push((source, frame));
    }

    /// Takes over, with everything executed.
    fn lead(&mut self, term: Term, now: Time) {
        self.replay(usize::MAX);
        let logged: BTreeMap<_, _> = self
            .log
            .iter()
            .map(|(source, _)| (source.gateway, source.number))
            .collect();
        self.port.lead(term, logged, now);
    }

    /// Replays up to `upto` entries; a replica's outputs go to its port at once.
    fn replay(&mut self, upto: usize) {
        while self.executed < upto.min(self.log.len()) {
            let frame = self.log[self.executed].1.clone();
            self.executed += 1;
            for (number, frame) in self.machine.arrive(&frame) {
                self.port.output(number, frame);
            }
        }
    }
}

struct Gateway {
    port: GatewayPort<usize>,
    pipes: BTreeMap<SessionId, Pipe>,
    sent: Vec<Bytes>,
    passed: Vec<Bytes>,
}

struct World {
    now: Time,
    term: Term,
    primary: usize,
    copies: Vec<Option<Copy>>,
    gateways: Vec<Gateway>,
    committed: usize,
    next_agent_session: u64,
}

fn name(gateway: u64) -> Name {
    format!("gateway-{gateway}").parse().expect("a name")
}

/// The only incarnation of a gateway: its run has the gateway's number.
fn incarnation(gateway: u64) -> GatewayIncarnation {
    incarnation_of(&name(gateway), gateway as u32)
}

/// The number of the gateway whose incarnation this is.
fn number(incarnation: GatewayIncarnation) -> u64 {
    incarnation.0 & u64::from(u32::MAX)
}

fn mac(gateway: u64) -> [u8; 6] {
    Mac::of(incarnation(gateway)).0
}

fn vm() -> VmName {
    VmName::new("vm").expect("a name")
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            now: Time::default(),
            term: Term(1),
            primary: 0,
            copies: (0..COPIES).map(|_| Some(Copy::new())).collect(),
            gateways: (1..=GATEWAYS)
                .map(|gateway| Gateway {
                    port: GatewayPort::new(
                        vm(),
                        incarnation(gateway),
                        Ipv4Addr::from(gateway as u32),
                        1 << 20,
                    ),
                    pipes: BTreeMap::new(),
                    sent: Vec::new(),
                    passed: Vec::new(),
                })
                .collect(),
            committed: 0,
            next_agent_session: 1,
        };
        world.copy(0).lead(Term(1), Time::default());
        for gateway in 0..GATEWAYS as usize {
            world.tell(gateway);
        }
        world
    }

    fn copy(&mut self, index: usize) -> &mut Copy {
        self.copies[index].as_mut().expect("this copy lives")
    }

    /// The record's keeper tells a gateway who reigns.
    fn tell(&mut self, gateway: usize) {
        let (term, primary, now) = (self.term, self.primary, self.now);
        self.gateways[gateway].port.reign(term, primary, now);
    }

    /// A client of a gateway says something.
    fn say(&mut self, gateway: usize) {
        let incarnation = number(self.gateways[gateway].port.incarnation());
        let gateway = &mut self.gateways[gateway];
        let text = format!("{incarnation}:{}", gateway.sent.len());
        let frame: Bytes = [&[2, 0, 0, 0, 0, 99], &mac(incarnation)[..], text.as_bytes()]
            .concat()
            .into();
        gateway.sent.push(frame.clone());
        gateway.port.send(frame);
    }

    fn actions(&mut self, index: usize) {
        while let Some(action) = self.gateways[index].port.poll_action() {
            match action {
                PortAction::Open {
                    session,
                    host,
                    hello,
                } => {
                    let Some(copy) = self.copies[host].as_mut() else {
                        let now = self.now;
                        self.gateways[index].port.lost(session, now);
                        continue;
                    };
                    let at_agent = SessionId(self.next_agent_session);
                    self.next_agent_session += 1;
                    copy.port
                        .connected(at_agent, &name(index as u64 + 1), self.now);
                    let mut to_agent = BytesMut::new();
                    ToAgent::Hello(hello).encode(&mut to_agent);
                    self.gateways[index].pipes.insert(
                        session,
                        Pipe {
                            copy: host,
                            to_agent,
                            to_gateway: BytesMut::new(),
                            at_agent,
                        },
                    );
                }
                // The old stream lingers: what is under way on it still comes.
                PortAction::Close { .. } => {}
            }
        }
    }

    /// Moves up to `messages` messages each way on every pipe of a gateway.
    fn carry(&mut self, index: usize, messages: usize) {
        self.actions(index);
        let sessions: Vec<_> = self.gateways[index].pipes.keys().copied().collect();
        for session in sessions {
            let now = self.now;
            let gateway = &mut self.gateways[index];
            let Some(pipe) = gateway.pipes.get_mut(&session) else {
                continue;
            };
            let Some(copy) = self.copies[pipe.copy].as_mut() else {
                gateway.pipes.remove(&session);
                gateway.port.lost(session, now);
                continue;
            };
            gateway.port.transmit(session, &mut pipe.to_agent, 200);
            let mut ended = false;
            for _ in 0..messages {
                let Some(message) = ToAgent::decode(&mut pipe.to_agent).expect("well formed")
                else {
                    break;
                };
                copy.port
                    .message(pipe.at_agent, message)
                    .expect("gateways keep the rules");
            }
            ended |= copy.port.transmit(pipe.at_agent, &mut pipe.to_gateway, 200);
            for _ in 0..messages {
                let Some(message) = ToGateway::decode(&mut pipe.to_gateway).expect("well formed")
                else {
                    break;
                };
                let frame = gateway
                    .port
                    .handle(session, message, now)
                    .expect("agents keep the rules");
                gateway.passed.extend(frame);
            }
            if ended && pipe.to_gateway.is_empty() {
                copy.port.disconnected(pipe.at_agent, now);
                gateway.pipes.remove(&session);
                gateway.port.lost(session, now);
            }
        }
    }

    /// The primary's machine takes up to `frames` arrivals.
    fn execute(&mut self, frames: usize) {
        let primary = self.primary;
        let copy = self.copy(primary);
        for _ in 0..frames {
            let Some((source, frame)) = copy.port.poll_arrival() else {
                break;
            };
            copy.append(source, frame.clone());
            copy.executed += 1;
            let end = LogIndex(copy.log.len() as u64);
            copy.port.logged(source, end);
            for (number, output) in copy.machine.arrive(&frame) {
                copy.unreleased.push_back((end, number, output));
            }
        }
    }

    /// The primary's log reaches the replicas, up to `entries` entries each, and what all hold is
    /// committed.
    fn ship(&mut self, entries: usize) {
        let primary = self.primary;
        let log = self.copy(primary).log.clone();
        let mut held = log.len();
        for index in (0..COPIES).filter(|index| *index != primary) {
            if let Some(replica) = self.copies[index].as_mut() {
                let from = replica.log.len();
                for (source, frame) in log.iter().skip(from).take(entries) {
                    replica.append(*source, frame.clone());
                }
                held = held.min(replica.log.len());
            }
        }
        self.committed = self.committed.max(held);
        let (committed, now) = (LogIndex(self.committed as u64), self.now);
        let copy = self.copy(primary);
        copy.port.committed(committed, now);
        while let Some((end, ..)) = copy.unreleased.front()
            && *end <= committed
            && let Some((_, number, frame)) = copy.unreleased.pop_front()
        {
            copy.port.output(number, frame);
        }
        let watermark = copy.port.received_by_all();
        for index in (0..COPIES).filter(|index| *index != primary) {
            if let Some(replica) = self.copies[index].as_mut() {
                replica.port.forget(watermark);
            }
        }
    }

    /// The primary's host dies; the replica that holds most takes over and replays to the end. A
    /// new replica comes in the dead one's place when `replace` says so.
    fn kill_primary(&mut self, replace: bool) {
        let dead = self.primary;
        let Some(heir) = (0..COPIES)
            .filter(|index| *index != dead && self.copies[*index].is_some())
            .max_by_key(|index| self.copies[*index].as_ref().map(|copy| copy.log.len()))
        else {
            return;
        };
        self.copies[dead] = None;
        self.term = self.term.next();
        self.primary = heir;
        let (term, now) = (self.term, self.now);
        let log = self.copy(heir).log.clone();
        assert!(log.len() >= self.committed, "the heir holds too little");
        self.committed = log.len();
        // The new record's members all hold the heir's log.
        for index in 0..COPIES {
            if let Some(member) = self.copies[index].as_mut() {
                for (source, frame) in log.iter().skip(member.log.len()) {
                    member.append(*source, frame.clone());
                }
                member.port.follow(term);
            }
        }
        self.copy(heir).lead(term, now);
        if replace {
            let mut fresh = Copy::new();
            for (source, frame) in &log {
                fresh.append(*source, frame.clone());
            }
            fresh.port.follow(term);
            self.copies[dead] = Some(fresh);
        }
    }

    /// A planned switchover: everything is shipped, the primary steps down and goes on as a
    /// replica with the port it has; what it took from gateways and did not log is not its any more.
    fn hand_over(&mut self, to: usize) {
        let from = self.primary;
        if to == from || self.copies[to].is_none() {
            return;
        }
        self.ship(usize::MAX);
        self.term = self.term.next();
        self.primary = to;
        let (term, now) = (self.term, self.now);
        self.copy(from).port.follow(term);
        self.copy(to).lead(term, now);
    }

    fn break_pipe(&mut self, index: usize, which: usize) {
        let now = self.now;
        let gateway = &mut self.gateways[index];
        let Some(session) = gateway.pipes.keys().nth(which % 3).copied() else {
            return;
        };
        if let Some(pipe) = gateway.pipes.remove(&session) {
            gateway.port.lost(session, now);
            if let Some(copy) = self.copies[pipe.copy].as_mut() {
                copy.port.disconnected(pipe.at_agent, now);
            }
        }
    }

    fn pass_time(&mut self, millis: u64) {
        self.now = self.now.plus(Span::from_millis(millis));
        let now = self.now;
        for gateway in &mut self.gateways {
            gateway.port.handle_timeout(now);
        }
        for copy in self.copies.iter_mut().flatten() {
            copy.port.handle_timeout(now);
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Say(gateway) => self.say(gateway),
            Step::Carry(gateway, messages) => self.carry(gateway, messages),
            Step::Execute(frames) => self.execute(frames),
            Step::Ship(entries) => self.ship(entries),
            Step::Replay(copy, entries) => {
                if copy != self.primary
                    && let Some(copy) = self.copies[copy].as_mut()
                {
                    let upto = copy.executed + entries;
                    copy.replay(upto);
                }
            }
            Step::Kill(replace) => self.kill_primary(replace),
            Step::HandOver(to) => self.hand_over(to),
            Step::Tell(gateway) => self.tell(gateway),
            Step::Break(gateway, which) => self.break_pipe(gateway, which),
            Step::Time(millis) => self.pass_time(millis),
        }
    }

    /// Everything works again: runs until nothing moves any more.
    fn heal(&mut self) {
        for gateway in 0..self.gateways.len() {
            self.tell(gateway);
        }
        for _ in 0..400 {
            for gateway in 0..self.gateways.len() {
                self.carry(gateway, 50);
            }
            self.execute(50);
            self.ship(50);
            self.pass_time(20);
        }
    }

    fn check(&mut self) {
        let primary = self.primary;
        let log = self.copy(primary).log.clone();
        let mut machine = Machine::default();
        let mut known = Vec::new();
        let mut expected: BTreeMap<u64, Vec<Bytes>> = BTreeMap::new();
        for (source, frame) in &log {
            if !known.contains(&source.gateway.0) {
                known.push(source.gateway.0);
            }
            for (_, output) in machine.arrive(frame) {
                for gateway in 1..=GATEWAYS {
                    if output[..6] == mac(gateway) {
                        expected.entry(gateway).or_default().push(output.clone());
                    }
                }
            }
        }
        for gateway in &self.gateways {
            let incarnation = gateway.port.incarnation();
            let arrived: Vec<_> = log
                .iter()
                .filter(|(source, _)| source.gateway == incarnation)
                .collect();
            for (index, (source, frame)) in arrived.iter().enumerate() {
                assert_eq!(source.number.0, index as u64 + 1, "numbers have no gaps");
                assert_eq!(*frame, gateway.sent[index], "frames arrive in order");
            }
            assert_eq!(arrived.len(), gateway.sent.len(), "a frame is lost");
            let (broadcast, own): (Vec<_>, Vec<_>) = gateway
                .passed
                .iter()
                .cloned()
                .partition(|frame| frame[0] == 0xff);
            assert_eq!(
                own,
                expected.remove(&number(incarnation)).unwrap_or_default(),
                "outputs pass exactly once and in order"
            );
            // A broadcast reaches a gateway at most once, and always once the machine knows it.
            assert!(broadcast.len() as u64 <= machine.arrivals / 3);
            let first = log.iter().position(|(s, _)| s.gateway == incarnation);
            if let Some(first) = first {
                let due = (first as u64 + 1..=machine.arrivals)
                    .filter(|n| n % 3 == 0)
                    .count();
                assert!(broadcast.len() >= due, "a broadcast is lost");
            }
            assert_eq!(gateway.port.unforgotten_bytes(), 0, "all is committed");
        }
        let last = FrameNumber(self.copy(primary).port.received_by_all().0);
        assert!(
            last.0 + 1 >= machine.outputs,
            "outputs are kept that all have: {last:?} of {}",
            machine.outputs
        );
    }
}

#[derive(Clone, Debug)]
enum Step {
    Say(usize),
    Carry(usize, usize),
    Execute(usize),
    Ship(usize),
    Replay(usize, usize),
    Kill(bool),
    HandOver(usize),
    Tell(usize),
    Break(usize, usize),
    Time(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let gateway = 0..GATEWAYS as usize;
    prop_oneof![
        6 => gateway.clone().prop_map(Step::Say),
        8 => (gateway.clone(), 1..6usize).prop_map(|(g, n)| Step::Carry(g, n)),
        4 => (1..4usize).prop_map(Step::Execute),
        4 => (1..4usize).prop_map(Step::Ship),
        2 => (0..COPIES, 1..4usize).prop_map(|(c, n)| Step::Replay(c, n)),
        1 => any::<bool>().prop_map(Step::Kill),
        1 => (0..COPIES).prop_map(Step::HandOver),
        2 => gateway.clone().prop_map(Step::Tell),
        2 => (gateway, 0..3usize).prop_map(|(g, w)| Step::Break(g, w)),
        2 => prop_oneof![Just(5u64), Just(20), Just(1_100)].prop_map(Step::Time),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn every_frame_passes_once_and_in_order(steps in proptest::collection::vec(step(), 1..150)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
        world.heal();
        world.check();
    }
}
