//! What a replica promises to claimants, and what becomes of its promises.

use replay_log::LogTip;

use super::Replica;
use crate::protocol::controller::Kind;
use crate::protocol::core::Core;
use crate::protocol::event::Event;
use crate::protocol::message::{Authority, Claim, Message, Refusal};
use crate::protocol::mutation::Mutation;
use crate::protocol::name::HostName;
use crate::protocol::node::Turn;

impl Replica {
    pub(super) fn seal(&mut self, core: &mut Core, from: &HostName, claim: Claim, consent: bool) {
        if claim.claimant != *from {
            return;
        }
        if !core.hear_of(claim.term) {
            let what = format!("claims {}, far beyond every term that is known", claim.term);
            let peer = from.clone();
            core.journal(Event::PeerMisbehaved { peer, what });
            return;
        }
        if let Some(why) = self.objection(core, &claim, consent) {
            core.refuse(from, claim.term, why, claim.base);
            return;
        }
        self.inquiry = None;
        // The claimant has as long as it takes before this host thinks of claiming itself.
        let patience = core.config.timing.claim_patience;
        self.not_before = self.not_before.max(core.now.plus(patience));
        if core.mutated(Mutation::NoSeal) {
            Self::tell_sealed(core, &claim);
            return;
        }
        self.source = None;
        if core.durable.promise.as_ref() != Some(&claim) {
            core.promise(claim.clone());
        }
        self.sealing = Some(claim);
        self.try_tell_sealed(core);
    }

    pub(super) fn objection(&self, core: &Core, claim: &Claim, consent: bool) -> Option<Refusal> {
        if !core.settled() {
            return Some(Refusal::Starting);
        }
        // A promise on a later state would become one on an earlier, and its maker would hear those
        // again whom it has promised not to.
        if core.latest_base() > claim.base {
            return Some(Refusal::RecordMovedOn);
        }
        if core.version() == claim.base && !core.is_copy() {
            return Some(Refusal::NotACopy);
        }
        if core.full.is_some() {
            return Some(Refusal::Full);
        }
        if core.promised_otherwise(claim) {
            return Some(Refusal::Promised);
        }
        // The word of the primary itself counts, not the claimant's.
        let consents = consent && self.consented.as_ref() == Some(claim);
        (!consents && self.vouches(core)).then_some(Refusal::PrimaryAlive)
    }

    /// A claim that this host was promised to is void: it hears the primary again.
    pub(in crate::protocol) fn renounced(&mut self, core: &mut Core, claim: &Claim, bound: bool) {
        self.sealing.take_if(|sealing| sealing == claim);
        self.consented.take_if(|consented| consented == claim);
        if bound {
            self.not_before = core.now.plus(core.config.timing.heartbeat);
            core.hello_all();
        }
    }

    /// The log here is shorter than what was sent: no more is taken of what follows on the rest. The
    /// primary is asked again when there is room, or with one of its next heartbeats.
    pub(in crate::protocol) fn store_short(&mut self, core: &Core) {
        self.source = None;
        self.hello_at = core.now.plus(core.config.timing.retry);
    }

    /// The disk takes more again: what was not taken is asked for.
    pub(in crate::protocol) fn store_room(&mut self, core: &mut Core) {
        self.acknowledge(core);
        if self.source.is_none() {
            core.hello_all();
        }
    }

    /// Whether anything came from the primary lately.
    pub(super) fn hears(&self, core: &Core) -> bool {
        let lately = |at| core.awake().since(at) < core.config.timing.lease;
        !self.abdicated && self.heard.is_some_and(lately)
    }

    /// Whether this host has heard the primary lately, as one that takes its log.
    pub(super) fn vouches(&self, core: &Core) -> bool {
        let following = self.source.as_ref();
        following.is_some_and(|s| matches!(s.authority, Authority::Reign(_)))
            && !self.abdicated
            && self.silence(core) < core.config.timing.lease
    }

    /// Tells the promise once it is durable and everything taken before it is stored.
    pub(in crate::protocol) fn try_tell_sealed(&mut self, core: &mut Core) {
        let durable = core.persisted.promise.as_ref() == self.sealing.as_ref();
        if durable
            && core.log.stored.index >= core.log.appended.index
            && let Some(claim) = self.sealing.take()
        {
            Self::tell_sealed(core, &claim);
            core.journal(Event::Sealed {
                term: claim.term,
                claimant: claim.claimant,
                index: core.log.appended.index,
            });
        }
    }

    pub(super) fn tell_sealed(core: &mut Core, claim: &Claim) {
        let message = Message::Sealed {
            term: claim.term,
            incarnation: core.durable.incarnation,
            tip: core.log.appended,
            held: core.held(),
        };
        core.send(&claim.claimant, message);
    }

    pub(super) fn handover(core: &mut Core, from: &HostName, claim: Claim, tip: LogTip) -> Turn {
        let record = core.record.as_ref();
        let fits = record.is_some_and(|r| r.version() == claim.base && r.primary.host == *from)
            && claim.claimant == *core.host()
            && core.settled()
            && core.is_copy()
            && tip == core.log.appended
            && core.latest_base() == claim.base
            && !core.promised_otherwise(&claim);
        let Some(base) = core.record.clone().filter(|_| fits) else {
            core.refuse(from, claim.term, Refusal::NotACopy, claim.base);
            return Turn::Stay;
        };
        Turn::Claim {
            kind: Kind::Handover(claim),
            base: Some(base),
        }
    }
}
