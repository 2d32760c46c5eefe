//! The end of a simulation: everything is repaired, an operator helps where only an operator can,
//! and progress is required. And the checking of facts on the way.

use std::fmt::Write;

use replay_log::Store;

use super::facts::HostView;
use super::host::Host;
use super::queue::SECOND;
use super::world::{Event, World};
use crate::protocol::{Input, Operator, Record, RoleName};

impl World {
    pub(super) fn heal(&mut self) {
        self.healed = Some(self.now);
        self.network.heal();
        self.network.loss = 2;
        self.witness.down = 0;
        self.gateway_blocks.fill(0);
        self.witness_blocks.fill(0);
        for host in 0..self.hosts.len() {
            let here = &mut self.hosts[host];
            here.slow_disk = 0;
            here.slow_vm = 0;
            if !here.is_up() {
                self.start_host(host);
            }
        }
        self.queue.plan(self.now + 3 * SECOND, Event::Rescue);
    }

    pub(super) fn is_healed(&self) -> bool {
        self.healed.is_some()
    }

    /// Some losses are more than the rule survives: then an operator has to accept them. The
    /// simulation knows when, and plays the operator.
    pub(super) fn rescue(&mut self) {
        self.queue.plan(self.now + 3 * SECOND, Event::Rescue);
        let Some(record) = self.witness.record.clone() else {
            let hosts = self.hosts.iter().map(|host| host.name.clone()).collect();
            let policy = self.setup.policy;
            let create = Operator::Create { hosts, policy };
            self.plan_input(0, 0, Input::Operator(create));
            return;
        };
        let reigns = self
            .hosts
            .iter()
            .any(|host| host.reign == Some(record.term));
        let intact = record.all_copies().filter(|copy| {
            let host = self.hosts.iter().find(|host| host.name == copy.host);
            host.is_some_and(|host| host.durable.incarnation == copy.incarnation)
        });
        if reigns || intact.count() >= record.seals() {
            return;
        }
        // The longest log; without any, the newest disks.
        let best = (0..self.hosts.len()).max_by_key(|host| {
            let (tip, durable) = (self.hosts[*host].store.tip(), &self.hosts[*host].durable);
            (tip.term, tip.index, durable.live)
        });
        if let Some(best) = best {
            self.hosts[best].accepts_loss = true;
            self.plan_input(0, best, Input::Operator(Operator::AcceptLoss));
        }
    }

    /// Healed, protected again, and serving everybody.
    pub(super) fn done(&self) -> bool {
        self.healed.is_some()
            && self.fresh_answers.iter().all(|answers| *answers >= 2)
            && self.protected()
    }

    pub(super) fn protected(&self) -> bool {
        let Some(record) = &self.witness.record else {
            return false;
        };
        let Some(primary) = self.number_of(&record.primary.host) else {
            return false;
        };
        record.copies() == record.hosts.len()
            && self.hosts[primary]
                .node
                .as_ref()
                .is_some_and(|node| node.status().role == RoleName::Primary)
    }

    pub(super) fn stuck(&self) -> String {
        let mut what = format!(
            "after the repair {:?} fresh answers; the record is {:?}",
            self.fresh_answers, self.witness.record
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

    pub(super) fn check(&mut self) {
        if self.facts.is_empty() || self.violation.is_some() {
            return;
        }
        let views: Vec<HostView> = self.hosts.iter().map(Host::view).collect();
        for fact in std::mem::take(&mut self.facts) {
            let record = self.witness.record.as_ref();
            if let Err(violation) = self.checker.check(self.now, &fact, &views, record) {
                self.trace.say(self.now, &violation.to_string());
                self.violation = Some(violation);
                return;
            }
        }
    }
}
