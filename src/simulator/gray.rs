//! What stays broken in the end: a cluster that has one fault left must go on all the same, where
//! its rule allows it.

use super::ids::SeatId;
use super::queue::{MILLI, SECOND};
use super::world::{Event, World};
use crate::protocol::{Acks, Input, OnLoss, Operator, Record};

/// The one fault that is not repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gray {
    /// A host does not come back.
    Down(usize),
    /// Nothing that is asked of a disk comes back.
    Hung(usize),
    /// A disk stays full.
    Full(usize),
    /// Two hosts do not hear each other.
    Cut(usize, usize),
    /// The first does not hear the second.
    OneWay(usize, usize),
    /// The keeper is slow.
    SlowKeeper,
}

impl World {
    /// Chooses what stays broken.
    pub(super) fn choose_gray(&mut self) {
        if !self.random.chance(350) {
            return;
        }
        let host = self.any_host();
        let other =
            (host + 1 + self.random.below(self.hosts.len() as u64 - 1) as usize) % self.hosts.len();
        let gray = *self.random.pick(&[
            Gray::Down(host),
            Gray::Hung(host),
            Gray::Full(host),
            Gray::Cut(host, other),
            Gray::OneWay(host, other),
            Gray::SlowKeeper,
        ]);
        let spared = match gray {
            Gray::Down(host) | Gray::Hung(host) | Gray::Full(host) => self.can_do_without(host),
            Gray::Cut(a, b) | Gray::OneWay(a, b) => {
                self.can_do_without(a) || self.can_do_without(b)
            }
            Gray::SlowKeeper => true,
        };
        if spared {
            self.gray = Some(gray);
        }
    }

    /// Breaks for good what was chosen, when everything else is repaired.
    pub(super) fn keep_broken(&mut self) {
        let Some(gray) = self.gray else { return };
        if self.options.trace {
            self.trace.say(self.now, &format!("*** {gray:?} stays"));
        }
        match gray {
            Gray::Down(host) => {
                if self.hosts[host].is_up() {
                    self.stop_host(host, false);
                }
            }
            Gray::Hung(host) => self.hosts[host].drive.hung += 1,
            Gray::Full(host) => self.hosts[host].drive.full += 1,
            Gray::Cut(a, b) => {
                self.network.block(a, b);
                self.network.block(b, a);
            }
            Gray::OneWay(a, b) => self.network.block(b, a),
            Gray::SlowKeeper => self.witness.slow += 1,
        }
    }

    /// The host that is not to be counted on any more.
    pub(super) fn lost_host(&self) -> Option<usize> {
        match self.gray {
            Some(Gray::Down(host) | Gray::Hung(host) | Gray::Full(host)) => Some(host),
            _ => None,
        }
    }

    /// Whether this host has left for good, so that an operator goes on without it.
    pub(super) fn is_gone(&self, host: usize) -> bool {
        self.gray == Some(Gray::Down(host))
    }

    /// Whether this host is not to be started again.
    pub(super) fn stays_down(&self, host: usize) -> bool {
        self.is_gone(host) || self.gray == Some(Gray::Hung(host))
    }

    /// Whether this host is down and will not be started again.
    pub(super) fn is_lost(&self, host: usize) -> bool {
        self.stays_down(host) && !self.hosts[host].is_up()
    }

    /// What stays broken turns out to be the only host with the log: what was under way when it was
    /// chosen has cost the others theirs. Then an operator repairs it first.
    pub(super) fn mend(&mut self, host: usize) -> bool {
        let only = matches!(self.gray, Some(Gray::Full(gray) | Gray::Hung(gray)) if gray == host);
        if only {
            self.gray = None;
            self.hosts[host].drive.heal();
            self.make_room_on(host);
            self.healed = Some(self.now);
            self.disturbed();
        }
        only
    }

    /// How many copies the record can name in the end, of those it wants; and whether clients get
    /// answers.
    pub(super) fn expected(&self, record: &Record) -> (usize, bool) {
        let wanted = record.hosts.len();
        let without = match self.gray {
            None | Some(Gray::SlowKeeper) => 0,
            Some(Gray::Cut(a, b) | Gray::OneWay(a, b)) => {
                let both = [a, b].map(|host| record.hosts.contains(&self.hosts[host].name));
                usize::from(both == [true, true])
            }
            _ => self.lost_host().map_or(0, |host| {
                usize::from(record.hosts.contains(&self.hosts[host].name))
            }),
        };
        let left = wanted - without;
        if without == 0 {
            return (wanted, true);
        }
        let policy = record.policy;
        // Memory acknowledgements go on without the disk.
        let counts = matches!(self.gray, Some(Gray::Hung(_))) && policy.acks == Acks::Memory;
        let shrinks = policy.on_loss == OnLoss::Shrink && left >= policy.min_copies as usize;
        let enough = policy.rule.needed(wanted) <= left && wanted >= policy.min_copies as usize;
        (left, shrinks || (enough && !counts && left > 1))
    }

    /// Whether the others can go on without this host, with every VM.
    fn can_do_without(&self, host: usize) -> bool {
        (0..self.guests.len()).all(|vm| self.vm_can_do_without(SeatId { vm, host }))
    }

    /// Enough of the record's copies elsewhere are intact.
    fn vm_can_do_without(&self, seat: SeatId) -> bool {
        // Not what a keeper has that was set back: it will get the newest one again.
        let Some(record) = self.witness.truth(seat.vm) else {
            return false;
        };
        let intact = record.all_copies().filter(|copy| {
            let mut others = self.seats.of_vm(seat.vm).iter().enumerate();
            others.any(|(number, other)| {
                number != seat.host && other.host == copy.host && {
                    let view = other.view();
                    view.intact && view.incarnation == copy.incarnation
                }
            })
        });
        record.hosts.len() > 1 && intact.count() >= record.seals().max(1)
    }

    /// The keeper comes back late: what must not depend on it is looked at meanwhile. It may go in the
    /// middle of a switchover: then nobody is to stand still for the sake of a claim that has ended.
    pub(super) fn maybe_keep_keeper_away(&mut self) {
        if self.gray.is_some() || !self.random.chance(150) {
            return;
        }
        let switchover = self.random.chance(600);
        let (goes, least) = if switchover {
            let begins = 400 * MILLI;
            let vm = self.any_vm();
            self.queue.plan(self.now + begins, Event::Switchover { vm });
            let takes = 20 * MILLI + 6 * self.setup.delay + 2 * self.setup.keeper.1;
            (begins + self.random.below(takes), 8)
        } else {
            (0, 3)
        };
        let away = self.random.between(least, 9) * SECOND + 500 * MILLI;
        self.queue.plan(self.now + goes, Event::KeeperAway);
        self.queue.plan(self.now + goes + away, Event::KeeperBack);
    }

    /// An operator wants another host to go on.
    pub(super) fn switch_over(&mut self, vm: usize) {
        if let Some(primary) = self.primary(vm) {
            let wish = Operator::Switchover { to: None };
            self.plan_input(0, primary, Input::Operator(wish));
        }
    }
}
