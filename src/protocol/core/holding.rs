//! What this host holds and has promised, as it outlives a restart.

use replay_log::{FrameNumber, LogIndex, Position, Term};

use super::{Core, OwnLog, Rest};
use crate::protocol::api::{Action, StopReason};
use crate::protocol::config::Durable;
use crate::protocol::event::Event;
use crate::protocol::message::Claim;
use crate::protocol::mutation::Mutation;
use crate::protocol::name::Incarnation;
use crate::protocol::record::{Lineage, TERM_LEAP, Version};
use crate::protocol::time::Span;

impl Core {
    pub(in crate::protocol) fn persist(&mut self) {
        self.durable.highest = self.highest;
        let durable = self.durable.clone();
        self.do_(Action::Persist(durable));
    }

    /// Whether this host's identity is durable and its log is the one that identity stands for.
    pub(in crate::protocol) fn settled(&self) -> bool {
        self.renewal.is_none()
            && self.persisted.incarnation == self.durable.incarnation
            && self.durable.incarnation != Incarnation(0)
    }

    /// Something was persisted. Says whether the holding has just become settled.
    pub(in crate::protocol) fn persisted(&mut self, durable: Durable) -> bool {
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
    pub(in crate::protocol) fn new_lineage(&self) -> Lineage {
        // Another draw than any incarnation's.
        Lineage(Incarnation::draw(!self.fresh, 0).0)
    }

    /// A copy that has less log than the record says that it held has lost some: a disk that lied
    /// about a sync, or that was set back with all that is on it.
    pub(super) fn check_holding(&mut self) {
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
    pub(in crate::protocol) fn forgets(&mut self, why: &str) {
        self.journal(Event::HoldingLost {
            why: why.to_owned(),
        });
        self.renew(Rest::Keep, why);
    }

    pub(super) fn take_incarnation(&mut self) {
        self.durable.incarnation = Incarnation::draw(self.fresh, self.drawn);
        self.drawn += 1;
        self.holdings.push(self.durable.incarnation);
    }

    /// Gives the holding up for a new one: an empty one, or one that begins with the same log.
    pub(in crate::protocol) fn renew(&mut self, rest: Rest, why: &str) {
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

    /// A claim binds nobody any more. (What its term was is remembered: no later claim has it.) Says
    /// whether this host is free by that: it is not while it has promised itself to an earlier claim on
    /// the same state of the record, too. Then only the record can free it, by moving on.
    pub(in crate::protocol) fn release_promise(&mut self, claim: &Claim) -> bool {
        let free = self.durable.promise.as_ref() == Some(claim) && !self.durable.bound_before;
        if free {
            self.durable.promise = None;
            self.persist();
        }
        free
    }

    /// Whether this host, in an earlier life, may have asked the keeper for a claim of its own: whoever
    /// gives a claim up before that has released its promise.
    pub(in crate::protocol) fn may_have_asked_for(&self, claim: &Claim) -> bool {
        self.durable.promise.as_ref().is_some_and(|promise| {
            promise == claim || (promise.base == claim.base && self.durable.bound_before)
        })
    }

    /// Whether a promise forbids to hear somebody who reigns by this state of the record.
    pub(in crate::protocol) fn sealed_against(&self, version: Version) -> bool {
        let promise = self.durable.promise.as_ref();
        promise.is_some_and(|promise| version <= promise.base)
    }

    /// The latest state of the record that this host knows of, be it only by a promise: whoever
    /// claimed on it had read it.
    pub(in crate::protocol) fn latest_base(&self) -> Version {
        let promised = self.durable.promise.as_ref().map(|promise| promise.base);
        self.version().max(promised.unwrap_or_default())
    }

    /// Somebody names a term. Says whether it is one that could have come about: terms rise one by
    /// one, and a wild one would leave none for those who come after.
    pub(in crate::protocol) fn hear_of(&mut self, term: Term) -> bool {
        // What others say is bounded by what was committed, and not by what others have said.
        let reigned = self.version().term.max(self.log.appended.term);
        let credible = term.0 <= reigned.0.saturating_add(TERM_LEAP / 2);
        if credible {
            self.highest = self.highest.max(term);
        }
        credible
    }

    /// The last term by which this host has, or may have, the disks of the guest.
    pub(in crate::protocol) fn has_disks_of(&self) -> Term {
        self.durable.live.max(self.durable.booting)
    }

    /// Whether this host has anything of the VM that it could go on from.
    pub(in crate::protocol) fn has_something(&self) -> bool {
        self.log.appended.index > LogIndex::START || self.has_disks_of() > Term(0)
    }

    /// Whether any host that can be reached has a log of the VM, or this one disks.
    pub(in crate::protocol) fn somebody_has_something(&self) -> bool {
        let greetings = self.peers.values().filter(|peer| peer.up);
        let mut tips = greetings.filter_map(|peer| peer.greeting.map(|greeting| greeting.tip));
        self.has_something() || tips.any(|tip| tip.index > LogIndex::START)
    }

    /// Somebody runs the guest.
    pub(in crate::protocol) fn somebody_runs_it(&mut self) {
        self.run_at = self.awake();
        self.waiting_said = false;
    }

    /// For how long nobody has, as far as this host knows.
    pub(in crate::protocol) fn nobody_for(&self) -> Span {
        self.awake().since(self.run_at)
    }

    /// Whether an earlier promise forbids to promise this.
    pub(in crate::protocol) fn promised_otherwise(&self, claim: &Claim) -> bool {
        self.durable.promise.as_ref().is_some_and(|promise| {
            promise.term > claim.term || (promise.term == claim.term && promise != claim)
        })
    }

    pub(in crate::protocol) fn promise(&mut self, claim: Claim) {
        self.highest = self.highest.max(claim.term);
        let before = self.durable.promise.as_ref();
        self.durable.bound_before = before.is_some_and(|before| {
            before.base == claim.base && (self.durable.bound_before || *before != claim)
        });
        self.durable.promise = Some(claim);
        self.persist();
    }
}
