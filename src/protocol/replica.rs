//! A host that does not reign: it takes the log, promises itself to claimants, watches the primary.
//!
//! ```text
//!                    Stream by one who may            the primary is silent, or abdicated,
//!                 ┌───────────────────────┐           and this is a copy
//!                 ▼                       │      ┌────────────────────────────┐
//!   Start ──► Waiting ──────────────► Following ─┤                            ▼
//!                 ▲  ▲                    │      │     ┌──── vouched for ── Inquiring
//!                 │  └── Seal: promise ───┤      └─────┘  (Heard, or it speaks)  │
//!                 │                       │                                      │ nobody hears it,
//!                 │       Diverged: drop the log,                                │ the keeper says it
//!                 └────── new incarnation ┘                                      ▼ still reigns
//!                                                                            Controller
//! ```

mod promises;
mod suspicion;

use std::collections::{BTreeMap, BTreeSet};

use replay_log::{Batch, LogIndex, LogTip, Term};

use super::api::{Operator, StopReason};
use super::controller::Kind;
use super::core::{Core, Rest, Vm};
use super::detector::Detector;
use super::event::Event;
use super::message::{Authority, Claim, Message, Refusal};
use super::mutation::Mutation;
use super::name::{HostName, Incarnation, VmRun};
use super::node::Turn;
use super::record::{Stumble, Version};
use super::time::{Span, Time};

/// Why a host that the record does not name is not ordered to reign. The command line has the record
/// name it first.
const NOT_NAMED: &str = "the record of this VM does not name this host, as far as is known here: when \
                         none of those that it names can be had, order it from the command line, \
                         which has the record name it first";

/// Whose log is being taken.
#[derive(Clone, Debug)]
struct Source {
    host: HostName,
    authority: Authority,
}

/// "Does anybody hear the primary?"
#[derive(Debug)]
struct Inquiry {
    base: Version,
    since: Time,
    /// The keeper has confirmed that the record is still the one asked about.
    confirmed: bool,
    silent: BTreeSet<HostName>,
    asked: BTreeSet<HostName>,
}

/// The state of a host that does not reign.
#[derive(Debug)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a thing that was seen or said, and they are independent"
)]
pub(super) struct Replica {
    source: Option<Source>,
    detector: Detector,
    /// When the primary of this term was last heard since this host does not reign, in awake time.
    /// (The detector begins as if it had been.)
    heard: Option<Time>,
    suspected: bool,
    abdicated: bool,
    /// Whom the journal says that this host follows.
    followed: Option<(HostName, Term)>,
    /// Since when the log here has ended at this place, and the primary's not.
    behind: Option<(Time, LogIndex)>,
    inquiry: Option<Inquiry>,
    /// No claim before this.
    not_before: Time,
    /// The promise that waits for being durable before it is told.
    sealing: Option<Claim>,
    /// The claim that the primary itself has asked for.
    consented: Option<Claim>,
    /// That nobody claims because of that has been said.
    stopped_said: bool,
    /// Which holdings other hosts have, since they have heard of this state of the record.
    holdings: BTreeMap<HostName, Incarnation>,
    holdings_for: Version,
    /// When they are asked again.
    ask_at: Time,
    /// The run of the VMM that the last acknowledgement was about.
    acked_run: VmRun,
    report_at: Time,
    hello_at: Time,
    read_at: Time,
    replay_at: Option<Time>,
}

impl Replica {
    pub(super) fn new(core: &Core) -> Self {
        // Who has to show first that it can execute its log must be given the chance.
        let unfit = core.executed < core.unfit_before && core.vm == Vm::Absent;
        let retry = core.now.plus(core.config.timing.claim_patience);
        Self {
            source: None,
            detector: Detector::new(core.awake(), &core.config.timing),
            heard: None,
            suspected: false,
            abdicated: false,
            followed: None,
            behind: None,
            inquiry: None,
            not_before: core.now,
            sealing: None,
            consented: None,
            stopped_said: false,
            holdings: BTreeMap::new(),
            holdings_for: Version::default(),
            ask_at: core.now,
            acked_run: core.run,
            report_at: core.now,
            hello_at: core.now,
            read_at: core.now.plus(core.config.timing.retry),
            replay_at: unfit.then_some(retry),
        }
    }

    /// One that should let others go first for so long.
    pub(super) fn patient(core: &Core, span: Span) -> Self {
        Self {
            not_before: core.now.plus(span),
            ..Self::new(core)
        }
    }

    pub(super) fn follows(&self) -> bool {
        self.source.is_some()
    }

    /// Where reign after reign has failed, if that keeps this host from claiming.
    pub(super) fn stopped_at(core: &Core) -> Option<Stumble> {
        let stumble = core.stumble.clone();
        stumble.filter(|stumble| stumble.reigns >= Stumble::LIMIT)
    }

    pub(super) fn silence(&self, core: &Core) -> Span {
        self.detector.silence(core.awake())
    }

    // --- messages ----------------------------------------------------------------------------

    pub(super) fn message(&mut self, core: &mut Core, from: &HostName, message: Message) -> Turn {
        match message {
            Message::Stream { authority, after } => self.stream(core, from, authority, after),
            Message::Log { term, batch } => self.log(core, from, term, batch),
            Message::Heartbeat {
                version,
                tail,
                committed,
                forget,
            } if self.heartbeat(core, from, version) => {
                self.report_soon(core);
                self.compare_tail(core, from, tail);
                core.let_out = core.let_out.max(committed);
                core.committed = core.committed.max(committed.min(core.log.appended.index));
                // What gateways have received is committed, or was let out by earlier reigns, of which
                // this one has gone on with everything. Beyond the log that is held here there may be
                // outputs of a history that this host never gets.
                let begins = core.record.as_ref().map(|record| record.begins);
                let received = committed.max(begins.unwrap_or_default());
                if received <= core.log.appended.index {
                    core.forget(forget);
                }
            }
            Message::Diverged { authority, tip } => self.diverged(core, from, &authority, tip),
            Message::Inquire { base } => self.inquired(core, from, base),
            Message::Heard {
                base,
                alive,
                incarnation,
            } => {
                if base == core.version() {
                    if self.holdings_for != base {
                        self.holdings.clear();
                        self.holdings_for = base;
                    }
                    self.holdings.insert(from.clone(), incarnation);
                }
                return self.heard(core, from, base, alive);
            }
            Message::Seal { claim, consent } => self.seal(core, from, claim, consent),
            Message::Fetch { term, after } => {
                let promised = core.durable.promise.as_ref();
                if promised.is_some_and(|p| p.term == term && p.claimant == *from) {
                    core.feed(from, Authority::Loan(term), after);
                }
            }
            Message::Handover { claim, tip } => return Self::handover(core, from, claim, tip),
            Message::Consent { claim } => {
                let record = core.record.as_ref();
                if record.is_some_and(|r| r.version() == claim.base && r.primary.host == *from) {
                    self.consented = Some(claim);
                }
            }
            // What was asked for before came before, and was given up or never begun.
            Message::TakeBack { claim }
                if claim.claimant == *core.host() && !core.may_have_asked_for(&claim) =>
            {
                core.send(from, Message::Renounced { claim });
            }
            Message::Refused {
                term,
                why: Refusal::Forgotten,
                ..
            } => {
                let record = core.record.as_ref();
                let reigns = record.is_some_and(|r| r.term == term && r.primary.host == *from);
                if reigns && core.settled() {
                    self.source = None;
                    core.forgets("the primary knows that this host has held more log than it has");
                }
            }
            Message::Abdicated { version, failed } => {
                let record = core.record.as_ref();
                if record.is_some_and(|r| r.term == version.term && r.primary.host == *from) {
                    self.abdicated = true;
                    core.stumble = failed.or(core.stumble.take());
                    self.source = None;
                }
            }
            _ => {}
        }
        Turn::Stay
    }

    /// Whether `from` may be heard as the primary of this state of the record. Refuses if not.
    fn may_reign(core: &mut Core, from: &HostName, version: Version) -> bool {
        if core.mutated(Mutation::AcceptLowerTerm) {
            return true;
        }
        if core.sealed_against(version) {
            core.refuse(from, version.term, Refusal::Sealed, version);
            return false;
        }
        let strangers = core.mutated(Mutation::StrangersHeard);
        let Some(reigning) = core.record.as_ref().map(|record| record.term) else {
            core.overlooked = Some(from.clone());
            core.read_record();
            return strangers;
        };
        if version.term > reigning && !strangers {
            // Anybody can say so. The record of that term, with its keeper's proof, is on its way.
            core.overlooked = Some(from.clone());
            core.read_record();
            return false;
        }
        let Some(record) = core.record.as_ref() else {
            return false;
        };
        if version.term < record.term
            || (version.term == record.term && record.primary.host != *from)
        {
            core.refuse(from, version.term, Refusal::RecordMovedOn, version);
            return false;
        }
        true
    }

    /// The primary was heard: no doubt about it any more.
    fn alive(&mut self, core: &mut Core) {
        core.somebody_runs_it();
        self.detector.heard(core.awake());
        self.heard = Some(core.awake());
        self.suspected = false;
        self.inquiry = None;
    }

    fn stream(&mut self, core: &mut Core, from: &HostName, authority: Authority, after: LogTip) {
        if !core.settled() {
            return;
        }
        let allowed = match &authority {
            Authority::Reign(version) => Self::may_reign(core, from, *version),
            Authority::Claim(claim) => {
                claim.claimant == *from && core.durable.promise.as_ref() == Some(claim)
            }
            Authority::Loan(_) => false,
        };
        if !allowed {
            return;
        }
        if after != core.log.appended {
            // It answers a greeting that has been overtaken by what came since, or its log is not
            // ours; it finds out which.
            self.source = None;
            core.hello(from);
            return;
        }
        if let Authority::Reign(version) = &authority {
            self.alive(core);
            self.abdicated = false;
            let following = (from.clone(), version.term);
            if self.followed.as_ref() != Some(&following) {
                self.followed = Some(following);
                let event = Event::Following {
                    primary: from.clone(),
                    term: version.term,
                    index: after.index,
                };
                core.journal(event);
            }
        }
        core.ensure_replay();
        self.source = Some(Source {
            host: from.clone(),
            authority,
        });
        self.acknowledge(core);
    }

    fn log(&mut self, core: &mut Core, from: &HostName, term: Term, batch: Batch) {
        let Some(source) = &self.source else { return };
        if source.host != *from || source.authority.term() != term || !core.settled() {
            return;
        }
        if core.full.is_some() && !core.mutated(Mutation::FullTakesMore) {
            // Nothing more is taken until there is room: then it is asked for from here on.
            self.source = None;
            return;
        }
        let tip = core.log.appended;
        if batch.first() != tip.index || batch.term() < tip.term || batch.term() > term {
            self.source = None;
            core.hello(from);
            return;
        }
        if matches!(source.authority, Authority::Reign(_)) {
            self.alive(core);
        }
        core.append(batch);
    }

    /// Says whether it comes from the primary whose log is taken.
    fn heartbeat(&mut self, core: &mut Core, from: &HostName, version: Version) -> bool {
        if !Self::may_reign(core, from, version) {
            return false;
        }
        self.alive(core);
        self.detector.beat(core.awake());
        let ours = self.source.as_ref().is_some_and(|s| s.host == *from);
        if !ours && core.now >= self.hello_at {
            self.hello_at = core.now.plus(core.config.timing.retry);
            core.hello(from);
        }
        ours
    }

    /// A stream that has stopped although there is more log is asked for again.
    fn compare_tail(&mut self, core: &mut Core, from: &HostName, tail: LogIndex) {
        let own = core.log.appended.index;
        if tail <= own || self.behind.is_none_or(|(_, at)| at != own) {
            self.behind = (tail > own).then_some((core.now, own));
        } else if let Some((since, _)) = self.behind
            && core.now.since(since) >= core.config.timing.claim_patience
        {
            self.behind = None;
            self.source = None;
            core.hello(from);
        }
    }

    fn diverged(&mut self, core: &mut Core, from: &HostName, authority: &Authority, tip: LogTip) {
        // A claimant's word is not enough to drop a log: its claim may fail, and the log may be
        // what the next one needs.
        let Authority::Reign(version) = authority else {
            return;
        };
        if core.settled() && Self::may_reign(core, from, *version) && tip == core.log.appended {
            self.source = None;
            // A reign that began with everything that had been let out has whatever counts of this
            // log; of one that did not, or may not have, this may be the only copy. What reigns in
            // between began with, and whether they had lost something, is not known here.
            let own = core.log.appended;
            let kept = core.record.as_ref().is_some_and(|record| {
                !record.loss
                    && record.follows == own.term
                    && record.begins >= core.let_out.min(own.index)
            });
            let rest = if kept || core.mutated(Mutation::Careless) {
                Rest::Delete
            } else {
                Rest::Aside
            };
            core.renew(rest, "the log here is not the beginning of the primary's");
        }
    }

    // --- everything else ---------------------------------------------------------------------

    /// A newer record is known.
    pub(super) fn record_changed(&mut self, core: &mut Core, new_term: bool) {
        self.inquiry = None;
        if new_term {
            self.abdicated = false;
            self.stopped_said = false;
            self.consented = None;
            self.heard = None;
            self.suspected = false;
            self.detector = Detector::new(core.awake(), &core.config.timing);
            if let Some(source) = &self.source
                && source.authority.term() < core.version().term
                && !core.mutated(Mutation::AcceptLowerTerm)
            {
                self.source = None;
            }
        }
        // Its stream is probably under way; if not, its next heartbeats will find none.
        self.hello_at = core.now.plus(core.config.timing.heartbeat);
        if let Some(host) = core.overlooked.take()
            && core.record.as_ref().is_some_and(|r| r.primary.host == host)
        {
            core.hello(&host);
        }
    }

    pub(super) fn record_read(&mut self, core: &mut Core) -> Turn {
        let known = core.version();
        if let Some(inquiry) = &mut self.inquiry
            && inquiry.base == known
        {
            inquiry.confirmed = true;
        }
        self.consider_claim(core)
    }

    pub(super) fn peer_down(&mut self, host: &HostName) {
        if self.source.as_ref().is_some_and(|s| s.host == *host) {
            self.source = None;
        }
        if let Some(inquiry) = &mut self.inquiry {
            inquiry.asked.remove(host);
        }
    }

    /// The log here is another one now.
    pub(super) fn renewed(&mut self, core: &mut Core) {
        self.source = None;
        core.unfit_before = core.unfit_before.min(core.log.appended.index);
        core.hello_all();
    }

    pub(super) fn vm_failed(&mut self, core: &mut Core) {
        core.note_vm_failure();
        core.stop_vm(StopReason::Failed);
        // What fails again and again is not tried once a second for ever.
        let wait = core.config.timing.claim_patience.times(core.backoff());
        self.replay_at = Some(core.now.plus(wait));
    }

    pub(super) fn operator(&mut self, core: &mut Core, wish: Operator) -> Turn {
        let refused = match wish {
            Operator::Create { hosts, policy } => {
                if !core.record_read {
                    "the keeper of records has not answered yet: try again when it can be reached"
                } else if core.record.is_some() {
                    "a VM of this name exists: choose another name"
                } else if core.log.appended.index > LogIndex::START || core.durable.live > Term(0) {
                    "this host holds a log or disks of a VM of this name, and the witness does not \
                     know it: let 'understudy witness recover' give the witness the record back, or \
                     remove the VM here first"
                } else if let Err(why) = policy.fits(&hosts, core.host()) {
                    core.journal(Event::OperatorRefused { why });
                    return Turn::Stay;
                } else {
                    return Turn::Claim {
                        kind: Kind::First { hosts, policy },
                        base: None,
                    };
                }
            }
            Operator::StartOver => match core.record.clone() {
                _ if !core.settled() => "this host is starting: try again",
                _ if self.hears(core) => "the primary is heard: nothing needs to start over",
                None => "this VM is not known here: 'understudy pair' creates it",
                Some(_) if core.keeper_set_back.is_some() => {
                    "the witness was set back: 'understudy witness recover' comes first"
                }
                Some(base) if !base.concerns(core.host()) => NOT_NAMED,
                Some(_) if core.somebody_has_something() => {
                    "a reachable host has a log or disks of this VM: 'understudy switchover --to \
                     HOST --accept-loss' goes on with that"
                }
                Some(base) => {
                    return Turn::Claim {
                        kind: Kind::First {
                            hosts: base.hosts.clone(),
                            policy: base.policy,
                        },
                        base: Some(base),
                    };
                }
            },
            Operator::AcceptLoss => match core.record.clone() {
                _ if !core.settled() => "this host is starting: try again",
                Some(_) if self.hears(core) => {
                    "the primary is heard: use a switchover that loses nothing"
                }
                // Those who have the VM would take it for a stranger, and it would reign beside them.
                Some(base) if !base.concerns(core.host()) => NOT_NAMED,
                Some(base) if core.latest_base() > base.version() => {
                    "another host is about to reign: see whether it does"
                }
                Some(base) if core.log.appended.index > LogIndex::START => {
                    return Turn::Claim {
                        kind: Kind::Forced {
                            silence: self.silence(core),
                        },
                        base: Some(base),
                    };
                }
                Some(base) if core.has_disks_of() > Term(0) => {
                    return Turn::Claim {
                        kind: Kind::Cold,
                        base: Some(base),
                    };
                }
                _ => {
                    "this host has neither log nor disks of the VM: ask a host that does, or where \
                     none does, 'understudy pair --image IMAGE --start-over' boots it anew"
                }
            },
            Operator::Pair { .. } | Operator::Switchover { .. } => {
                "this host is not the primary: ask the one that is"
            }
        };
        core.journal(Event::OperatorRefused {
            why: refused.to_owned(),
        });
        Turn::Stay
    }

    /// Another VMM has begun to execute: that is told where the order is kept, because datagrams about
    /// a run that is not known say nothing.
    pub(super) fn executed(&mut self, core: &mut Core) {
        if self.acked_run != core.run {
            self.acknowledge(core);
        }
    }

    /// What is held has changed: tells whoever sends it.
    pub(super) fn acknowledge(&mut self, core: &mut Core) {
        if let Some(source) = &self.source {
            let ack = core.ack(source.authority.term());
            self.acked_run = ack.run;
            self.report_at = core.now.plus(core.config.timing.doze());
            core.send(&source.host, Message::Ack(ack));
        }
    }

    /// A heartbeat came: answers it, unless something was told just now. So a host that hears its
    /// primary is woken once for both, and packets carry the acknowledgement of each other.
    fn report_soon(&mut self, core: &Core) {
        let due = core.now.plus(core.config.timing.heartbeat);
        if self.report_at <= due {
            self.report_at = core.now;
        }
    }

    pub(super) fn tick(&mut self, core: &mut Core) -> Turn {
        if core.now >= self.report_at
            && let Some(source) = &self.source
        {
            let ack = core.ack(source.authority.term());
            self.report_at = core.now.plus(core.config.timing.doze());
            core.send(&source.host, Message::Report(ack));
        }
        if self.replay_at.is_some_and(|at| core.now >= at) && core.settled() {
            self.replay_at = None;
            core.ensure_replay();
        }
        let lost = self.source.is_none() || self.suspected;
        if lost && core.now >= self.read_at {
            // A host that the VM does not concern need not know at once when that changes.
            let concerned = core
                .record
                .as_ref()
                .is_some_and(|r| r.concerns(core.host()));
            let pause = core
                .config
                .timing
                .retry
                .times(if concerned { 1 } else { 5 });
            self.read_at = core.now.plus(pause);
            core.read_record();
        }
        self.watch(core)
    }

    /// When to be called at the latest.
    pub(super) fn timeout(&self, core: &Core) -> Time {
        let timing = &core.config.timing;
        let silence = self.silence(core);
        let mut at = core.now.plus(timing.doze());
        if self.source.is_some() {
            at = at.min(self.report_at);
        }
        if let Some(record) = core.record.as_ref().filter(|_| core.is_copy()) {
            let patience = self.patience(core, record);
            if patience > silence {
                at = at.min(core.now.plus(patience.minus(silence)));
            }
        }
        if let Some(inquiry) = &self.inquiry {
            let due = inquiry.since.plus(timing.inquiry);
            if due > core.now {
                at = at.min(due);
            }
        }
        at
    }
}
