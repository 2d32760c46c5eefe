//! Output that waits, replicas that fall behind: what is said about it, and when the guest is slowed.

use super::super::api::Action;
use super::super::core::Core;
use super::super::event::Event;
use super::super::record::OnLoss;
use super::super::time::Span;
use super::Primary;

/// Output that waits this many heartbeats is worth a line in the journal.
const STALL_HEARTBEATS: u64 = 10;

impl Primary {
    pub(super) fn watch_stall(&mut self, core: &mut Core) {
        if self.committed >= core.log.appended.index {
            if let Some(since) = self.waiting_since.take()
                && std::mem::take(&mut self.stalled)
            {
                core.journal(Event::OutputResumed {
                    after_ms: core.now.since(since).as_millis(),
                });
            }
            return;
        }
        let committed = core.committed;
        let since = match self.waiting_since {
            Some(since) if self.pace.stuck_at(committed) => since,
            _ => {
                self.pace.note(committed);
                *self.waiting_since.insert(core.now)
            }
        };
        let limit = core.config.timing.heartbeat.times(STALL_HEARTBEATS);
        if core.now.since(since) < limit {
            return;
        }
        if !self.stalled
            && let Some(record) = core.record.clone()
        {
            self.stalled = true;
            let tail = core.log.appended.index;
            let members = record.members.iter();
            let held_by = members.filter(|m| self.holds(m, tail)).count();
            core.journal(Event::OutputStalled {
                held_by: held_by + usize::from(core.held() >= tail),
                needed: record.needed(),
            });
        }
        // Whoever cannot be heard may be following another primary by now.
        if core.now >= self.read_at {
            self.read_at = core.now.plus(core.config.timing.retry);
            core.read_record();
        }
    }

    pub(super) fn watch_pace(&mut self, core: &mut Core) {
        let in_vain = self.throttled && self.slowed_in_vain(core);
        if in_vain {
            // Whoever has not come nearer while the guest stood still will not: the guest goes on,
            // and the replica is let to catch up as one that is new.
            for follower in self.followers.values_mut() {
                follower.has_kept_up = false;
            }
        }
        let bounds = core.config.bounds;
        let limit = core.config.timing.lag_limit;
        let lag = self.worst_lag(core);
        let half = self.throttled;
        let over = |value: u64, bound: u64| value > if half { bound / 2 } else { bound };
        let why = if over(lag.as_nanos(), limit.as_nanos()) {
            format!("a replica executes {lag} behind")
        } else if over(self.pace.uncommitted_bytes(), bounds.uncommitted_log) {
            "too much log is not committed".to_owned()
        } else if over(self.output_waits, bounds.waiting_output) {
            "too much output waits for its commit".to_owned()
        } else {
            String::new()
        };
        let on = !why.is_empty();
        if on != self.throttled {
            self.throttled_at = core.now;
            self.throttled = on;
            core.do_(Action::Throttle { on });
            let why = if on {
                why
            } else if in_vain {
                "a replica comes no nearer, and is waited for no more".to_owned()
            } else {
                "everybody keeps up".to_owned()
            };
            core.journal(Event::Throttled { on, why });
        }
    }

    /// Whether the guest has been held back for a replica for too long.
    fn slowed_in_vain(&self, core: &Core) -> bool {
        // Where lost replicas are removed, none keeps clients waiting for longer than that takes.
        let timing = &core.config.timing;
        let patience = match Self::on_loss(core) {
            OnLoss::Shrink => timing.slow_patience.min(timing.shrink_after),
            OnLoss::Stall => timing.slow_patience,
        };
        self.worst_lag(core) > Span::ZERO && core.now.since(self.throttled_at) >= patience
    }

    fn worst_lag(&self, core: &Core) -> Span {
        let Some(record) = &core.record else {
            return Span::ZERO;
        };
        // A replica that replays from the beginning is not lagging yet: it has to be let.
        let members = record.members.iter();
        members
            .filter_map(|member| self.followers.get(&member.host))
            .filter(|follower| follower.has_kept_up)
            .map(|follower| self.pace.lag(core.now, follower.executed))
            .max()
            .unwrap_or_default()
    }
}
