//! What goes wrong with the keeper of records.

use super::super::queue::{MILLI, Moment, SECOND};
use super::super::world::{Event, World};
use super::{Fault, Kind};
use crate::protocol::Record;

impl World {
    pub(super) fn break_keeper(&mut self, kind: Kind, long: Moment) {
        match kind {
            Kind::WitnessSlow => {
                self.witness.slow += 1;
                self.repair_after(3 * long, Fault::WitnessSlow);
            }
            Kind::WitnessRefuses => {
                self.witness.refuses += 1;
                self.repair_after(long, Fault::WitnessRefuses);
            }
            Kind::WitnessDownLong => {
                self.witness.down += 1;
                self.repair_after(4 * long, Fault::WitnessDown);
            }
            Kind::WitnessSetBack => {
                let changes = self.random.between(1, 4) as usize;
                self.set_keeper_back(changes);
            }
            _ => self.set_keeper_back(usize::MAX),
        }
    }

    /// Its folder is put back, which it notices by itself; or its whole disk, which it can only be
    /// told by somebody who has seen more. So the latter happens only where all have, and nobody
    /// has asked for a change before.
    fn set_keeper_back(&mut self, changes: usize) {
        let vms = 0..self.guests.len();
        if vms.clone().all(|vm| self.witness.record(vm).is_none()) {
            return;
        }
        let all = vms.into_iter().all(|vm| self.all_have_seen(vm));
        let found_out = !all || self.random.chance(500);
        let blind = all && self.random.chance(400);
        self.witness.turn_back(changes, found_out, blind);
        let after = self.random.between(200, 2_000) * MILLI + SECOND / 2;
        self.queue.plan(self.now + after, Event::Recover);
    }

    /// Whether every host has seen what the keeper has of a VM, durably, and has asked for nothing
    /// more.
    fn all_have_seen(&self, vm: usize) -> bool {
        let version = self.witness.record(vm).map(Record::version);
        self.seats.of_vm(vm).iter().all(|seat| {
            let seen = seat.durable.seen.as_ref().filter(|_| !seat.swapping);
            let seen = seen.map(|seen| seen.record.version());
            seen.is_some() && seen >= version
        })
    }
}
