//! A simulated host: a production node, its durable state, its log, and its VMM.

use std::collections::{BTreeSet, VecDeque};

use replay_log::MemoryStore;
use replay_log::{LogIndex, LogTip, Store, Term};
use vmm::host::HostTime;

use super::facts::HostView;
use super::gateway::Session;
use super::patience::KeeperPatience;
use super::queue::{MICRO, Moment};
use super::random::Random;
use super::storage::{Backup, Storage, copy};
use super::streams::Streams;
use super::vm::Vm;
use super::world::Event;
use crate::protocol::{
    Acks, Bounds, Config, DiskId, Durable, HostName, Incarnation, Mutation, Node, Record, Restored,
    Time, Version, VmName,
};

/// How much may wait: less than in production, as the simulated guest writes less.
pub(super) const BOUNDS: Bounds = Bounds {
    uncommitted_log: 64 << 10,
    waiting_output: 64 << 10,
};

/// A clock that is wrong, differently on every host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    offset: u64,
    /// Millionths that it goes fast (or slow).
    drift: i64,
}

impl Clock {
    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            offset: random.below(1_000_000_000_000),
            drift: i64::from(random.below(401) as u16) - 200,
        }
    }

    pub(super) fn shows(self, at: Moment) -> u64 {
        let skew = i128::from(at) * i128::from(self.drift) / 1_000_000;
        let shown = i128::from(self.offset) + i128::from(at) + skew;
        u64::try_from(shown).unwrap_or(0)
    }

    /// The first moment at which it shows at least `shown`.
    pub(super) fn moment(self, shown: u64) -> Moment {
        let since = i128::from(shown) - i128::from(self.offset);
        let at = since * 1_000_000 / (1_000_000 + i128::from(self.drift));
        u64::try_from(at).unwrap_or(0) + 1
    }
}

/// A host.
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a fault or a fact of its own"
)]
pub(super) struct Host {
    pub(super) name: HostName,
    pub(super) clock: Clock,
    pub(super) random: Random,
    pub(super) node: Option<Node>,
    /// Counts the starts of its processes; what an earlier one had planned is void.
    pub(super) life: u32,
    /// When the node's next timeout is planned for.
    pub(super) due: Option<Moment>,
    pub(super) paused_until: Moment,
    /// What has come while it was paused.
    pub(super) frozen: Vec<Event>,
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
    pub(super) session: Option<Session>,
    pub(super) asked: BTreeSet<u64>,
    pub(super) keeper: KeeperPatience,
    /// A swap was sent to the keeper, and what came of it is not known here.
    pub(super) swapping: bool,
    pub(super) streams: Streams,
    /// For how long the guest has stood paused although nothing forbade it to go on.
    pub(super) paused: Option<Moment>,
    /// Orders of the operator that the journal has named since somebody reigned last.
    pub(super) named: BTreeSet<&'static str>,
    // Faults.
    pub(super) slow_vm: u32,
    /// Nothing reaches it, and what it sends does.
    pub(super) deaf: u32,
    pub(super) deaf_since: Option<Moment>,
    pub(super) accepts_loss: bool,
}

impl Host {
    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        let name = format!("host{number}");
        let clock = Clock::new(random);
        Self {
            name: HostName::new(&name).expect("a name made of letters and digits"),
            clock,
            random: random.fork(),
            node: None,
            life: 0,
            due: None,
            paused_until: 0,
            frozen: Vec::new(),
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
            session: None,
            asked: BTreeSet::new(),
            keeper: KeeperPatience::default(),
            swapping: false,
            streams: Streams::default(),
            paused: None,
            named: BTreeSet::new(),
            slow_vm: 0,
            deaf: 0,
            deaf_since: None,
            accepts_loss: false,
        }
    }

    pub(super) fn time(&self, at: Moment) -> Time {
        Time::from_nanos(self.clock.shows(at))
    }

    pub(super) fn host_time(&self, at: Moment) -> HostTime {
        HostTime(self.clock.shows(at))
    }

    /// Starts its processes with what is on its disk.
    pub(super) fn start(&mut self, now: Moment, mutation: Option<Mutation>) {
        self.damaged |= self.store.restart().is_err();
        if self.damaged {
            // Set aside, as evidence.
            self.store = MemoryStore::new();
        }
        let log = self.store.tip();
        let vm = VmName::new("vm").expect("a name made of letters");
        let mut config = Config::new(self.name.clone(), vm).with_mutation(mutation);
        config.bounds = BOUNDS;
        let restored = Restored {
            durable: self.durable.clone(),
            log,
            damaged: self.damaged,
            disk: self.disk,
            fresh: self.random.next(),
        };
        self.life += 1;
        self.knew = LogIndex::START;
        self.tag = self.durable.incarnation;
        self.storage.begin();
        self.keeper = KeeperPatience::default();
        self.node = Some(Node::new(config, restored, self.time(now)));
    }

    /// Ends its processes. A power failure also takes what was not synced, all or the end of it.
    pub(super) fn stop(&mut self, power: bool) {
        self.node = None;
        self.life += 1;
        if let Some(vm) = self.vm.as_mut().filter(|vm| vm.records()) {
            self.last_disk = vm.flushed();
        }
        self.vm = None;
        self.due = None;
        self.turn_at = None;
        self.stored_planned = false;
        self.reign = None;
        self.session = None;
        self.asked.clear();
        self.swapping = false;
        self.streams.clear();
        self.paused = None;
        self.storage.begin();
        // Of what was being written when it stopped, any beginning may have got through.
        let tried = if self.storage.is_well() {
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

    pub(super) fn is_up(&self) -> bool {
        self.node.is_some()
    }

    /// How long a flush takes.
    pub(super) fn fsync(&mut self) -> Moment {
        if self.storage.slow > 0 {
            self.random.between(50, 300) * 1_000 * MICRO
        } else {
            self.random.between(200, 3_000) * MICRO
        }
    }

    /// One reason less that nothing reaches it.
    pub(super) fn hears_again(&mut self) {
        self.deaf -= 1;
        self.deaf_since.take_if(|_| self.deaf == 0);
    }

    /// Whether the process runs and is not frozen.
    pub(super) fn runs(&self, now: Moment) -> bool {
        self.is_up() && self.paused_until <= now
    }

    /// Whether the holding is still the one that a record with this incarnation names, and would
    /// be after a restart.
    pub(super) fn keeps(&self) -> bool {
        let keeps = self.durable.acks == Acks::Disk && !self.damaged;
        // One that has started and is about to take another incarnation has lost something.
        let same = |node: &Node| node.incarnation() == self.durable.incarnation;
        self.node.as_ref().map_or(keeps, same) && self.durable.disk == self.disk
    }

    /// Whether the disk has lost what it had synced, and nobody has found out yet.
    pub(super) fn lies(&self) -> bool {
        let lost = |tip: &LogTip| self.store.chain_at(tip.index).ok().flatten() != Some(tip.chain);
        self.storage.lied.as_ref().is_some_and(lost)
    }

    pub(super) fn view(&self) -> HostView {
        HostView {
            name: self.name.clone(),
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
