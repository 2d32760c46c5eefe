//! Two stacks back to back: the gateway's and a guest's, time under the test's control.

use bytes::Bytes;
use replay_log::GatewayIncarnation;

use super::guest::{self, BYE, DEAF, ECHO, Guest, NOBODY, RESET, stack_config};
use crate::gateway::stack::{ConnectionId, GuestSideAddress, Progress, Stack};
use crate::protocol::{Span, Time};

struct Wire {
    stack: Stack,
    guest: Guest,
    now: Time,
}

impl Wire {
    fn new() -> Self {
        let now = Time::default();
        let mut stack = Stack::new(GatewayIncarnation(1), stack_config(), now).expect("a stack");
        stack.set_room(1_000);
        Self {
            stack,
            guest: Guest::new(),
            now,
        }
    }

    /// Carries frames until none moves any more.
    fn settle(&mut self) {
        loop {
            self.stack.egress(self.now);
            let frames: Vec<Bytes> = std::iter::from_fn(|| self.stack.poll_transmit()).collect();
            let idle = frames.is_empty();
            for frame in frames {
                for answer in self.guest.step(Some(frame), self.now) {
                    self.stack.handle_frame(answer, self.now);
                }
            }
            if idle {
                return;
            }
        }
    }

    /// Lets time pass, with every timer that falls due on the way.
    fn pass(&mut self, span: Span) {
        let end = self.now.plus(span);
        while self.now < end {
            self.now = self.now.plus(Span::from_millis(10)).min(end);
            for frame in self.guest.step(None, self.now) {
                self.stack.handle_frame(frame, self.now);
            }
            self.stack.handle_timeout(self.now);
            self.settle();
        }
    }

    fn connect(&mut self, port: u16) -> ConnectionId {
        let id = self.stack.connect(port, self.now).expect("a connection");
        self.settle();
        id
    }

    fn received(&mut self, id: ConnectionId) -> Vec<u8> {
        let mut all = Vec::new();
        self.stack.receive(id, |bytes| {
            all.extend_from_slice(bytes);
            bytes.len()
        });
        all
    }

    fn send(&mut self, id: ConnectionId, bytes: &[u8]) -> usize {
        let mut sent = 0;
        self.stack.send(id, |room| {
            let part = room.len().min(bytes.len() - sent);
            room[..part].copy_from_slice(&bytes[sent..sent + part]);
            sent += part;
            part
        });
        self.settle();
        sent
    }
}

#[test]
fn bytes_go_there_and_back_on_many_connections() {
    let mut wire = Wire::new();
    let ids: Vec<_> = (0..50).map(|_| wire.connect(ECHO)).collect();
    for (index, id) in ids.iter().enumerate() {
        assert_eq!(wire.stack.progress(*id), Some(Progress::Open));
        let text = format!("client {index}");
        assert_eq!(wire.send(*id, text.as_bytes()), text.len());
        assert_eq!(wire.received(*id), text.as_bytes());
    }
}

#[test]
fn half_close_goes_through_both_ways() {
    let mut wire = Wire::new();
    let id = wire.connect(ECHO);
    wire.send(id, b"last words");
    wire.stack.finish(id);
    wire.settle();
    assert!(!wire.stack.is_drained(id), "the answer waits to be taken");
    assert_eq!(wire.received(id), b"last words");
    wire.pass(Span::from_millis(20));
    assert!(wire.stack.is_drained(id));
    assert_eq!(wire.stack.progress(id), Some(Progress::Closed));

    let id = wire.connect(BYE);
    assert_eq!(wire.received(id), b"bye");
    assert!(wire.stack.is_drained(id));
    assert_eq!(wire.stack.progress(id), Some(Progress::Open));
    wire.stack.finish(id);
    wire.settle();
    assert_eq!(wire.stack.progress(id), Some(Progress::Closed));
}

#[test]
fn the_guest_is_rid_of_a_connection_as_soon_as_we_are() {
    let mut wire = Wire::new();
    let id = wire.connect(ECHO);
    wire.stack.finish(id);
    // The guest answers our FIN with its own, and we forget the connection at that moment.
    while wire.stack.progress(id) != Some(Progress::Closed) {
        wire.stack.egress(wire.now);
        let frame = wire.stack.poll_transmit().expect("a segment");
        for answer in wire.guest.step(Some(frame), wire.now) {
            wire.stack.handle_frame(answer, wire.now);
        }
    }
    assert_eq!(wire.guest.busy(), 1);
    wire.stack.remove(id, wire.now);
    wire.settle();
    assert_eq!(wire.guest.busy(), 0);

    let id = wire.connect(ECHO);
    wire.stack.abort(id, wire.now);
    wire.settle();
    assert_eq!(wire.guest.busy(), 0);
}

#[test]
fn refusals_and_resets_are_told() {
    let mut wire = Wire::new();
    let id = wire.connect(NOBODY);
    assert_eq!(wire.stack.progress(id), Some(Progress::Reset));
    let id = wire.connect(RESET);
    assert_eq!(wire.stack.progress(id), Some(Progress::Open));
    wire.send(id, b"x");
    assert_eq!(wire.stack.progress(id), Some(Progress::Reset));
    assert_eq!(wire.stack.poll_touched(), Some(id));
    // The other way round: an abort reaches the guest even when the device is full.
    let id = wire.connect(ECHO);
    wire.stack.set_room(0);
    wire.stack.abort(id, wire.now);
    let reset = wire.stack.poll_transmit().expect("a reset segment");
    assert_eq!(wire.guest.step(Some(reset), wire.now), Vec::<Bytes>::new());
    assert_eq!(wire.stack.progress(id), None);
}

#[test]
fn a_guest_that_does_not_read_stops_the_client() {
    let mut wire = Wire::new();
    let id = wire.connect(DEAF);
    let mut sent = 0;
    for _ in 0..100 {
        sent += wire.send(id, &[1; 10_000]);
    }
    // Its own receive buffer and our send buffer.
    assert_eq!(sent, 16 * 1024 + stack_config().buffer);
    assert_eq!(wire.stack.send_room(id), 0);
}

#[test]
fn a_client_that_does_not_read_closes_the_window() {
    let mut wire = Wire::new();
    let id = wire.connect(ECHO);
    let mut sent = 0;
    for _ in 0..100 {
        sent += wire.send(id, &[1; 10_000]);
        wire.pass(Span::from_millis(20));
    }
    let most = 2 * (16 * 1024 + stack_config().buffer);
    assert!(sent <= most, "{sent} bytes were taken, {most} fit");
    let mut back = 0;
    while back < sent {
        let part = wire.received(id).len();
        back += part;
        wire.pass(Span::from_millis(20));
        assert!(part > 0 || wire.now < Time::from_nanos(100_000_000_000));
    }
    assert_eq!(back, sent);
}

#[test]
fn a_full_device_holds_frames_and_lets_them_go_later() {
    let mut wire = Wire::new();
    let id = wire.connect(ECHO);
    wire.stack.set_room(0);
    assert_eq!(wire.send(id, b"patience"), 8);
    assert_eq!(wire.received(id), b"");
    wire.stack.set_room(1_000);
    wire.settle();
    assert_eq!(wire.received(id), b"patience");
}

/// Nobody's frames pass for hours: output that waits for its commit, a host that was stopped.
#[test]
fn a_stall_resets_no_connection_whose_ends_live() {
    let mut wire = Wire::new();
    let (idle, busy) = (wire.connect(ECHO), wire.connect(ECHO));
    assert_eq!(wire.send(busy, b"before"), 6);
    assert_eq!(wire.received(busy), b"before");
    // What the busy one says when the stall has begun is on its way.
    let mut word = Some(b'x');
    wire.stack.send(busy, |room| {
        word.take().map_or(0, |word| {
            room[0] = word;
            1
        })
    });
    let mut held = Vec::new();
    let end = wire.now.plus(Span::from_millis(3_600_000));
    while wire.now < end {
        wire.stack.egress(wire.now);
        held.extend(std::iter::from_fn(|| wire.stack.poll_transmit()));
        wire.now = wire.stack.poll_timeout().map_or(end, |due| due.min(end));
        wire.stack.handle_timeout(wire.now);
    }
    for frame in held {
        for answer in wire.guest.step(Some(frame), wire.now) {
            wire.stack.handle_frame(answer, wire.now);
        }
    }
    wire.pass(Span::from_millis(20));
    for id in [idle, busy] {
        assert_eq!(wire.stack.progress(id), Some(Progress::Open));
        assert_eq!(wire.send(id, b"after"), 5);
        wire.pass(Span::from_millis(20));
    }
    assert_eq!(wire.received(idle), b"after");
    wire.pass(Span::from_millis(1_000));
    assert_eq!(wire.received(busy), b"xafter");
}

#[test]
fn a_guest_that_is_not_there_yet_is_waited_for_and_then_given_up() {
    let mut wire = Wire::new();
    let id = wire.stack.connect(ECHO, wire.now).expect("a connection");
    // Nobody answers while the frames go nowhere.
    let mut asked = 0;
    while wire.stack.progress(id) == Some(Progress::Connecting) {
        wire.stack.egress(wire.now);
        while wire.stack.poll_transmit().is_some() {
            asked += 1;
        }
        let due = wire.stack.poll_timeout().expect("a timer");
        assert!(due > wire.now, "time passes");
        wire.now = due;
        wire.stack.handle_timeout(wire.now);
    }
    assert_eq!(wire.stack.progress(id), Some(Progress::Reset));
    assert_eq!(
        wire.now,
        Time::default().plus(stack_config().connect_timeout)
    );
    assert!(asked > 3, "it asked {asked} times");
}

#[test]
fn nonsense_from_the_guest_is_dropped() {
    let mut wire = Wire::new();
    let id = wire.connect(ECHO);
    let good: Vec<u8> = {
        wire.stack.send(id, |room| {
            room[0] = 1;
            1
        });
        wire.stack.egress(wire.now);
        let frame = wire.stack.poll_transmit().expect("a segment");
        wire.guest.step(Some(frame), wire.now).concat()
    };
    for length in 0..good.len() {
        wire.stack
            .handle_frame(Bytes::copy_from_slice(&good[..length]), wire.now);
    }
    for position in 12..good.len() {
        let mut bad = good.clone();
        bad[position] ^= 0xff;
        wire.stack.handle_frame(bad.into(), wire.now);
        wire.stack.egress(wire.now);
    }
}

#[test]
fn addresses_are_fresh_and_inside_the_subnet() {
    for prefix in [8, 16, 24] {
        let mut config = stack_config();
        config.prefix = prefix;
        for incarnation in 0..2_000 {
            let address =
                GuestSideAddress::derive(GatewayIncarnation(incarnation), &config).expect("fits");
            let mask = u32::MAX << (32 - prefix);
            let (ip, guest) = (u32::from(address.ip), u32::from(guest::ADDRESS));
            assert_eq!(ip & mask, guest & mask);
            assert_ne!(ip & !mask, 0);
            assert_ne!(ip & !mask, !mask);
            assert_ne!(ip, guest);
        }
    }
    let of = |incarnation| {
        GuestSideAddress::derive(GatewayIncarnation(incarnation), &stack_config()).expect("fits")
    };
    assert_eq!(of(5), of(5));
    assert_ne!(of(5).mac, of(6).mac);
    assert_ne!(of(5).ip, of(6).ip);
    let mut config = stack_config();
    config.prefix = 30;
    assert!(GuestSideAddress::derive(GatewayIncarnation(1), &config).is_err());
}
