//! Suspecting a primary: phi-accrual over its heartbeats, with a floor, in the time that this node
//! itself was awake.
//!
//! Accrual asks how improbable the present silence is, given how irregular the heartbeats have
//! been. With a normal distribution and a threshold of φ = 8 (one wrong suspicion in 10⁸
//! intervals) that is a silence of the mean and 5.6 standard deviations.

use super::config::Timing;
use super::time::{Span, Time};

/// The quantile of the standard normal distribution for 1 − 10⁻⁸, in tenths.
const PHI_8_TENTHS: u64 = 56;
/// How much one interval weighs in mean and variance: a sixteenth.
const WEIGHT_SHIFT: u32 = 4;

/// The time a node has been awake: it stands still while the node is not called.
///
/// A node asks to be called at every heartbeat. Whatever a gap is longer than that (a busy
/// machine, a stopped process) it has not been listening, and a silence it did not listen to
/// proves nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attention {
    last: Time,
    awake: Time,
    limit: Span,
}

impl Attention {
    pub(super) fn new(now: Time, timing: &Timing) -> Self {
        Self {
            last: now,
            awake: Time::default(),
            limit: timing.attention,
        }
    }

    /// The node is called.
    pub(super) fn called(&mut self, now: Time) {
        let gap = now.since(self.last);
        self.last = self.last.max(now);
        self.awake = self.awake.plus(gap.min(self.limit));
    }

    /// The time on the clock that stands still while nobody calls.
    pub(super) fn awake(&self) -> Time {
        self.awake
    }
}

/// Watches one primary. All times are awake times.
#[derive(Clone, Copy, Debug)]
pub(super) struct Detector {
    heard: Time,
    beat: Option<Time>,
    mean_us: u64,
    variance_us2: u64,
}

impl Detector {
    /// Begins to watch; the primary counts as heard now.
    pub(super) fn new(awake: Time, timing: &Timing) -> Self {
        Self {
            heard: awake,
            beat: None,
            mean_us: timing.heartbeat.as_nanos() / 1_000,
            variance_us2: 0,
        }
    }

    /// Anything came from the primary.
    pub(super) fn heard(&mut self, awake: Time) {
        self.heard = self.heard.max(awake);
    }

    /// A heartbeat came, which it sends regularly.
    pub(super) fn beat(&mut self, awake: Time) {
        self.heard(awake);
        if let Some(before) = self.beat.replace(awake) {
            // A single interval counts for no more than ten seconds.
            let interval = (awake.since(before).as_nanos() / 1_000).min(10_000_000);
            let off = interval.abs_diff(self.mean_us);
            self.mean_us = blend(self.mean_us, interval);
            self.variance_us2 = blend(self.variance_us2, off * off);
        }
    }

    /// For how long nothing came.
    pub(super) fn silence(&self, awake: Time) -> Span {
        awake.since(self.heard)
    }

    /// The silence at which the primary is suspected.
    pub(super) fn patience(&self, timing: &Timing) -> Span {
        let improbable = self.mean_us + PHI_8_TENTHS * self.variance_us2.isqrt() / 10;
        Span::from_micros(improbable)
            .min(timing.suspicion_ceiling)
            .max(timing.suspicion_floor)
    }
}

fn blend(average: u64, sample: u64) -> u64 {
    average - (average >> WEIGHT_SHIFT) + (sample >> WEIGHT_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Time {
        Time::from_nanos(ms * 1_000_000)
    }

    #[test]
    fn a_regular_primary_is_suspected_at_the_floor() {
        let timing = Timing::default();
        let mut detector = Detector::new(at(0), &timing);
        for beat in 0..500 {
            detector.beat(at(beat * 20));
        }
        assert_eq!(detector.patience(&timing), timing.suspicion_floor);
        assert_eq!(detector.silence(at(499 * 20 + 7)).as_millis(), 7);
    }

    #[test]
    fn an_irregular_primary_is_given_more_time_but_not_without_end() {
        let timing = Timing::default();
        let mut detector = Detector::new(at(0), &timing);
        let mut now = 0;
        for beat in 0..500 {
            now += if beat % 4 == 0 { 190 } else { 5 };
            detector.beat(at(now));
        }
        let patience = detector.patience(&timing);
        assert!(patience > timing.suspicion_floor, "{patience}");
        now += 9_000_000;
        detector.beat(at(now));
        assert_eq!(detector.patience(&timing), timing.suspicion_ceiling);
    }

    #[test]
    fn silence_does_not_count_while_the_node_sleeps() {
        let timing = Timing::default();
        let mut attention = Attention::new(at(0), &timing);
        let detector = Detector::new(attention.awake(), &timing);
        attention.called(at(20));
        attention.called(at(10_000));
        let silence = detector.silence(attention.awake());
        assert_eq!(silence, Span::from_millis(20).plus(timing.attention));
    }
}
