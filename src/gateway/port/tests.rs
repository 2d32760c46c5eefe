//! Tests of the gateway's end alone.

use super::*;

const START: Time = Time::from_nanos(0);

fn vm() -> VmName {
    VmName::new("vm").expect("a name")
}

const BOOT: Boot = Boot([1; 16]);

fn frame(number: u64) -> ToGateway {
    ToGateway::Frame {
        port: NetworkPort::default(),
        number: FrameNumber(number),
        bytes: Bytes::from_static(b"frame"),
    }
}

fn welcome(term: u64, logged: u64) -> ToGateway {
    ToGateway::Welcome {
        term: Term(term),
        boot: BOOT,
        logged: FrameNumber(logged),
    }
}

fn port() -> GatewayPort<&'static str> {
    GatewayPort::new(vm(), GatewayIncarnation(1), Ipv4Addr::LOCALHOST, 20)
}

fn opened(port: &mut GatewayPort<&'static str>) -> (SessionId, &'static str, Hello) {
    loop {
        match port.poll_action().expect("a session is opened") {
            PortAction::Open {
                session,
                host,
                hello,
            } => return (session, host, hello),
            PortAction::Close { .. } => {}
        }
    }
}

#[test]
fn an_output_that_comes_twice_passes_once() {
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (session, ..) = opened(&mut port);
    port.handle(session, welcome(1, 0), START).expect("welcome");
    let mut passed = Vec::new();
    for number in [3, 3, 2, 5, 3] {
        let frame = port.handle(session, frame(number), START).expect("a frame");
        passed.push(frame.is_some());
    }
    assert_eq!(passed, [true, false, false, true, false]);
    assert_eq!(port.counters().duplicates, 3);
    assert_eq!(port.received(), FrameNumber(5));
}

#[test]
fn nothing_of_a_term_that_is_over_passes() {
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (old, ..) = opened(&mut port);
    port.handle(old, welcome(1, 0), START).expect("welcome");
    port.reign(Term(2), "b", START);
    let late = port.handle(old, frame(1), START).expect("dropped");
    assert_eq!(late, None);
    assert_eq!(port.counters().dropped_old_term, 1);
    let (_, host, hello) = opened(&mut port);
    assert_eq!((host, hello.term), ("b", Term(2)));
    assert_eq!(hello.received, FrameNumber(0));
    // Old news from the keeper change nothing.
    port.reign(Term(1), "a", START);
    assert_eq!(port.reigning(), Some(&(Term(2), "b")));
    assert_eq!(port.poll_action(), None);
}

#[test]
fn who_claims_a_term_the_keeper_did_not_name_is_not_believed() {
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (session, ..) = opened(&mut port);
    let refused = port.handle(session, welcome(9, 0), START);
    assert!(matches!(refused, Err(PortError::Broken { .. })));
    assert_eq!(port.reigning(), Some(&(Term(1), "a")));
    assert!(!port.is_welcomed());
}

#[test]
fn a_lost_primary_is_tried_again_soon() {
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (first, ..) = opened(&mut port);
    port.lost(first, START);
    assert_eq!(port.poll_timeout(), Some(START.plus(RETRY_AFTER)));
    port.handle_timeout(START.plus(RETRY_AFTER));
    let (second, ..) = opened(&mut port);
    assert_ne!(first, second);
    // No welcome comes: asked anew.
    port.handle_timeout(START.plus(RETRY_AFTER).plus(WELCOME_WITHIN));
    let (third, ..) = opened(&mut port);
    assert_ne!(second, third);
}

#[test]
fn a_machine_that_lost_history_ends_the_incarnation() {
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (session, ..) = opened(&mut port);
    port.handle(session, welcome(1, 0), START).expect("welcome");
    port.send(Bytes::from_static(&[0; 15]));
    port.send(Bytes::from_static(&[0; 15]));
    assert!(!port.has_room(), "30 bytes of 20 wait");
    let mut out = BytesMut::new();
    port.transmit(session, &mut out, 1 << 16);
    port.handle(
        session,
        ToGateway::Committed {
            through: FrameNumber(1),
        },
        START,
    )
    .expect("committed");
    assert!(port.has_room());
    port.reign(Term(2), "b", START);
    let (session, ..) = opened(&mut port);
    let lost = port.handle(session, welcome(2, 0), START);
    assert!(matches!(lost, Err(PortError::HistoryLost { .. })));
}

#[test]
fn a_lie_about_what_was_sent_closes_the_session() {
    for lie in [
        ToGateway::Committed {
            through: FrameNumber(1),
        },
        welcome(1, 0),
    ] {
        let mut port = port();
        port.reign(Term(1), "a", START);
        let (session, ..) = opened(&mut port);
        port.handle(session, welcome(1, 0), START).expect("welcome");
        let refused = port.handle(session, lie, START);
        assert!(matches!(refused, Err(PortError::Broken { .. })));
        assert!(!port.is_welcomed());
    }
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (session, ..) = opened(&mut port);
    let refused = port.handle(session, welcome(1, u64::MAX), START);
    // Somebody has spoken in its name: an agent that gave it up.
    assert!(matches!(refused, Err(PortError::HistoryLost { .. })));
    assert!(!port.is_welcomed());
}

#[test]
fn an_address_that_is_taken_ends_the_incarnation() {
    let mut port = port();
    port.reign(Term(1), "a", START);
    let (session, ..) = opened(&mut port);
    let refused = ToGateway::Refused {
        term: Term(1),
        why: Refusal::AddressTaken,
    };
    let lost = port.handle(session, refused, START);
    assert!(matches!(lost, Err(PortError::HistoryLost { .. })));
}
