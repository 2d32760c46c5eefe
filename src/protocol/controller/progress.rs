//! The steps of a claim, each as far as it can be made: choose the longest sealed log, fetch what is
//! lacking, bring the others along, propose the record.

use replay_log::{LogIndex, LogTip};

use super::super::api::Action;
use super::super::core::Core;
use super::super::event::Event;
use super::super::message::{Authority, Message};
use super::super::mutation::Mutation;
use super::super::name::HostName;
use super::super::node::Turn;
use super::super::record::{MAX_COPIES, Member, Policy, Record};
use super::super::time::{Span, Time};
use super::{Controller, Kind, Phase, Sealed};

impl Controller {
    /// The suspected primary is a copy too, but nobody waits for its seal unless it has answered
    /// the inquiry: its connection says nothing.
    pub(super) fn is_dead(&self, host: &HostName) -> bool {
        let primary = self
            .base
            .as_ref()
            .is_some_and(|base| base.primary.host == *host);
        match &self.kind {
            Kind::Succession { awake, .. } => primary && !awake.contains(host),
            _ => false,
        }
    }

    pub(super) fn prepare(&mut self, core: &mut Core) -> Option<Turn> {
        let durable = core.persisted.booting == self.claim.term;
        if !durable || !core.settled() || core.log.appended.index > LogIndex::START {
            return None;
        }
        self.chosen = LogTip::default();
        self.propose(core, vec![]);
        Some(Turn::Stay)
    }

    /// Sealing is over when enough copies are sealed and every other reachable one has had its
    /// chance: one that is left out and has taken more log must start from the beginning.
    pub(super) fn choose(&mut self, core: &mut Core) -> Option<Turn> {
        let forced = matches!(self.kind, Kind::Forced { .. });
        let own = core.persisted.promise.as_ref() == Some(&self.claim)
            && core.log.stored.index >= core.log.appended.index;
        let needed = self.base.as_ref().map_or(1, Record::seals);
        let enough = forced || self.sealed.len() + 1 >= needed;
        let answered = self.others(core).iter().all(|host| {
            self.sealed.contains_key(host) || self.refused.contains(host) || self.is_dead(host)
        });
        let waited = core.now.since(self.began) >= self.grace(core);
        if !(own && enough && (answered || waited)) {
            return None;
        }
        let here = (core.log.appended, core.host().clone());
        let (longest, holder) = self
            .sealed
            .iter()
            .map(|(host, sealed)| (sealed.tip, host.clone()))
            .chain([here])
            .max_by(|(a, at_a), (b, at_b)| {
                // Of equal logs the own is taken.
                let key = |tip: &LogTip, at: &HostName| (tip.term, tip.index, at == core.host());
                key(a, at_a).cmp(&key(b, at_b))
            })?;
        self.chosen = longest;
        let by = self.sealed.keys().chain([core.host()]).cloned().collect();
        core.journal(Event::SealsWon {
            term: self.claim.term,
            by,
            index: longest.index,
            holder: holder.clone(),
        });
        if longest != core.log.appended {
            let message = Message::Fetch {
                term: self.claim.term,
                after: core.log.appended,
            };
            core.send(&holder, message);
        }
        self.phase = Phase::Fetching {
            from: holder,
            accepted: false,
        };
        Some(Turn::Stay)
    }

    /// How long the other copies have for their seals. Those that have answered the inquiry are alive:
    /// a copy that is left out would be one less. An operator's claim asks everybody whether the
    /// primary is heard.
    pub(super) fn grace(&self, core: &Core) -> Span {
        let timing = &core.config.timing;
        let missing =
            |host: &HostName| !self.sealed.contains_key(host) && !self.refused.contains(host);
        let alive = match &self.kind {
            Kind::Succession { awake, .. } => awake.iter().any(missing),
            Kind::Forced { .. } => true,
            _ => false,
        };
        let others = self.others(core);
        let far = core
            .farthest(others.iter().filter(|host| missing(host)))
            .times(2);
        let grace = if alive {
            timing.seal_grace_awake
        } else {
            timing.seal_grace
        };
        grace.max(far.min(timing.claim_patience))
    }

    /// How long the sealed copies have to take what they lack.
    pub(super) fn patience_to_bring(&self, core: &Core) -> Span {
        let timing = &core.config.timing;
        let far = core.farthest(self.sealed.keys()).times(4);
        timing.bring_along.max(far.min(timing.claim_patience))
    }

    pub(super) fn fetch(&mut self, core: &mut Core) -> Option<Turn> {
        let tip = core.log.appended;
        if tip.index < self.chosen.index {
            return None;
        }
        if tip != self.chosen {
            return Some(self.give_up(core, "what was fetched is not the longest log"));
        }
        core.ensure_replay();
        let ours = self.chosen;
        for (host, sealed) in &mut self.sealed {
            if sealed.left_out || sealed.tip == ours {
                continue;
            }
            let authority = Authority::Claim(self.claim.clone());
            core.feed(host, authority, sealed.tip);
            // What it held before counts only once it is known to be the beginning of this log.
            sealed.held = LogIndex::START;
            sealed.left_out = !core.feeds.serves(host);
        }
        self.phase = Phase::Bringing { since: core.now };
        Some(Turn::Stay)
    }

    pub(super) fn bring(&mut self, core: &mut Core, since: Time) -> Option<Turn> {
        if core.held() < self.chosen.index {
            return None;
        }
        let everything = core.mutated(Mutation::MemberWithoutLog);
        let holds =
            |sealed: &Sealed| everything || (!sealed.left_out && sealed.held >= self.chosen.index);
        let complete = self.sealed.values().all(|s| s.left_out || holds(s));
        let waited = core.now.since(since) >= self.patience_to_bring(core);
        if !complete && !waited {
            return None;
        }
        let holders = self.sealed.iter().filter(|(_, sealed)| holds(sealed));
        let members = holders
            .map(|(host, sealed)| Member {
                host: host.clone(),
                incarnation: sealed.incarnation,
            })
            .collect();
        self.propose(core, members);
        Some(Turn::Stay)
    }

    pub(super) fn propose(&mut self, core: &mut Core, members: Vec<Member>) {
        let (mut hosts, policy) = match (&self.kind, &self.base) {
            (Kind::First { hosts, policy }, _) => (hosts.clone(), *policy),
            (_, Some(base)) => (base.hosts.clone(), base.policy),
            (_, None) => (vec![], Policy::default()),
        };
        hosts.push(core.host().clone());
        hosts.sort();
        hosts.dedup();
        hosts.truncate(MAX_COPIES);
        let lineage = self
            .base
            .as_ref()
            .map_or_else(|| core.new_lineage(), |base| base.lineage);
        let new = Record {
            lineage,
            term: self.claim.term,
            epoch: self.claim.base.epoch.next(),
            primary: core.me(),
            members,
            hosts,
            policy,
            through: self.chosen.index,
            begins: self.chosen.index,
            follows: self.chosen.term,
            loss: match self.kind {
                Kind::Cold | Kind::Forced { .. } => true,
                Kind::First { .. } => self.base.is_some(),
                Kind::Succession { .. } | Kind::Handover(_) => false,
            },
            failed: match &self.kind {
                Kind::Succession { stumble, .. } => stumble.clone(),
                _ => None,
            },
        };
        core.journal(Event::RecordProposed {
            version: new.version(),
            copies: new.all_copies().cloned().collect(),
            why: "to reign".to_owned(),
        });
        self.phase = Phase::Committing {
            new: Box::new(new),
            asking: false,
            again_at: core.now,
        };
        self.swap(core);
    }

    pub(super) fn swap(&mut self, core: &mut Core) {
        let expect = self.base.as_ref().map(Record::version);
        if let Phase::Committing {
            new,
            asking,
            again_at,
        } = &mut self.phase
            && !*asking
            && core.now >= *again_at
        {
            *asking = true;
            *again_at = core.now.plus(core.config.timing.claim_patience);
            core.do_(Action::SwapRecord {
                expect,
                new: new.as_ref().clone(),
                seen: core.seen_to_tell(),
            });
        }
    }
}
