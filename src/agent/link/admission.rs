//! Who may begin a handshake. A stranger's first packet costs an attacker nothing and us a signature, so
//! handshakes are bounded in number and rate, and strangers prove their address first when there are many.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
    under_way: usize,
    by_prefix: HashMap<Prefix, usize>,
    /// Where the configured peers are, as far as it was looked up.
    peers: HashMap<Name, HashSet<IpAddr>>,
    unproven: Bucket,
    proven: Bucket,
    of_peers: Bucket,
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
                under_way: 0,
                by_prefix: HashMap::new(),
                peers: HashMap::new(),
                // A handshake takes some 0.3 ms of the thread that heartbeats live on: together these
                // are 5 % of its time.
                unproven: Bucket::new(30, 16, now),
                proven: Bucket::new(60, 32, now),
                of_peers: Bucket::new(60, 32, now),
            }),
        }
    }

    /// Remembers where a configured peer is.
    pub(super) fn peer_is_at(&self, peer: &Name, addresses: &[SocketAddr]) {
        let addresses = addresses.iter().map(|address| address.ip().to_canonical());
        lock(&self.state)
            .peers
            .insert(peer.clone(), addresses.collect());
    }

    /// Whether a configured peer has this address.
    pub(super) fn is_peer(&self, from: SocketAddr) -> bool {
        lock(&self.state).is_peer(from)
    }

    /// Judges a first packet. `proven`: the sender has shown that the address is its own.
    pub(super) fn judge(&self, from: SocketAddr, proven: bool, now: Instant) -> Verdict {
        let state = &mut *lock(&self.state);
        if !state.has_room(from) {
            return Verdict::Drop;
        }
        if !proven {
            let admitted = state.under_way < FEW && state.unproven.take(now);
            return if admitted {
                Verdict::Admit
            } else {
                Verdict::Prove
            };
        }
        let bucket = if state.is_peer(from) {
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
    pub(super) fn begin(self: &Arc<Self>, from: SocketAddr) -> Option<UnderWay> {
        let state = &mut *lock(&self.state);
        if !state.has_room(from) {
            return None;
        }
        let prefix = Prefix::of(from);
        state.under_way += 1;
        *state.by_prefix.entry(prefix).or_default() += 1;
        Some(UnderWay {
            admission: Arc::clone(self),
            prefix,
        })
    }
}

impl State {
    fn is_peer(&self, from: SocketAddr) -> bool {
        let ip = from.ip().to_canonical();
        self.peers.values().any(|addresses| addresses.contains(&ip))
    }

    fn has_room(&self, from: SocketAddr) -> bool {
        if self.is_peer(from) {
            return self.under_way < MOST_WITH_PEERS;
        }
        let of_prefix = self.by_prefix.get(&Prefix::of(from)).copied();
        self.under_way < MOST && of_prefix.unwrap_or_default() < MOST_OF_A_PREFIX
    }
}

/// A handshake that is under way.
#[derive(Debug)]
pub(super) struct UnderWay {
    admission: Arc<Admission>,
    prefix: Prefix,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let state = &mut *lock(&self.admission.state);
        state.under_way = state.under_way.saturating_sub(1);
        if let Some(count) = state.by_prefix.get_mut(&self.prefix) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.by_prefix.remove(&self.prefix);
            }
        }
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
        let few: Vec<_> = (0..16).map(|n| admission.begin(stranger(n))).collect();
        assert_eq!(admission.judge(stranger(99), false, now), Verdict::Prove);
        assert_eq!(admission.judge(stranger(99), true, now), Verdict::Admit);
        let more: Vec<_> = (16..64).map(|n| admission.begin(stranger(n))).collect();
        assert!(few.iter().chain(&more).all(Option::is_some));
        assert!(admission.begin(stranger(99)).is_none());
        assert_eq!(admission.judge(stranger(99), true, now), Verdict::Drop);
        assert_eq!(admission.judge(at(7), true, now), Verdict::Admit);
        assert!(admission.begin(at(7)).is_some());
        drop(few);
        assert!(admission.begin(stranger(99)).is_some());
    }

    #[test]
    fn one_prefix_does_not_take_the_places_of_all() {
        let admission = Arc::new(Admission::new());
        let taken: Vec<_> = (0..64).filter_map(|n| admission.begin(at(n))).collect();
        assert_eq!(taken.len(), MOST_OF_A_PREFIX);
        assert!(admission.begin(stranger(0)).is_some());
        drop(taken);
        assert!(lock(&admission.state).by_prefix.is_empty());
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
        assert_eq!(judged(false), 16);
        assert_eq!(judged(true), 32);
    }
}
