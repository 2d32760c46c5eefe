//! The planned switchover: stop the guest, let the target have everything, promise to it, and ask
//! it to claim. Nobody suspects anybody, and nothing is lost.
//!
//! Until the promise is made giving up is simply letting the guest go on. Afterwards the target
//! may win at any time, so the keeper has to confirm this reign first: that voids the claim.

use replay_log::{LogIndex, Term};

use super::super::api::Action;
use super::super::core::Core;
use super::super::event::Event;
use super::super::message::{Claim, Message};
use super::super::name::{HostName, VmRun};
use super::super::node::Turn;
use super::super::record::Member;
use super::super::time::Time;
use super::Primary;

/// Where a reign stands.
#[derive(Debug)]
pub(super) enum Phase {
    /// The VMM replays to the end of the log.
    GoingLive,
    /// The guest runs.
    Live,
    /// The keeper is asked whether it is there: without it nobody can take over, and a guest that
    /// was stopped would have to wait for it.
    Asking { to: HostName, since: Time },
    /// The guest is being stopped.
    Pausing { to: HostName, since: Time },
    /// The guest is stopped; the target takes and executes the rest. `asked`: since when the keeper
    /// is asked once more.
    Draining {
        to: HostName,
        since: Time,
        asked: Option<Time>,
    },
    /// The target is to claim; this host hears nobody who reigns by the present record, and
    /// releases nothing by it.
    Handing {
        to: HostName,
        since: Time,
        claim: Claim,
        asked: bool,
        /// It took too long: the keeper is asked to confirm this reign.
        regretted: bool,
    },
}

impl Phase {
    pub(super) fn is_handing(&self) -> bool {
        matches!(self, Self::Handing { .. })
    }
}

impl Primary {
    pub(super) fn begin_switchover(
        &mut self,
        core: &mut Core,
        to: Option<&HostName>,
    ) -> Result<(), &'static str> {
        if !matches!(self.phase, Phase::Live) {
            return Err("the guest does not run here yet, or a switchover is under way: try later");
        }
        let Some(record) = &core.record else {
            return Err("there is no record yet: try later");
        };
        let mut members = record.members.iter();
        let fits = |m: &&Member| core.is_up(&m.host) && self.lost(core, m).is_none();
        let member = match to {
            Some(to) => members.find(|m| m.host == *to && fits(m)),
            None => members.find(fits),
        };
        let Some(member) = member else {
            return Err("only a connected member of the record can take over: see status");
        };
        let to = member.host.clone();
        core.journal(Event::SwitchoverBegan { to: to.clone() });
        let since = core.now;
        self.phase = Phase::Asking { to, since };
        core.read_record();
        Ok(())
    }

    pub(in super::super) fn paused(&mut self, core: &mut Core, run: VmRun) -> Turn {
        if run == core.run
            && let Phase::Pausing { to, since } = &self.phase
        {
            self.phase = Phase::Draining {
                to: to.clone(),
                since: *since,
                asked: None,
            };
        }
        self.advance(core)
    }

    pub(super) fn advance_switchover(&mut self, core: &mut Core) -> Turn {
        let patience = core.config.timing.switchover_patience;
        let late = |since: Time| core.now.since(since) >= patience;
        match &self.phase {
            Phase::Asking { since, .. } if late(*since) => {
                self.resume(core, "the keeper of records does not answer");
            }
            Phase::Asking { to, since } if core.keeper_heard_since(*since) => {
                let (to, since) = (to.clone(), *since);
                self.phase = Phase::Pausing { to, since };
                core.do_(Action::PauseVm { run: core.run });
            }
            Phase::Pausing { since, .. } | Phase::Draining { since, .. } if late(*since) => {
                self.resume(core, "it took too long");
            }
            Phase::Draining { to, since, asked } => {
                let (to, since, asked) = (to.clone(), *since, *asked);
                // A change that is under way would void the claim.
                let ready = self.change.is_none() && self.challenge.is_none();
                if ready && self.has_all(core, &to) {
                    self.ask_again(core, to, since, asked);
                }
            }
            Phase::Handing {
                since, regretted, ..
            } if late(*since) && !regretted => self.regret(core),
            Phase::Handing { .. } => self.ask_target(core),
            _ => {}
        }
        Turn::Stay
    }

    /// The keeper did not answer. A guest that was only to be stopped for a while goes on.
    pub(in super::super) fn keeper_silent(&mut self, core: &mut Core, reason: &str) {
        let waits = match &self.phase {
            Phase::Asking { .. } => true,
            Phase::Draining { asked, .. } => asked.is_some(),
            _ => false,
        };
        if waits {
            let why = format!("the keeper of records does not answer ({reason})");
            self.resume(core, &why);
        }
    }

    /// Whether the target holds and has executed the whole log, and all of it is committed.
    fn has_all(&self, core: &Core, to: &HostName) -> bool {
        let tail = core.log.appended.index;
        let member = core.record.as_ref().and_then(|record| record.member_on(to));
        let done = self.followers.get(to).is_some_and(|f| f.executed >= tail);
        done && tail > LogIndex::START
            && core.held() >= tail
            && self.committed >= tail
            && member.is_some_and(|member| self.holds(member, tail))
    }

    /// The target has everything. What it needs now is the keeper: only when that has answered once
    /// more is the promise made that nobody but the keeper, or the target, can take back.
    fn ask_again(&mut self, core: &mut Core, to: HostName, since: Time, asked: Option<Time>) {
        match asked {
            Some(asked) if core.keeper_heard_since(asked) => self.hand_over(core, to, since),
            Some(_) => core.read_record(),
            None => {
                let asked = Some(core.now);
                self.phase = Phase::Draining { to, since, asked };
                core.read_record();
            }
        }
    }

    fn hand_over(&mut self, core: &mut Core, to: HostName, since: Time) {
        let claim = Claim {
            term: core.highest.max(self.term).next(),
            claimant: to.clone(),
            base: core.version(),
        };
        core.promise(claim.clone());
        self.phase = Phase::Handing {
            to,
            since,
            claim,
            asked: false,
            regretted: false,
        };
    }

    fn ask_target(&mut self, core: &mut Core) {
        if let Phase::Handing {
            to, claim, asked, ..
        } = &mut self.phase
            && !*asked
            && core.persisted.promise.as_ref() == Some(claim)
        {
            *asked = true;
            let message = Message::Handover {
                claim: claim.clone(),
                tip: core.log.appended,
            };
            let event = Event::HandedOver {
                to: to.clone(),
                term: claim.term,
            };
            let (to, claim) = (to.clone(), claim.clone());
            core.journal(event);
            for host in core.up_peers() {
                if host != to && core.concerns(&host) {
                    let claim = claim.clone();
                    core.send(&host, Message::Consent { claim });
                }
            }
            core.send(&to, message);
        }
    }

    /// Too late to simply go on: the target must renounce its claim, or the keeper confirm this reign.
    fn regret(&mut self, core: &mut Core) {
        if let Phase::Handing { to, regretted, .. } = &mut self.phase {
            *regretted = true;
            let to = to.clone();
            self.ask_to_renounce(core, &to);
        }
        if let Some(record) = core.record.clone().filter(|_| self.change.is_none()) {
            self.propose(core, record, "to take back a switchover");
        }
    }

    /// The target of a switchover that this host regrets is told so; again whenever it comes back, for it
    /// may not have been there to hear it.
    pub(super) fn ask_to_renounce(&self, core: &mut Core, target: &HostName) {
        if let Phase::Handing {
            to,
            claim,
            regretted: true,
            ..
        } = &self.phase
            && to == target
        {
            let claim = claim.clone();
            core.send(target, Message::TakeBack { claim });
        }
    }

    pub(super) fn switchover_refused(&mut self, core: &mut Core, from: &HostName, term: Term) {
        if let Phase::Handing {
            to,
            claim,
            regretted: false,
            ..
        } = &self.phase
            && to == from
            && claim.term == term
        {
            self.regret(core);
        }
    }

    /// The target has renounced this claim: it can never come through, and the guest goes on.
    pub(super) fn take_back(&mut self, core: &mut Core, renounced: &Claim) {
        let ours = matches!(&self.phase, Phase::Handing { claim, .. } if claim == renounced);
        // Bound by an earlier promise, too, this host waits for the keeper.
        if ours && !core.sealed_against(core.version()) {
            self.resume(core, "the target does not claim");
        }
    }

    /// A confirmed record voids the claim: the guest goes on here.
    pub(super) fn switchover_record_changed(&mut self, core: &mut Core) {
        if let Phase::Handing { claim, .. } = &self.phase
            && core.version() > claim.base
        {
            self.resume(core, "the target has not claimed");
        }
    }

    fn resume(&mut self, core: &mut Core, why: &str) {
        if let Phase::Asking { to, .. }
        | Phase::Pausing { to, .. }
        | Phase::Draining { to, .. }
        | Phase::Handing { to, .. } = &self.phase
        {
            let runs = matches!(self.phase, Phase::Asking { .. });
            core.journal(Event::SwitchoverFailed {
                to: to.clone(),
                why: why.to_owned(),
            });
            self.phase = Phase::Live;
            if !runs && core.full.is_none() {
                self.parked = false;
                core.do_(Action::ResumeVm { run: core.run });
            }
            self.park_if_full(core);
            self.record_held_back(core);
        }
    }
}
