//! The switchover controller: a copy that claims a term (DESIGN.md section 4, "Promotion").
//!
//! ```text
//!   claim ──► Sealing ──────────► Fetching ─────► Bringing ─────────► Committing ──► Won
//!               │  enough seals,     │  own log     │  the sealed        │  compare-   (Primary)
//!               │  and the others    │  is the      │  copies hold it,   │  and-set on
//!               │  had their chance  │  longest     │  or are left out   │  the base
//!               │                    │              │                    │
//!               └────────────────────┴──────────────┴────────────────────┴──► given up (Replica)
//!                  record moved on, a higher claim, out of time
//!
//!   first boot, cold boot:  (drop the old log) ──► Committing ──► Won
//! ```

mod progress;

use std::collections::{BTreeMap, BTreeSet};

use replay_log::{Batch, LogIndex, LogTip};

use super::api::Swapped;
use super::core::{Core, Rest};
use super::event::Event;
use super::message::{Authority, Claim, Message, Refusal};
use super::mutation::Mutation;
use super::name::{HostName, Incarnation};
use super::node::Turn;
use super::record::{Policy, Record, Stumble, Version};
use super::time::{Span, Time};

/// Why a host claims.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// The VM is new.
    First {
        /// Where copies are wanted.
        hosts: Vec<HostName>,
        /// The owner's choice.
        policy: Policy,
    },
    /// The primary is silent.
    Succession {
        /// The copies that said so.
        awake: BTreeSet<HostName>,
        /// Why it has abdicated, if its VMM failed.
        stumble: Option<Stumble>,
    },
    /// The primary asked for this claim.
    Handover(Claim),
    /// Nobody has the log any more; the disks are here.
    Cold,
    /// An operator accepts loss.
    Forced {
        /// For how long the last primary had been silent.
        silence: Span,
    },
}

impl Kind {
    /// Whether the guest starts from power-on, with an empty log.
    pub(super) fn boots(&self) -> bool {
        matches!(self, Self::First { .. } | Self::Cold)
    }
}

/// A copy that has promised itself to this claim.
#[derive(Clone, Copy, Debug)]
struct Sealed {
    incarnation: Incarnation,
    tip: LogTip,
    /// It holds the chosen log through here.
    held: LogIndex,
    left_out: bool,
}

#[derive(Debug)]
enum Phase {
    /// The old log is being dropped, before a boot.
    Preparing,
    Sealing,
    Fetching {
        from: HostName,
        accepted: bool,
    },
    Bringing {
        since: Time,
    },
    Committing {
        new: Box<Record>,
        asking: bool,
        again_at: Time,
    },
}

/// A claim in progress.
#[derive(Debug)]
pub(super) struct Controller {
    kind: Kind,
    claim: Claim,
    base: Option<Record>,
    phase: Phase,
    began: Time,
    sealed: BTreeMap<HostName, Sealed>,
    refused: BTreeSet<HostName>,
    /// The log the new reign begins with: the longest sealed one.
    chosen: LogTip,
    ask_at: Time,
}

impl Controller {
    pub(super) fn new(core: &mut Core, kind: Kind, base: Option<Record>) -> Self {
        let version = base.as_ref().map(Record::version).unwrap_or_default();
        let claim = match &kind {
            Kind::Handover(claim) => claim.clone(),
            _ => Claim {
                term: core.highest.max(version.term).next(),
                claimant: core.host().clone(),
                base: version,
            },
        };
        core.highest = core.highest.max(claim.term);
        core.feeds.stop_all(&mut core.actions);
        let seals = match (&base, &kind) {
            (Some(base), Kind::Succession { .. } | Kind::Handover(_)) => base.seals(),
            _ => 0,
        };
        core.journal(Event::Claimed {
            term: claim.term,
            base: version,
            seals,
        });
        Self {
            kind,
            claim,
            base,
            phase: Phase::Sealing,
            began: core.now,
            sealed: BTreeMap::new(),
            refused: BTreeSet::new(),
            chosen: core.log.appended,
            ask_at: core.now,
        }
    }

    /// Begins, and goes as far as it can at once.
    pub(super) fn begin(&mut self, core: &mut Core) -> Turn {
        if self.kind.boots() {
            // If this claim wins and the host dies before the guest runs, the disks still count.
            core.durable.booting = self.claim.term;
            if core.log.appended.index > LogIndex::START {
                core.renew(Rest::Aside, "the machine is to be booted");
            } else {
                core.persist();
            }
            self.phase = Phase::Preparing;
        } else {
            core.promise(self.claim.clone());
            self.ask(core);
        }
        self.advance(core)
    }

    fn ask(&mut self, core: &mut Core) {
        self.ask_at = core.now.plus(core.config.timing.retry);
        let consent = matches!(self.kind, Kind::Handover(_));
        for host in self.others(core) {
            if !self.sealed.contains_key(&host) {
                let claim = self.claim.clone();
                // Who does not know the record that is claimed on cannot judge the claim.
                core.inform(&host, Version::default());
                core.send(&host, Message::Seal { claim, consent });
            }
        }
    }

    /// The connected copies of the record, without this host.
    fn others(&self, core: &Core) -> Vec<HostName> {
        let copies = self.base.iter().flat_map(Record::all_copies);
        copies
            .map(|copy| copy.host.clone())
            .filter(|host| host != core.host() && core.is_up(host))
            .collect()
    }

    // --- messages ----------------------------------------------------------------------------

    pub(super) fn message(&mut self, core: &mut Core, from: &HostName, message: Message) -> Turn {
        match message {
            Message::Sealed {
                term,
                incarnation,
                tip,
                held,
            } if term == self.claim.term => self.sealed(core, from, incarnation, tip, held),
            Message::Refused {
                term, why, promise, ..
            } if term == self.claim.term => {
                if let Some(promise) = promise {
                    core.hear_of(promise.term);
                }
                if why == Refusal::PrimaryAlive && matches!(self.kind, Kind::Forced { .. }) {
                    return self.give_up(core, why.as_words());
                }
                // One that is starting will promise in a moment, and one that claims itself, or has
                // promised to another claimant, when that claim is given up.
                if !matches!(why, Refusal::Starting | Refusal::Promised) {
                    self.refused.insert(from.clone());
                }
                // Those who are no copies any more say so at every attempt: no need to hurry to it.
                let soon = why != Refusal::NotACopy && matches!(self.phase, Phase::Sealing);
                if soon && self.hopeless(core) {
                    return self.give_up(core, why.as_words());
                }
            }
            Message::Stream {
                authority: Authority::Loan(term),
                after,
            } if term == self.claim.term => self.loan(core, from, after),
            Message::Log { term, batch } if term == self.claim.term => {
                self.loaned(core, from, &batch);
            }
            Message::Diverged {
                authority: Authority::Loan(term),
                ..
            } if term == self.claim.term => {
                return self.give_up(core, "the log here is not the beginning of the longest");
            }
            Message::Ack(ack) | Message::Report(ack) if ack.term == self.claim.term => {
                if let Some(sealed) = self.sealed.get_mut(from)
                    && sealed.incarnation == ack.incarnation
                {
                    sealed.held = sealed.held.max(ack.held);
                }
            }
            Message::TakeBack { claim } if claim == self.claim && !self.may_have_won() => {
                return self.give_up(core, "the primary goes on itself");
            }
            Message::Inquire { base } => {
                let alive = core.version() > base;
                core.heard(from, base, alive);
            }
            Message::Seal { claim, consent } => return self.rival(core, from, claim, consent),
            // The primary lives after all. The promise stands: it has to be confirmed by the
            // keeper, or this claim comes through.
            Message::Heartbeat { version, .. } if core.sealed_against(version) => {
                core.refuse(from, version.term, Refusal::Sealed, version);
            }
            _ => {}
        }
        self.advance(core)
    }

    fn sealed(
        &mut self,
        core: &Core,
        from: &HostName,
        incarnation: Incarnation,
        tip: LogTip,
        held: LogIndex,
    ) {
        let named = self.base.as_ref().and_then(|base| base.copy_on(from));
        if named.is_none_or(|copy| copy.incarnation != incarnation) || from == core.host() {
            return;
        }
        let too_late = match &self.phase {
            Phase::Sealing => false,
            // It can be brought along like those that sealed in time, unless it has more.
            Phase::Fetching { .. } => (tip.term, tip.index) > (self.chosen.term, self.chosen.index),
            _ => true,
        };
        let same = tip == self.chosen;
        self.sealed.entry(from.clone()).or_insert(Sealed {
            incarnation,
            tip,
            held,
            left_out: too_late && !same,
        });
    }

    /// Whether too few copies are left that could be sealed.
    fn hopeless(&self, core: &Core) -> bool {
        let Some(base) = &self.base else { return false };
        let possible = self
            .others(core)
            .iter()
            .filter(|h| !self.refused.contains(*h))
            .count();
        possible + 1 < base.seals()
    }

    fn rival(&mut self, core: &mut Core, from: &HostName, claim: Claim, consent: bool) -> Turn {
        if !core.hear_of(claim.term) {
            return Turn::Stay;
        }
        // Of two claimants of one term the one goes on that is first in the order of claiming: else
        // both would stand alone.
        let rank = |host: &HostName| self.base.as_ref().and_then(|base| base.rank(host));
        let goes_first = claim.term == self.claim.term
            && claim.base == self.claim.base
            && rank(from) < rank(core.host());
        if claim.base < core.latest_base() {
            core.refuse(from, claim.term, Refusal::RecordMovedOn, claim.base);
        } else if self.may_have_won() || (core.promised_otherwise(&claim) && !goes_first) {
            core.refuse(from, claim.term, Refusal::Promised, claim.base);
        } else {
            self.give_up(core, "another host claims it, too, and goes first");
            return Turn::Yield {
                to: from.clone(),
                message: Message::Seal { claim, consent },
            };
        }
        Turn::Stay
    }

    /// Whether the record may name this host already.
    fn may_have_won(&self) -> bool {
        matches!(self.phase, Phase::Committing { .. })
    }

    fn loan(&mut self, core: &mut Core, from: &HostName, after: LogTip) {
        if let Phase::Fetching {
            from: holder,
            accepted,
        } = &mut self.phase
            && holder == from
        {
            *accepted = after == core.log.appended;
        }
    }

    fn loaned(&mut self, core: &mut Core, from: &HostName, batch: &Batch) {
        let Phase::Fetching {
            from: holder,
            accepted: true,
        } = &self.phase
        else {
            return;
        };
        let tip = core.log.appended;
        let fits = batch.first() == tip.index
            && batch.end() <= self.chosen.index
            && batch.term() >= tip.term
            && batch.term() <= self.chosen.term;
        if holder == from && fits {
            core.append(batch.clone());
        }
    }

    // --- progress ----------------------------------------------------------------------------

    /// Goes as far as it can.
    pub(super) fn advance(&mut self, core: &mut Core) -> Turn {
        loop {
            let turn = match &self.phase {
                Phase::Preparing => self.prepare(core),
                Phase::Sealing => self.choose(core),
                Phase::Fetching { .. } => self.fetch(core),
                Phase::Bringing { since } => self.bring(core, *since),
                Phase::Committing { .. } => None,
            };
            match turn {
                None => return Turn::Stay,
                Some(Turn::Stay) => {}
                Some(turn) => return turn,
            }
        }
    }

    pub(super) fn swapped(&mut self, core: &mut Core, swapped: Swapped) -> Turn {
        let Phase::Committing {
            new,
            asking,
            again_at,
        } = &mut self.phase
        else {
            return Turn::Stay;
        };
        *asking = false;
        match swapped {
            Swapped::Done(committed) | Swapped::Conflict(Some(committed)) => {
                let ours = committed.record == **new;
                let moved_on = committed.record.version() > self.claim.base;
                if !ours && !moved_on {
                    // The answer to an earlier claim, from a slow keeper: what it tells is what this
                    // claim rests on. To ask for this one twice does no harm.
                    *again_at = core.now.plus(core.config.timing.retry);
                }
                core.learn(committed);
                if ours {
                    self.won(core)
                } else if moved_on {
                    self.give_up(core, "the record has moved on")
                } else {
                    Turn::Stay
                }
            }
            Swapped::Conflict(None) => self.give_up(core, "the keeper does not know the VM"),
            Swapped::Unknown { reason } => {
                *again_at = core.now.plus(core.config.timing.retry);
                core.journal(Event::RecordUnreachable { reason });
                Turn::Stay
            }
        }
    }

    fn won(&mut self, core: &mut Core) -> Turn {
        let named = core.record.as_ref().map(|record| &record.primary);
        if named != Some(&core.me()) || !core.settled() {
            // What it would begin with is gone: nobody need wait for its silence to say so.
            for host in core.up_peers() {
                core.disclaim(&host);
            }
            return self.give_up(core, "the log that it was to begin with is gone");
        }
        if let Kind::Forced { silence } = &self.kind {
            core.journal(Event::LossAccepted {
                entries: core.let_out.since(self.chosen.index),
                silence_ms: silence.as_millis(),
            });
        }
        Turn::Reign {
            kind: self.kind.clone(),
            base: self.chosen,
        }
    }

    /// The seals that are missing need not be waited for any more.
    pub(super) fn operator_accepts_loss(&mut self, core: &mut Core) -> Turn {
        if !self.kind.boots() && matches!(self.phase, Phase::Sealing) {
            self.kind = Kind::Forced {
                silence: core.now.since(self.began),
            };
        }
        self.advance(core)
    }

    /// The record is known to be another than the one this claim rests on.
    pub(super) fn record_changed(&mut self, core: &mut Core) -> Turn {
        if let Phase::Committing { new, .. } = &self.phase
            && core.record.as_ref() == Some(new.as_ref())
        {
            return self.won(core);
        }
        let base: Version = self.claim.base;
        if core.version() > base {
            return self.give_up(core, "the record has moved on");
        }
        Turn::Stay
    }

    pub(super) fn give_up(&mut self, core: &mut Core, why: &str) -> Turn {
        core.journal(Event::ClaimGivenUp {
            term: self.claim.term,
            why: why.to_owned(),
        });
        core.feeds.stop_all(&mut core.actions);
        if !self.may_have_won() {
            self.renounce(core);
        }
        Turn::StandDown
    }

    /// The keeper has not been asked for this claim, and never will be: whoever was sealed for it is
    /// free again, and the primary goes on without asking the keeper.
    fn renounce(&self, core: &mut Core) {
        if self.kind.boots() || core.mutated(Mutation::ClaimAbandoned) {
            return;
        }
        core.release_promise(&self.claim);
        for host in self.others(core) {
            let claim = self.claim.clone();
            core.send(&host, Message::Renounced { claim });
        }
    }

    /// Something here failed. A claim whose outcome is not known goes on all the same: if it comes
    /// through, the guest is begun anew.
    pub(super) fn abandon(&mut self, core: &mut Core, why: &str) -> Turn {
        if self.may_have_won() && core.settled() && !core.mutated(Mutation::ClaimAbandoned) {
            return Turn::Stay;
        }
        self.give_up(core, why)
    }

    /// The disk takes nothing more.
    pub(super) fn store_full(&mut self, core: &mut Core) -> Turn {
        self.abandon(core, "the disk here takes nothing more")
    }

    pub(super) fn tick(&mut self, core: &mut Core) -> Turn {
        let out_of_time =
            core.now.since(self.began) >= core.config.timing.claim_patience.plus(self.slack(core));
        let unknown = self.may_have_won() && !core.mutated(Mutation::ClaimAbandoned);
        if out_of_time && !unknown {
            return self.give_up(core, "it took too long");
        }
        if matches!(self.phase, Phase::Sealing) && core.now >= self.ask_at {
            self.ask(core);
        }
        self.swap(core);
        self.advance(core)
    }

    /// The keeper may be unreachable for long; the first boot waits for it.
    fn slack(&self, core: &Core) -> Span {
        if self.kind.boots() {
            return core.config.timing.claim_patience.times(4);
        }
        // A few round trips: seal, fetch, bring along.
        let copies = self.base.iter().flat_map(Record::all_copies);
        core.farthest(copies.map(|copy| &copy.host)).times(8)
    }

    pub(super) fn timeout(&self, core: &Core) -> Time {
        let timing = &core.config.timing;
        let at = match &self.phase {
            Phase::Sealing => self.began.plus(self.grace(core)),
            Phase::Bringing { since } => since.plus(self.patience_to_bring(core)),
            Phase::Committing {
                again_at,
                asking: false,
                ..
            } => *again_at,
            _ => core.now.plus(timing.heartbeat),
        };
        if at > core.now {
            at.min(core.now.plus(timing.heartbeat))
        } else {
            core.now.plus(timing.heartbeat)
        }
    }
}
