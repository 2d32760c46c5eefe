//! What is checked: facts that the simulated world states as they happen, with a view of the whole
//! that no host has.

use std::collections::BTreeSet;

use replay_log::MemoryStore;
use replay_log::{Chain, FrameNumber, LogIndex, LogTip, Store, Term};

use super::invariants;
use super::options::Violation;
use super::queue::Moment;
use crate::protocol::{Durable, HostName, Incarnation, Record, Seen, Version};

/// Something that an invariant may forbid.
#[derive(Clone, Debug)]
pub(super) enum Fact {
    /// A host asks the keeper for this record.
    Proposed(Record),
    /// The keeper has committed a record.
    Recorded(Record),
    /// The keeper has committed a record under which the machine starts from power-on, because the
    /// copies of the record before are gone: its log and its outputs begin anew.
    Lost { before: Record },
    /// A machine starts from power-on.
    Booted,
    /// A host reigns, with this log.
    Promoted {
        host: usize,
        term: Term,
        tip: LogTip,
    },
    /// A primary let out the outputs through here.
    Released {
        host: usize,
        term: Term,
        through: LogIndex,
    },
    /// One of them, for this gateway or for all.
    LetOut {
        number: FrameNumber,
        content: u64,
        to: Option<usize>,
    },
    /// A gateway passed an output.
    Passed {
        gateway: u64,
        term: Term,
        number: FrameNumber,
        content: u64,
    },
    /// A host's durable state is another.
    Persisted { host: usize, durable: Durable },
    /// A host gets an empty disk.
    Replaced { host: usize },
    /// A copy's machine did not do what the log says.
    Diverged { host: usize, what: String },
    /// A client got the answer to a request that it sent when it had seen `floor`.
    Answered { key: u32, value: u64, floor: u64 },
    /// An operator accepted loss, or a disk that lied has lost more than the rule survives: history
    /// goes on from the log of this host. `hidden`: nobody can know that.
    LossAccepted { host: usize, hidden: bool },
    /// A host gives its log up. What is set aside is not deleted. It has been told, since its process
    /// began, that output was let out through `knew`.
    Dropped {
        log: MemoryStore,
        aside: bool,
        knew: LogIndex,
    },
    /// Something was broken, or repaired: what comes next may take its time.
    Disturbed,
    /// An operator has given the keeper this state of the record again.
    Recovered { version: Version },
    /// A host claims a term, and enough copies are there for its claim.
    Claimed { term: Term },
    /// The guest runs live by a new term.
    WentLive,
    /// A primary that had heard nobody for so long had a member removed.
    Removed { host: usize, for_ms: u64 },
    /// The state of the whole, looked at now and then.
    Watched(Watched),
    /// Somebody whom no record concerns is told what only copies may know.
    Leaked { to: HostName, what: &'static str },
    /// The keeper answered a host that has seen this, from what it has.
    Served { seen: Seen, has: Option<Seen> },
    /// Only an operator can help, and no journal has said so by naming this order.
    Untold { order: &'static str },
}

/// What is looked at now and then.
#[derive(Clone, Debug, Default)]
pub(super) struct Watched {
    pub(super) now: Moment,
    /// For each gateway: enough healthy copies are connected, with one another, the keeper and it.
    pub(super) could_serve: Vec<bool>,
    /// Within so long they have to serve.
    pub(super) within: Moment,
    /// For how long a guest has stood paused without need, and how long it may.
    pub(super) paused: Option<(HostName, Moment, Moment)>,
    /// A queue with its length and its bound.
    pub(super) queues: Vec<Queued>,
}

/// How much waits somewhere.
#[derive(Clone, Debug)]
pub(super) struct Queued {
    pub(super) what: &'static str,
    pub(super) len: usize,
    pub(super) most: usize,
}

/// A host as the omniscient see it.
#[derive(Clone, Debug)]
pub(super) struct HostView {
    pub(super) name: HostName,
    /// The holding that a claimant would hear of, once the host is up.
    pub(super) incarnation: Incarnation,
    pub(super) store: MemoryStore,
    /// Up, or its log would survive a restart as the same holding.
    pub(super) intact: bool,
    /// Its disk has lost what it had synced, and it does not know.
    pub(super) lies: bool,
    /// The same, and a primary has been told how much is left.
    pub(super) found_out: bool,
    /// Where the batches end that wait for room on the disk.
    pub(super) waiting: Vec<LogTip>,
    /// The newest state of the record that it has seen, durably.
    pub(super) seen: Option<Version>,
}

impl HostView {
    /// The chain of its log there.
    pub(super) fn chain_at(&self, index: LogIndex) -> Option<Chain> {
        if index == LogIndex::START {
            return Some(Chain::default());
        }
        self.store.chain_at(index).ok().flatten()
    }

    /// The chain of the log there that it may not have on its disk yet.
    pub(super) fn chain_known(&self, index: LogIndex) -> Option<Chain> {
        let waiting = self.waiting.iter().find(|tip| tip.index == index);
        self.chain_at(index)
            .or_else(|| waiting.map(|tip| tip.chain))
    }
}

/// What invariants may look at.
#[derive(Debug)]
pub(super) struct View<'a> {
    pub(super) hosts: &'a [HostView],
    pub(super) record: Option<&'a Record>,
    /// The furthest that output was let out in the present history.
    pub(super) released: Released,
}

/// A place in the log, as far as which output was let out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Released {
    pub(super) index: LogIndex,
    pub(super) chain: Chain,
}

impl View<'_> {
    pub(super) fn host(&self, name: &HostName) -> Option<&HostView> {
        self.hosts.iter().find(|host| host.name == *name)
    }
}

/// One thing that must never happen.
pub(super) trait Invariant: std::fmt::Debug {
    /// Its name: that of its file.
    fn name(&self) -> &'static str;

    /// Whether it still holds after this fact; if not, what was found.
    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String>;
}

/// Checks every fact against every invariant.
#[derive(Debug)]
pub(super) struct Checker {
    invariants: Vec<Box<dyn Invariant>>,
    released: Released,
    seen: BTreeSet<&'static str>,
}

impl Checker {
    pub(super) fn new() -> Self {
        Self {
            invariants: invariants::all(),
            released: Released::default(),
            seen: BTreeSet::new(),
        }
    }

    pub(super) fn check(
        &mut self,
        at: Moment,
        fact: &Fact,
        hosts: &[HostView],
        record: Option<&Record>,
    ) -> Result<(), Violation> {
        self.note(fact, hosts);
        let view = View {
            hosts,
            record,
            released: self.released,
        };
        for invariant in &mut self.invariants {
            self.seen.insert(invariant.name());
            invariant.check(fact, &view).map_err(|what| Violation {
                invariant: invariant.name(),
                at,
                what,
            })?;
        }
        Ok(())
    }

    /// The furthest that output was let out in the present history.
    pub(super) fn released(&self) -> Released {
        self.released
    }

    fn note(&mut self, fact: &Fact, hosts: &[HostView]) {
        match fact {
            Fact::Lost { .. } | Fact::Booted => self.released = Released::default(),
            Fact::LossAccepted { host, .. } => {
                // A log that is longer may still be another one: of an earlier term, on the host that
                // alone has not lost everything.
                let host = &hosts[*host];
                if host.chain_at(self.released.index) != Some(self.released.chain) {
                    let tip = host.store.tip();
                    self.released = Released {
                        index: tip.index,
                        chain: tip.chain,
                    };
                }
            }
            Fact::Released { host, through, .. } if *through > self.released.index => {
                if let Some(chain) = hosts.get(*host).and_then(|host| host.chain_known(*through)) {
                    self.released = Released {
                        index: *through,
                        chain,
                    };
                }
            }
            _ => {}
        }
    }
}
