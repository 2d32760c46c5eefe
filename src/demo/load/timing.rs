//! How long answers took, and when none came.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Latencies in buckets that are at most 1/32 wide, from a microsecond to days.
#[derive(Clone, Debug, Default)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    longest: Duration,
}

/// Buckets for each doubling.
const STEPS: u64 = 32;

impl Histogram {
    /// Counts one.
    pub fn record(&mut self, latency: Duration) {
        let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let index = Self::index(micros);
        if self.buckets.len() <= index {
            self.buckets.resize(index + 1, 0);
        }
        self.buckets[index] += 1;
        self.count += 1;
        self.longest = self.longest.max(latency);
    }

    /// Adds all of another one.
    pub fn merge(&mut self, other: &Self) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.longest = self.longest.max(other.longest);
    }

    /// How many were counted.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The longest.
    pub const fn longest(&self) -> Duration {
        self.longest
    }

    /// The latency that this share of all (0 to 1) did not exceed, to 1/32 of it.
    pub fn quantile(&self, share: f64) -> Duration {
        #[allow(
            clippy::cast_precision_loss,
            clippy::cast_sign_loss,
            reason = "counts are far below 2^52 and the product is not negative"
        )]
        let rank = (share.clamp(0.0, 1.0) * self.count as f64).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= rank.max(1) {
                return Duration::from_micros(Self::highest(index)).min(self.longest);
            }
        }
        self.longest
    }

    /// Small values have a bucket each; larger ones share one with their neighbours.
    fn index(micros: u64) -> usize {
        let doublings = micros.max(1).ilog2().saturating_sub(STEPS.ilog2());
        (u64::from(doublings) * STEPS + (micros >> doublings)) as usize
    }

    /// The highest value of a bucket.
    fn highest(index: usize) -> u64 {
        let index = index as u64;
        let doublings = (index / STEPS).saturating_sub(1);
        let step = index - doublings * STEPS;
        ((step + 1) << doublings) - 1
    }
}

/// A time without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The last answer before it, or the question if that came later.
    pub from: Instant,
    /// The answer that ended it.
    pub until: Instant,
}

impl Gap {
    /// How long it was.
    pub fn length(&self) -> Duration {
        self.until.saturating_duration_since(self.from)
    }
}

/// Shorter gaps between the answers of all clients together are not remembered.
pub const SHORTEST_GAP: Duration = Duration::from_millis(1);

/// How many gaps are remembered: the oldest are forgotten first.
const MOST_GAPS: usize = 100_000;

/// When answers came, whoever got them.
#[derive(Debug, Default)]
pub struct Timeline {
    last: Option<Instant>,
    gaps: VecDeque<Gap>,
}

impl Timeline {
    /// An answer has come.
    pub fn answer(&mut self, at: Instant) {
        if let Some(from) = self.last
            && at.saturating_duration_since(from) >= SHORTEST_GAP
        {
            if self.gaps.len() == MOST_GAPS {
                self.gaps.pop_front();
            }
            self.gaps.push_back(Gap { from, until: at });
        }
        self.last = self.last.max(Some(at));
    }

    /// The last answer.
    pub const fn last(&self) -> Option<Instant> {
        self.last
    }

    /// When the first answer after this instant came, to [`SHORTEST_GAP`]; `None` when none has.
    pub fn first_answer_after(&self, instant: Instant) -> Option<Instant> {
        if self.last.is_none_or(|last| last <= instant) {
            return None;
        }
        let next = self.gaps.partition_point(|gap| gap.until <= instant);
        match self.gaps.get(next) {
            Some(gap) if gap.from <= instant => Some(gap.until),
            // Answers came all the time.
            _ => Some(instant),
        }
    }

    /// The longest time without any answer that touches these.
    pub fn longest_gap_between(&self, from: Instant, until: Instant) -> Option<Gap> {
        self.gaps
            .iter()
            .filter(|gap| gap.until > from && gap.from < until)
            .max_by_key(|gap| gap.length())
            .copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_near_the_truth() {
        let mut histogram = Histogram::default();
        let mut other = Histogram::default();
        for micros in 1..=100_000u64 {
            let half = if micros % 2 == 0 {
                &mut histogram
            } else {
                &mut other
            };
            half.record(Duration::from_micros(micros));
        }
        histogram.merge(&other);
        assert_eq!(histogram.count(), 100_000);
        assert_eq!(histogram.longest(), Duration::from_millis(100));
        for (share, truth) in [
            (0.5, 50_000u64),
            (0.99, 99_000),
            (0.0001, 10),
            (1.0, 100_000),
        ] {
            let found = histogram.quantile(share).as_micros() as u64;
            assert!(
                found >= truth && found <= truth + truth / 16,
                "{share}: {found} instead of {truth}"
            );
        }
    }

    #[test]
    fn buckets_hold_what_they_say() {
        for micros in (0..5_000).chain([1 << 20, (1 << 40) + 12_345, u64::MAX >> 1]) {
            let index = Histogram::index(micros);
            assert!(Histogram::highest(index) >= micros, "{micros}");
            assert!(
                index == 0 || Histogram::highest(index - 1) < micros,
                "{micros}"
            );
        }
    }

    #[test]
    fn the_first_answer_after_an_instant_ends_its_gap() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut timeline = Timeline::default();
        for millis in [0, 10, 10, 400, 401] {
            timeline.answer(at(millis));
        }
        assert_eq!(timeline.first_answer_after(at(5)), Some(at(10)));
        assert_eq!(timeline.first_answer_after(at(100)), Some(at(400)));
        assert_eq!(timeline.first_answer_after(at(401)), None);
        let gap = timeline.longest_gap_between(at(5), at(401)).expect("a gap");
        assert_eq!((gap.from, gap.until), (at(10), at(400)));
        assert_eq!(gap.length(), Duration::from_millis(390));
    }
}
