//! The host that reigns: it ships the log, counts who holds it, lets output out, and keeps the
//! record true.
//!
//! ```text
//!   won ──► GoingLive ── WentLive ──► Live ◄──────────────────────────────┐
//!                                      │ ▲                                │ given up
//!                    Switchover        │ └─── the record is confirmed ──┐ │
//!                                      ▼                                │ │
//!                                   Pausing ── Paused ──► Draining ─────┼─┘
//!                                                            │          │
//!                             the target holds and has done   ▼          │ out of time
//!                             everything; promise to it    Handing ─────┘
//!                                                            │
//!   any of these ── a higher term reigns ──► deposed, or handed over (Replica)
//!                ── VMM or store failed ───► abdicated (Replica)
//! ```
//!
//! [`change`] proposes new records, [`switchover`] hands over, [`followers`] counts,
//! [`flow`] slows down.

mod challenge;
mod change;
mod disks;
mod flow;
mod followers;
mod switchover;

use std::collections::{BTreeMap, BTreeSet};

use replay_log::{Batch, FrameNumber, LogIndex, LogTip, Term};

use self::change::Change;
use self::followers::{Follower, Pace};
use self::switchover::Phase;
use super::api::{Action, Operator};
use super::controller::Kind;
use super::core::{Core, Vm};
use super::event::Event;
use super::message::{Ack, Authority, Claim, Message, Refusal};
use super::mutation::Mutation;
use super::name::{HostName, VmRun};
use super::node::Turn;
use super::record::{Member, OnLoss, Record, Version};
use super::status::{FollowerStatus, RoleName};
use super::time::Time;

/// The state of a host that reigns.
#[derive(Debug)]
pub(super) struct Primary {
    term: Term,
    phase: Phase,
    /// The log this reign began with; all members of its first record held it.
    base: LogTip,
    followers: BTreeMap<HostName, Follower>,
    /// Through where output has been let out.
    committed: LogIndex,
    change: Option<Change>,
    /// Output waits for these, so that they can be members.
    awaited: Vec<Member>,
    /// A claim that interrupts this reign; the keeper is to decide.
    challenge: Option<Claim>,
    pace: Pace,
    throttled: bool,
    throttled_at: Time,
    output_waits: u64,
    waiting_since: Option<Time>,
    stalled: bool,
    unprotected_since: Option<Time>,
    /// The guest is paused because no disk takes its log.
    parked: bool,
    wanted: Option<Operator>,
    held_back: Vec<Batch>,
    beat_at: Time,
    read_at: Time,
    check_at: Time,
}

impl Primary {
    /// The record names this host; the reign begins at `base`.
    pub(super) fn new(core: &mut Core, kind: &Kind, base: LogTip) -> Self {
        let term = core.version().term;
        core.journal(Event::Promoted {
            term,
            index: base.index,
        });
        core.feeds.stop_all(&mut core.actions);
        // What enough copies hold at the outset may leave at once; with fewer it waits for more.
        let enough = core.record.as_ref().is_some_and(Record::enough_copies);
        let committed = if enough { base.index } else { LogIndex::START };
        core.committed = committed;
        core.let_out = base.index;
        let mut primary = Self {
            term,
            phase: Phase::GoingLive,
            base,
            followers: BTreeMap::new(),
            committed,
            change: None,
            awaited: Vec::new(),
            challenge: None,
            pace: Pace::default(),
            throttled: false,
            throttled_at: core.now,
            output_waits: 0,
            waiting_since: None,
            stalled: false,
            unprotected_since: None,
            parked: false,
            wanted: None,
            held_back: Vec::new(),
            beat_at: core.now,
            read_at: core.now,
            check_at: core.now.plus(core.config.timing.keeper_check),
        };
        primary.start_vm(core, kind, base);
        primary.meet_members(core);
        primary.announce(core);
        primary
    }

    fn start_vm(&mut self, core: &mut Core, kind: &Kind, base: LogTip) {
        let term = self.term;
        if kind.boots() || base.index == LogIndex::START {
            // An empty log in a record that is not the first was lost with everybody's memory.
            let cold = !matches!(kind, Kind::First { .. });
            core.begin_run(Vm::Recording);
            core.forgotten = FrameNumber(0);
            let run = core.run;
            core.do_(Action::Boot { run, term, cold });
            core.journal(Event::Booted { term, cold });
        } else {
            core.ensure_replay();
            core.vm = Vm::Recording;
            let run = core.run;
            core.do_(Action::GoLive {
                run,
                term,
                at: base,
            });
        }
        if self.committed > LogIndex::START {
            core.do_(Action::Release {
                term,
                through: self.committed,
            });
        }
    }

    /// The members of the new record hold the log through its beginning.
    fn meet_members(&mut self, core: &mut Core) {
        let Some(record) = core.record.clone() else {
            return;
        };
        for member in &record.members {
            let mut follower = Follower::new(member.incarnation, core.awake());
            follower.begins_at(self.base.index);
            self.followers.insert(member.host.clone(), follower);
        }
        self.note_protection(core);
        for host in core.up_peers() {
            core.send_record(&host);
            let Some(member) = record.member_on(&host) else {
                continue;
            };
            let greeting = core.peers.get(&host).and_then(|peer| peer.greeting);
            if greeting.is_some_and(|greeting| greeting.incarnation != member.incarnation) {
                // It has begun anew since it was sealed, and has said so once: to the claimant.
                self.greeted(core, &host);
            } else {
                core.feed(&host, Authority::Reign(record.version()), self.base);
            }
        }
    }

    fn version(core: &Core) -> Version {
        core.version()
    }

    // --- inputs ------------------------------------------------------------------------------

    pub(super) fn message(&mut self, core: &mut Core, from: &HostName, message: Message) -> Turn {
        match message {
            Message::Ack(ack) => self.acked(core, from, ack, true),
            Message::Report(ack) => self.acked(core, from, ack, false),
            Message::Inquire { base } => {
                let alive = core.version() > base || !self.phase.is_handing();
                core.heard(from, base, alive);
                core.inform(from, base);
            }
            Message::Seal { claim, .. } => self.seal(core, from, &claim),
            Message::Refused {
                term,
                why: Refusal::Sealed,
                promise: Some(promise),
                ..
            } if term == self.term => self.challenged(core, from, promise),
            Message::Refused { term, .. } => self.switchover_refused(core, from, term),
            Message::Fetch { term, after } => {
                let promised = core.durable.promise.as_ref();
                if promised.is_some_and(|p| p.term == term && p.claimant == *from) {
                    core.feed(from, Authority::Loan(term), after);
                }
            }
            Message::Heartbeat { version, .. } if version < core.version() => {
                core.refuse(from, version.term, Refusal::RecordMovedOn, version);
            }
            Message::Stream { authority, .. } => {
                let version = Version {
                    term: authority.term(),
                    ..Version::default()
                };
                if authority.term() < self.term {
                    core.refuse(from, authority.term(), Refusal::RecordMovedOn, version);
                }
            }
            _ => {}
        }
        self.advance(core)
    }

    /// A host says what it holds: it is to have what it lacks.
    pub(super) fn greeted(&mut self, core: &mut Core, from: &HostName) {
        self.ask_to_renounce(core, from);
        let Some(greeting) = core.peers.get(from).and_then(|peer| peer.greeting) else {
            return;
        };
        let wanted = core
            .record
            .as_ref()
            .is_some_and(|record| record.concerns(from));
        if !wanted {
            return;
        }
        let follower = self
            .followers
            .entry(from.clone())
            .and_modify(|follower| {
                if follower.incarnation != greeting.incarnation {
                    *follower = Follower::new(greeting.incarnation, core.attention.awake());
                }
            })
            .or_insert_with(|| Follower::new(greeting.incarnation, core.attention.awake()));
        follower.refuses = false;
        let authority = Authority::Reign(Self::version(core));
        core.feed(from, authority, greeting.tip);
    }

    /// A greeting has just come. (One that is remembered may be from before what was acknowledged.)
    pub(super) fn greets(&mut self, core: &mut Core, from: &HostName) {
        let greeting = core.peers.get(from).and_then(|peer| peer.greeting);
        if let Some(greeting) = greeting
            && let Some(follower) = self.followers.get_mut(from)
        {
            let (incarnation, tip) = (greeting.incarnation, greeting.tip.index);
            if follower.has_forgotten(incarnation, tip) && !core.mutated(Mutation::Amnesia) {
                self.forgotten(core, from);
                return;
            }
            follower.forgetful = false;
        }
        self.greeted(core, from);
    }

    /// A copy has less than it had acknowledged in this very incarnation: its disk lied, or was set
    /// back. Nothing that it held counts any more.
    fn forgotten(&mut self, core: &mut Core, from: &HostName) {
        if let Some(follower) = self.followers.get_mut(from)
            && !std::mem::replace(&mut follower.forgetful, true)
        {
            follower.held = LogIndex::START;
            core.journal(Event::PeerMisbehaved {
                peer: from.clone(),
                what:
                    "has less log than it had acknowledged: its disk has lost what it had synced, \
                       or was set back"
                        .to_owned(),
            });
        }
        core.feeds.stop(from, &mut core.actions);
        // With every greeting: until it knows, it can be no copy.
        core.refuse_at_once(from, self.term, Refusal::Forgotten, None);
    }

    fn acked(&mut self, core: &mut Core, from: &HostName, ack: Ack, ordered: bool) {
        core.inform(from, ack.known);
        if ack.term != self.term {
            return;
        }
        let own = core.log.appended.index;
        let Some(follower) = self.followers.get_mut(from) else {
            return;
        };
        let another = follower.incarnation != ack.incarnation || follower.forgetful;
        if another || ack.held > own {
            return;
        }
        follower.acked(&ack, ordered, core.attention.awake());
    }

    pub(super) fn recorded(&mut self, core: &mut Core, run: VmRun, batch: &Batch) -> Turn {
        if run != core.run {
            return Turn::Stay;
        }
        if self.phase.is_handing() {
            // The end of the log has been promised to the target. A paused recorder may still
            // write a mark; it counts only if this reign goes on.
            self.held_back.push(batch.clone());
            return Turn::Stay;
        }
        self.record(core, batch);
        self.advance(core)
    }

    fn record(&mut self, core: &mut Core, batch: &Batch) {
        if batch.first() != core.log.appended.index || batch.term() != self.term {
            return;
        }
        let bytes = batch.payload().len() as u64;
        core.append(batch.clone());
        let ours = core.log.appended;
        core.feeds.grown(ours, &mut core.actions);
        core.executed = ours.index;
        self.pace.recorded(core.now, ours.index, bytes);
    }

    pub(super) fn record_held_back(&mut self, core: &mut Core) {
        for batch in std::mem::take(&mut self.held_back) {
            self.record(core, &batch);
        }
    }

    pub(super) fn went_live(&mut self, core: &mut Core, run: VmRun) -> Turn {
        if run == core.run && matches!(self.phase, Phase::GoingLive) {
            self.phase = Phase::Live;
            core.journal(Event::WentLive { term: self.term });
            core.durable.live = self.term;
            core.persist();
            self.park_if_full(core);
        }
        self.advance(core)
    }

    pub(super) fn output_waits(&mut self, core: &mut Core, bytes: u64) {
        self.output_waits = bytes;
        self.watch_pace(core);
    }

    pub(super) fn operator(&mut self, core: &mut Core, wish: Operator) -> Turn {
        let refused = match wish {
            Operator::Pair { ref hosts, policy } => {
                if let Err(why) = policy.fits(hosts, core.host()) {
                    core.journal(Event::OperatorRefused { why });
                    return Turn::Stay;
                }
                let acks = core.record.as_ref().map(|record| record.policy.acks);
                if acks == Some(policy.acks) {
                    self.wanted = Some(wish);
                    return self.advance(core);
                }
                "what acknowledging means is fixed for the life of a VM: pair with the same acks"
            }
            Operator::Switchover { to } => match self.begin_switchover(core, to.as_ref()) {
                Ok(()) => return self.advance(core),
                Err(why) => why,
            },
            Operator::Create { .. } => "the VM exists: use pair to change its copies",
            Operator::StartOver => "this host runs the VM: nothing needs to start over",
            Operator::AcceptLoss => "this host is the primary: nothing is lost",
        };
        core.journal(Event::OperatorRefused {
            why: refused.to_owned(),
        });
        Turn::Stay
    }

    // --- commit ------------------------------------------------------------------------------

    /// Through where this record's rule is satisfied.
    fn committed_by(&self, core: &Core, record: &Record) -> LogIndex {
        if !record.enough_copies() {
            return LogIndex::START;
        }
        let evicted = |member: &&Member| {
            let follower = self.followers.get(&member.host);
            core.mutated(Mutation::LocalEviction)
                && follower
                    .is_some_and(|f| f.silence(core.awake()) > core.config.timing.suspicion_floor)
        };
        let members = record.members.iter().filter(|member| !evicted(member));
        let replicas = members.map(|member| self.held_by(member));
        let mut held: Vec<_> = replicas.chain([core.held()]).collect();
        held.sort_unstable_by(|a, b| b.cmp(a));
        let needed = record.policy.rule.needed(held.len());
        held.get(needed - 1).copied().unwrap_or(LogIndex::START)
    }

    /// Lets out what enough copies hold, by the record and by the one that may replace it, and what
    /// those hold that are to be copies soon.
    fn commit(&mut self, core: &mut Core) {
        let Some(record) = core.record.as_ref() else {
            return;
        };
        if core.sealed_against(record.version()) {
            return;
        }
        let mut through = self.committed_by(core, record);
        if let Some(change) = &self.change
            && !(core.mutated(Mutation::ShrinkEarly) && change.new.copies() < record.copies())
        {
            through = through.min(self.committed_by(core, &change.new));
        }
        if let Some(awaited) = self.awaited_through() {
            through = through.min(awaited);
        }
        if core.mutated(Mutation::ReleaseBeforeCommit) {
            through = core.log.appended.index;
        }
        if through > self.committed {
            self.committed = through;
            core.committed = through;
            core.let_out = core.let_out.max(through);
            self.pace.committed(through);
            core.do_(Action::Release {
                term: self.term,
                through,
            });
        }
    }

    // --- time --------------------------------------------------------------------------------

    /// Whatever may have become possible.
    pub(super) fn advance(&mut self, core: &mut Core) -> Turn {
        self.commit(core);
        self.watch_stall(core);
        self.watch_pace(core);
        self.consider_change(core);
        self.advance_switchover(core)
    }

    pub(super) fn tick(&mut self, core: &mut Core) -> Turn {
        core.somebody_runs_it();
        // A copy has come since that could go on.
        if self.parked
            && let Some(reason) = core.full.clone().filter(|_| self.another_has_room(core))
        {
            return self.abdicate(core, reason, None);
        }
        if core.now >= self.beat_at {
            self.announce(core);
        }
        if core.now >= self.check_at {
            // A quiet reign needs no keeper, and would learn only with the next failure that it was
            // set back.
            self.check_at = core.now.plus(core.config.timing.keeper_check);
            core.read_record();
        }
        self.retry_change(core);
        self.advance(core)
    }

    fn announce(&mut self, core: &mut Core) {
        self.beat_at = core.now.plus(core.config.timing.heartbeat);
        let Some(record) = &core.record else { return };
        let message = Message::Heartbeat {
            version: record.version(),
            tail: core.log.appended.index,
            committed: self.committed,
            forget: core.forgotten,
        };
        let hosts: BTreeSet<_> = record
            .all_copies()
            .map(|copy| &copy.host)
            .chain(&record.hosts)
            .filter(|host| *host != core.host())
            .cloned()
            .collect();
        for host in hosts {
            core.send(&host, message.clone());
        }
    }

    pub(super) fn timeout(&self) -> Time {
        self.beat_at
    }

    /// The record has changed. By this host, or over its head.
    pub(super) fn record_changed(&mut self, core: &mut Core) -> Turn {
        let Some(record) = core.record.clone() else {
            return Turn::Stay;
        };
        if record.term > self.term {
            return Turn::Deposed {
                term: self.term,
                handed_over: self.phase.is_handing()
                    && record.member_on(core.host()) == Some(&core.me()),
            };
        }
        self.change_committed(core, &record);
        self.advance(core)
    }

    // --- looking -----------------------------------------------------------------------------

    pub(super) fn role(&self) -> RoleName {
        match self.phase {
            Phase::GoingLive => RoleName::GoingLive,
            Phase::Live | Phase::Asking { .. } => RoleName::Primary,
            _ => RoleName::HandingOver,
        }
    }

    pub(super) fn unprotected_since(&self) -> Option<Time> {
        self.unprotected_since
    }

    pub(super) fn stalled_since(&self) -> Option<Time> {
        self.waiting_since.filter(|_| self.stalled)
    }

    pub(super) fn throttled(&self) -> bool {
        self.throttled
    }

    pub(super) fn follower_status(&self, core: &Core) -> Vec<FollowerStatus> {
        let followers = self.followers.iter();
        followers
            .map(|(host, follower)| FollowerStatus {
                host: host.clone(),
                incarnation: follower.incarnation,
                member: core.record.as_ref().is_some_and(|record| {
                    let member = record.member_on(host);
                    member.is_some_and(|m| m.incarnation == follower.incarnation)
                }),
                connected: core.is_up(host),
                held: follower.held,
                executed: follower.executed,
                lag: self.pace.lag(core.now, follower.executed),
                health: follower.health(),
                silence: follower.silence(core.awake()),
            })
            .collect()
    }

    fn note_protection(&mut self, core: &mut Core) {
        let alone = core.record.as_ref().is_some_and(|r| r.members.is_empty());
        match (alone, self.unprotected_since) {
            (true, None) => {
                self.unprotected_since = Some(core.now);
                core.journal(Event::Unprotected { term: self.term });
            }
            (false, Some(_)) => self.unprotected_since = None,
            _ => {}
        }
    }

    fn on_loss(core: &Core) -> OnLoss {
        let record = core.record.as_ref();
        record.map_or(OnLoss::Stall, |record| record.policy.on_loss)
    }
}
