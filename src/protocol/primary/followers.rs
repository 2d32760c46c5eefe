//! Who holds how much of the log, and how far behind they execute it.

use std::collections::VecDeque;

use replay_log::LogIndex;

use super::super::core::Core;
use super::super::message::{Ack, Health};
use super::super::mutation::Mutation;
use super::super::name::{Incarnation, VmRun};
use super::super::record::Member;
use super::super::time::{Span, Time};
use super::Primary;

/// How often the tail of the log is noted, for measuring lag.
const SAMPLE: Span = Span::from_millis(5);
/// How many of these notes are kept: 20 s.
const SAMPLES: usize = 4_096;
/// Bytes of log that count as one when the uncommitted ones are summed up.
const GRAIN: u64 = 64 << 10;

/// A host that takes this primary's log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Follower {
    pub(super) incarnation: Incarnation,
    /// It holds this reign's log through here.
    pub(super) held: LogIndex,
    pub(super) executed: LogIndex,
    /// The run of its VMM that has executed it.
    run: VmRun,
    /// Through where it has said that it holds it on the lane that keeps the order of its greetings.
    told: LogIndex,
    /// When `held` moved last, or had nothing to move to; in awake time.
    moved: Time,
    /// What keeps it from being counted on, and since when; in awake time.
    health: (Health, Time),
    /// It has greeted with less than it had held in this very incarnation.
    pub(super) forgetful: bool,
    /// It is sealed against this state of the record.
    pub(super) refuses: bool,
    /// It has once executed nearly everything: from then on falling behind is lagging.
    pub(super) has_kept_up: bool,
    acked: Time,
}

impl Follower {
    pub(super) fn new(incarnation: Incarnation, awake: Time) -> Self {
        Self {
            incarnation,
            held: LogIndex::START,
            executed: LogIndex::START,
            told: LogIndex::START,
            moved: awake,
            health: (Health::Well, awake),
            forgetful: false,
            run: VmRun::default(),
            refuses: false,
            has_kept_up: false,
            acked: awake,
        }
    }

    /// It has acknowledged. `ordered`: on the lane that keeps the order; a datagram may be an old one.
    pub(super) fn acked(&mut self, ack: &Ack, ordered: bool, awake: Time) {
        if ack.held > self.held {
            self.held = ack.held;
            self.moved = awake;
        }
        if ordered {
            self.told = self.told.max(ack.held);
        }
        if ack.run == self.run {
            self.executed = self.executed.max(ack.executed);
        } else if ordered {
            // Another VMM has begun, at the beginning of the log. It has to be let.
            self.run = ack.run;
            self.executed = ack.executed;
            self.has_kept_up = false;
        }
        if ack.health != self.health.0 {
            self.health = (ack.health, awake);
        }
        self.acked = awake;
    }

    /// This reign's members held its beginning when it was won.
    pub(super) fn begins_at(&mut self, base: LogIndex) {
        self.held = base;
        self.told = base;
    }

    /// Whether a greeting with this end of its log shows that it has lost what it held.
    pub(super) fn has_forgotten(&self, incarnation: Incarnation, tip: LogIndex) -> bool {
        incarnation == self.incarnation && tip < self.told
    }

    /// What keeps it from being counted on.
    pub(super) fn health(&self) -> Health {
        self.health.0
    }

    /// Whether it has nothing to acknowledge, or has just begun to have: what it does not move counts
    /// from then on.
    pub(super) fn note_progress(&mut self, tail: LogIndex, awake: Time) {
        if self.held >= tail {
            self.moved = awake;
        }
    }

    /// For how long it has not come on although there is more log, or its disk or VMM has been such
    /// that it could not.
    pub(super) fn stands_still(&self, awake: Time) -> Span {
        let unwell = match self.health {
            (Health::Well, _) => Span::ZERO,
            (_, since) => awake.since(since),
        };
        awake.since(self.moved).max(unwell)
    }

    /// For how long it has acknowledged nothing, in awake time.
    pub(super) fn silence(&self, awake: Time) -> Span {
        awake.since(self.acked)
    }
}

/// How the log grows: for lag in time, and for bytes that are not committed.
#[derive(Debug, Default)]
pub(super) struct Pace {
    samples: VecDeque<(Time, LogIndex)>,
    uncommitted: VecDeque<(LogIndex, u64)>,
    bytes: u64,
    noted: Option<LogIndex>,
}

impl Pace {
    pub(super) fn recorded(&mut self, now: Time, end: LogIndex, bytes: u64) {
        let due = self
            .samples
            .back()
            .is_none_or(|(at, _)| now.since(*at) >= SAMPLE);
        if due {
            if self.samples.len() == SAMPLES {
                self.samples.pop_front();
            }
            self.samples.push_back((now, end));
        }
        self.bytes += bytes;
        match self.uncommitted.back_mut() {
            Some((last, sum)) if *sum + bytes <= GRAIN => {
                *last = end;
                *sum += bytes;
            }
            _ => self.uncommitted.push_back((end, bytes)),
        }
    }

    pub(super) fn committed(&mut self, through: LogIndex) {
        while let Some((end, bytes)) = self.uncommitted.front().copied()
            && end <= through
        {
            self.uncommitted.pop_front();
            self.bytes -= bytes;
        }
    }

    pub(super) fn uncommitted_bytes(&self) -> u64 {
        self.bytes
    }

    /// How long ago the first entry was recorded that somebody has not executed, or does not hold.
    pub(super) fn lag(&self, now: Time, done: LogIndex) -> Span {
        let first = self.samples.partition_point(|(_, end)| *end <= done);
        self.samples
            .get(first)
            .map_or(Span::ZERO, |(at, _)| now.since(*at))
    }

    /// Whether the commit is where it was noted.
    pub(super) fn stuck_at(&self, committed: LogIndex) -> bool {
        self.noted == Some(committed)
    }

    pub(super) fn note(&mut self, committed: LogIndex) {
        self.noted = Some(committed);
    }
}

impl Primary {
    /// Through where this very holding is known to hold the log.
    pub(super) fn held_by(&self, member: &Member) -> LogIndex {
        let follower = self.followers.get(&member.host);
        let follower = follower.filter(|f| f.incarnation == member.incarnation);
        follower.map_or(LogIndex::START, |f| f.held)
    }

    /// Whether this very holding is known to hold the log through here.
    pub(super) fn holds(&self, member: &Member, through: LogIndex) -> bool {
        self.held_by(member) >= through
    }

    /// Whether what this very holding lacks, as far as is known, was recorded just now.
    pub(super) fn nearly_holds(&self, core: &Core, member: &Member) -> bool {
        let held = self.held_by(member);
        // What it acknowledges is a round trip old.
        let away = core.farthest([&member.host]).times(2);
        let join_lag = core.config.timing.join_lag.max(away);
        // How old what came before this reign is, nobody has noted.
        held >= self.base.index && self.pace.lag(core.now, held) <= join_lag
    }

    /// Whether this member has not acknowledged for so long that it counts as lost. One that
    /// has taken another incarnation is lost at once: it can never acknowledge as a member again.
    pub(super) fn lost(&self, core: &Core, member: &Member) -> Option<Span> {
        let follower = self.followers.get(&member.host)?;
        let silence = follower.silence(core.awake());
        let gone = follower.incarnation != member.incarnation || follower.forgetful;
        // Whoever answers and does not come on is of no more use than one that is silent.
        let stands = if core.mutated(Mutation::SilenceOnly) {
            Span::ZERO
        } else {
            follower.stands_still(core.awake())
        };
        let longest = silence.max(stands);
        (gone || longest >= core.config.timing.shrink_after).then_some(longest)
    }

    /// Notes who executes nearly as fast as the log grows.
    pub(super) fn note_pace(&mut self, core: &Core) {
        let half = Span::from_nanos(core.config.timing.lag_limit.as_nanos() / 2);
        let (tail, awake) = (core.log.appended.index, core.awake());
        for follower in self.followers.values_mut() {
            follower.note_progress(tail, awake);
            // A new reign knows of nobody's past: whoever is there has executed its beginning.
            let here = follower.executed >= self.base.index;
            if here && self.pace.lag(core.now, follower.executed) < half {
                follower.has_kept_up = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn lag_is_the_age_of_the_first_entry_not_executed() {
        let mut pace = Pace::default();
        for n in 1..=100 {
            pace.recorded(at(n * 10), LogIndex(n), 10);
        }
        assert_eq!(pace.lag(at(1_000), LogIndex(100)), Span::ZERO);
        assert_eq!(pace.lag(at(1_000), LogIndex(99)), Span::ZERO);
        assert_eq!(pace.lag(at(1_000), LogIndex(50)).as_millis(), 1_000 - 510);
        assert_eq!(pace.lag(at(1_000), LogIndex(0)).as_millis(), 990);
    }

    #[test]
    fn uncommitted_bytes_are_those_behind_the_commit() {
        let mut pace = Pace::default();
        for n in 1..=10 {
            pace.recorded(at(n), LogIndex(n), GRAIN);
        }
        assert_eq!(pace.uncommitted_bytes(), 10 * GRAIN);
        pace.committed(LogIndex(4));
        assert_eq!(pace.uncommitted_bytes(), 6 * GRAIN);
        pace.committed(LogIndex(10));
        assert_eq!(pace.uncommitted_bytes(), 0);
    }
}
