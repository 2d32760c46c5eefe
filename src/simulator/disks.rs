//! What comes of writing: appends that find no room, files that cannot be replaced, flushes that do
//! not come back.

use replay_log::{Batch, Store};

use super::facts::Fact;
use super::queue::{MICRO, Moment};
use super::storage::{AGAIN, HUNG, LOOK, batch_at};
use super::world::{Event, World};
use crate::protocol::{Incarnation, Input, Message};

impl World {
    pub(super) fn append(&mut self, host: usize, batch: &Batch) {
        let here = &mut self.hosts[host];
        if here.storage.full > 0 || !here.storage.waiting.is_empty() {
            here.storage.waiting.push_back(batch.clone());
            self.takes_nothing(host, "no space left on the device");
        } else if let Err(error) = here.store.append(batch) {
            let reason = error.to_string();
            self.plan_input(5 * MICRO, host, Input::StoreFailed { reason });
            return;
        } else {
            self.will_be_stored(host);
        }
        let here = &mut self.hosts[host];
        if let Some(vm) = here.vm.as_mut().filter(|vm| !vm.records()) {
            let (run, at) = (vm.run, vm.at());
            if let Err(reason) = vm.feed(batch, &self.bases) {
                self.plan_input(5 * MICRO, host, Input::VmFailed { run, reason, at });
            }
            self.plan_turn(host, 10 * MICRO);
        }
    }

    fn will_be_stored(&mut self, host: usize) {
        let here = &mut self.hosts[host];
        if !std::mem::replace(&mut here.stored_planned, true) {
            let life = here.life;
            let takes = here.random.between(5, 40) * MICRO;
            self.queue
                .plan(self.now + takes, Event::Stored { host, life });
        }
    }

    pub(super) fn drop_log(&mut self, host: usize, incarnation: Incarnation, aside: bool) {
        let here = &mut self.hosts[host];
        let log = std::mem::take(&mut here.store);
        here.damaged = false;
        here.storage.waiting.clear();
        here.storage.lied = None;
        here.streams.clear();
        here.tag = incarnation;
        self.counts.resynchronisations += 1;
        let knew = std::mem::take(&mut here.knew);
        self.facts.push(Fact::Dropped { log, aside, knew });
    }

    /// Says once that the disk takes nothing more.
    fn takes_nothing(&mut self, host: usize, why: &str) {
        if !std::mem::replace(&mut self.hosts[host].storage.told, true) {
            let reason = why.to_owned();
            self.plan_input(5 * MICRO, host, Input::StoreFull { reason });
        }
    }

    /// Says that it takes more again, when nothing waits for it.
    fn has_room(&mut self, host: usize) {
        let storage = &mut self.hosts[host].storage;
        if storage.told && storage.is_well() && storage.waiting.is_empty() {
            storage.told = false;
            self.plan_input(50 * MICRO, host, Input::StoreRoom);
        }
    }

    /// There is room again: what has waited is written, in order.
    pub(super) fn make_room(&mut self, host: usize) {
        let here = &mut self.hosts[host];
        if here.storage.full > 0 || !here.is_up() {
            return;
        }
        while let Some(batch) = here.storage.waiting.pop_front() {
            if let Err(error) = here.store.append(&batch) {
                let reason = error.to_string();
                self.plan_input(5 * MICRO, host, Input::StoreFailed { reason });
                return;
            }
        }
        self.will_be_stored(host);
        // A file that could not be written is tried again by itself.
        if self.hosts[host].persisting.is_empty() {
            self.has_room(host);
        }
    }

    pub(super) fn persisted(&mut self, host: usize, life: u32) {
        if !self.lives(host, life) {
            return;
        }
        let storage = &self.hosts[host].storage;
        let later = if storage.hung > 0 {
            self.hangs(host);
            LOOK
        } else if storage.full > 0 || storage.refuses > 0 {
            self.takes_nothing(host, "the durable state cannot be written");
            AGAIN
        } else {
            self.persist_next(host);
            return;
        };
        self.queue
            .plan(self.now + later, Event::Persisted { host, life });
    }

    fn persist_next(&mut self, host: usize) {
        let here = &mut self.hosts[host];
        here.storage.since = None;
        if let Some(durable) = here.persisting.pop_front() {
            here.durable = durable.clone();
            self.facts.push(Fact::Persisted {
                host,
                durable: durable.clone(),
            });
            self.input(host, Input::Persisted(durable));
        }
        if self.hosts[host].persisting.is_empty() {
            self.has_room(host);
        }
    }

    /// Something waits for a disk that does not come back.
    fn hangs(&mut self, host: usize) {
        let since = *self.hosts[host].storage.since.get_or_insert(self.now);
        if self.now - since >= HUNG {
            self.takes_nothing(host, "the disk has not come back for seconds");
        }
    }

    pub(super) fn stored(&mut self, host: usize, life: u32) {
        if self.lives(host, life) {
            let here = &mut self.hosts[host];
            here.stored_planned = false;
            let (incarnation, tip) = (here.tag, here.store.tip());
            self.input(host, Input::Stored { incarnation, tip });
        }
    }

    pub(super) fn synced(&mut self, host: usize, life: u32, incarnation: Incarnation) {
        if !self.lives(host, life) {
            return;
        }
        let storage = &self.hosts[host].storage;
        // What waits for room was asked for before.
        if storage.hung > 0 || !storage.waiting.is_empty() {
            if storage.hung > 0 {
                self.hangs(host);
            }
            let at = self.now + LOOK;
            self.queue.plan(
                at,
                Event::Synced {
                    host,
                    life,
                    tag: incarnation,
                },
            );
            return;
        }
        let here = &mut self.hosts[host];
        here.storage.since = None;
        let input = match here.store.sync() {
            Ok(tip) => Input::Synced { incarnation, tip },
            Err(error) => Input::StoreFailed {
                reason: error.to_string(),
            },
        };
        self.input(host, input);
        if self.hosts[host].persisting.is_empty() {
            self.has_room(host);
        }
    }

    /// Disks fill up.
    pub(super) fn fill(&mut self, host: usize, span: Moment) {
        if !self.is_healed() {
            self.hosts[host].storage.full += 1;
            self.repair_after(span, super::faults::Fault::Full(host));
        }
    }

    /// Whatever is streamed and may be sent now is sent.
    pub(super) fn pump(&mut self, host: usize) {
        let here = &mut self.hosts[host];
        let (store, waiting) = (&here.store, &here.storage.waiting);
        let sent = here
            .streams
            .pump(self.setup.window, |from| batch_at(store, waiting, from));
        for (to, term, batch) in sent {
            self.send(host, to, Message::Log { term, batch });
        }
    }
}
