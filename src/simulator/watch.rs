//! The whole, looked at now and then: could somebody serve, how long has a guest stood paused, how
//! much waits where.

use replay_log::Batch;

use super::facts::{Fact, Queued, Watched};
use super::gateway::Gateway;
use super::ids::SeatId;
use super::queue::{Moment, SECOND};
use super::world::{Event, WATCH, World};
use crate::protocol::{HostName, OnLoss, Record};

/// Who can serve has to within this, and longer where everything takes long.
const SERVE: Moment = 12 * SECOND;
/// No guest stands paused for longer: a switchover's patience, and some.
const PAUSE: Moment = 5 * SECOND;
/// More datagrams lost than this, of a thousand, and nothing is expected of anybody.
const LOSSES: u64 = 50;
/// Files that may wait to be replaced: each of them says something new.
const FILES: usize = 24;
/// Bytes of log that may wait for room: what came before the node was told that there is none.
const LOG: usize = 4 << 10;

impl World {
    pub(super) fn watch(&mut self) {
        self.queue.plan(self.now + WATCH, Event::Watch);
        for vm in 0..self.guests.len() {
            let watched = Watched {
                now: self.now,
                could_serve: self.could_serve(vm),
                within: SERVE + self.setup.slowness(),
                paused: self.longest_pause(vm),
                queues: self.queues(vm),
            };
            self.facts.push((vm, Fact::Watched(watched)));
        }
    }

    /// Whether enough copies are there, well and connected that a claim could succeed.
    pub(super) fn claim_can_succeed(&self, vm: usize) -> bool {
        let Some(record) = self.witness.record(vm) else {
            return false;
        };
        let enough = |_, copies| copies >= record.seals();
        self.witness.is_well(vm) && self.together(vm, record, enough)
    }

    /// Whether enough copies are there, well and connected, that output could leave: for each gateway.
    fn could_serve(&self, vm: usize) -> Vec<bool> {
        let some = self.some_could_serve(vm);
        // Nobody fails over for the sake of a gateway that cannot reach the primary.
        let reached = |gateway: &Gateway| gateway.blocks.iter().sum::<u32>() == 0;
        let gateways = self.guests[vm].gateways.iter();
        gateways.map(|gateway| some && reached(gateway)).collect()
    }

    fn some_could_serve(&self, vm: usize) -> bool {
        let Some(record) = self.witness.record(vm) else {
            return false;
        };
        let quiet = self.witness_blocks.iter().sum::<u32>() == 0
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
        let well = self.witness.is_well(vm) && !self.guests[vm].stopped;
        quiet && !far && well && self.together(vm, record, serve)
    }

    /// Whether there are hosts, all well and all connected with one another, of which this holds:
    /// how many they are that the record wants, and how many of its copies are among them.
    fn together(&self, vm: usize, record: &Record, enough: impl Fn(usize, usize) -> bool) -> bool {
        let seats = self.seats.of_vm(vm);
        let well = |host: usize| {
            let here = &self.hosts[host];
            let lively = here.runs(self.now) && here.drive.is_well() && here.deaf == 0;
            lively && !seats[host].damaged
        };
        let all = 1_u32 << self.hosts.len();
        (1..all).any(|chosen| {
            let chosen: Vec<_> = (0..self.hosts.len())
                .filter(|host| chosen >> host & 1 == 1)
                .collect();
            let hear = |a: usize, b: usize| a == b || self.network.hears(a, b);
            let fit = chosen.iter().all(|a| {
                self.witness_blocks[*a] == 0 && well(*a) && chosen.iter().all(|b| hear(*a, *b))
            });
            let hosts = chosen.iter().map(|host| &seats[*host]);
            let wanted = hosts.clone().filter(|h| record.hosts.contains(&h.host));
            let copies = hosts.filter(|seat| {
                let copy = record.copy_on(&seat.host);
                seat.keeps() && copy.is_some_and(|c| c.incarnation == seat.durable.incarnation)
            });
            fit && enough(wanted.count(), copies.count())
        })
    }

    /// For how long a guest has stood paused although it could go on.
    fn longest_pause(&mut self, vm: usize) -> Option<(HostName, Moment, Moment)> {
        let mut longest = None;
        for host in 0..self.hosts.len() {
            let seat = SeatId { vm, host };
            let Some(span) = self.seats[seat].paused else {
                continue;
            };
            let span = if self.pause_is_excused(seat) {
                span
            } else {
                span + WATCH
            };
            self.seats[seat].paused = Some(span);
            let name = self.hosts[host].name.clone();
            longest = longest.max(Some((span, name)));
        }
        let most = PAUSE + self.setup.slowness();
        longest.map(|(span, name)| (name, span, most))
    }

    /// Whether nothing can be expected of this host, or nobody knows whether its claimant reigns.
    fn pause_is_excused(&self, seat: SeatId) -> bool {
        let (host, here) = (&self.hosts[seat.host], &self.seats[seat]);
        if !host.runs(self.now) || host.slow_vm > 0 || !host.drive.is_well() {
            return true;
        }
        let promise = here.durable.promise.as_ref();
        let Some(promise) = promise.filter(|promise| promise.claimant != here.host) else {
            return false;
        };
        let Some(target) = self.number_of(&promise.claimant) else {
            return false;
        };
        let there = &self.hosts[target];
        let keeper = self.witness.is_well(seat.vm) && self.witness_blocks[seat.host] == 0;
        let hears = |a: usize, b: usize| self.network.hears(a, b) && self.network.hears(b, a);
        let lively = there.runs(self.now) && there.drive.is_well();
        let claimant = SeatId {
            vm: seat.vm,
            host: target,
        };
        // In an earlier life it may have asked the keeper: it cannot renounce what it promised then.
        let claimant = &self.seats[claimant];
        let bound = claimant.durable.promise.as_ref();
        let bound = bound.is_some_and(|own| {
            own == promise || (own.base == promise.base && claimant.durable.bound_before)
        });
        let reached = lively && hears(seat.host, target) && !bound;
        claimant.swapping || !(reached || keeper)
    }

    fn queues(&self, vm: usize) -> Vec<Queued> {
        let mut queues = Vec::new();
        for seat in self.seats.of_vm(vm) {
            let bytes = |batch: &Batch| batch.payload().len();
            let waiting: usize = seat.storage.waiting.iter().map(bytes).sum();
            queues.push(Queued {
                what: "files to be replaced",
                len: seat.persisting.len(),
                most: FILES,
            });
            queues.push(Queued {
                what: "bytes of log for a disk that is known to have no room",
                len: waiting.saturating_sub(seat.storage.early),
                most: LOG,
            });
        }
        queues
    }
}
