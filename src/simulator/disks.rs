//! What comes of writing: appends that find no room, files that cannot be replaced, flushes that do
//! not come back.

use replay_log::{Batch, Store};

use super::facts::Fact;
use super::ids::SeatId;
use super::queue::{MICRO, Moment};
use super::storage::{AGAIN, HUNG, LOOK, batch_at};
use super::world::{Event, World};
use crate::protocol::{Incarnation, Input, Message};

/// A node hears so soon that its disk takes nothing more.
const TELLS: Moment = 5 * MICRO;

impl World {
    pub(super) fn append(&mut self, seat: SeatId, batch: &Batch) {
        let here = &mut self.seats[seat];
        if self.hosts[seat.host].drive.full > 0 || !here.storage.waiting.is_empty() {
            here.storage.waiting.push_back(batch.clone());
            self.takes_nothing(seat, "no space left on the device");
            let storage = &mut self.seats[seat].storage;
            if storage.told.is_some_and(|told| self.now <= told + TELLS) {
                storage.early += batch.payload().len();
            }
        } else if let Err(error) = here.store.append(batch) {
            let reason = error.to_string();
            self.plan_input(5 * MICRO, seat, Input::StoreFailed { reason });
            return;
        } else {
            self.will_be_stored(seat);
        }
        let here = &mut self.seats[seat];
        if let Some(vm) = here.vm.as_mut().filter(|vm| !vm.records()) {
            let (run, at) = (vm.run, vm.at());
            if let Err(reason) = vm.feed(batch, &self.bases) {
                self.plan_input(5 * MICRO, seat, Input::VmFailed { run, reason, at });
            }
            self.plan_turn(seat, 10 * MICRO);
        }
    }

    fn will_be_stored(&mut self, seat: SeatId) {
        let here = &mut self.seats[seat];
        if !std::mem::replace(&mut here.stored_planned, true) {
            let life = self.hosts[seat.host].life;
            let takes = here.random.between(5, 40) * MICRO;
            self.queue
                .plan(self.now + takes, Event::Stored { seat, life });
        }
    }

    pub(super) fn drop_log(&mut self, seat: SeatId, incarnation: Incarnation, aside: bool) {
        let here = &mut self.seats[seat];
        let log = std::mem::take(&mut here.store);
        here.damaged = false;
        here.storage.waiting.clear();
        here.storage.early = 0;
        here.storage.lied = None;
        here.streams.clear();
        here.tag = incarnation;
        self.counts.resynchronisations += 1;
        let knew = std::mem::take(&mut here.knew);
        self.facts
            .push((seat.vm, Fact::Dropped { log, aside, knew }));
    }

    /// Says once that the disk takes nothing more.
    fn takes_nothing(&mut self, seat: SeatId, why: &str) {
        let told = &mut self.seats[seat].storage.told;
        if told.is_none() {
            *told = Some(self.now);
            let reason = why.to_owned();
            self.plan_input(TELLS, seat, Input::StoreFull { reason });
        }
    }

    /// Says that it takes more again, when nothing waits for it.
    fn has_room(&mut self, seat: SeatId) {
        let storage = &mut self.seats[seat].storage;
        let well = self.hosts[seat.host].drive.is_well();
        if storage.told.is_some() && well && storage.waiting.is_empty() {
            storage.told = None;
            storage.early = 0;
            self.plan_input(50 * MICRO, seat, Input::StoreRoom);
        }
    }

    /// There is room again, for every VM.
    pub(super) fn make_room_on(&mut self, host: usize) {
        for vm in 0..self.guests.len() {
            self.make_room(SeatId { vm, host });
        }
    }

    /// What has waited is written, in order.
    fn make_room(&mut self, seat: SeatId) {
        let here = &mut self.seats[seat];
        let host = &self.hosts[seat.host];
        if host.drive.full > 0 || !host.is_up() {
            return;
        }
        while let Some(batch) = here.storage.waiting.pop_front() {
            if let Err(error) = here.store.append(&batch) {
                let reason = error.to_string();
                self.plan_input(5 * MICRO, seat, Input::StoreFailed { reason });
                return;
            }
        }
        self.will_be_stored(seat);
        // A file that could not be written is tried again by itself.
        if self.seats[seat].persisting.is_empty() {
            self.has_room(seat);
        }
    }

    pub(super) fn persisted(&mut self, seat: SeatId, life: u32) {
        if !self.lives(seat, life) {
            return;
        }
        let drive = &self.hosts[seat.host].drive;
        let later = if drive.hung > 0 {
            self.hangs(seat);
            LOOK
        } else if drive.full > 0 || drive.refuses > 0 {
            self.takes_nothing(seat, "the durable state cannot be written");
            AGAIN
        } else {
            self.persist_next(seat);
            return;
        };
        self.queue
            .plan(self.now + later, Event::Persisted { seat, life });
    }

    fn persist_next(&mut self, seat: SeatId) {
        let here = &mut self.seats[seat];
        here.storage.since = None;
        if let Some(durable) = here.persisting.pop_front() {
            here.durable = durable.clone();
            let persisted = Fact::Persisted {
                host: seat.host,
                durable: durable.clone(),
            };
            self.facts.push((seat.vm, persisted));
            self.input(seat, Input::Persisted(durable));
        }
        if self.seats[seat].persisting.is_empty() {
            self.has_room(seat);
        }
    }

    /// Something waits for a disk that does not come back.
    fn hangs(&mut self, seat: SeatId) {
        let since = *self.seats[seat].storage.since.get_or_insert(self.now);
        if self.now - since >= HUNG {
            self.takes_nothing(seat, "the disk has not come back for seconds");
        }
    }

    pub(super) fn stored(&mut self, seat: SeatId, life: u32) {
        if self.lives(seat, life) {
            let here = &mut self.seats[seat];
            here.stored_planned = false;
            let (incarnation, tip) = (here.tag, here.store.tip());
            self.input(seat, Input::Stored { incarnation, tip });
        }
    }

    pub(super) fn synced(&mut self, seat: SeatId, life: u32, incarnation: Incarnation) {
        if !self.lives(seat, life) {
            return;
        }
        let hung = self.hosts[seat.host].drive.hung > 0;
        // What waits for room was asked for before.
        if hung || !self.seats[seat].storage.waiting.is_empty() {
            if hung {
                self.hangs(seat);
            }
            let at = self.now + LOOK;
            self.queue.plan(
                at,
                Event::Synced {
                    seat,
                    life,
                    tag: incarnation,
                },
            );
            return;
        }
        let here = &mut self.seats[seat];
        here.storage.since = None;
        let input = match here.store.sync() {
            Ok(tip) => Input::Synced { incarnation, tip },
            Err(error) => Input::StoreFailed {
                reason: error.to_string(),
            },
        };
        self.input(seat, input);
        if self.seats[seat].persisting.is_empty() {
            self.has_room(seat);
        }
    }

    /// Disks fill up.
    pub(super) fn fill(&mut self, host: usize, span: Moment) {
        if !self.is_healed() {
            self.hosts[host].drive.full += 1;
            self.repair_after(span, super::faults::Fault::Full(host));
        }
    }

    /// Whatever is streamed and may be sent now is sent.
    pub(super) fn pump(&mut self, seat: SeatId) {
        let here = &mut self.seats[seat];
        let (store, waiting) = (&here.store, &here.storage.waiting);
        let sent = here
            .streams
            .pump(self.setup.window, |from| batch_at(store, waiting, from));
        for (to, term, batch) in sent {
            self.send(seat, to, Message::Log { term, batch });
        }
    }
}
