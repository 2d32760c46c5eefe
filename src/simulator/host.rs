//! A simulated host: a production node, its durable state, its log, and its VMM.

use std::collections::{BTreeSet, VecDeque};

use replay_log::MemoryStore;
use replay_log::{LogIndex, LogTip, Store, Term};
use vmm::host::HostTime;

use super::facts::HostView;
use super::gateway::Session;
use super::queue::{MICRO, Moment};
use super::random::Random;
use super::vm::Vm;
use super::world::Event;
use crate::protocol::{
    Acks, Config, Durable, HostName, Incarnation, Mutation, Node, Restored, Time, VmName,
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
    pub(super) machine: u64,
    pub(super) session: Option<Session>,
    pub(super) asked: BTreeSet<u64>,
    // Faults.
    pub(super) slow_disk: u32,
    pub(super) slow_vm: u32,
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
            persisting: VecDeque::new(),
            tag: Incarnation(0),
            stored_planned: false,
            vm: None,
            turn_at: None,
            reign: None,
            released: LogIndex::START,
            machine: 0,
            session: None,
            asked: BTreeSet::new(),
            slow_disk: 0,
            slow_vm: 0,
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
        let log = if self.damaged {
            LogTip::default()
        } else {
            self.store.tip()
        };
        let vm = VmName::new("vm").expect("a name made of letters");
        let config = Config::new(self.name.clone(), vm).with_mutation(mutation);
        let restored = Restored {
            durable: self.durable.clone(),
            log,
            damaged: self.damaged,
            disk: crate::protocol::DiskId(1),
            fresh: self.random.next(),
        };
        self.life += 1;
        self.tag = self.durable.incarnation;
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
        // Of what was being written when it stopped, any beginning may have got through.
        let through = self.random.below(self.persisting.len() as u64 + 1);
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
        if self.slow_disk > 0 {
            self.random.between(50, 300) * 1_000 * MICRO
        } else {
            self.random.between(200, 3_000) * MICRO
        }
    }

    pub(super) fn view(&self) -> HostView {
        let keeps = self.durable.acks == Acks::Disk && !self.damaged;
        // One that has started and is about to take another incarnation has lost something.
        let same = |node: &Node| node.incarnation() == self.durable.incarnation;
        HostView {
            name: self.name.clone(),
            incarnation: self.durable.incarnation,
            store: self.store.clone(),
            intact: self.node.as_ref().map_or(keeps, same),
        }
    }
}
