//! A gateway that is gone has its connections reset in the guest, by the primary that it had and by
//! the one after it.

use bytes::{Bytes, BytesMut};
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, LogIndex, Term};

use super::failover::{name, vm};
use super::guest::{COUNT, ECHO, Guest, stack_config};
use crate::agent::frames::{FrameLimits, FramePort};
use crate::gateway::frames::{
    Boot, Hello, Message, NetworkPort, Refusal, SessionId, ToAgent, ToGateway, incarnation_of,
};
use crate::gateway::stack::{GuestSideAddress, Progress, Stack};
use crate::protocol::{Span, Time};

const SESSION: SessionId = SessionId(1);

fn incarnation() -> GatewayIncarnation {
    incarnation_of(&name(), 1)
}

/// One copy of the guest with the agent's end of its frames.
struct Copy {
    port: FramePort,
    guest: Guest,
    outputs: u64,
}

impl Copy {
    fn new() -> Self {
        Self {
            port: FramePort::new(vm(), Boot([1; 16]), FrameLimits::default()),
            guest: Guest::new(),
            outputs: 0,
        }
    }

    fn execute(&mut self, frame: Option<Bytes>, now: Time) {
        for frame in self.guest.step(frame, now) {
            self.outputs += 1;
            self.port.output(FrameNumber(self.outputs), frame);
        }
    }

    /// The machine takes what has come for it.
    fn take_arrivals(&mut self, now: Time, log: &mut Vec<(Time, Option<(FrameSource, Bytes)>)>) {
        while let Some((source, frame)) = self.port.poll_arrival() {
            log.push((now, Some((source, frame.clone()))));
            self.port.logged(source, LogIndex(log.len() as u64));
            self.execute(Some(frame), now);
        }
        log.push((now, None));
        self.execute(None, now);
    }
}

fn hello(term: u64) -> ToAgent {
    hello_of(incarnation(), term)
}

/// All have the same address.
fn hello_of(gateway: GatewayIncarnation, term: u64) -> ToAgent {
    let address = GuestSideAddress::derive(incarnation(), &stack_config());
    ToAgent::Hello(Hello {
        vm: vm(),
        gateway,
        address: address.expect("a network with room").ip,
        term: Term(term),
        received: FrameNumber(0),
    })
}

fn said(port: &mut FramePort, session: SessionId) -> Vec<ToGateway> {
    let mut out = BytesMut::new();
    port.transmit(session, &mut out, 1 << 20);
    std::iter::from_fn(|| ToGateway::decode(&mut out).expect("well formed")).collect()
}

fn refusal(port: &mut FramePort, session: SessionId) -> Option<Refusal> {
    match said(port, session)[..] {
        [ToGateway::Refused { why, .. }] => Some(why),
        _ => None,
    }
}

#[test]
fn the_connections_of_a_gateway_that_is_gone_are_reset_in_the_guest() {
    const CLIENTS: usize = 40;
    let mut now = Time::default();
    let (mut primary, mut log) = (Copy::new(), Vec::new());
    primary.port.lead(Term(1), [], now);
    primary.port.connected(SESSION, &name(), now);
    primary.port.message(SESSION, hello(1)).expect("hello");

    let mut stack = Stack::new(incarnation(), stack_config(), now).expect("a stack");
    stack.set_room(1_000);
    let mut clients = Vec::new();
    for index in 0..CLIENTS {
        let port = if index % 2 == 0 { ECHO } else { COUNT };
        clients.push(stack.connect(port, now).expect("a connection"));
    }
    let mut sent = 0;
    for turn in 0..100 {
        if turn == 50 {
            for client in &clients {
                let mut words = Some(b"one more\n");
                stack.send(*client, |room| {
                    words.take().map_or(0, |words| {
                        room[..words.len()].copy_from_slice(words);
                        words.len()
                    })
                });
            }
            // One client resets its connection itself.
            stack.abort(clients[0], now);
        }
        stack.handle_timeout(now);
        stack.egress(now);
        while let Some(bytes) = stack.poll_transmit() {
            sent += 1;
            let frame = ToAgent::Frame {
                port: NetworkPort::default(),
                number: FrameNumber(sent),
                bytes,
            };
            primary.port.message(SESSION, frame).expect("a frame");
        }
        primary.take_arrivals(now, &mut log);
        for message in said(&mut primary.port, SESSION) {
            if let ToGateway::Frame { bytes, .. } = message {
                stack.handle_frame(bytes, now);
            }
        }
        now = now.plus(Span::from_millis(2));
    }
    assert_eq!(stack.progress(clients[1]), Some(Progress::Open));
    assert_eq!(primary.guest.busy(), CLIENTS - 1);

    // Another copy executes the same log.
    let mut replica = Copy::new();
    for (at, arrival) in &log {
        replica.execute(arrival.as_ref().map(|(_, frame)| frame.clone()), *at);
    }
    assert_eq!(replica.guest.busy(), CLIENTS - 1);

    // The gateway's host loses power.
    primary.port.disconnected(SESSION, now);
    let absence = FrameLimits::default().absence;
    let mut later = now.plus(absence);
    primary.port.handle_timeout(later);
    primary.take_arrivals(later, &mut log);
    assert_eq!(primary.guest.busy(), 0);
    // It cannot come back as if nothing had happened.
    primary.port.connected(SessionId(2), &name(), later);
    primary.port.message(SessionId(2), hello(1)).expect("hello");
    assert_eq!(
        refusal(&mut primary.port, SessionId(2)),
        Some(Refusal::TooLate)
    );

    // A copy that begins to reign without having seen any of that does the same.
    let logged = FrameNumber(sent);
    replica.port.lead(Term(2), [(incarnation(), logged)], later);
    // It knows the gateway's address from the guest, before the gateway is back.
    let other = "other".parse().expect("a name");
    replica.port.connected(SESSION, &other, later);
    let same_address = hello_of(incarnation_of(&other, 1), 2);
    replica.port.message(SESSION, same_address).expect("hello");
    assert_eq!(
        refusal(&mut replica.port, SESSION),
        Some(Refusal::AddressTaken)
    );
    later = later.plus(absence);
    replica.port.handle_timeout(later);
    let mut numbers = Vec::new();
    while let Some((source, frame)) = replica.port.poll_arrival() {
        assert_eq!(source.gateway, incarnation());
        numbers.push(source.number.0);
        replica.execute(Some(frame), later);
    }
    assert_eq!(replica.guest.busy(), 0);
    let expected: Vec<_> = (sent + 1..).take(numbers.len()).collect();
    assert_eq!(numbers, expected, "the gateway's own numbers go on");
}
