//! The whole, looked at now and then: could somebody serve, how long has a guest stood paused, how
//! much waits where.

use replay_log::Batch;

use super::facts::{Fact, Queued, Watched};
use super::host::{BOUNDS, Host};
use super::queue::{Moment, SECOND};
use super::world::{Event, WATCH, World};
use crate::protocol::{HostName, OnLoss, Record};

/// Who can serve has to within this, and longer where everything takes long.
const SERVE: Moment = 12 * SECOND;
/// No guest stands paused for longer: a switchover's patience, and some.
const PAUSE: Moment = 5 * SECOND;
/// More datagrams lost than this, of a thousand, and nothing is expected of anybody.
const LOSSES: u64 = 50;
/// Files that may wait to be replaced.
const FILES: usize = 64;

impl World {
    pub(super) fn watch(&mut self) {
        self.queue.plan(self.now + WATCH, Event::Watch);
        let watched = Watched {
            now: self.now,
            could_serve: self.could_serve(),
            within: SERVE + self.setup.slowness(),
            paused: self.longest_pause(),
            queues: self.queues(),
        };
        self.facts.push(Fact::Watched(watched));
    }

    /// Whether enough copies are there, well and connected that a claim could succeed.
    pub(super) fn claim_can_succeed(&self) -> bool {
        let Some(record) = self.witness.record.as_ref() else {
            return false;
        };
        self.witness.is_well() && self.together(record, |_, copies| copies >= record.seals())
    }

    /// Whether enough copies are there, well and connected, that output could leave.
    fn could_serve(&self) -> bool {
        let Some(record) = self.witness.record.as_ref() else {
            return false;
        };
        // Nobody fails over for the sake of a gateway that cannot reach the primary.
        let edges = self.gateway_blocks.iter().chain(&self.witness_blocks);
        let quiet = edges.sum::<u32>() == 0
            && self.hosts.iter().all(|host| host.slow_vm == 0)
            && self.network.loss <= LOSSES;
        let policy = record.policy;
        let serve = |hosts: usize, copies: usize| {
            let least = policy.min_copies as usize;
            let rule = match policy.on_loss {
                OnLoss::Shrink => hosts >= least,
                OnLoss::Stall => copies >= record.needed().max(least),
            };
            rule && copies >= record.seals()
        };
        let far = self.setup.is_far() && policy.min_copies > 1;
        quiet && !far && !self.stopped && self.witness.is_well() && self.together(record, serve)
    }

    /// Whether there are hosts, all well and all connected with one another, of which this holds:
    /// how many they are that the record wants, and how many of its copies are among them.
    fn together(&self, record: &Record, enough: impl Fn(usize, usize) -> bool) -> bool {
        let well = |host: &Host| {
            host.runs(self.now) && host.storage.is_well() && !host.damaged && host.deaf == 0
        };
        let all = 1_u32 << self.hosts.len();
        (1..all).any(|chosen| {
            let chosen: Vec<_> = (0..self.hosts.len())
                .filter(|host| chosen >> host & 1 == 1)
                .collect();
            let hear = |a: usize, b: usize| a == b || self.network.hears(a, b);
            let fit = chosen.iter().all(|a| {
                self.witness_blocks[*a] == 0
                    && well(&self.hosts[*a])
                    && chosen.iter().all(|b| hear(*a, *b))
            });
            let hosts = chosen.iter().map(|host| &self.hosts[*host]);
            let wanted = hosts.clone().filter(|h| record.hosts.contains(&h.name));
            let copies = hosts.filter(|host| {
                let copy = record.copy_on(&host.name);
                host.keeps() && copy.is_some_and(|c| c.incarnation == host.durable.incarnation)
            });
            fit && enough(wanted.count(), copies.count())
        })
    }

    /// For how long a guest has stood paused although it could go on.
    fn longest_pause(&mut self) -> Option<(HostName, Moment, Moment)> {
        let mut longest = None;
        for number in 0..self.hosts.len() {
            let Some(span) = self.hosts[number].paused else {
                continue;
            };
            let span = if self.pause_is_excused(number) {
                span
            } else {
                span + WATCH
            };
            self.hosts[number].paused = Some(span);
            let name = self.hosts[number].name.clone();
            longest = longest.max(Some((span, name)));
        }
        let most = PAUSE + self.setup.slowness();
        longest.map(|(span, name)| (name, span, most))
    }

    /// Whether nothing can be expected of this host, or nobody knows whether its claimant reigns.
    fn pause_is_excused(&self, number: usize) -> bool {
        let here = &self.hosts[number];
        if !here.runs(self.now) || here.slow_vm > 0 || !here.storage.is_well() {
            return true;
        }
        let promise = here.durable.promise.as_ref();
        let Some(promise) = promise.filter(|promise| promise.claimant != here.name) else {
            return false;
        };
        let Some(target) = self.number_of(&promise.claimant) else {
            return false;
        };
        let there = &self.hosts[target];
        let keeper = self.witness.is_well() && self.witness_blocks[number] == 0;
        let reached = self.network.hears(number, target) && self.network.hears(target, number);
        let lively = reached && there.runs(self.now) && there.storage.is_well();
        there.swapping || !(lively || keeper)
    }

    fn queues(&self) -> Vec<Queued> {
        let mut queues = Vec::new();
        for host in &self.hosts {
            let bytes = |batch: &Batch| batch.payload().len();
            queues.push(Queued {
                what: "files to be replaced",
                len: host.persisting.len(),
                most: FILES,
            });
            queues.push(Queued {
                what: "bytes of log for a disk without room",
                len: host.storage.waiting.iter().map(bytes).sum(),
                most: 2 * BOUNDS.uncommitted_log as usize + 2 * self.setup.window.min(64 << 10),
            });
        }
        queues
    }
}
