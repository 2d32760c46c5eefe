//! Is the primary dead? Silence, the order of claiming, and asking others before anything durable
//! is done; and what to do when nobody is left who could be promoted.

use std::collections::BTreeSet;

use super::super::config::BACKLOG_FREE;
use super::super::controller::Kind;
use super::super::core::Core;
use super::super::event::Event;
use super::super::message::Message;
use super::super::name::HostName;
use super::super::node::Turn;
use super::super::record::{Acks, Member, Record, Version};
use super::super::time::Span;
use super::{Inquiry, Replica};

/// About what executing one entry takes.
const BACKLOG_ENTRY: Span = Span::from_micros(20);
/// A copy waits no longer than this for one that has executed more.
const BACKLOG_MOST: Span = Span::from_millis(500);

impl Replica {
    pub(super) fn inquired(&mut self, core: &mut Core, from: &HostName, base: Version) {
        let alive = core.version() > base || self.vouches(core);
        core.heard(from, base, alive);
        core.inform(from, base);
    }

    pub(super) fn heard(
        &mut self,
        core: &mut Core,
        from: &HostName,
        base: Version,
        alive: bool,
    ) -> Turn {
        let Some(inquiry) = self.inquiry.as_mut().filter(|i| i.base == base) else {
            return Turn::Stay;
        };
        if !alive {
            inquiry.silent.insert(from.clone());
            return self.consider_claim(core);
        }
        self.inquiry = None;
        core.somebody_runs_it();
        self.not_before = core.now.plus(core.config.timing.suspicion_floor);
        if let Some(record) = &core.record {
            let primary = record.primary.host.clone();
            let by = from.clone();
            core.journal(Event::SuspicionLifted { primary, by });
        }
        Turn::Stay
    }

    /// How long this host waits for the primary before it inquires.
    pub(super) fn patience(&self, core: &Core, record: &Record) -> Span {
        let timing = &core.config.timing;
        let rank = record.rank(core.host()).unwrap_or(0) as u64;
        let base = if self.abdicated {
            Span::ZERO
        } else {
            self.detector.patience(timing)
        };
        base.plus(timing.stagger.times(rank))
            .plus(Self::backlog_wait(core))
    }

    /// Whoever has less of its log to execute claims first: clients wait for whatever a new primary
    /// has still to replay. Bounded, because a copy that is behind is better than none.
    fn backlog_wait(core: &Core) -> Span {
        let behind = core.log.appended.index.since(core.executed);
        if behind <= BACKLOG_FREE {
            return Span::ZERO;
        }
        BACKLOG_ENTRY.times(behind).min(BACKLOG_MOST)
    }

    pub(super) fn watch(&mut self, core: &mut Core) -> Turn {
        let Some(record) = core.record.clone() else {
            return Turn::Stay;
        };
        Self::say_what_it_takes(core);
        let silence = self.silence(core);
        let suspicious = self.abdicated || silence >= self.detector.patience(&core.config.timing);
        if !suspicious {
            return Turn::Stay;
        }
        if !core.is_copy() {
            return self.cold_boot(core, &record);
        }
        if !self.suspected && record.primary.host != *core.host() {
            self.suspected = true;
            core.journal(Event::Suspected {
                primary: record.primary.host.clone(),
                silence_ms: silence.as_millis(),
            });
        }
        if self.is_stopped(core) {
            return Turn::Stay;
        }
        let fit = core.executed >= core.unfit_before && core.full.is_none();
        let due = fit && silence >= self.patience(core, &record) && core.now >= self.not_before;
        if due && self.inquiry.is_none() && self.sealing.is_none() {
            self.inquire(core, &record);
        }
        self.consider_claim(core)
    }

    /// Whether nobody claims any more because reign after reign has failed at one place: the next
    /// copy would only execute the same instruction.
    fn is_stopped(&mut self, core: &mut Core) -> bool {
        let Some(stumble) = Self::stopped_at(core) else {
            return false;
        };
        if !std::mem::replace(&mut self.stopped_said, true) {
            core.journal(Event::GuestStopsHosts {
                at: stumble.at,
                reigns: stumble.reigns,
                reason: stumble.reason,
            });
        }
        true
    }

    fn inquire(&mut self, core: &mut Core, record: &Record) {
        let base = record.version();
        let mut asked = BTreeSet::new();
        for host in core.up_peers() {
            if record.copy_on(&host).is_some() {
                core.send(&host, Message::Inquire { base });
                asked.insert(host);
            }
        }
        self.inquiry = Some(Inquiry {
            base,
            since: core.now,
            confirmed: false,
            silent: BTreeSet::new(),
            asked,
        });
        self.read_at = core.now.plus(core.config.timing.retry);
        core.read_record();
    }

    pub(super) fn consider_claim(&mut self, core: &mut Core) -> Turn {
        let Some(inquiry) = &self.inquiry else {
            return Turn::Stay;
        };
        // As long as those who were asked are far away, and no longer than others take over.
        let timing = &core.config.timing;
        let far = core.farthest(&inquiry.asked).times(2);
        let patience = timing.inquiry.max(far.min(timing.inquiry_most));
        let waited = core.now.since(inquiry.since) >= patience;
        let everybody = inquiry.asked.iter().all(|h| inquiry.silent.contains(h));
        if !(inquiry.confirmed && (waited || everybody)) {
            return Turn::Stay;
        }
        match core.record.clone() {
            Some(base)
                if base.version() == inquiry.base
                    && core.latest_base() == inquiry.base
                    && core.is_copy() =>
            {
                Turn::Claim {
                    kind: Kind::Succession {
                        awake: inquiry.silent.clone(),
                        stumble: core.stumble.clone(),
                    },
                    base: Some(base),
                }
            }
            _ => {
                self.inquiry = None;
                Turn::Stay
            }
        }
    }

    /// Nobody has run the guest for long, and nothing that this host can do has changed that: an
    /// operator is told what can.
    fn say_what_it_takes(core: &mut Core) {
        let silence = core.nobody_for();
        if core.waiting_said
            || silence < core.config.timing.despair
            || core.keeper_set_back.is_some()
            || Self::stopped_at(core).is_some()
        {
            return;
        }
        core.waiting_said = true;
        let (vm, host) = (&core.config.vm, core.host());
        if !core.has_something() {
            if !core.somebody_has_something() {
                let why = format!(
                    "nobody has run {vm} for {} s, and no host that can be reached has a log or disks \
                     of it: start the others, or boot it anew by 'understudy pair {vm} --image IMAGE \
                     --primary {host} --start-over', or go on with another's by --accept-loss",
                    silence.as_millis() / 1_000
                );
                core.journal(Event::Waiting { why });
            }
            return;
        }
        let why = format!(
            "nobody has run {vm} for {} s, and too few of the copies that its record names can be \
             reached, or have what it takes: start them, or go on with what {host} has by \
             'understudy switchover {vm} --to {host} --accept-loss'",
            silence.as_millis() / 1_000
        );
        core.journal(Event::Waiting { why });
    }

    /// Everybody has lost what was only in memory: the host that was the primary has the disks.
    fn cold_boot(&mut self, core: &mut Core, record: &Record) -> Turn {
        // A primary that never came to run the guest has not got the disks either. (A later term
        // than the record's is that of a cold boot that did not come through.)
        let here = record.primary.host == *core.host() && core.has_disks_of() >= record.term;
        if !here || record.policy.acks != Acks::Memory || !core.settled() {
            return Turn::Stay;
        }
        // What a host holds counts from when it has heard of this very record: an older greeting may
        // be from before it became a member.
        let base = record.version();
        let gone = |member: &Member| {
            let holding = self.holdings.get(&member.host);
            self.holdings_for == base && holding.is_some_and(|held| *held != member.incarnation)
        };
        let missing: Vec<_> = record.members.iter().filter(|m| !gone(m)).collect();
        if core.now >= self.ask_at {
            self.ask_at = core.now.plus(core.config.timing.retry);
            for member in &missing {
                core.send(&member.host, Message::Inquire { base });
            }
        }
        if missing.is_empty() {
            return Turn::Claim {
                kind: Kind::Cold,
                base: Some(record.clone()),
            };
        }
        if !core.waiting_said {
            core.waiting_said = true;
            let names: Vec<_> = missing.iter().map(ToString::to_string).collect();
            core.journal(Event::Waiting {
                why: format!(
                    "lost its memory and boots from its disks only when {} cannot have the log \
                     any more: start it, or go on without it by 'understudy switchover {} --to {} \
                     --accept-loss'",
                    names.join(", "),
                    core.config.vm,
                    core.host()
                ),
            });
        }
        Turn::Stay
    }
}
