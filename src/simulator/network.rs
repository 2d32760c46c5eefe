//! The simulated network between hosts: connections with an ordered control lane, an ordered log
//! lane and datagrams; delay, jitter, loss, doubling; and blocks, which have a direction.

use std::collections::{BTreeMap, VecDeque};

use super::queue::{MICRO, MILLI, Moment};
use super::random::Random;
use super::setup::Setup;
use crate::protocol::{Lane, Message};

/// One way of one lane of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LaneKey {
    pub(super) link: u64,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) lane: Lane,
}

/// What waits on a lane for its arrival.
#[derive(Debug, Default)]
struct Waiting {
    /// When each arrives, and of which VM it is.
    messages: VecDeque<(Moment, usize, Message)>,
    bytes: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Link {
    id: u64,
    up: bool,
    lives: (u32, u32),
    bad_since: Option<Moment>,
}

/// What the keeper of connections found.
#[derive(Clone, Copy, Debug)]
pub(super) enum LinkChange {
    Up(usize, usize),
    Down(usize, usize),
}

/// When and how a message travels.
pub(super) enum Travel {
    /// Never: there is no connection, or the datagram is lost.
    Lost,
    /// An ordered lane has something at this moment.
    Lane(LaneKey, Moment),
    /// A datagram arrives at these moments.
    Datagram(u64, Vec<Moment>, Box<Message>),
}

/// All connections between hosts.
#[derive(Debug)]
pub(super) struct Network {
    hosts: usize,
    links: BTreeMap<(usize, usize), Link>,
    lanes: BTreeMap<LaneKey, Waiting>,
    blocks: BTreeMap<(usize, usize), u32>,
    /// Hosts that take nothing of what arrives. Their connections stay.
    deaf: BTreeMap<usize, u32>,
    next_id: u64,
    /// Connections that were closed and of which nobody has been told yet.
    closed: Vec<(usize, usize)>,
    random: Random,
    /// One way, in nanoseconds.
    pub(super) delay: Moment,
    /// Of a thousand packets.
    pub(super) loss: u64,
    idle: Moment,
    /// A connection with more bytes than this behind one lane is closed.
    queue: usize,
    /// The longest that any lane was, in bytes.
    pub(super) longest: usize,
}

impl Network {
    pub(super) fn new(setup: &Setup, random: Random) -> Self {
        Self {
            hosts: setup.hosts,
            links: BTreeMap::new(),
            lanes: BTreeMap::new(),
            blocks: BTreeMap::new(),
            deaf: BTreeMap::new(),
            next_id: 0,
            closed: Vec::new(),
            random,
            delay: setup.delay,
            loss: setup.loss,
            idle: setup.idle,
            queue: setup.queue,
            longest: 0,
        }
    }

    pub(super) fn block(&mut self, from: usize, to: usize) {
        *self.blocks.entry((from, to)).or_default() += 1;
    }

    pub(super) fn unblock(&mut self, from: usize, to: usize) {
        if let Some(count) = self.blocks.get_mut(&(from, to)) {
            *count = count.saturating_sub(1);
        }
    }

    pub(super) fn blocked(&self, from: usize, to: usize) -> bool {
        self.blocks.get(&(from, to)).is_some_and(|count| *count > 0)
    }

    pub(super) fn deafen(&mut self, host: usize) {
        *self.deaf.entry(host).or_default() += 1;
    }

    pub(super) fn undeafen(&mut self, host: usize) {
        if let Some(count) = self.deaf.get_mut(&host) {
            *count = count.saturating_sub(1);
        }
    }

    /// Whether what arrives there is taken.
    pub(super) fn takes(&self, from: usize, to: usize) -> bool {
        !self.blocked(from, to) && self.deaf.get(&to).is_none_or(|count| *count == 0)
    }

    pub(super) fn heal(&mut self) {
        self.deaf.clear();
        self.blocks.clear();
    }

    fn link(&self, a: usize, b: usize) -> Option<&Link> {
        self.links.get(&(a.min(b), a.max(b))).filter(|link| link.up)
    }

    pub(super) fn is_current(&self, id: u64, a: usize, b: usize) -> bool {
        self.link(a, b).is_some_and(|link| link.id == id)
    }

    /// How long one packet takes.
    pub(super) fn flight(&mut self) -> Moment {
        let jitter = self.random.below(self.delay / 2 + 50 * MICRO);
        let late = if self.random.chance(5) {
            self.random.below(20 * MILLI)
        } else {
            0
        };
        self.delay + jitter + late
    }

    pub(super) fn lost(&mut self) -> bool {
        let loss = self.loss;
        self.random.chance(loss)
    }

    /// All VMs share the connections: what is behind the message of one may be another one's.
    pub(super) fn send(
        &mut self,
        now: Moment,
        from: usize,
        to: usize,
        vm: usize,
        message: Message,
    ) -> Travel {
        let Some(id) = self.link(from, to).map(|link| link.id) else {
            return Travel::Lost;
        };
        let lane = message.lane();
        let flight = self.flight();
        if lane == Lane::Datagram {
            if self.lost() || !self.takes(from, to) {
                return Travel::Lost;
            }
            let mut at = vec![now + flight];
            if self.random.chance(10) {
                at.push(now + flight + self.random.below(5 * MILLI));
            }
            return Travel::Datagram(id, at, Box::new(message));
        }
        let resent = if self.lost() {
            2 * self.delay + self.random.between(5 * MILLI, 30 * MILLI)
        } else {
            0
        };
        let key = LaneKey {
            link: id,
            from,
            to,
            lane,
        };
        let waiting = self.lanes.entry(key).or_default();
        waiting.bytes += size(&message);
        if waiting.bytes > self.queue {
            // Whoever does not take what is sent is closed, not waited for.
            self.close(from, to);
            return Travel::Lost;
        }
        self.longest = self.longest.max(waiting.bytes);
        let behind = waiting.messages.back().map_or(0, |(at, ..)| *at);
        let at = (now + flight + resent).max(behind);
        waiting.messages.push_back((at, vm, message));
        Travel::Lane(key, at)
    }

    /// Takes the first message of a lane that is due; `Err` with a later moment while it is
    /// blocked.
    pub(super) fn arrive(
        &mut self,
        now: Moment,
        key: LaneKey,
    ) -> Result<Option<(usize, Message)>, Moment> {
        if !self.is_current(key.link, key.from, key.to) {
            self.lanes.remove(&key);
            return Ok(None);
        }
        if !self.takes(key.from, key.to) {
            return Err(now + 7 * MILLI);
        }
        let Some(waiting) = self.lanes.get_mut(&key) else {
            return Ok(None);
        };
        let first = waiting.messages.pop_front();
        waiting.bytes -= first.as_ref().map_or(0, |(_, _, message)| size(message));
        Ok(first.map(|(_, vm, message)| (vm, message)))
    }

    /// Ends a connection at once, as a full queue does; both ends hear of it.
    pub(super) fn close(&mut self, a: usize, b: usize) {
        let link = self.links.get_mut(&(a.min(b), a.max(b)));
        if let Some(link) = link.filter(|link| link.up) {
            link.up = false;
            link.bad_since = None;
            self.closed.push((a.min(b), a.max(b)));
        }
    }

    /// Whether what the second sends reaches the first.
    pub(super) fn hears(&self, a: usize, b: usize) -> bool {
        self.link(a, b).is_some() && self.takes(b, a)
    }

    /// Makes and ends connections. `lives` are the numbers of the processes that run, by host.
    pub(super) fn keep(&mut self, now: Moment, lives: &[Option<u32>]) -> Vec<LinkChange> {
        let closed = std::mem::take(&mut self.closed).into_iter();
        let mut changes: Vec<_> = closed.map(|(a, b)| LinkChange::Down(a, b)).collect();
        for a in 0..self.hosts {
            for b in a + 1..self.hosts {
                let reachable = !self.blocked(a, b) && !self.blocked(b, a);
                let alive = lives[a].zip(lives[b]);
                let link = self.links.entry((a, b)).or_default();
                let same = alive == Some(link.lives);
                if link.up && !(reachable && same) {
                    let since = *link.bad_since.get_or_insert(now);
                    let reborn = alive.is_some() && !same && reachable;
                    if now - since >= self.idle || reborn {
                        link.up = false;
                        link.bad_since = None;
                        changes.push(LinkChange::Down(a, b));
                    }
                } else {
                    link.bad_since = None;
                }
                if !link.up
                    && reachable
                    && let Some(lives) = alive
                {
                    self.next_id += 1;
                    *link = Link {
                        id: self.next_id,
                        up: true,
                        lives,
                        bad_since: None,
                    };
                    changes.push(LinkChange::Up(a, b));
                }
            }
        }
        changes
    }
}

/// About how many bytes a message takes.
fn size(message: &Message) -> usize {
    match message {
        Message::Log { batch, .. } => batch.payload().len() + 40,
        _ => 100,
    }
}
