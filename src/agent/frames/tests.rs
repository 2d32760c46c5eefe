//! Tests of the agent's end alone.

use bytes::BytesMut;

use super::*;
use crate::gateway::frames::{Message, NetworkPort, ToAgent, incarnation_of, is_incarnation_of};

const START: Time = Time::from_nanos(0);

fn seconds(seconds: u64) -> Time {
    START.plus(Span::from_millis(seconds * 1_000))
}

fn vm(name: &str) -> VmName {
    VmName::new(name).expect("a name")
}

/// Three gateways, each with an incarnation of its own.
const NAMES: [&str; 3] = ["east", "west", "third"];

fn name(index: usize) -> Name {
    NAMES[index].parse().expect("a name")
}

fn gateway(index: usize, run: u32) -> GatewayIncarnation {
    incarnation_of(&name(index), run)
}

/// Its address in the guest's network: another one for each run in these tests.
fn address(gateway: GatewayIncarnation) -> Ipv4Addr {
    let [_, _, _, who, .., a, b] = gateway.0.to_be_bytes();
    Ipv4Addr::new(10, who, a, b)
}

/// The name of the gateway whose incarnation this is.
fn who(gateway: GatewayIncarnation) -> Name {
    let mut names = (0..NAMES.len()).map(name);
    let theirs = names.find(|name| is_incarnation_of(gateway, name));
    theirs.expect("one of the three")
}

fn port() -> FramePort {
    let limits = FrameLimits {
        gateways: 2,
        sessions: 12,
        sessions_each: 4,
        outputs: 100,
        arrivals: 30,
        absence: Span::from_millis(60_000),
        ..FrameLimits::default()
    };
    FramePort::new(vm("vm"), Boot([1; 16]), limits)
}

fn hello(gateway: GatewayIncarnation, term: u64, received: u64) -> ToAgent {
    ToAgent::Hello(Hello {
        vm: vm("vm"),
        gateway,
        address: address(gateway),
        term: Term(term),
        received: FrameNumber(received),
    })
}

/// An output, 15 bytes long.
fn ethernet(to: GatewayIncarnation) -> Bytes {
    [&Mac::of(to).0[..], &[2, 0, 0, 0, 0, 99, 8, 0, 42]]
        .concat()
        .into()
}

/// A frame of the first gateway, 15 bytes long.
fn frame(number: u64) -> ToAgent {
    ToAgent::Frame {
        port: NetworkPort::default(),
        number: FrameNumber(number),
        bytes: [
            &[2, 0, 0, 0, 0, 99][..],
            &Mac::of(gateway(0, 5)).0,
            &[8, 1, 42],
        ]
        .concat()
        .into(),
    }
}

fn written(port: &mut FramePort, session: SessionId) -> (Vec<ToGateway>, bool) {
    let mut out = BytesMut::new();
    let ends = port.transmit(session, &mut out, 1 << 16);
    let mut messages = Vec::new();
    while let Some(message) = ToGateway::decode(&mut out).expect("well formed") {
        messages.push(message);
    }
    (messages, ends)
}

fn refusal(port: &mut FramePort, session: SessionId) -> Option<Refusal> {
    let (messages, ends) = written(port, session);
    match messages.first() {
        Some(ToGateway::Refused { why, .. }) if ends => Some(*why),
        _ => None,
    }
}

fn join(port: &mut FramePort, session: u64, gateway: GatewayIncarnation, received: u64) {
    port.connected(SessionId(session), &who(gateway), START);
    port.message(SessionId(session), hello(gateway, 1, received))
        .expect("hello");
}

/// A leading port whose machine has logged one frame of each of two gateways.
fn leading() -> FramePort {
    let mut port = port();
    let logged = [
        (gateway(0, 5), FrameNumber(1)),
        (gateway(1, 6), FrameNumber(1)),
    ];
    port.lead(Term(1), logged, START);
    port
}

#[test]
fn a_frame_that_comes_twice_is_delivered_once_and_a_gap_is_refused() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    for number in [1, 2, 2, 3] {
        port.message(SessionId(1), frame(number)).expect("a frame");
    }
    let numbers: Vec<_> = std::iter::from_fn(|| port.poll_arrival())
        .map(|(source, _)| source.number.0)
        .collect();
    assert_eq!(numbers, [2, 3]);
    assert_eq!(port.counters().duplicates, 2);
    assert!(port.message(SessionId(1), frame(5)).is_err());
}

#[test]
fn a_hello_waits_for_the_reign_that_it_names() {
    let mut port = port();
    join(&mut port, 1, gateway(0, 5), 0);
    assert_eq!(written(&mut port, SessionId(1)), (vec![], false));
    port.lead(Term(1), [], START);
    let (messages, ends) = written(&mut port, SessionId(1));
    assert!(matches!(messages[..], [ToGateway::Welcome { .. }]));
    assert!(!ends);
    // Deposed: the session is over, and so is one for a term that is past.
    port.follow(Term(2));
    assert_eq!(refusal(&mut port, SessionId(1)), Some(Refusal::OtherTerm));
    join(&mut port, 2, gateway(0, 5), 0);
    assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::OtherTerm));
}

#[test]
fn outputs_go_to_whom_they_are_for() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    join(&mut port, 2, gateway(1, 6), 0);
    port.output(FrameNumber(1), ethernet(gateway(0, 5)));
    port.output(FrameNumber(4), ethernet(gateway(1, 6)));
    let mut broadcast = ethernet(gateway(0, 5)).to_vec();
    broadcast[..6].fill(0xff);
    port.output(FrameNumber(5), broadcast.into());
    let mut numbers = |session| {
        let (messages, _) = written(&mut port, SessionId(session));
        messages
            .iter()
            .filter_map(|message| match message {
                ToGateway::Frame { number, .. } => Some(number.0),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(numbers(1), [1, 5]);
    assert_eq!(numbers(2), [4, 5]);
    assert_eq!(port.received_by_all(), FrameNumber(0));
    let received = |through| ToAgent::Received {
        through: FrameNumber(through),
    };
    port.message(SessionId(1), received(5)).expect("received");
    assert_eq!(port.received_by_all(), FrameNumber(3));
    assert!(port.message(SessionId(2), received(6)).is_err());
}

#[test]
fn a_gateway_that_stays_away_is_dropped_and_cannot_come_back() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    port.output(FrameNumber(1), ethernet(gateway(0, 5)));
    port.output(FrameNumber(2), ethernet(gateway(1, 6)));
    assert_eq!(port.received_by_all(), FrameNumber(0));
    port.disconnected(SessionId(1), seconds(10));
    // The other gateway was known from the log and never came: it goes first.
    assert_eq!(port.poll_timeout(), Some(seconds(60)));
    port.handle_timeout(seconds(60));
    port.handle_timeout(seconds(70));
    let dropped: Vec<_> = std::iter::from_fn(|| port.poll_event())
        .filter_map(|event| match event {
            FrameEvent::Dropped { gateway, why, .. } => Some((gateway, why)),
            _ => None,
        })
        .collect();
    assert_eq!(
        dropped,
        [
            (gateway(1, 6), DropReason::Absent),
            (gateway(0, 5), DropReason::Absent)
        ]
    );
    assert_eq!(port.received_by_all(), FrameNumber(2));
    join(&mut port, 2, gateway(0, 5), 0);
    assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::TooLate));
    join(&mut port, 3, gateway(0, 5), 1);
    assert_eq!(refusal(&mut port, SessionId(3)), None);
}

#[test]
fn a_gateway_that_takes_nothing_holds_the_guest_back_and_is_dropped_then() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    join(&mut port, 2, gateway(1, 6), 0);
    port.tell_time(seconds(1));
    for number in 1..=6 {
        port.output(FrameNumber(number), ethernet(gateway(0, 5)));
    }
    assert_eq!(port.overdue_bytes(), 0, "90 bytes of 100");
    port.output(FrameNumber(7), ethernet(gateway(0, 5)));
    assert_eq!(port.overdue_bytes(), 105);
    // What it takes is a sign of life.
    written(&mut port, SessionId(1));
    port.tell_time(seconds(4));
    let received = |through| ToAgent::Received {
        through: FrameNumber(through),
    };
    port.message(SessionId(1), received(1)).expect("received");
    assert_eq!(port.overdue_bytes(), 0);
    for number in 8..=9 {
        port.output(FrameNumber(number), ethernet(gateway(0, 5)));
    }
    assert_eq!(port.overdue_bytes(), 120);
    assert_eq!(port.poll_timeout(), Some(seconds(9)));
    port.handle_timeout(seconds(9));
    assert_eq!(refusal(&mut port, SessionId(1)), Some(Refusal::TooLate));
    let mut events = std::iter::from_fn(|| port.poll_event());
    let dropped = events.find_map(|event| match event {
        FrameEvent::Dropped { gateway, why, .. } => Some((gateway, why)),
        _ => None,
    });
    assert_eq!(dropped, Some((gateway(0, 5), DropReason::TooFarBehind)));
    assert_eq!(port.overdue_bytes(), 0);
    assert_eq!(port.received_by_all(), FrameNumber(9));
}

/// A whole commit comes before the streams are polled once: after a stall, more than is kept for
/// a gateway that is away.
#[test]
fn a_burst_reaches_a_gateway_that_is_there() {
    const OUTPUTS: u64 = 10_000;
    let payload = [7; 1_500];
    let frame: Bytes = [&ethernet(gateway(0, 5))[..], &payload].concat().into();
    let mut port = FramePort::new(vm("vm"), Boot([1; 16]), FrameLimits::default());
    port.lead(Term(1), [(gateway(0, 5), FrameNumber(1))], START);
    join(&mut port, 1, gateway(0, 5), 0);
    for number in 1..=OUTPUTS {
        port.output(FrameNumber(number), frame.clone());
    }
    assert!(port.kept_bytes() > 3 * FrameLimits::default().outputs);
    assert_eq!(port.overdue_bytes(), port.kept_bytes());
    let mut frames = 0;
    port.tell_time(seconds(1));
    while frames < OUTPUTS {
        let (messages, ends) = written(&mut port, SessionId(1));
        assert!(!ends, "{frames} frames reached it");
        let outputs = |message: &&ToGateway| matches!(message, ToGateway::Frame { .. });
        frames += messages.iter().filter(outputs).count() as u64;
    }
    let received = ToAgent::Received {
        through: FrameNumber(OUTPUTS),
    };
    port.message(SessionId(1), received).expect("received");
    assert_eq!((port.kept_bytes(), port.overdue_bytes()), (0, 0));
    assert_eq!(port.poll_timeout(), None);
}

/// The same for a copy that begins to reign: its gateways come a moment later.
#[test]
fn a_burst_is_kept_for_gateways_that_come_with_the_reign() {
    let mut port = leading();
    port.follow(Term(1));
    for number in 1..=20 {
        port.output(FrameNumber(number), ethernet(gateway(0, 5)));
    }
    port.lead(Term(2), [], seconds(1));
    port.connected(SessionId(1), &name(0), seconds(2));
    port.message(SessionId(1), hello(gateway(0, 5), 2, 0))
        .expect("hello");
    let (messages, _) = written(&mut port, SessionId(1));
    let outputs = |message: &&ToGateway| matches!(message, ToGateway::Frame { .. });
    assert_eq!(messages.iter().filter(outputs).count(), 20);
}

#[test]
fn a_gateway_that_was_replaced_is_not_waited_for_as_long() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    join(&mut port, 2, gateway(1, 6), 0);
    port.disconnected(SessionId(1), seconds(10));
    assert_eq!(port.poll_timeout(), Some(seconds(70)));
    join(&mut port, 3, gateway(0, 8), 0);
    assert_eq!(port.poll_timeout(), Some(seconds(15)));
    port.handle_timeout(seconds(15));
    let dropped = |event| matches!(event, FrameEvent::Dropped { .. });
    assert_eq!(
        std::iter::from_fn(|| port.poll_event())
            .filter(|e| dropped(e.clone()))
            .count(),
        1
    );
    assert_eq!((port.served(), port.poll_timeout()), (2, None));
}

#[test]
fn a_machine_that_takes_nothing_stops_the_gateway() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    port.message(SessionId(1), frame(2)).expect("a frame");
    assert!(port.wants_input(SessionId(1)));
    port.message(SessionId(1), frame(3)).expect("a frame");
    assert!(!port.wants_input(SessionId(1)), "30 bytes of 30 wait");
    port.hold_arrivals(true);
    assert_eq!((port.poll_arrival(), port.has_news()), (None, true));
    while port.poll_event().is_some() {}
    assert!(!port.has_news());
    port.hold_arrivals(false);
    assert!(port.has_news());
    port.poll_arrival();
    assert!(port.wants_input(SessionId(1)));
}

#[test]
fn frames_are_committed_to_the_gateway_when_the_log_is() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    written(&mut port, SessionId(1));
    port.message(SessionId(1), frame(2)).expect("a frame");
    let (source, _) = port.poll_arrival().expect("it arrives");
    port.logged(source, LogIndex(7));
    port.committed(LogIndex(6), START);
    assert_eq!(port.poll_timeout(), Some(seconds(60)));
    port.committed(LogIndex(7), START);
    assert_eq!(written(&mut port, SessionId(1)).0, []);
    port.handle_timeout(START.plus(COMMITTED_WITHIN));
    assert_eq!(
        written(&mut port, SessionId(1)).0,
        [ToGateway::Committed {
            through: FrameNumber(2)
        }]
    );
}

#[test]
fn a_replica_keeps_outputs_until_all_gateways_have_them() {
    let mut port = leading();
    port.follow(Term(1));
    port.output(FrameNumber(1), ethernet(gateway(0, 5)));
    port.output(FrameNumber(2), ethernet(gateway(0, 5)));
    port.forget(FrameNumber(3));
    // Replay comes to it later than the gateway did.
    port.output(FrameNumber(3), ethernet(gateway(0, 5)));
    port.output(FrameNumber(4), ethernet(gateway(0, 5)));
    port.lead(Term(2), [], START);
    port.connected(SessionId(1), &name(0), START);
    port.message(SessionId(1), hello(gateway(0, 5), 2, 3))
        .expect("hello");
    let (messages, _) = written(&mut port, SessionId(1));
    let numbers: Vec<_> = messages
        .iter()
        .filter_map(|message| match message {
            ToGateway::Frame { number, .. } => Some(number.0),
            _ => None,
        })
        .collect();
    assert_eq!(numbers, [4]);
    // One that lacks what all were thought to have cannot go on.
    port.connected(SessionId(2), &name(0), START);
    port.message(SessionId(2), hello(gateway(0, 5), 2, 2))
        .expect("hello");
    assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::TooLate));
}

#[test]
fn strangers_are_turned_away() {
    let mut port = leading();
    port.connected(SessionId(1), &name(0), START);
    assert!(port.message(SessionId(1), frame(1)).is_err());
    let wrong = ToAgent::Hello(Hello {
        vm: vm("another"),
        gateway: gateway(0, 5),
        address: address(gateway(0, 5)),
        term: Term(1),
        received: FrameNumber(0),
    });
    port.connected(SessionId(2), &name(0), START);
    port.message(SessionId(2), wrong).expect("hello");
    assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::UnknownVm));
    join(&mut port, 3, gateway(0, 5), 0);
    join(&mut port, 4, gateway(1, 6), 0);
    join(&mut port, 5, gateway(2, 7), 0);
    assert_eq!(refusal(&mut port, SessionId(5)), Some(Refusal::TooMany));
    // The same gateway again takes the place of its older session.
    join(&mut port, 6, gateway(0, 5), 0);
    assert_eq!(refusal(&mut port, SessionId(6)), None);
    assert!(written(&mut port, SessionId(3)).1, "the older one ends");
}

/// An incarnation is one of the gateway that the certificate names, and of no other.
#[test]
fn a_gateway_cannot_take_over_what_is_another_s() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    port.connected(SessionId(2), &name(1), START);
    let stolen = port.message(SessionId(2), hello(gateway(0, 5), 1, 0));
    assert!(stolen.is_err());
    assert_eq!(port.served(), 1);
    // Nor does the guest hear it under the other's address.
    join(&mut port, 3, gateway(1, 6), 0);
    assert!(port.message(SessionId(3), frame(2)).is_err());
    port.message(SessionId(1), frame(2))
        .expect("its own address");
}

#[test]
fn sessions_that_nobody_welcomes_end() {
    let mut port = port();
    port.follow(Term(3));
    // Nobody reigns in that term before the universe ends.
    port.connected(SessionId(1), &name(0), START);
    port.message(SessionId(1), hello(gateway(0, 5), 1 << 40, 0))
        .expect("hello");
    assert_eq!(refusal(&mut port, SessionId(1)), Some(Refusal::OtherTerm));
    // A gateway may be ahead of this agent, for a while; and one may say nothing, for a while.
    port.connected(SessionId(2), &name(0), seconds(1));
    port.message(SessionId(2), hello(gateway(0, 5), 4, 0))
        .expect("hello");
    port.connected(SessionId(3), &name(0), seconds(1));
    port.handle_timeout(seconds(3));
    assert_eq!(written(&mut port, SessionId(2)), (vec![], false));
    port.handle_timeout(seconds(4));
    assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::OtherTerm));
    assert!(port.is_over(SessionId(3)));
    // Who does not take the refusal does not keep the stream either.
    assert!(!port.is_over(SessionId(2)));
    port.handle_timeout(seconds(7));
    assert!(port.is_over(SessionId(2)));
    for session in 1..=3 {
        port.disconnected(SessionId(session), seconds(7));
    }
    assert_eq!(port.poll_timeout(), None);
}

#[test]
fn a_gateway_with_too_many_sessions_loses_its_own_oldest() {
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    for session in 2..=6 {
        port.connected(SessionId(session), &name(0), START);
    }
    // Four may stay: the one that is served, and the latest of those that are not.
    let over: Vec<_> = (1..=6).filter(|n| port.is_over(SessionId(*n))).collect();
    assert_eq!(over, [2, 3]);
    join(&mut port, 10, gateway(1, 6), 0);
    assert_eq!(refusal(&mut port, SessionId(10)), None);
    assert_eq!(port.served(), 2);
}

#[test]
fn all_gateways_together_have_a_bounded_number_of_sessions() {
    let mut port = leading();
    for session in 1..=20 {
        let who = format!("gateway-{session}").parse().expect("a name");
        port.connected(SessionId(session), &who, START);
    }
    let alive = (1..=20).filter(|n| !port.is_over(SessionId(*n))).count();
    assert_eq!(alive, 12);
}

/// The guest chooses whom it speaks to: what is remembered about that is bounded, and does not push
/// out what is known about gateways.
#[test]
fn a_guest_that_invents_addresses_costs_no_memory() {
    let mut port = leading();
    port.follow(Term(1));
    port.output(FrameNumber(1), ethernet(gateway(0, 5)));
    for number in 2..=100_000 {
        let mut frame = ethernet(gateway(0, 5)).to_vec();
        frame[2..6].copy_from_slice(&(number as u32).to_le_bytes());
        port.output(FrameNumber(number), frame.into());
        port.forget(FrameNumber(number));
    }
    assert_eq!(port.kept_bytes(), 0);
    assert!(port.destinations.remembered() <= 8_192);
    let logged = [(gateway(0, 5), FrameNumber(1))];
    port.lead(Term(1), logged, START);
    // It lacks the first output, and nobody knows that any more: it is not served.
    join(&mut port, 1, gateway(0, 5), 0);
    assert_eq!(refusal(&mut port, SessionId(1)), Some(Refusal::TooLate));
    // One that has all of them goes on, and so does one that has just begun.
    port.connected(SessionId(2), &name(0), START);
    port.message(SessionId(2), hello(gateway(0, 5), 1, 100_000))
        .expect("hello");
    join(&mut port, 3, gateway(2, 7), 0);
    assert_eq!(port.served(), 2);
}

/// One gateway with many runs does not make this agent forget how far another one is.
#[test]
fn a_gateway_that_restarts_without_end_has_only_its_own_runs_forgotten() {
    let mut port = leading();
    let mut events = 0;
    let greatest = (0..NAMES.len()).max_by_key(|index| gateway(*index, 0));
    let restless = greatest.expect("three");
    let other = if restless == 0 {
        gateway(1, 6)
    } else {
        gateway(0, 5)
    };
    for run in 100..6_000 {
        join(&mut port, 1, gateway(restless, run), 0);
        port.disconnected(SessionId(1), START);
        events += std::iter::from_fn(|| port.poll_event()).count();
    }
    assert_eq!(events, 5_900);
    join(&mut port, 1, other, 0);
    let (messages, _) = written(&mut port, SessionId(1));
    let logged = messages.iter().find_map(|message| match message {
        ToGateway::Welcome { logged, .. } => Some(*logged),
        _ => None,
    });
    assert_eq!(logged, Some(FrameNumber(1)));
}

#[test]
fn two_gateways_never_share_an_address() {
    let same = |run| {
        ToAgent::Hello(Hello {
            vm: vm("vm"),
            gateway: gateway(1, run),
            address: address(gateway(0, 5)),
            term: Term(1),
            received: FrameNumber(0),
        })
    };
    let mut port = leading();
    join(&mut port, 1, gateway(0, 5), 0);
    port.connected(SessionId(2), &name(1), START);
    port.message(SessionId(2), same(6)).expect("hello");
    let refused = refusal(&mut port, SessionId(2));
    assert_eq!(refused, Some(Refusal::AddressTaken));
    // Nor does one speak under the other's address.
    let spoof = |from: GatewayIncarnation| {
        let mut frame = ethernet(from).to_vec();
        frame[6..12].copy_from_slice(&Mac::of(gateway(1, 6)).0);
        frame.truncate(12);
        // The beginning of an IPv4 header of 20 bytes.
        frame.extend([8, 0, 0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend(address(from).octets());
        frame.extend([10, 0, 0, 2]);
        ToAgent::Frame {
            port: NetworkPort::default(),
            number: FrameNumber(2),
            bytes: frame.into(),
        }
    };
    join(&mut port, 3, gateway(1, 6), 0);
    port.message(SessionId(3), spoof(gateway(1, 6)))
        .expect("its own");
    assert!(port.message(SessionId(3), spoof(gateway(0, 5))).is_err());
    // An address is free again when who had it is dropped.
    port.disconnected(SessionId(1), seconds(1));
    port.handle_timeout(seconds(61));
    port.connected(SessionId(4), &name(1), seconds(61));
    port.message(SessionId(4), same(7)).expect("hello");
    assert_eq!(refusal(&mut port, SessionId(4)), None);
}
