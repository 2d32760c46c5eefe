//! Changing the record of one's own reign: confirming it, removing and adding members.
//!
//! ```text
//!   none ── something is to be changed ──► awaiting ── who is awaited comes no nearer ──► none
//!    │                                        │
//!    └── the same, and everybody who stays or comes holds all that was released
//!             │                               │
//!             ▼                               │
//!         Proposed ◄──────────────────────────┘
//!             │  ▲
//!             │  │
//!             ├──┼── Done, or found done ──► none
//!             │  └── Unknown: ask again for the very same
//!             └── another term reigns ──► deposed
//! ```
//!
//! Awaiting holds output back until those who lack a little hold it too. Without it a far host would
//! never become a copy of a guest that is busy: what was released while its acknowledgement was on
//! its way is what it lacks when that arrives.
//!
//! From the moment a change is proposed until its outcome is known, output waits for both records:
//! nobody knows which of them a claimant will read. For the same reason a proposal is never
//! replaced by another one before its outcome is known.

use replay_log::LogIndex;

use super::super::api::{Action, Operator, Swapped};
use super::super::config::BACKLOG_FREE;
use super::super::core::Core;
use super::super::event::Event;
use super::super::message::Health;
use super::super::mutation::Mutation;
use super::super::name::HostName;
use super::super::node::Turn;
use super::super::record::{MAX_COPIES, Member, OnLoss, Policy, Record, Version};
use super::super::time::{Span, Time};
use super::Primary;

/// A proposed record whose outcome is not known.
#[derive(Debug)]
pub(super) struct Change {
    expect: Version,
    pub(super) new: Record,
    asking: bool,
    again_at: Time,
    unreachable_said: bool,
}

impl Primary {
    /// Proposes a change if one is needed and allowed.
    pub(super) fn consider_change(&mut self, core: &mut Core) {
        self.note_pace(core);
        self.awaited.clear();
        let Some(record) = core.record.clone() else {
            return;
        };
        if self.change.is_some() || self.phase.is_handing() {
            return;
        }
        if self.challenge.is_some() {
            // The same copies: nothing to hold for anybody. If members are lost as well, they are
            // removed by the next change.
            self.propose(core, record, "to void a claim");
            return;
        }
        let (hosts, policy) = self.wishes(core, &record);
        let members = self.wanted_members(core, &record, &hosts);
        if members == record.members && hosts == record.hosts && policy == record.policy {
            self.wanted = None;
            return;
        }
        let grows = members.iter().any(|new| !record.members.contains(new));
        let hold = self.may_change(core, &record, &members, &hosts, policy);
        let careless = core.mutated(Mutation::ShrinkEarly) && !grows
            || core.mutated(Mutation::MemberWithoutLog) && grows;
        if !hold && !careless {
            let (new, old): (Vec<_>, Vec<_>) = members
                .into_iter()
                .partition(|member| !record.members.contains(member));
            self.await_holders(core, if new.is_empty() { old } else { new });
            return;
        }
        if !self.hears_the_keeper(core, &record, &members) {
            return;
        }
        self.say_why(core, &record, &members);
        let why = match members.len().cmp(&record.members.len()) {
            std::cmp::Ordering::Less => "to go on with fewer copies",
            std::cmp::Ordering::Greater => "to go on with more copies",
            std::cmp::Ordering::Equal => "to go on with other copies",
        };
        let new = Record {
            members,
            hosts,
            policy,
            ..record
        };
        self.propose(core, new, why);
    }

    /// Whether these copies hold what was let out: enough of them that whoever is promoted from them
    /// has it, and everyone that is new.
    fn may_change(
        &self,
        core: &Core,
        record: &Record,
        members: &[Member],
        hosts: &[HostName],
        policy: Policy,
    ) -> bool {
        let next = Record {
            members: members.to_vec(),
            hosts: hosts.to_vec(),
            policy: Policy {
                // Whether output may leave with so few is another question.
                min_copies: 0,
                ..policy
            },
            ..record.clone()
        };
        let mut new = members
            .iter()
            .filter(|member| !record.members.contains(member));
        self.committed_by(core, &next) >= self.committed
            && new.all(|member| self.holds(member, self.committed))
    }

    /// Through where every copy of this record is known to hold the log.
    fn held_by_all(&self, core: &Core, record: &Record) -> LogIndex {
        let members = record.members.iter().map(|member| self.held_by(member));
        let all = members.chain([core.held(), self.committed]);
        all.min().unwrap_or_default()
    }

    /// Whether the keeper has answered lately, if members are to go that have not been heard lately.
    /// One that hears nothing at all might have lost nobody: its change would reach the keeper, and it
    /// could not go on. Lately is half the time after which members count as lost: who was heard when
    /// they had just fallen silent says nothing of the time since.
    fn hears_the_keeper(&self, core: &mut Core, record: &Record, members: &[Member]) -> bool {
        let patience = Span::from_nanos(core.config.timing.shrink_after.as_nanos() / 2);
        let silent = |member: &Member| {
            let follower = self.followers.get(&member.host);
            follower.is_some_and(|follower| follower.silence(core.awake()) >= patience)
        };
        let mut gone = record.members.iter().filter(|m| !members.contains(m));
        if !gone.any(silent) {
            return true;
        }
        let since = Time::from_nanos(core.now.as_nanos().saturating_sub(patience.as_nanos()));
        if core.keeper_heard_since(since) || core.mutated(Mutation::DeafPrimary) {
            return true;
        }
        core.read_record();
        false
    }

    /// Lets output wait for those of these who lack a part of what was released, if it is little.
    /// That ends by itself: who comes no nearer soon lacks what is older than
    /// [`Timing::join_lag`](super::super::config::Timing::join_lag).
    fn await_holders(&mut self, core: &Core, members: Vec<Member>) {
        if members.iter().all(|member| self.nearly_holds(core, member)) {
            self.awaited = members;
        }
    }

    /// Through where output may be let out for the sake of those who are to be copies.
    pub(super) fn awaited_through(&self) -> Option<LogIndex> {
        let members = self.awaited.iter();
        members.map(|member| self.held_by(member)).min()
    }

    fn wishes(&self, core: &Core, record: &Record) -> (Vec<HostName>, Policy) {
        let Some(Operator::Pair { hosts, policy }) = &self.wanted else {
            return (record.hosts.clone(), record.policy);
        };
        let mut hosts = hosts.clone();
        hosts.push(core.host().clone());
        hosts.sort();
        hosts.dedup();
        hosts.truncate(MAX_COPIES);
        (hosts, *policy)
    }

    /// The members there should be: without the lost and the unwanted, with those that caught up.
    fn wanted_members(&self, core: &Core, record: &Record, hosts: &[HostName]) -> Vec<Member> {
        let shrinks = Self::on_loss(core) == OnLoss::Shrink;
        let stays = |member: &&Member| {
            hosts.contains(&member.host) && !(shrinks && self.lost(core, member).is_some())
        };
        let mut members: Vec<_> = record.members.iter().filter(stays).cloned().collect();
        for host in hosts.iter().filter(|host| *host != core.host()) {
            let Some(follower) = self.followers.get(host) else {
                continue;
            };
            let new = Member {
                host: host.clone(),
                incarnation: follower.incarnation,
            };
            if self.caught_up(core, &new) && !members.contains(&new) {
                members.retain(|member| member.host != *host);
                members.push(new);
            }
        }
        if members.len() + 1 < record.policy.min_copies as usize {
            // Removing those that are lost would only stall output for another reason. Where others take
            // their place it does not.
            let missing = |old: &&Member| {
                hosts.contains(&old.host) && members.iter().all(|new| new.host != old.host)
            };
            let lost: Vec<_> = record.members.iter().filter(missing).cloned().collect();
            members.extend(lost);
        }
        members.sort();
        members
    }

    fn caught_up(&self, core: &Core, candidate: &Member) -> bool {
        let Some(follower) = self.followers.get(&candidate.host) else {
            return false;
        };
        let served = core.feeds.serves(&candidate.host) && !follower.refuses;
        let lively = follower.silence(core.awake()) < core.config.timing.suspicion_floor;
        if core.mutated(Mutation::MemberWithoutLog) {
            return served;
        }
        // Whose machine cannot be started, for want of its image or of memory, would hold a log that
        // nobody could go on from.
        let away = core.farthest([&candidate.host]).times(2);
        // Nor would clients wait for one that has still to execute what it holds.
        let runs = follower.executed >= self.base.index
            && follower.executed > LogIndex::START
            && (core.log.appended.index.since(follower.executed) <= BACKLOG_FREE
                || self.pace.lag(core.now, follower.executed)
                    <= core.config.timing.lag_limit.max(away));
        let well = follower.health() == Health::Well && !follower.forgetful;
        served && well && lively && runs && self.nearly_holds(core, candidate)
    }

    fn say_why(&self, core: &mut Core, record: &Record, members: &[Member]) {
        for member in &record.members {
            if let Some(silence) = self
                .lost(core, member)
                .filter(|_| !members.contains(member))
            {
                core.journal(Event::ReplicaLost {
                    replica: member.host.clone(),
                    silence_ms: silence.as_millis(),
                });
            }
        }
        for member in members.iter().filter(|m| !record.members.contains(m)) {
            let held = self.followers.get(&member.host).map(|f| f.held);
            core.journal(Event::ReplicaCaughtUp {
                replica: member.host.clone(),
                index: held.unwrap_or_default(),
            });
        }
    }

    pub(super) fn propose(&mut self, core: &mut Core, mut new: Record, why: &str) {
        let expect = core.version();
        new.epoch = expect.epoch.next();
        new.through = self.held_by_all(core, &new);
        core.journal(Event::RecordProposed {
            version: new.version(),
            copies: new.all_copies().cloned().collect(),
            why: why.to_owned(),
        });
        self.change = Some(Change {
            expect,
            new,
            asking: false,
            again_at: core.now,
            unreachable_said: false,
        });
        self.retry_change(core);
    }

    /// Asks the keeper, or asks again for the same.
    pub(super) fn retry_change(&mut self, core: &mut Core) {
        let due = |change: &&Change| !change.asking && core.now >= change.again_at;
        let Some(members) = self
            .change
            .as_ref()
            .filter(due)
            .map(|c| c.new.members.clone())
        else {
            return;
        };
        // Since it was proposed this host may have come to hear nobody.
        if let Some(record) = core.record.clone()
            && !self.hears_the_keeper(core, &record, &members)
        {
            return;
        }
        if let Some(change) = &mut self.change {
            change.asking = true;
            core.do_(Action::SwapRecord {
                expect: Some(change.expect),
                new: change.new.clone(),
                seen: core.seen_to_tell(),
            });
        }
    }

    pub(in super::super) fn swapped(&mut self, core: &mut Core, swapped: Swapped) -> Turn {
        let Some(change) = &mut self.change else {
            return Turn::Stay;
        };
        change.asking = false;
        match swapped {
            Swapped::Done(record) | Swapped::Conflict(Some(record)) => {
                if core.learn(record) {
                    return self.record_changed(core);
                }
                change.again_at = core.now.plus(core.config.timing.retry);
            }
            Swapped::Conflict(None) => {
                change.again_at = core.now.plus(core.config.timing.retry);
            }
            Swapped::Unknown { reason } => {
                change.again_at = core.now.plus(core.config.timing.retry);
                if !std::mem::replace(&mut change.unreachable_said, true) {
                    core.journal(Event::RecordUnreachable { reason });
                }
            }
        }
        Turn::Stay
    }

    /// A later state of this reign's record is committed.
    pub(super) fn change_committed(&mut self, core: &mut Core, record: &Record) {
        let version = record.version();
        if self
            .change
            .as_ref()
            .is_some_and(|change| change.expect < version)
        {
            self.change = None;
        }
        if self
            .challenge
            .as_ref()
            .is_some_and(|claim| claim.base < version)
        {
            self.challenge = None;
        }
        self.followers.retain(|host, _| record.concerns(host));
        for host in core.up_peers() {
            core.send_record(&host);
            let refused = self.followers.get(&host).is_some_and(|f| f.refuses);
            if refused && !core.feeds.serves(&host) {
                self.greeted(core, &host);
            }
            if !record.concerns(&host) {
                core.feeds.stop(&host, &mut core.actions);
            }
        }
        self.note_protection(core);
        self.switchover_record_changed(core);
    }
}
