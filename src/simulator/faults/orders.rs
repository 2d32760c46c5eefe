//! What operators order, at random.

use super::super::facts::Fact;
use super::super::ids::SeatId;
use super::super::setup;
use super::super::world::World;
use super::Kind;
use crate::protocol::{HostName, Input, Operator};

impl World {
    pub(super) fn order(&mut self, kind: Kind, seat: SeatId) {
        match kind {
            Kind::Pair => self.pair(seat.vm),
            Kind::Create => {
                let hosts = self.some_hosts();
                let acks = self.guests[seat.vm].policy.acks;
                let policy = setup::policy(&mut self.random, hosts.len(), acks);
                let create = Operator::Create { hosts, policy };
                self.plan_input(0, seat, Input::Operator(create));
            }
            Kind::Remove => self.remove(seat),
            // Refused wherever the primary is heard, directly or by another copy.
            _ => self.accept_loss_in_vain(seat),
        }
    }

    fn some_hosts(&mut self) -> Vec<HostName> {
        let names: Vec<_> = self.hosts.iter().map(|host| host.name.clone()).collect();
        let share = *self.random.pick(&[300, 600, 900]);
        names
            .into_iter()
            .filter(|_| self.random.chance(share))
            .collect()
    }

    /// Of the primary: copies elsewhere, by another policy.
    fn pair(&mut self, vm: usize) {
        let Some(primary) = self.primary(vm) else {
            return;
        };
        let hosts = self.some_hosts();
        let acks = self.guests[vm].policy.acks;
        let most = hosts.len().max(1) + 1;
        let policy = setup::policy(&mut self.random, most, acks);
        let pair = Operator::Pair { hosts, policy };
        self.plan_input(0, primary, Input::Operator(pair));
    }

    /// Removes the folder of the VM from a host, which starts anew; refused unless the keeper says
    /// that its record does not concern it.
    fn remove(&mut self, seat: SeatId) {
        let host = seat.host;
        let keeper = self.witness.is_well(seat.vm) && self.witness_blocks[host] == 0;
        let here = &self.seats[seat];
        let named = self
            .witness
            .record(seat.vm)
            .is_none_or(|record| record.concerns(&here.host));
        if !keeper || named || !self.hosts[host].runs(self.now) {
            return;
        }
        let (log, knew) = (here.store.clone(), here.knew);
        self.stop_host(host, false);
        self.seats[seat].wipe();
        self.facts.push((seat.vm, Fact::Replaced { host }));
        let aside = false;
        self.facts
            .push((seat.vm, Fact::Dropped { log, aside, knew }));
        self.start_host(host);
    }

    /// An operator who is in a hurry.
    fn accept_loss_in_vain(&mut self, seat: SeatId) {
        let (vm, host) = (seat.vm, seat.host);
        let Some(primary) = self.primary(vm) else {
            return;
        };
        let runs = |host: usize| self.hosts[host].runs(self.now);
        let hear = |a: usize, b: usize| self.network.hears(a, b) && self.network.hears(b, a);
        let lives = runs(primary.host) && self.seats[primary].reign.is_some();
        let copies = (0..self.hosts.len()).filter(|other| *other != primary.host && runs(*other));
        let heard = copies.clone().any(|other| {
            let near = other == host || hear(host, other);
            near && hear(other, primary.host) && self.follows(SeatId { vm, host: other })
        });
        if lives && heard && host != primary.host && runs(host) {
            self.plan_input(0, seat, Input::Operator(Operator::AcceptLoss));
        }
    }

    /// Whether a host takes the log of the primary of the present record.
    fn follows(&self, seat: SeatId) -> bool {
        let here = &self.seats[seat];
        let status = here.node.as_ref().map(crate::protocol::Node::status);
        let record = self.witness.record(seat.vm);
        status.zip(record).is_some_and(|(status, record)| {
            let copy = record.copy_on(&here.host);
            let known = status
                .record
                .is_some_and(|known| known.version() == record.version());
            let near = status.primary_silence.is_some_and(|s| s.as_millis() < 100);
            known && near && copy.is_some_and(|copy| copy.incarnation == status.incarnation)
        })
    }
}
