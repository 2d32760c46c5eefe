//! What goes wrong with disks.

use super::super::facts::Fact;
use super::super::ids::SeatId;
use super::super::queue::{MILLI, Moment, SECOND};
use super::super::seat::Seat;
use super::super::world::{Event, World};
use super::{Fault, Kind};
use crate::protocol::{Acks, Input};

impl World {
    pub(super) fn break_disk(&mut self, kind: Kind, seat: SeatId, long: Moment) {
        let host = seat.host;
        // Some faults outlast everything but the end.
        let span = if self.random.chance(200) {
            60 * SECOND
        } else {
            2 * long
        };
        match kind {
            Kind::HungDisk => {
                self.hosts[host].drive.hung += 1;
                self.repair_after(span, Fault::Hung(host));
            }
            Kind::NoFiles => {
                self.hosts[host].drive.refuses += 1;
                self.repair_after(span, Fault::NoFiles(host));
            }
            Kind::FullDisk => self.fill(host, span),
            // Copies hold the same bytes: equal disks are full in the same second.
            Kind::FullDisks => {
                for host in 0..self.hosts.len() {
                    if self.random.chance(750) {
                        let at = self.now + self.random.below(SECOND);
                        self.queue.plan(at, Event::Fill { host, span });
                    }
                }
            }
            // What is held is doubtful everywhere: more than the rule survives, and all is kept.
            Kind::StoresFail => {
                for vm in 0..self.guests.len() {
                    self.all_stores_fail(vm);
                }
            }
            Kind::PutBack => self.put_back(seat, long),
            _ => self.lose_tail(seat, long),
        }
    }

    fn all_stores_fail(&mut self, vm: usize) {
        for host in 0..self.hosts.len() {
            if self.hosts[host].runs(self.now) {
                let after = self.random.below(SECOND);
                let reason = "the simulator broke all of them".to_owned();
                let seat = SeatId { vm, host };
                self.plan_input(after, seat, Input::StoreFailed { reason });
            }
        }
    }

    /// A host gets its folders back from a backup, or the one of one VM; or a backup is made.
    fn put_back(&mut self, seat: SeatId, down: Moment) {
        let host = seat.host;
        if self.seats[seat].storage.backup.is_none() {
            for vm in 0..self.guests.len() {
                for here in self.seats.of_vm_mut(vm) {
                    here.back_up();
                }
            }
            return;
        }
        let all = self.guests.len() == 1 || self.random.chance(600);
        let spared = if all {
            self.can_spare_all(host)
        } else {
            self.can_spare(seat)
        };
        if !spared || !self.hosts[host].is_up() {
            return;
        }
        // Often much is wrong at once: whoever has the rest of the log is away, and the folder is there.
        let alone = self.random.chance(600);
        self.crash(host, true, if alone { down.min(300 * MILLI) } else { down });
        for other in (0..self.hosts.len()).filter(|other| alone && *other != host) {
            self.crash(other, false, down.max(SECOND));
        }
        for vm in (0..self.guests.len()).filter(|vm| all || *vm == seat.vm) {
            if self.seats[SeatId { vm, host }].put_back() {
                self.facts.push((vm, Fact::Replaced { host }));
            }
        }
    }

    /// The power fails, and the disk has lost some of the logs that it had synced.
    fn lose_tail(&mut self, seat: SeatId, down: Moment) {
        let synced = |seat: &Seat| seat.durable.acks != Acks::Memory && !seat.lies();
        if !self.hosts[seat.host].is_up() || !synced(&self.seats[seat]) {
            return;
        }
        let here = self.seats.on_host_mut(seat.host);
        let lose: Vec<_> = here.map(|seat| synced(seat)).collect();
        self.crash(seat.host, true, down.min(400 * MILLI));
        let here = self.seats.on_host_mut(seat.host);
        for (seat, _) in here.zip(lose).filter(|(_, loses)| *loses) {
            seat.lose_tail();
        }
    }
}
