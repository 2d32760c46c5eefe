//! Who may begin a handshake, and on which thread. A stranger's first packet costs an attacker nothing and
//! us a signature, so handshakes are bounded in number and rate. Configured peers prove their address
//! first and come to the thread that heartbeats live on; everybody else to the hall, where they prove
//! their address when there are many.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::endpoint::lock;
use crate::agent::certs::Name;

/// With so many handshakes under way, whoever begins another proves its address first.
const FEW: usize = 16;
/// No more handshakes are under way at the same time.
const MOST: usize = 64;
/// The same for addresses of configured peers: strangers never take their last places.
const MOST_WITH_PEERS: usize = 96;
/// No more handshakes are under way with the addresses of one prefix (/24 of IPv4, /48 of IPv6), unless
/// they are configured peers'.
const MOST_OF_A_PREFIX: usize = 24;

/// A handshake that is under way for so long gives its place to a new one where none is left: so those
/// that stop half-way keep nobody out.
const GIVES_WAY_AFTER: Duration = Duration::from_millis(500);
/// A peer that is known by an address that it did not come from is asked to come again no more often.
const COME_AGAIN_AFTER: Duration = Duration::from_mins(1);

/// What to do with a first packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The handshake may begin.
    Admit,
    /// The sender must prove first that it receives what is sent to its address (QUIC's Retry).
    Prove,
    /// No answer: the sender tries again by itself.
    Drop,
}

/// Counts the handshakes of one endpoint.
#[derive(Debug)]
pub(super) struct Admission {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The oldest first.
    under_way: VecDeque<Begun>,
    /// How many have begun ever.
    number: u64,
    peers: HashMap<Name, Whereabouts>,
    unproven: Bucket,
    proven: Bucket,
    of_peers: Bucket,
    /// All that begin, but for peers'.
    begun: Bucket,
}

/// A handshake that has begun.
#[derive(Debug)]
struct Begun {
    number: u64,
    prefix: Prefix,
    since: Instant,
    /// Gone when it has to give way.
    _place: oneshot::Sender<()>,
}

/// Where there is room for another handshake.
enum Room {
    Free,
    /// In the place of this one of those that are under way.
    Instead(usize),
    None,
}

/// Where a configured peer is.
#[derive(Debug, Default)]
struct Whereabouts {
    /// As far as it was looked up. A host dials from the port that it listens on.
    found: HashSet<SocketAddr>,
    /// Where else it came from, with its certificate, and when: addresses may be translated.
    came_from: Option<(SocketAddr, Instant)>,
}

impl Whereabouts {
    fn is_at(&self, from: SocketAddr) -> bool {
        let came_from = self.came_from.map(|(address, _)| address);
        came_from == Some(from) || self.found.contains(&from)
    }
}

/// An address as it is written in one way only.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Prefix {
    V4([u8; 3]),
    V6([u16; 3]),
}

impl Prefix {
    fn of(address: SocketAddr) -> Self {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => {
                let octets = ip.octets();
                Self::V4([octets[0], octets[1], octets[2]])
            }
            IpAddr::V6(ip) => {
                let groups = ip.segments();
                Self::V6([groups[0], groups[1], groups[2]])
            }
        }
    }
}

impl Admission {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            state: Mutex::new(State {
                under_way: VecDeque::new(),
                number: 0,
                peers: HashMap::new(),
                // A handshake takes some 0.3 ms: these are 5 % of the hall's time,
                unproven: Bucket::new(60, 32, now),
                proven: Bucket::new(120, 64, now),
                // and this is 2 % of the time of the thread that heartbeats live on.
                of_peers: Bucket::new(60, 32, now),
                // More than come by the door.
                begun: Bucket::new(200, 128, now),
            }),
        }
    }

    /// Remembers where a configured peer is.
    pub(super) fn peer_is_at(&self, peer: &Name, addresses: &[SocketAddr]) {
        let mut state = lock(&self.state);
        let known = state.peers.entry(peer.clone()).or_default();
        known.found = addresses.iter().copied().map(canonical).collect();
    }

    /// Tells where a peer came from whose certificate is proven. Whether it is to come again: then it is
    /// known as a peer by its address.
    pub(super) fn comes_again(&self, peer: &Name, from: SocketAddr, now: Instant) -> bool {
        let (mut state, from) = (lock(&self.state), canonical(from));
        let Some(known) = state.peers.get_mut(peer) else {
            return false;
        };
        let lately = known
            .came_from
            .is_some_and(|(_, at)| now.saturating_duration_since(at) < COME_AGAIN_AFTER);
        if known.is_at(from) || lately {
            return false;
        }
        known.came_from = Some((from, now));
        true
    }

    /// Whether a configured peer has this address.
    pub(super) fn is_peer(&self, from: SocketAddr) -> bool {
        lock(&self.state).is_peer(from)
    }

    /// Judges a first packet. `proven`: the sender has shown that the address is its own.
    pub(super) fn judge(&self, from: SocketAddr, proven: bool, now: Instant) -> Verdict {
        let state = &mut *lock(&self.state);
        let peer = state.is_peer(from);
        if !proven {
            // Nobody gets to the thread that heartbeats live on by an address that is said only.
            let admitted = !peer && state.under_way.len() < FEW && state.unproven.take(now);
            return if admitted {
                Verdict::Admit
            } else {
                Verdict::Prove
            };
        }
        if matches!(state.room(from, now), Room::None) {
            return Verdict::Drop;
        }
        let bucket = if peer {
            &mut state.of_peers
        } else {
            &mut state.proven
        };
        if bucket.take(now) {
            Verdict::Admit
        } else {
            Verdict::Drop
        }
    }

    /// Counts a handshake for as long as what is returned lives; `None` when there are too many.
    pub(super) fn begin(self: &Arc<Self>, from: SocketAddr, now: Instant) -> Option<UnderWay> {
        let state = &mut *lock(&self.state);
        let room = state.room(from, now);
        // Whoever has the hall's tag and a proof needs no door: the rate holds for all together.
        if matches!(room, Room::None) || !state.is_peer(from) && !state.begun.take(now) {
            return None;
        }
        if let Room::Instead(place) = room {
            state.under_way.remove(place);
        }
        state.number += 1;
        let number = state.number;
        let (place, given_away) = oneshot::channel();
        state.under_way.push_back(Begun {
            number,
            prefix: Prefix::of(from),
            since: now,
            _place: place,
        });
        Some(UnderWay {
            admission: Arc::clone(self),
            number,
            given_away,
        })
    }
}

impl State {
    fn is_peer(&self, from: SocketAddr) -> bool {
        let from = canonical(from);
        self.peers.values().any(|known| known.is_at(from))
    }

    fn room(&self, from: SocketAddr, now: Instant) -> Room {
        let (count, prefix) = (self.under_way.len(), Prefix::of(from));
        let of_prefix = |begun: &Begun| begun.prefix == prefix;
        let stalls = |begun: &Begun| now.saturating_duration_since(begun.since) >= GIVES_WAY_AFTER;
        let mut oldest = self.under_way.iter();
        let stalled = if self.is_peer(from) {
            if count < MOST_WITH_PEERS {
                return Room::Free;
            }
            oldest.position(stalls)
        } else if self
            .under_way
            .iter()
            .filter(|begun| of_prefix(begun))
            .count()
            >= MOST_OF_A_PREFIX
        {
            // A prefix takes places from itself.
            oldest.position(|begun| of_prefix(begun) && stalls(begun))
        } else if count < MOST {
            return Room::Free;
        } else {
            oldest.position(stalls)
        };
        stalled.map_or(Room::None, Room::Instead)
    }
}

/// A handshake that is under way.
#[derive(Debug)]
pub(super) struct UnderWay {
    admission: Arc<Admission>,
    number: u64,
    given_away: oneshot::Receiver<()>,
}

impl UnderWay {
    /// Resolves when another handshake has its place.
    pub(super) async fn gives_way(&mut self) {
        // Nothing is ever said.
        let _ = (&mut self.given_away).await;
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut state = lock(&self.admission.state);
        state.under_way.retain(|begun| begun.number != self.number);
    }
}

/// A rate with some room for bursts.
#[derive(Debug)]
pub(super) struct Bucket {
    /// The time that one costs.
    each: Duration,
    most: Duration,
    saved: Duration,
    at: Instant,
}

impl Bucket {
    /// So many a second, and so many at once after a pause.
    pub(super) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let each = Duration::from_secs(1) / per_second;
        Self {
            each,
            most: each * burst,
            saved: each * burst,
            at: now,
        }
    }

    /// Takes one, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        self.saved = (self.saved + now.saturating_duration_since(self.at)).min(self.most);
        self.at = now;
        match self.saved.checked_sub(self.each) {
            Some(left) => {
                self.saved = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, last], 7_000))
    }

    fn stranger(number: u8) -> SocketAddr {
        SocketAddr::from(([198, 51, number, 1], 7_000))
    }

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let now = Instant::now();
        let mut bucket = Bucket::new(10, 3, now);
        assert_eq!((0..5).filter(|_| bucket.take(now)).count(), 3);
        let later = now + Duration::from_millis(250);
        assert_eq!((0..5).filter(|_| bucket.take(later)).count(), 2);
        let much_later = now + Duration::from_secs(100);
        assert_eq!((0..5).filter(|_| bucket.take(much_later)).count(), 3);
    }

    #[test]
    fn when_many_are_under_way_addresses_are_proven_and_the_last_places_are_the_peers() {
        let admission = Arc::new(Admission::new());
        let now = Instant::now();
        let peer = "b".parse().expect("a name");
        admission.peer_is_at(&peer, &[at(7)]);
        assert_eq!(admission.judge(stranger(0), false, now), Verdict::Admit);
        let few: Vec<_> = (0..16).map(|n| admission.begin(stranger(n), now)).collect();
        assert_eq!(admission.judge(stranger(99), false, now), Verdict::Prove);
        assert_eq!(admission.judge(stranger(99), true, now), Verdict::Admit);
        let more: Vec<_> = (16..64)
            .map(|n| admission.begin(stranger(n), now))
            .collect();
        assert!(few.iter().chain(&more).all(Option::is_some));
        assert!(admission.begin(stranger(99), now).is_none());
        assert_eq!(admission.judge(stranger(99), true, now), Verdict::Drop);
        assert_eq!(admission.judge(at(7), true, now), Verdict::Admit);
        assert!(admission.begin(at(7), now).is_some());
        drop(few);
        assert!(admission.begin(stranger(99), now).is_some());
    }

    #[test]
    fn one_prefix_does_not_take_the_places_of_all() {
        let admission = Arc::new(Admission::new());
        let now = Instant::now();
        let taken: Vec<_> = (0..64)
            .filter_map(|n| admission.begin(at(n), now))
            .collect();
        assert_eq!(taken.len(), MOST_OF_A_PREFIX);
        assert!(admission.begin(stranger(0), now).is_some());
        drop(taken);
        assert!(lock(&admission.state).under_way.is_empty());
    }

    #[test]
    fn a_handshake_that_stalls_gives_its_place_to_a_new_one_of_its_prefix() {
        let admission = Arc::new(Admission::new());
        let now = Instant::now();
        let others = admission.begin(stranger(0), now).expect("room");
        let mut stalled: Vec<_> = (0..64)
            .filter_map(|n| admission.begin(at(n), now))
            .collect();
        let later = now + GIVES_WAY_AFTER;
        assert_eq!(admission.judge(at(99), true, now), Verdict::Drop);
        assert_eq!(admission.judge(at(99), true, later), Verdict::Admit);
        let newer = admission.begin(at(99), later).expect("a place");
        let gone = |one: &mut UnderWay| {
            one.given_away
                .try_recv()
                .is_err_and(|why| why == oneshot::error::TryRecvError::Closed)
        };
        let gone: Vec<_> = stalled.iter_mut().map(gone).collect();
        assert!(gone[0] && !gone[1..].contains(&true), "{gone:?}");
        drop(stalled);
        assert_eq!(lock(&admission.state).under_way.len(), 2);
        drop((others, newer));
    }

    #[test]
    fn handshakes_do_not_begin_faster_than_their_rate() {
        let admission = Admission::new();
        let now = Instant::now();
        let judged = |proven| {
            (0..200u8)
                .map(|n| admission.judge(stranger(n), proven, now))
                .filter(|verdict| *verdict == Verdict::Admit)
                .count()
        };
        assert_eq!(judged(false), 32);
        assert_eq!(judged(true), 64);
    }

    #[test]
    fn what_does_not_come_by_the_door_has_a_rate_too_and_peers_are_apart() {
        let admission = Arc::new(Admission::new());
        let now = Instant::now();
        let begun = (0..=255).filter(|n| admission.begin(stranger(*n), now).is_some());
        assert_eq!(begun.count(), 128);
        let peer = "b".parse().expect("a name");
        admission.peer_is_at(&peer, &[at(7)]);
        assert!(admission.begin(at(7), now).is_some());
    }

    #[test]
    fn a_peer_is_known_by_its_whole_address_proves_it_and_is_asked_once_to_come_again() {
        let admission = Admission::new();
        let now = Instant::now();
        let [peer, unknown] = ["b", "x"].map(|name| name.parse().expect("a name"));
        admission.peer_is_at(&peer, &[at(7)]);
        assert!(admission.is_peer(at(7)));
        assert_eq!(admission.judge(at(7), false, now), Verdict::Prove);
        assert_eq!(admission.judge(at(7), true, now), Verdict::Admit);
        // A process beside it, and itself behind an address that was translated.
        let beside = SocketAddr::new(at(7).ip(), 7_001);
        assert!(!admission.is_peer(beside));
        assert!(!admission.comes_again(&unknown, beside, now));
        assert!(!admission.comes_again(&peer, at(7), now));
        assert!(admission.comes_again(&peer, beside, now));
        assert!(admission.is_peer(beside) && admission.is_peer(at(7)));
        assert!(!admission.comes_again(&peer, at(8), now));
        let later = now + COME_AGAIN_AFTER;
        assert!(admission.comes_again(&peer, at(8), later));
        assert!(!admission.is_peer(beside));
    }
}
