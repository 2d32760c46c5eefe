//! The end of a simulation: everything is repaired, an operator helps where only an operator can,
//! and progress is required. And the checking of facts on the way.

use std::collections::BTreeMap;
use std::fmt::Write;

use replay_log::Store;

use super::actions::{ACCEPT_LOSS, RECOVER};
use super::facts::{Fact, HostView};
use super::ids::{SeatId, VMS};
use super::queue::SECOND;
use super::seat::Seat;
use super::witness::Ask;
use super::world::{Event, World};
use crate::protocol::{Input, Operator, Record, RoleName};

/// So often an operator looks for an order in the journals before it is given without.
const LOOKS: u32 = 4;

impl World {
    pub(super) fn heal(&mut self) {
        self.healed = Some(self.now);
        self.disturbed();
        self.network.heal();
        self.network.loss = 2;
        self.witness.down = 0;
        self.witness.slow = 0;
        self.witness.refuses = 0;
        for guest in &mut self.guests {
            for gateway in &mut guest.gateways {
                gateway.blocks.fill(0);
            }
        }
        self.witness_blocks.fill(0);
        for host in 0..self.hosts.len() {
            let here = &mut self.hosts[host];
            here.slow_vm = 0;
            here.deaf = 0;
            here.deaf_since = None;
            here.drive.heal();
            self.make_room_on(host);
        }
        self.choose_gray();
        self.keep_broken();
        self.maybe_keep_keeper_away();
        for host in 0..self.hosts.len() {
            if !self.hosts[host].is_up() && !self.stays_down(host) {
                self.start_host(host);
            }
        }
        // First they are given the time to say what they wait for.
        self.queue.plan(self.now + 6 * SECOND, Event::Rescue);
    }

    pub(super) fn is_healed(&self) -> bool {
        self.healed.is_some()
    }

    pub(super) fn keeper_back(&mut self) {
        self.witness.down = 0;
        // From now on there must be progress.
        self.healed = Some(self.now);
        self.disturbed();
    }

    /// Some losses are more than the rule survives: then an operator has to accept them. The
    /// simulation knows when, and plays the operator.
    pub(super) fn rescue(&mut self) {
        self.queue.plan(self.now + 3 * SECOND, Event::Rescue);
        if self.witness.down > 0 {
            return;
        }
        for vm in 0..self.guests.len() {
            self.rescue_vm(vm);
        }
    }

    fn rescue_vm(&mut self, vm: usize) {
        if self.witness.refuses_all(vm) {
            if self.told(vm, RECOVER) {
                self.recover();
            }
            return;
        }
        if self.keeper_is_behind(vm) {
            // Whoever has asked it since has said so. If nobody has, an operator sees it in status.
            if self.witness.contradicted(vm) && !self.told(vm, RECOVER) {
                return;
            }
            self.witness.mistrust(vm);
            self.recover();
            return;
        }
        let Some(record) = self.witness.record(vm).cloned() else {
            let create = self.creation(vm);
            let to = (0..self.hosts.len()).find(|host| self.hosts[*host].is_up());
            let host = to.unwrap_or(0);
            self.plan_input(0, SeatId { vm, host }, Input::Operator(create));
            return;
        };
        if self.needs_help(vm, &record)
            && let Some(best) = self.best_log(vm)
        {
            self.accept_loss_on(best, &record);
        }
    }

    /// Whether nobody reigns, and too few copies are left that anybody could.
    fn needs_help(&self, vm: usize, record: &Record) -> bool {
        let seats = self.seats.of_vm(vm);
        let reigns = seats.iter().any(|seat| seat.reign == Some(record.term));
        let intact = record.all_copies().filter(|copy| {
            let host = self
                .number_of(&copy.host)
                .filter(|host| self.lost_host() != Some(*host));
            host.is_some_and(|host| seats[host].durable.incarnation == copy.incarnation)
        });
        let stumbled = self.guests[vm].stopped;
        !reigns && (intact.count() < record.seals() || stumbled)
    }

    /// The longest log; without any, the newest disks.
    fn best_log(&self, vm: usize) -> Option<SeatId> {
        let there = (0..self.hosts.len()).filter(|host| self.hosts[*host].is_up());
        let best = there.max_by_key(|host| {
            let seat = &self.seats.of_vm(vm)[*host];
            let (tip, durable) = (seat.store.tip(), &seat.durable);
            (tip.term, tip.index, durable.live.max(durable.booting))
        });
        best.map(|host| SeatId { vm, host })
    }

    fn accept_loss_on(&mut self, best: SeatId, record: &Record) {
        if self.mend(best.host) || !self.told(best.vm, ACCEPT_LOSS) {
            return;
        }
        // Only hosts that the record names take such an order. The command line names this one first.
        let name = &self.hosts[best.host].name;
        if !record.concerns(name) {
            let ask = Ask::Swap {
                expect: Some(record.version()),
                new: Box::new(record.wanted_on(name)),
                seen: None,
            };
            self.keeper_answers(best, ask, self.now, None);
            return;
        }
        let here = &mut self.seats[best];
        let durable = &here.durable;
        let nothing = here.store.tip().index == replay_log::LogIndex::START
            && durable.live.max(durable.booting) == replay_log::Term(0);
        here.accepts_loss = true;
        let order = if nothing {
            Operator::StartOver
        } else {
            self.guests[best.vm].stopped = false;
            Operator::AcceptLoss
        };
        self.plan_input(0, best, Input::Operator(order));
    }

    /// Whether the operator gives this order now: when some journal has named it, or after a time in
    /// which one should have, and then that is what is wrong if nothing else is.
    fn told(&mut self, vm: usize, order: &'static str) -> bool {
        let mut journals = self.seats.of_vm(vm).iter();
        if journals.any(|seat| seat.named.contains(order)) {
            return true;
        }
        let guest = &mut self.guests[vm];
        guest.unnamed += 1;
        // With a slow keeper hosts know their record only after seconds, and then wait for one another.
        if guest.unnamed < LOOKS {
            return false;
        }
        guest.untold.get_or_insert(order);
        true
    }

    fn keeper_is_behind(&self, vm: usize) -> bool {
        let has = self.witness.record(vm).map(Record::version);
        let seats = self.seats.of_vm(vm).iter();
        seats.filter_map(Seat::known_version).max() > has
    }

    /// The operator gives the keeper the newest record of every VM that any host has.
    pub(super) fn recover(&mut self) {
        let all = self.hosts.iter().enumerate();
        // Whoever is left out could have seen a newer one.
        let missing = all
            .filter(|(n, host)| !host.is_up() && !self.is_lost(*n))
            .count();
        let lacks = |vm: &usize| self.witness.refuses_all(*vm) || self.keeper_is_behind(*vm);
        let lacking: Vec<_> = (0..self.guests.len()).filter(lacks).collect();
        if missing > 0 || lacking.is_empty() {
            return;
        }
        self.witness.blind = false;
        for vm in lacking {
            self.recover_vm(vm);
        }
        self.disturbed();
    }

    fn recover_vm(&mut self, vm: usize) {
        // Gateways have read it, too.
        let newest = self.seats.of_vm(vm).iter().filter_map(Seat::known);
        let gateways = self.guests[vm].gateways.iter();
        let newest = newest.chain(gateways.filter_map(|gateway| gateway.record.clone()));
        let newest = newest.max_by_key(Record::version);
        let version = newest.as_ref().map(Record::version).unwrap_or_default();
        if self.options.trace {
            let what = format!("*** the keeper gets {version} of {} again", VMS[vm]);
            self.trace.say(self.now, &what);
        }
        self.witness.recover(vm, newest);
        self.facts.push((vm, Fact::Recovered { version }));
    }

    /// Healed, protected again, and serving everybody.
    pub(super) fn done(&self) -> bool {
        self.is_healed() && (0..self.guests.len()).all(|vm| self.vm_is_done(vm))
    }

    fn vm_is_done(&self, vm: usize) -> bool {
        let Some(record) = self.witness.record(vm) else {
            return false;
        };
        let (mut copies, serves) = self.expected(record);
        if self.setup.is_far() {
            // A busy guest is never a moment ago at the other end.
            copies = 1;
        }
        let serves = serves && !(self.setup.is_far() && record.policy.min_copies > 1);
        let gateways = self.guests[vm].gateways.iter();
        let answered = gateways
            .flat_map(|gateway| gateway.fresh_answers)
            .all(|answers| answers >= 2);
        (answered || !serves) && self.protected(vm, record, copies) && self.witness.down == 0
    }

    /// Whether so many copies are named, and a guest runs.
    fn protected(&self, vm: usize, record: &Record, copies: usize) -> bool {
        let Some(primary) = self.number_of(&record.primary.host) else {
            return false;
        };
        record.copies() >= copies
            && self.seats.of_vm(vm)[primary]
                .node
                .as_ref()
                .is_some_and(|node| node.status().role == RoleName::Primary)
    }

    /// How every VM stands that does not stand as it should.
    pub(super) fn stuck(&self) -> String {
        let mut what = format!("after the repair ({:?} stays)", self.gray);
        for vm in (0..self.guests.len()).filter(|vm| !self.vm_is_done(*vm)) {
            self.describe(vm, &mut what);
        }
        what
    }

    fn describe(&self, vm: usize, what: &mut String) {
        let gateways = self.guests[vm].gateways.iter();
        let answers: Vec<_> = gateways.map(|gateway| gateway.fresh_answers).collect();
        let record = self.witness.record(vm);
        let _ = write!(
            what,
            " {} has {answers:?} fresh answers; its record is {record:?}",
            VMS[vm]
        );
        for seat in self.seats.of_vm(vm) {
            if let Some(node) = &seat.node {
                let status = node.status();
                let _ = write!(
                    what,
                    "\n  {}#{}: {:?} knows {:?}, log {:?} stored {} synced {} executed {} committed {} promise {:?} followers {:?}",
                    seat.host,
                    status.incarnation,
                    status.role,
                    status.record.as_ref().map(Record::version),
                    status.tip,
                    status.stored,
                    status.synced,
                    status.executed,
                    status.committed,
                    status.promise,
                    status.followers,
                );
            }
        }
    }

    /// At the end, what an operator had to find out without help.
    pub(super) fn last_words(&mut self) {
        for vm in 0..self.guests.len() {
            if let Some(order) = self.guests[vm].untold {
                self.facts.push((vm, Fact::Untold { order }));
            }
        }
        self.check();
    }

    pub(super) fn check(&mut self) {
        if self.facts.is_empty() || self.violation.is_some() {
            return;
        }
        let mut views = BTreeMap::new();
        for (vm, fact) in std::mem::take(&mut self.facts) {
            let all = || self.seats.of_vm(vm).iter().map(Seat::view).collect();
            let views: &mut Vec<HostView> = views.entry(vm).or_insert_with(all);
            let record = self.witness.truth(vm);
            let checker = &mut self.guests[vm].checker;
            if let Err(violation) = checker.check(self.now, &fact, views, record) {
                let what = format!("{}: {violation}", VMS[vm]);
                self.trace.say(self.now, &what);
                let stuck = self.stuck();
                self.trace.say(self.now, &stuck);
                self.violation = Some(violation);
                return;
            }
        }
    }
}
