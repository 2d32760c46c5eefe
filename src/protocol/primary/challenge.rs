//! Another host claims the next term while this one reigns.

use super::Primary;
use crate::protocol::core::Core;
use crate::protocol::event::Event;
use crate::protocol::message::{Claim, Message, Refusal};
use crate::protocol::name::HostName;

impl Primary {
    pub(super) fn seal(&mut self, core: &mut Core, from: &HostName, claim: &Claim) {
        if claim.claimant != *from || !core.hear_of(claim.term) {
            return;
        }
        if core.latest_base() > claim.base {
            core.refuse(from, claim.term, Refusal::RecordMovedOn, claim.base);
        } else if self.phase.is_handing() && core.persisted.promise.as_ref() == Some(claim) {
            let message = Message::Sealed {
                term: claim.term,
                incarnation: core.durable.incarnation,
                tip: core.log.appended,
                held: core.held(),
            };
            core.send(from, message);
        } else {
            core.refuse(from, claim.term, Refusal::PrimaryAlive, claim.base);
        }
    }

    /// A claim can never come through: whoever was sealed for it hears this primary again, and the
    /// keeper need not be asked.
    pub(in crate::protocol) fn renounced(&mut self, core: &mut Core, claim: &Claim) {
        self.challenge.take_if(|challenge| challenge == claim);
        self.take_back(core, claim);
    }

    /// A member is sealed for somebody else: it hears nothing of this state of the record. Only
    /// the keeper can say who is right; a confirmed record voids the claim.
    pub(super) fn challenged(&mut self, core: &mut Core, from: &HostName, promise: Claim) {
        if !core.hear_of(promise.term) {
            return;
        }
        if promise.base < core.version() {
            return;
        }
        core.feeds.stop(from, &mut core.actions);
        if let Some(follower) = self.followers.get_mut(from) {
            follower.refuses = true;
        }
        if self.challenge.is_none() && !self.phase.is_handing() {
            core.journal(Event::Challenged {
                by: from.clone(),
                term: promise.term,
                claimant: promise.claimant.clone(),
            });
            self.challenge = Some(promise);
        }
    }
}
