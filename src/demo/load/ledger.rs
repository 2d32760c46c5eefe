//! The checker: what one client knows about its own counters, and what an answer proves.
//!
//! Only this client increments these counters, so after `n` acknowledged increments the next
//! answer is `n + 1`. Increments that were sent on a connection that broke before they were
//! answered may have been executed or not: each widens what may come by one.

/// What a client knows about one counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// The last value that was acknowledged (or found at the start).
    acknowledged: u64,
    /// Increments that were sent and will never be answered.
    uncertain: u64,
}

/// What an answer proves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it must be.
    Right,
    /// Lower than it can be: so many acknowledged increments were taken back.
    Undone(u64),
    /// Higher than it can be: so many increments were executed that nobody asked for.
    Repeated(u64),
}

impl Counter {
    /// A counter found at this value.
    pub const fn starting_at(value: u64) -> Self {
        Self {
            acknowledged: value,
            uncertain: 0,
        }
    }

    /// The last acknowledged value.
    pub const fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// An increment was answered with this value.
    pub fn answered(&mut self, value: u64) -> Verdict {
        let lowest = self.acknowledged.saturating_add(1);
        let verdict = self.judge(value, lowest);
        self.uncertain -= value.saturating_sub(lowest).min(self.uncertain);
        self.acknowledged = value;
        verdict
    }

    /// An increment was sent, and its connection broke.
    pub const fn unanswered(&mut self) {
        self.uncertain += 1;
    }

    /// The counter is read at the end. Too low a value means that acknowledged increments are lost.
    pub fn read_back(&self, value: u64) -> Verdict {
        self.judge(value, self.acknowledged)
    }

    fn judge(&self, value: u64, lowest: u64) -> Verdict {
        let highest = lowest.saturating_add(self.uncertain);
        if value < lowest {
            Verdict::Undone(lowest - value)
        } else if value > highest {
            Verdict::Repeated(value - highest)
        } else {
            Verdict::Right
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_must_rise_by_one() {
        let mut counter = Counter::starting_at(5);
        assert_eq!(counter.answered(6), Verdict::Right);
        assert_eq!(counter.answered(7), Verdict::Right);
        assert_eq!(counter.answered(7), Verdict::Undone(1));
        assert_eq!(counter.answered(5), Verdict::Undone(3));
        assert_eq!(counter.answered(7), Verdict::Repeated(1));
        assert_eq!(counter.read_back(7), Verdict::Right);
        assert_eq!(counter.read_back(6), Verdict::Undone(1));
        assert_eq!(counter.read_back(8), Verdict::Repeated(1));
    }

    #[test]
    fn an_unanswered_increment_may_count_or_not_but_once() {
        let mut counter = Counter::starting_at(1);
        counter.unanswered();
        assert_eq!(counter.read_back(1), Verdict::Right);
        assert_eq!(counter.read_back(2), Verdict::Right);
        assert_eq!(counter.read_back(3), Verdict::Repeated(1));
        let mut twin = counter;
        assert_eq!(twin.answered(3), Verdict::Right);
        assert_eq!(twin.answered(5), Verdict::Repeated(1));
        assert_eq!(counter.answered(2), Verdict::Right);
        assert_eq!(counter.answered(4), Verdict::Right);
        assert_eq!(counter.answered(6), Verdict::Repeated(1));
    }
}
