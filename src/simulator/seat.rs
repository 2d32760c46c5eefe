//! What a simulated host has of one VM: a production node, its durable state, its log, and its VMM.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Index, IndexMut};

use replay_log::MemoryStore;
use replay_log::{FrameNumber, LogIndex, LogTip, Store, Term};
use vmm::host::HostTime;

use super::facts::HostView;
use super::gateway::Session;
use super::host::{Clock, Host};
use super::ids::{SeatId, VMS};
use super::patience::KeeperPatience;
use super::queue::{MICRO, Moment};
use super::random::Random;
use super::storage::{Backup, Storage, copy};
use super::streams::Streams;
use super::vm::Vm;
use crate::protocol::{
    Acks, Bounds, Config, DiskId, Durable, HostName, Incarnation, Mutation, Node, Record, Restored,
    Time, Version, VmName,
};

/// How much may wait: less than in production, as the simulated guest writes less.
pub(super) const BOUNDS: Bounds = Bounds {
    uncommitted_log: 64 << 10,
    waiting_output: 64 << 10,
};

/// One VM on one host.
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a fault or a fact of its own"
)]
pub(super) struct Seat {
    vm_name: VmName,
    /// Those of the host.
    pub(super) host: HostName,
    pub(super) clock: Clock,
    pub(super) random: Random,
    pub(super) node: Option<Node>,
    /// When the node's next timeout is planned for.
    pub(super) due: Option<Moment>,
    // Durable.
    pub(super) durable: Durable,
    pub(super) store: MemoryStore,
    pub(super) damaged: bool,
    pub(super) last_disk: Option<Vec<u8>>,
    /// What the folder lies on: another one after it was put back from a backup.
    pub(super) disk: DiskId,
    pub(super) storage: Storage,
    // The process.
    pub(super) persisting: VecDeque<Durable>,
    /// The incarnation of the last `Persist` carried out.
    pub(super) tag: Incarnation,
    pub(super) stored_planned: bool,
    pub(super) vm: Option<Vm>,
    /// When the VMM's next turn is planned for.
    pub(super) turn_at: Option<Moment>,
    pub(super) reign: Option<Term>,
    pub(super) released: LogIndex,
    /// Through where output was let out, as its process knows.
    pub(super) knew: LogIndex,
    pub(super) machine: u64,
    /// Those of the gateways that it serves, by their numbers.
    pub(super) sessions: BTreeMap<usize, Session>,
    /// The last output that each of them has, as far as it has said so.
    pub(super) received: BTreeMap<usize, FrameNumber>,
    pub(super) asked: BTreeSet<u64>,
    pub(super) keeper: KeeperPatience,
    /// A swap was sent to the keeper, and what came of it is not known here.
    pub(super) swapping: bool,
    pub(super) streams: Streams,
    /// For how long the guest has stood paused although nothing forbade it to go on.
    pub(super) paused: Option<Moment>,
    /// Orders of the operator that the journal has named since somebody reigned last.
    pub(super) named: BTreeSet<&'static str>,
    pub(super) accepts_loss: bool,
}

impl Seat {
    pub(super) fn new(vm: usize, host: &Host, random: &mut Random) -> Self {
        Self {
            vm_name: VmName::new(VMS[vm]).expect("a name made of letters"),
            host: host.name.clone(),
            clock: host.clock,
            random: random.fork(),
            node: None,
            due: None,
            durable: Durable::default(),
            store: MemoryStore::new(),
            damaged: false,
            last_disk: None,
            disk: DiskId(random.next() | 1),
            storage: Storage::default(),
            persisting: VecDeque::new(),
            tag: Incarnation(0),
            stored_planned: false,
            vm: None,
            turn_at: None,
            reign: None,
            released: LogIndex::START,
            knew: LogIndex::START,
            machine: 0,
            sessions: BTreeMap::new(),
            received: BTreeMap::new(),
            asked: BTreeSet::new(),
            keeper: KeeperPatience::default(),
            swapping: false,
            streams: Streams::default(),
            paused: None,
            named: BTreeSet::new(),
            accepts_loss: false,
        }
    }

    pub(super) fn time(&self, at: Moment) -> Time {
        Time::from_nanos(self.clock.shows(at))
    }

    pub(super) fn host_time(&self, at: Moment) -> HostTime {
        HostTime(self.clock.shows(at))
    }

    /// Starts its node with what is on the disk.
    pub(super) fn start(&mut self, now: Moment, mutation: Option<Mutation>) {
        self.damaged |= self.store.restart().is_err();
        if self.damaged {
            // Set aside, as evidence.
            self.store = MemoryStore::new();
        }
        let log = self.store.tip();
        let (host, vm) = (self.host.clone(), self.vm_name.clone());
        let mut config = Config::new(host, vm).with_mutation(mutation);
        config.bounds = BOUNDS;
        let restored = Restored {
            durable: self.durable.clone(),
            log,
            damaged: self.damaged,
            disk: self.disk,
            fresh: self.random.next(),
        };
        self.knew = LogIndex::START;
        self.tag = self.durable.incarnation;
        self.storage.begin();
        self.keeper = KeeperPatience::default();
        self.node = Some(Node::new(config, restored, self.time(now)));
    }

    /// Ends its node and its VMM, on a disk that takes everything or does not. A power failure also
    /// takes what was not synced, all or the end of it.
    pub(super) fn stop(&mut self, power: bool, takes: bool) {
        self.node = None;
        if let Some(vm) = self.vm.as_mut().filter(|vm| vm.records()) {
            self.last_disk = vm.flushed();
        }
        self.vm = None;
        self.due = None;
        self.turn_at = None;
        self.stored_planned = false;
        self.reign = None;
        self.sessions.clear();
        self.asked.clear();
        self.swapping = false;
        self.streams.clear();
        self.paused = None;
        self.storage.begin();
        // Of what was being written when it stopped, any beginning may have got through.
        let tried = if takes {
            self.persisting.len() as u64
        } else {
            0
        };
        let through = self.random.below(tried + 1);
        for durable in self.persisting.drain(..).take(through as usize) {
            self.durable = durable;
        }
        if power {
            let unsynced = self.store.unsynced_bytes();
            let survive = self.random.below(unsynced + 1);
            self.store.crash(survive);
        }
    }

    /// How long a flush takes, on a disk that may be slow.
    pub(super) fn fsync(&mut self, slow: u32) -> Moment {
        if slow > 0 {
            self.random.between(50, 300) * 1_000 * MICRO
        } else {
            self.random.between(200, 3_000) * MICRO
        }
    }

    /// Whether the holding is still the one that a record with this incarnation names, and would
    /// be after a restart.
    pub(super) fn keeps(&self) -> bool {
        let disk = self.durable.disk == self.disk;
        let keeps = self.durable.acks == Acks::Disk && !self.damaged && disk;
        // One that has started and is about to take another incarnation has lost something. One that
        // has not believes in what it has found, on whichever disk.
        let same = |node: &Node| node.incarnation() == self.durable.incarnation;
        self.node.as_ref().map_or(keeps, same)
    }

    /// Whether the disk has lost what it had synced, and nobody has found out yet.
    pub(super) fn lies(&self) -> bool {
        let lost = |tip: &LogTip| self.store.chain_at(tip.index).ok().flatten() != Some(tip.chain);
        self.storage.lied.as_ref().is_some_and(lost)
    }

    pub(super) fn view(&self) -> HostView {
        HostView {
            name: self.host.clone(),
            incarnation: self.durable.incarnation,
            store: self.store.clone(),
            intact: self.keeps() && !self.lies(),
            lies: self.lies(),
            found_out: self.lies() && self.storage.found_out,
            waiting: self.waiting_tips(),
            seen: self.durable.seen.as_ref().map(|seen| seen.record.version()),
        }
    }

    /// Where the batches end that the disk has had no room for.
    fn waiting_tips(&self) -> Vec<LogTip> {
        let mut tip = self.store.tip();
        let mut tips = Vec::new();
        for batch in &self.storage.waiting {
            tip = batch.tip(tip.chain);
            tips.push(tip);
        }
        tips
    }

    /// The newest record that it knows: what runs knows most.
    pub(super) fn known(&self) -> Option<Record> {
        let durable = self.durable.seen.as_ref().map(|seen| seen.record.clone());
        let running = self.node.as_ref().and_then(|node| node.status().record);
        [durable, running]
            .into_iter()
            .flatten()
            .max_by_key(Record::version)
    }

    pub(super) fn known_version(&self) -> Option<Version> {
        self.known().as_ref().map(Record::version)
    }

    /// Keeps a copy of everything that is on the disk now.
    pub(super) fn back_up(&mut self) {
        self.storage.backup = Some(Backup {
            durable: self.durable.clone(),
            store: copy(&self.store),
            last_disk: self.last_disk.clone(),
        });
    }

    /// Puts that copy in its place, which makes it another disk. Says whether there was one.
    pub(super) fn put_back(&mut self) -> bool {
        let Some(backup) = self.storage.backup.take() else {
            return false;
        };
        self.store = backup.store;
        self.durable = backup.durable;
        self.last_disk = backup.last_disk;
        self.damaged = false;
        self.storage.lied = None;
        self.disk = DiskId(self.random.next() | 1);
        true
    }

    /// The disk has lost the end of the log, synced or not.
    pub(super) fn lose_tail(&mut self) {
        let lied = self.store.tip();
        let batches = self.random.between(1, 40);
        self.store.lose(batches as usize);
        self.storage.lied = Some(lied);
        self.storage.found_out = false;
    }

    /// Gives it an empty disk.
    pub(super) fn wipe(&mut self) {
        self.store = MemoryStore::new();
        self.durable = Durable::default();
        self.damaged = false;
        self.last_disk = None;
        self.storage.lied = None;
        self.disk = DiskId(self.random.next() | 1);
    }
}

/// All of them.
pub(super) struct Seats(Vec<Vec<Seat>>);

impl Seats {
    /// Those of one VM after another.
    pub(super) fn new(all: Vec<Vec<Seat>>) -> Self {
        Self(all)
    }

    /// One VM's, host by host.
    pub(super) fn of_vm(&self, vm: usize) -> &[Seat] {
        &self.0[vm]
    }

    pub(super) fn of_vm_mut(&mut self, vm: usize) -> &mut [Seat] {
        &mut self.0[vm]
    }

    /// One host's, VM by VM.
    pub(super) fn on_host_mut(&mut self, host: usize) -> impl Iterator<Item = &mut Seat> {
        self.0.iter_mut().map(move |seats| &mut seats[host])
    }
}

impl Index<SeatId> for Seats {
    type Output = Seat;

    fn index(&self, at: SeatId) -> &Seat {
        &self.0[at.vm][at.host]
    }
}

impl IndexMut<SeatId> for Seats {
    fn index_mut(&mut self, at: SeatId) -> &mut Seat {
        &mut self.0[at.vm][at.host]
    }
}
