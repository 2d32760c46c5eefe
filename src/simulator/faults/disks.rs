//! What goes wrong with disks.

use replay_log::Store;

use super::super::facts::Fact;
use super::super::queue::{MILLI, Moment, SECOND};
use super::super::world::{Event, World};
use super::{Fault, Kind};
use crate::protocol::{Acks, DiskId, Input};

impl World {
    pub(super) fn break_disk(&mut self, kind: Kind, host: usize, long: Moment) {
        // Some faults outlast everything but the end.
        let span = if self.random.chance(200) {
            60 * SECOND
        } else {
            2 * long
        };
        match kind {
            Kind::HungDisk => {
                self.hosts[host].storage.hung += 1;
                self.repair_after(span, Fault::Hung(host));
            }
            Kind::NoFiles => {
                self.hosts[host].storage.refuses += 1;
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
                for host in 0..self.hosts.len() {
                    if self.hosts[host].runs(self.now) {
                        let after = self.random.below(SECOND);
                        let reason = "the simulator broke all of them".to_owned();
                        self.plan_input(after, host, Input::StoreFailed { reason });
                    }
                }
            }
            Kind::PutBack => self.put_back(host, long),
            _ => self.lose_tail(host, long),
        }
    }

    /// A host gets the VM's folder back from a backup; or a backup is made.
    fn put_back(&mut self, host: usize, down: Moment) {
        if self.hosts[host].storage.backup.is_none() {
            for here in &mut self.hosts {
                here.back_up();
            }
            return;
        }
        if !self.can_spare(host) || !self.hosts[host].is_up() {
            return;
        }
        // Often much is wrong at once: whoever has the rest of the log is away, and the folder is there.
        let alone = self.random.chance(600);
        self.crash(host, true, if alone { down.min(300 * MILLI) } else { down });
        for other in (0..self.hosts.len()).filter(|other| alone && *other != host) {
            self.crash(other, false, down.max(SECOND));
        }
        let here = &mut self.hosts[host];
        if let Some(backup) = here.storage.backup.take() {
            here.store = backup.store;
            here.durable = backup.durable;
            here.last_disk = backup.last_disk;
            here.damaged = false;
            here.storage.lied = None;
            here.disk = DiskId(here.random.next() | 1);
            self.facts.push(Fact::Replaced { host });
        }
    }

    /// The power fails, and the disk has lost some of the log that it had synced.
    fn lose_tail(&mut self, host: usize, down: Moment) {
        let here = &self.hosts[host];
        if !here.is_up() || here.durable.acks == Acks::Memory || here.lies() {
            return;
        }
        self.crash(host, true, down.min(400 * MILLI));
        let here = &mut self.hosts[host];
        let lied = here.store.tip();
        let batches = here.random.between(1, 40);
        here.store.lose(batches as usize);
        here.storage.lied = Some(lied);
        here.storage.found_out = false;
    }
}
