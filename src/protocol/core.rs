//! What a host knows of a VM whatever its role: its log, its promise, the record, its peers.

mod holding;
mod log;
mod machine;
mod record;
mod talk;

use std::collections::{BTreeMap, VecDeque};

use replay_log::{FrameNumber, LogIndex, LogTip, Position, Term};

use super::api::Action;
use super::config::{Config, Durable, Restored};
use super::detector::Attention;
use super::event::Event;
use super::feed::Feeds;
use super::message::Message;
use super::mutation::Mutation;
use super::name::{DiskId, HostName, Incarnation, VmRun};
use super::record::{Acks, Committed, Member, Proof, Record, Stumble};
use super::status::SetBack;
use super::time::{Span, Time};

/// The log this host holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct OwnLog {
    /// What the store was asked to append.
    pub(super) appended: LogTip,
    /// What it holds in memory.
    pub(super) stored: LogTip,
    /// What it holds on disk.
    pub(super) synced: LogTip,
    syncing: bool,
}

/// What a peer last said of itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct Greeting {
    pub(super) incarnation: Incarnation,
    pub(super) tip: LogTip,
}

/// Another host.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Peer {
    pub(super) up: bool,
    pub(super) greeting: Option<Greeting>,
    /// A round trip to it.
    pub(super) rtt: Span,
    refused_at: Option<Time>,
    record_sent_at: Option<Time>,
}

/// What becomes of the log when its holding ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rest {
    /// It stays, as a beginning.
    Keep,
    /// It is deleted: others hold whatever counts of it.
    Delete,
    /// It is set aside: for all that is known, nobody else holds it.
    Aside,
}

/// What the present run of the VMM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vm {
    /// There is none.
    Absent,
    /// It replays the log.
    Replaying,
    /// It records, or has been told to.
    Recording,
}

/// The state that all roles share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) config: Config,
    pub(super) now: Time,
    pub(super) attention: Attention,
    /// What is, or is being, persisted.
    pub(super) durable: Durable,
    /// What is known to be persisted.
    pub(super) persisted: Durable,
    pub(super) log: OwnLog,
    /// A new incarnation is being persisted; then this happens to the log.
    renewal: Option<Rest>,
    /// The incarnations in which the present log has been held, the latest last.
    holdings: Vec<Incarnation>,
    /// Random bits of this start, and how many incarnations were drawn from them.
    fresh: u64,
    drawn: u64,
    /// The disk takes nothing more, for this reason.
    pub(super) full: Option<String>,
    pub(super) run: VmRun,
    pub(super) vm: Vm,
    pub(super) executed: LogIndex,
    pub(super) position: Position,
    pub(super) record: Option<Record>,
    /// The keeper's proof of that record.
    proof: Proof,
    /// Whether the keeper has answered since this node started.
    pub(super) record_read: bool,
    reading: Option<Time>,
    /// When the keeper last answered with a record that is not below what this host has seen.
    pub(super) keeper_heard: Option<Time>,
    /// The keeper has less than this host has seen.
    pub(super) keeper_set_back: Option<SetBack>,
    /// What was last said of a keeper that could not be asked.
    keeper_silence: Option<String>,
    /// Whose stream was not taken, because the record that names it was not known.
    pub(super) overlooked: Option<HostName>,
    pub(super) peers: BTreeMap<HostName, Peer>,
    pub(super) feeds: Feeds,
    pub(super) committed: LogIndex,
    pub(super) forgotten: FrameNumber,
    /// Through where the primary said that output was let out, which may be beyond what is held
    /// here: the exposure when loss is accepted.
    pub(super) let_out: LogIndex,
    /// The VMM has failed here: until it has executed the log through here, this host is not fit to
    /// reign.
    pub(super) unfit_before: LogIndex,
    /// Through where it had executed when it failed last.
    failed_at: LogIndex,
    /// How often the VMM has failed here without having come beyond that place.
    failures: u32,
    /// When somebody last ran the guest, or was said to, as far as this host knows; in time awake.
    run_at: Time,
    /// An operator has been told what it takes since then.
    pub(super) waiting_said: bool,
    /// Where and why the VMM of the last reign failed, if that ended it.
    pub(super) stumble: Option<Stumble>,
    /// The highest term that anybody reigned by or claimed, as far as is known.
    pub(super) highest: Term,
    pub(super) actions: VecDeque<Action>,
}

impl Core {
    pub(super) fn new(config: Config, restored: Restored, now: Time) -> Self {
        let attention = Attention::new(now, &config.timing);
        let awake = attention.awake();
        let Restored {
            durable,
            log,
            damaged,
            disk,
            fresh,
        } = restored;
        let promised = durable.promise.as_ref().map_or(Term(0), |p| p.term);
        let (record, proof) = match durable.seen.clone() {
            Some(Committed { record, proof }) => (Some(record), proof),
            None => (None, Proof::default()),
        };
        let reigned = record.as_ref().map_or(Term(0), |record| record.term);
        let highest = durable.highest.max(promised).max(reigned);
        let mut core = Self {
            config,
            now,
            attention,
            persisted: durable.clone(),
            durable,
            log: OwnLog {
                appended: log,
                stored: log,
                ..OwnLog::default()
            },
            renewal: None,
            holdings: Vec::new(),
            fresh,
            drawn: 0,
            full: None,
            run: VmRun::begin(fresh),
            vm: Vm::Absent,
            executed: LogIndex::START,
            position: Position::START,
            record,
            proof,
            record_read: false,
            reading: None,
            keeper_heard: None,
            keeper_set_back: None,
            keeper_silence: None,
            overlooked: None,
            peers: BTreeMap::new(),
            feeds: Feeds::default(),
            committed: LogIndex::START,
            forgotten: FrameNumber(0),
            let_out: LogIndex::START,
            unfit_before: LogIndex::START,
            failed_at: LogIndex::START,
            failures: 0,
            run_at: awake,
            waiting_said: false,
            stumble: None,
            highest: highest.max(log.term),
            actions: VecDeque::new(),
        };
        core.begin(damaged, disk);
        core
    }

    /// Decides whether the holding found on disk is still the one that was acknowledged.
    fn begin(&mut self, damaged: bool, disk: DiskId) {
        let had = self.durable.incarnation != Incarnation(0);
        let elsewhere = had
            && self.durable.disk != disk
            && self.durable.disk != DiskId(0)
            && !self.mutated(Mutation::PutBackBelieved);
        self.durable.disk = disk;
        self.holdings.push(self.durable.incarnation);
        if !had {
            self.take_incarnation();
            self.persist();
        } else if damaged {
            // The driver has set it aside: what is dropped is an empty one.
            self.renew(Rest::Delete, "the log on disk is damaged");
        } else if elsewhere {
            // Whatever was acknowledged, flushed or promised since the copy was made is not in it.
            self.durable.live = Term(0);
            self.durable.booting = Term(0);
            let why = "the VM's folder was copied, moved or put back from a backup";
            self.journal(Event::HoldingLost {
                why: why.to_owned(),
            });
            self.renew(Rest::Keep, why);
        } else if self.durable.acks == Acks::Memory && !self.mutated(Mutation::Amnesia) {
            self.renew(Rest::Keep, "what was acknowledged from memory is gone");
        } else {
            self.check_holding();
        }
        if had {
            self.journal(Event::Restarted {
                incarnation: self.durable.incarnation,
                kept: self.settled(),
                index: self.log.appended.index,
            });
        }
        self.sync();
        self.read_record();
    }

    pub(super) fn mutated(&self, mutation: Mutation) -> bool {
        self.config.mutation == Some(mutation)
    }

    pub(super) fn host(&self) -> &HostName {
        &self.config.host
    }

    pub(super) fn awake(&self) -> Time {
        self.attention.awake()
    }

    /// This host's holding, as a record would name it.
    pub(super) fn me(&self) -> Member {
        Member {
            host: self.config.host.clone(),
            incarnation: self.durable.incarnation,
        }
    }

    pub(super) fn do_(&mut self, action: Action) {
        self.actions.push_back(action);
    }

    pub(super) fn journal(&mut self, event: Event) {
        self.do_(Action::Journal(event));
    }

    pub(super) fn send(&mut self, to: &HostName, message: Message) {
        if self.peers.get(to).is_some_and(|peer| peer.up) {
            self.do_(Action::Send {
                to: to.clone(),
                message,
            });
        }
    }

    /// The connected hosts.
    pub(super) fn up_peers(&self) -> Vec<HostName> {
        let up = self.peers.iter().filter(|(_, peer)| peer.up);
        up.map(|(host, _)| host.clone()).collect()
    }

    pub(super) fn is_up(&self, host: &HostName) -> bool {
        self.peers.get(host).is_some_and(|peer| peer.up)
    }
}
