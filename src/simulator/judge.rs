//! The end of a simulation: everything is repaired, an operator helps where only an operator can,
//! and progress is required. And the checking of facts on the way.

use std::fmt::Write;

use replay_log::Store;

use super::actions::{ACCEPT_LOSS, RECOVER};
use super::facts::{Fact, HostView};
use super::host::Host;
use super::queue::SECOND;
use super::world::{Event, World};
use crate::protocol::{Input, Operator, Record, RoleName};

/// So often an operator looks for an order in the journals before it is given without.
const LOOKS: u32 = 4;

impl World {
    pub(super) fn heal(&mut self) {
        self.healed = Some(self.now);
        self.facts.push(Fact::Disturbed);
        self.network.heal();
        self.network.loss = 2;
        self.witness.down = 0;
        self.witness.slow = 0;
        self.witness.refuses = 0;
        self.gateway_blocks.fill(0);
        self.witness_blocks.fill(0);
        for host in 0..self.hosts.len() {
            let here = &mut self.hosts[host];
            here.slow_vm = 0;
            here.deaf = 0;
            here.deaf_since = None;
            here.storage.heal();
            self.make_room(host);
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
        self.facts.push(Fact::Disturbed);
    }

    /// Some losses are more than the rule survives: then an operator has to accept them. The
    /// simulation knows when, and plays the operator.
    pub(super) fn rescue(&mut self) {
        self.queue.plan(self.now + 3 * SECOND, Event::Rescue);
        if self.witness.down > 0 {
            return;
        }
        if self.witness.set_back {
            if self.told(RECOVER) {
                self.recover();
            }
            return;
        }
        if self.keeper_is_behind() {
            // Whoever has asked it since has said so. If nobody has, an operator sees it in status.
            if self.witness.contradicted && !self.told(RECOVER) {
                return;
            }
            self.witness.set_back = true;
            self.recover();
            return;
        }
        let Some(record) = self.witness.record.clone() else {
            let hosts = self.hosts.iter().map(|host| host.name.clone()).collect();
            let policy = self.setup.policy;
            let create = Operator::Create { hosts, policy };
            let to = (0..self.hosts.len()).find(|host| self.hosts[*host].is_up());
            self.plan_input(0, to.unwrap_or(0), Input::Operator(create));
            return;
        };
        let reigns = self
            .hosts
            .iter()
            .any(|host| host.reign == Some(record.term));
        let intact = record.all_copies().filter(|copy| {
            let host = self
                .number_of(&copy.host)
                .filter(|host| self.lost_host() != Some(*host));
            host.is_some_and(|host| self.hosts[host].durable.incarnation == copy.incarnation)
        });
        let stumbled = self.stopped;
        if reigns || (intact.count() >= record.seals() && !stumbled) {
            return;
        }
        // The longest log; without any, the newest disks.
        let there = (0..self.hosts.len()).filter(|host| self.hosts[*host].is_up());
        let best = there.max_by_key(|host| {
            let (tip, durable) = (self.hosts[*host].store.tip(), &self.hosts[*host].durable);
            (tip.term, tip.index, durable.live.max(durable.booting))
        });
        if let Some(best) = best {
            if self.mend(best) {
                return;
            }
            if !self.told(ACCEPT_LOSS) {
                return;
            }
            let here = &self.hosts[best];
            let durable = &here.durable;
            let nothing = here.store.tip().index == replay_log::LogIndex::START
                && durable.live.max(durable.booting) == replay_log::Term(0);
            if nothing {
                self.hosts[best].accepts_loss = true;
                self.plan_input(0, best, Input::Operator(Operator::StartOver));
                return;
            }
            self.stopped = false;
            self.hosts[best].accepts_loss = true;
            self.plan_input(0, best, Input::Operator(Operator::AcceptLoss));
        }
    }

    /// Whether the operator gives this order now: when some journal has named it, or after a time in
    /// which one should have, and then that is what is wrong if nothing else is.
    fn told(&mut self, order: &'static str) -> bool {
        if self.hosts.iter().any(|host| host.named.contains(order)) {
            return true;
        }
        self.unnamed += 1;
        // With a slow keeper hosts know their record only after seconds, and then wait for one another.
        if self.unnamed < LOOKS {
            return false;
        }
        self.untold.get_or_insert(order);
        true
    }

    fn keeper_is_behind(&self) -> bool {
        let has = self.witness.record.as_ref().map(Record::version);
        let known = self.hosts.iter().filter_map(Host::known_version).max();
        known > has
    }

    /// The operator gives the keeper the newest record that any host has.
    pub(super) fn recover(&mut self) {
        let all = self.hosts.iter().enumerate();
        // Whoever is left out could have seen a newer one.
        let missing = all
            .filter(|(n, host)| !host.is_up() && !self.is_lost(*n))
            .count();
        if missing > 0 || !(self.witness.set_back || self.keeper_is_behind()) {
            return;
        }
        // Gateways have read it, too.
        let newest = self.hosts.iter().filter_map(Host::known);
        let newest = newest.chain(self.gateway.record.clone());
        let newest = newest.max_by_key(Record::version);
        let version = newest.as_ref().map(Record::version).unwrap_or_default();
        if self.options.trace {
            let what = format!("*** the keeper gets {version} again");
            self.trace.say(self.now, &what);
        }
        self.witness.recover(newest);
        self.facts.push(Fact::Recovered { version });
        self.facts.push(Fact::Disturbed);
    }

    /// Healed, protected again, and serving everybody.
    pub(super) fn done(&self) -> bool {
        let Some(record) = self.witness.record.as_ref().filter(|_| self.is_healed()) else {
            return false;
        };
        let (mut copies, serves) = self.expected(record);
        if self.setup.is_far() {
            // A busy guest is never a moment ago at the other end.
            copies = 1;
        }
        let serves = serves && !(self.setup.is_far() && record.policy.min_copies > 1);
        let answered = self.fresh_answers.iter().all(|answers| *answers >= 2);
        (answered || !serves) && self.protected(record, copies) && self.witness.down == 0
    }

    /// Whether so many copies are named, and a guest runs.
    fn protected(&self, record: &Record, copies: usize) -> bool {
        let Some(primary) = self.number_of(&record.primary.host) else {
            return false;
        };
        record.copies() >= copies
            && self.hosts[primary]
                .node
                .as_ref()
                .is_some_and(|node| node.status().role == RoleName::Primary)
    }

    pub(super) fn stuck(&self) -> String {
        let mut what = format!(
            "after the repair ({:?} stays) {:?} fresh answers; the record is {:?}",
            self.gray, self.fresh_answers, self.witness.record
        );
        for host in &self.hosts {
            if let Some(node) = &host.node {
                let status = node.status();
                let _ = write!(
                    what,
                    "\n  {}#{}: {:?} knows {:?}, log {:?} stored {} synced {} executed {} committed {} promise {:?} followers {:?}",
                    host.name,
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
        what
    }

    /// At the end, what an operator had to find out without help.
    pub(super) fn last_words(&mut self) {
        if let Some(order) = self.untold {
            self.facts.push(Fact::Untold { order });
            self.check();
        }
    }

    pub(super) fn check(&mut self) {
        if self.facts.is_empty() || self.violation.is_some() {
            return;
        }
        let views: Vec<HostView> = self.hosts.iter().map(Host::view).collect();
        for fact in std::mem::take(&mut self.facts) {
            let record = self.witness.truth.as_ref();
            if let Err(violation) = self.checker.check(self.now, &fact, &views, record) {
                self.trace.say(self.now, &violation.to_string());
                let stuck = self.stuck();
                self.trace.say(self.now, &stuck);
                self.violation = Some(violation);
                return;
            }
        }
    }
}
