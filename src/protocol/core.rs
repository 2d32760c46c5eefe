//! What a host knows of a VM whatever its role: its log, its promise, the record, its peers.

use std::collections::{BTreeMap, VecDeque};

use replay_log::{Batch, FrameNumber, LogIndex, LogTip, Position, Term};

use super::api::{Action, StopReason};
use super::config::{Config, Durable, Restored};
use super::detector::Attention;
use super::event::Event;
use super::feed::Feeds;
use super::message::{Ack, Authority, Claim, Health, Message, PROTOCOL_VERSION, Refusal};
use super::mutation::Mutation;
use super::name::{DiskId, HostName, Incarnation, VmRun};
use super::record::{
    Acks, Committed, Lineage, Member, Proof, Record, Seen, Stumble, TERM_LEAP, Version,
};
use super::status::SetBack;
use super::time::{Span, Time};

/// A reign that has come no further than so many landmarks beyond the place where the last one
/// failed has failed at the same place: what arrives from outside moves it a little.
const SAME_PLACE: u64 = 256;

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
    /// When somebody last ran the guest, or was said to, as far as this host knows.
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
            run_at: now,
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

    // --- durable state -----------------------------------------------------------------------

    pub(super) fn persist(&mut self) {
        self.durable.highest = self.highest;
        let durable = self.durable.clone();
        self.do_(Action::Persist(durable));
    }

    /// Whether this host's identity is durable and its log is the one that identity stands for.
    pub(super) fn settled(&self) -> bool {
        self.renewal.is_none()
            && self.persisted.incarnation == self.durable.incarnation
            && self.durable.incarnation != Incarnation(0)
    }

    /// Something was persisted. Says whether the holding has just become settled.
    pub(super) fn persisted(&mut self, durable: Durable) -> bool {
        let before = self.settled();
        self.persisted = durable;
        let named = self.persisted.incarnation == self.durable.incarnation;
        match self.renewal {
            Some(Rest::Keep) if named => self.renewal = None,
            Some(rest) if named => {
                self.renewal = None;
                self.holdings = vec![self.durable.incarnation];
                self.log = OwnLog::default();
                self.executed = LogIndex::START;
                self.position = Position::START;
                // The next log may be another machine's, with outputs counted anew.
                self.committed = LogIndex::START;
                self.let_out = LogIndex::START;
                self.forgotten = FrameNumber(0);
                self.do_(Action::DropLog {
                    incarnation: self.durable.incarnation,
                    aside: rest == Rest::Aside,
                });
            }
            _ => {}
        }
        !before && self.settled()
    }

    /// The identity of a VM that is created here.
    pub(super) fn new_lineage(&self) -> Lineage {
        // Another draw than any incarnation's.
        Lineage(Incarnation::draw(!self.fresh, 0).0)
    }

    /// A copy that has less log than the record says that it held has lost some: a disk that lied
    /// about a sync, or that was set back with all that is on it.
    fn check_holding(&mut self) {
        let through = self.record.as_ref().map(|record| record.through);
        let own = self.log.appended.index;
        let lacks = through.is_some_and(|through| own < through);
        if lacks && self.is_copy() && self.settled() && !self.mutated(Mutation::Amnesia) {
            let through = through.unwrap_or_default();
            let why = format!(
                "its log ends at {own}, and the record says that it held {through}: the disk has lost \
                 what it had synced, or was set back"
            );
            self.forgets(&why);
        }
    }

    /// What is here is less than what was acknowledged by this holding: it becomes another one.
    pub(super) fn forgets(&mut self, why: &str) {
        self.journal(Event::HoldingLost {
            why: why.to_owned(),
        });
        self.renew(Rest::Keep, why);
    }

    fn take_incarnation(&mut self) {
        self.durable.incarnation = Incarnation::draw(self.fresh, self.drawn);
        self.drawn += 1;
        self.holdings.push(self.durable.incarnation);
    }

    /// Gives the holding up for a new one: an empty one, or one that begins with the same log.
    pub(super) fn renew(&mut self, rest: Rest, why: &str) {
        if !(rest != Rest::Keep && self.mutated(Mutation::Amnesia)) {
            self.take_incarnation();
        }
        self.persist();
        self.renewal = self.renewal.max(Some(rest));
        self.feeds.stop_all(&mut self.actions);
        if rest != Rest::Keep {
            self.stop_vm(StopReason::Resynchronised);
            let incarnation = self.durable.incarnation;
            let why = why.to_owned();
            self.journal(Event::Resynchronising { incarnation, why });
        }
    }

    /// A claim binds nobody any more. (What its term was is remembered: no later claim has it.)
    pub(super) fn release_promise(&mut self, claim: &Claim) -> bool {
        let bound = self.durable.promise.as_ref() == Some(claim);
        if bound {
            self.durable.promise = None;
            self.persist();
        }
        bound
    }

    /// Whether a promise forbids to hear somebody who reigns by this state of the record.
    pub(super) fn sealed_against(&self, version: Version) -> bool {
        let promise = self.durable.promise.as_ref();
        promise.is_some_and(|promise| version <= promise.base)
    }

    /// The latest state of the record that this host knows of, be it only by a promise: whoever
    /// claimed on it had read it.
    pub(super) fn latest_base(&self) -> Version {
        let promised = self.durable.promise.as_ref().map(|promise| promise.base);
        self.version().max(promised.unwrap_or_default())
    }

    /// Somebody names a term. Says whether it is one that could have come about: terms rise one by
    /// one, and a wild one would leave none for those who come after.
    pub(super) fn hear_of(&mut self, term: Term) -> bool {
        // What others say is bounded by what was committed, and not by what others have said.
        let reigned = self.version().term.max(self.log.appended.term);
        let credible = term.0 <= reigned.0.saturating_add(TERM_LEAP / 2);
        if credible {
            self.highest = self.highest.max(term);
        }
        credible
    }

    /// The last term by which this host has, or may have, the disks of the guest.
    pub(super) fn has_disks_of(&self) -> Term {
        self.durable.live.max(self.durable.booting)
    }

    /// Whether this host has anything of the VM that it could go on from.
    pub(super) fn has_something(&self) -> bool {
        self.log.appended.index > LogIndex::START || self.has_disks_of() > Term(0)
    }

    /// Whether any host that can be reached has a log of the VM, or this one disks.
    pub(super) fn somebody_has_something(&self) -> bool {
        let greetings = self.peers.values().filter(|peer| peer.up);
        let mut tips = greetings.filter_map(|peer| peer.greeting.map(|greeting| greeting.tip));
        self.has_something() || tips.any(|tip| tip.index > LogIndex::START)
    }

    /// Somebody runs the guest.
    pub(super) fn somebody_runs_it(&mut self) {
        self.run_at = self.now;
        self.waiting_said = false;
    }

    /// For how long nobody has, as far as this host knows.
    pub(super) fn nobody_for(&self) -> Span {
        self.now.since(self.run_at)
    }

    /// Whether an earlier promise forbids to promise this.
    pub(super) fn promised_otherwise(&self, claim: &Claim) -> bool {
        self.durable.promise.as_ref().is_some_and(|promise| {
            promise.term > claim.term || (promise.term == claim.term && promise != claim)
        })
    }

    pub(super) fn promise(&mut self, claim: Claim) {
        self.highest = self.highest.max(claim.term);
        self.durable.promise = Some(claim);
        self.persist();
    }

    // --- the log -----------------------------------------------------------------------------

    /// What counting as a holder of the log means for this VM.
    pub(super) fn acks(&self) -> Acks {
        let wanted = self.record.as_ref().map(|record| record.policy.acks);
        match (wanted, self.persisted.acks) {
            // Until a restart would give up the holding, memory is no promise.
            (Some(Acks::Memory), Acks::Memory) => Acks::Memory,
            _ => Acks::Disk,
        }
    }

    /// Through where this host holds its log, in the VM's sense of holding.
    pub(super) fn held(&self) -> LogIndex {
        match self.acks() {
            Acks::Memory => self.log.stored.index,
            Acks::Disk => self.log.synced.index,
        }
    }

    pub(super) fn append(&mut self, batch: Batch) {
        self.log.appended = batch.tip(self.log.appended.chain);
        self.highest = self.highest.max(batch.term());
        self.do_(Action::Append { batch });
        if self.acks() == Acks::Disk {
            self.sync();
        }
    }

    fn sync(&mut self) {
        if !self.log.syncing && self.log.synced.index < self.log.appended.index {
            self.log.syncing = true;
            self.do_(Action::Sync);
        }
    }

    pub(super) fn stored(&mut self, incarnation: Incarnation, tip: LogTip) {
        let news = tip.index > self.log.stored.index && tip.index <= self.log.appended.index;
        if self.is_current(incarnation) && news {
            self.log.stored = tip;
        }
    }

    pub(super) fn synced(&mut self, incarnation: Incarnation, tip: LogTip) {
        if self.is_current(incarnation) {
            self.log.syncing = false;
            // A store that was told never to sync makes no progress: it is not asked in a loop.
            if tip.index > self.log.synced.index && tip.index <= self.log.appended.index {
                self.log.synced = tip;
                self.log.stored = self.log.stored.max(tip);
                if self.acks() == Acks::Disk {
                    self.sync();
                }
            }
        }
    }

    /// The store has not taken what was appended after here: nobody has been told that it is held, and
    /// nobody has had it from here. Says whether the log is shorter for it.
    pub(super) fn shortened(&mut self, incarnation: Incarnation, tip: LogTip) -> bool {
        let shorter = self.is_current(incarnation) && tip.index < self.log.appended.index;
        if shorter {
            self.log.appended = tip;
            self.executed = self.executed.min(tip.index);
            self.committed = self.committed.min(tip.index);
            // They would go on from where it ended before.
            self.feeds.stop_all(&mut self.actions);
        }
        shorter
    }

    /// The store failed: what it held may be gone.
    pub(super) fn store_failed(&mut self, reason: String) {
        self.journal(Event::StoreFailed { reason });
        self.renew(Rest::Aside, "what the local store holds is doubtful");
    }

    fn is_current(&self, incarnation: Incarnation) -> bool {
        let dropping = self.renewal.is_some_and(|rest| rest != Rest::Keep);
        self.holdings.contains(&incarnation) && !dropping
    }

    pub(super) fn ack(&self, term: Term) -> Ack {
        Ack {
            term,
            incarnation: self.durable.incarnation,
            held: self.held(),
            run: self.run,
            executed: self.executed,
            position: self.position,
            known: self.version(),
            health: self.health(),
        }
    }

    /// A reign has failed at this landmark: how many in a row have by now.
    pub(super) fn stumbles(&self, at: Position, reason: &str) -> Stumble {
        let before = self.record.as_ref().and_then(|r| r.failed.as_ref());
        let again = before.filter(|before| at.0 <= before.at.0.saturating_add(SAME_PLACE));
        let mut reason = reason.to_owned();
        while reason.len() > Stumble::REASON_MAX {
            reason.pop();
        }
        Stumble {
            at: again.map_or(at, |before| before.at.max(at)),
            reigns: again.map_or(1, |before| before.reigns.saturating_add(1)),
            reason,
        }
    }

    /// What keeps this copy from being counted on.
    pub(super) fn health(&self) -> Health {
        if self.full.is_some() {
            Health::Full
        } else if self.failures >= 2 && self.executed <= self.failed_at {
            Health::Unable
        } else {
            Health::Well
        }
    }

    /// How many times the usual patience a VMM that has failed waits before it is tried again.
    pub(super) fn backoff(&self) -> u64 {
        1 << self.failures.saturating_sub(1).min(5)
    }

    /// The VMM failed: until it has executed what it had by then, this host is not fit to reign. (Not
    /// all that is held: the end of a log is executed only when more follows.)
    pub(super) fn note_vm_failure(&mut self) {
        self.failures = if self.failures > 0 && self.executed <= self.failed_at {
            self.failures.saturating_add(1)
        } else {
            1
        };
        self.failed_at = self.executed;
        self.unfit_before = self.executed.max(LogIndex(1));
    }

    /// Begins to serve this host's log to another.
    pub(super) fn feed(&mut self, to: &HostName, authority: Authority, theirs: LogTip) {
        let ours = self.log.appended;
        self.feeds
            .start(to, authority, theirs, ours, &mut self.actions);
    }

    // --- the record --------------------------------------------------------------------------

    pub(super) fn version(&self) -> Version {
        self.record
            .as_ref()
            .map(Record::version)
            .unwrap_or_default()
    }

    /// Hears of a committed record. Says whether it is news.
    pub(super) fn learn(&mut self, committed: Committed) -> bool {
        let record = &committed.record;
        let namesake = self
            .record
            .as_ref()
            .is_some_and(|known| known.lineage != record.lineage);
        if record.version() <= self.version() || namesake {
            return false;
        }
        self.highest = self.highest.max(record.term);
        if record.term > self.version().term {
            self.stumble = None;
            self.run_at = self.now;
            self.waiting_said = false;
            // What a log was to be deleted for may be gone before that is done.
            if self.renewal == Some(Rest::Delete) && self.log.appended.index > LogIndex::START {
                self.renewal = Some(Rest::Aside);
            }
        }
        self.journal(Event::RecordCommitted {
            version: record.version(),
            primary: record.primary.clone(),
            members: record.members.clone(),
        });
        self.durable.seen = Some(committed.clone());
        self.record = Some(committed.record);
        self.proof = committed.proof;
        self.agree_on_acks();
        self.persist();
        self.check_holding();
        true
    }

    /// The keeper says that this is the record. Whether it can be: a keeper that has less than this
    /// host has seen was set back, or emptied, and nothing that it says counts.
    pub(super) fn keeper_says(&mut self, theirs: Option<&Committed>) -> bool {
        let ours = self.seen();
        let theirs = theirs.map(Committed::seen);
        let back = ours.is_some_and(|ours| {
            theirs.is_none_or(|theirs| {
                theirs.lineage != ours.lineage || theirs.version < ours.version
            })
        });
        if !back || self.mutated(Mutation::KeeperTrusted) {
            self.keeper_heard = Some(self.now);
            self.keeper_silence = None;
            self.keeper_set_back = None;
            return true;
        }
        let kept = theirs.map(|theirs| theirs.version);
        let set_back = kept.map_or(SetBack::Emptied, SetBack::To);
        if self.keeper_set_back.replace(set_back) != Some(set_back) {
            self.journal(Event::KeeperSetBack {
                kept,
                seen: ours.map(|ours| ours.version).unwrap_or_default(),
            });
        }
        false
    }

    /// Whether the keeper has answered since this time.
    pub(super) fn keeper_heard_since(&self, since: Time) -> bool {
        self.keeper_heard.is_some_and(|at| at >= since)
    }

    /// The record names this host as the primary, and it does not reign (it has restarted, or its store
    /// failed): nobody need wait for its silence to say so.
    pub(super) fn disclaim(&mut self, host: &HostName) {
        let named = self
            .record
            .as_ref()
            .is_some_and(|r| r.primary.host == self.config.host);
        if named && self.concerns(host) {
            let version = self.version();
            self.send(
                host,
                Message::Abdicated {
                    version,
                    failed: self.stumble.clone(),
                },
            );
        }
    }

    /// Whether the record that is known concerns this host: it wants a copy there, or has one.
    pub(super) fn concerns(&self, host: &HostName) -> bool {
        self.record.as_ref().is_some_and(|r| r.concerns(host))
    }

    /// The longest round trip to any of these.
    pub(super) fn farthest<'a>(&self, hosts: impl IntoIterator<Item = &'a HostName>) -> Span {
        let peers = hosts.into_iter().filter_map(|host| self.peers.get(host));
        let rtts = peers.filter(|peer| peer.up).map(|peer| peer.rtt);
        rtts.max().unwrap_or_default()
    }

    /// What no keeper can be below that is the one asked before.
    fn seen(&self) -> Option<Seen> {
        self.record.as_ref().map(Record::seen)
    }

    /// The same, for the keeper: it may not know that it has less than it had.
    pub(super) fn seen_to_tell(&self) -> Option<Seen> {
        self.seen().filter(|_| !self.mutated(Mutation::SeenUntold))
    }

    /// The latest record with its keeper's proof.
    pub(super) fn committed_record(&self) -> Option<Committed> {
        let record = self.record.clone()?;
        Some(Committed {
            record,
            proof: self.proof.clone(),
        })
    }

    /// Remembers durably what acknowledging means for this VM: it decides what a restart costs.
    pub(super) fn agree_on_acks(&mut self) {
        let wanted = self.record.as_ref().map(|record| record.policy.acks);
        if let Some(wanted) = wanted.filter(|acks| *acks != self.durable.acks)
            && self.settled()
        {
            self.durable.acks = wanted;
            self.persist();
        }
    }

    /// Whether the record names this very holding as a copy.
    pub(super) fn is_copy(&self) -> bool {
        let record = self.record.as_ref();
        let named = record.and_then(|record| record.copy_on(&self.config.host));
        named.is_some_and(|copy| copy.incarnation == self.durable.incarnation)
    }

    /// Asks the keeper, unless an answer is still due.
    pub(super) fn read_record(&mut self) {
        let patience = self.config.timing.claim_patience;
        if self
            .reading
            .is_none_or(|since| self.now.since(since) > patience)
        {
            self.reading = Some(self.now);
            let seen = self.seen_to_tell();
            self.do_(Action::ReadRecord { seen });
        }
    }

    /// The keeper has answered, or will not.
    pub(super) fn read_ended(&mut self) {
        self.reading = None;
    }

    // --- talking -----------------------------------------------------------------------------

    pub(super) fn hello(&mut self, to: &HostName) {
        if self.settled() {
            let message = Message::Hello {
                protocol: PROTOCOL_VERSION,
                incarnation: self.durable.incarnation,
                tip: self.log.appended,
                known: self.version(),
            };
            self.send(to, message);
        }
    }

    pub(super) fn hello_all(&mut self) {
        for host in self.up_peers() {
            self.hello(&host);
        }
    }

    pub(super) fn send_record(&mut self, to: &HostName) {
        if let Some(record) = self.committed_record() {
            self.send(to, Message::Record(record));
        }
    }

    /// Answers an inquiry.
    pub(super) fn heard(&mut self, from: &HostName, base: Version, alive: bool) {
        let incarnation = self.durable.incarnation;
        self.send(
            from,
            Message::Heard {
                base,
                alive,
                incarnation,
            },
        );
    }

    /// Sends the record to a peer that knows an older one, but not with every message of its.
    pub(super) fn inform(&mut self, host: &HostName, known: Version) {
        let (now, pause) = (self.now, self.config.timing.heartbeat.times(3));
        if known >= self.version() {
            return;
        }
        if let Some(peer) = self.peers.get_mut(host)
            && peer.record_sent_at.is_none_or(|at| now.since(at) >= pause)
        {
            peer.record_sent_at = Some(now);
            self.send_record(host);
        }
    }

    /// Refuses what a peer asks under a term. Repeated refusals are neither sent nor written down
    /// more often than a few times a second.
    pub(super) fn refuse(&mut self, peer: &HostName, term: Term, why: Refusal, asked: Version) {
        let (now, pause) = (self.now, self.config.timing.heartbeat.times(3));
        let entry = self.peers.entry(peer.clone()).or_default();
        if entry.refused_at.is_some_and(|at| now.since(at) < pause) {
            return;
        }
        entry.refused_at = Some(now);
        let newer = self
            .committed_record()
            .filter(|committed| committed.record.version() > asked);
        let message = Message::Refused {
            term,
            why,
            promise: self.durable.promise.clone(),
            record: newer,
        };
        self.send(peer, message);
        let peer = peer.clone();
        self.journal(Event::Refused { peer, term, why });
    }

    /// Refuses every time, without a word in the journal.
    pub(super) fn refuse_at_once(
        &mut self,
        peer: &HostName,
        term: Term,
        why: Refusal,
        record: Option<Committed>,
    ) {
        let message = Message::Refused {
            term,
            why,
            promise: self.durable.promise.clone(),
            record,
        };
        self.send(peer, message);
    }

    /// The keeper could not be asked. That is said once, until it can be asked again.
    pub(super) fn keeper_silent(&mut self, reason: &str) {
        if self.keeper_silence.as_deref() != Some(reason) {
            self.keeper_silence = Some(reason.to_owned());
            let reason = reason.to_owned();
            self.journal(Event::RecordUnreachable { reason });
        }
    }

    // --- the VM ------------------------------------------------------------------------------

    /// Starts a replay of the stored log, unless one is running.
    pub(super) fn ensure_replay(&mut self) {
        if self.vm != Vm::Replaying {
            self.begin_run(Vm::Replaying);
            self.do_(Action::Replay { run: self.run });
        }
    }

    /// Gives the next VMM its number. What an earlier one still reports is ignored.
    pub(super) fn begin_run(&mut self, vm: Vm) {
        self.run = self.run.next();
        self.vm = vm;
        self.executed = LogIndex::START;
        self.position = Position::START;
    }

    /// Ends the VMM, if there is one.
    pub(super) fn stop_vm(&mut self, why: StopReason) {
        if self.vm != Vm::Absent {
            self.do_(Action::StopVm { run: self.run, why });
            self.begin_run(Vm::Absent);
        }
    }

    pub(super) fn executed(&mut self, run: VmRun, through: LogIndex, position: Position) {
        if run == self.run {
            self.executed = self.executed.max(through);
            self.position = self.position.max(position);
        }
    }

    pub(super) fn forget(&mut self, through: FrameNumber) {
        if through > self.forgotten {
            self.forgotten = through;
            self.do_(Action::ForgetOutputs { through });
        }
    }
}
