//! How long an answer of the witness is waited for: several times what its answers have taken
//! lately. A fixed patience that is shorter than a slow disk needs would give every question up just
//! before it is answered.

use std::time::Duration;

/// Never less: the first answer takes a handshake, too.
const LEAST: Duration = Duration::from_secs(1);
/// Never more: whoever does not answer at all is noticed by the connection.
const MOST: Duration = Duration::from_secs(10);
/// So many times the slowest of lately.
const TIMES: u32 = 4;

/// What is known of how long answers take.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Patience {
    /// The slowest answer, forgotten little by little.
    slowest: Duration,
}

impl Patience {
    /// How long to wait now.
    pub(super) fn now(self) -> Duration {
        (self.slowest * TIMES).clamp(LEAST, MOST)
    }

    /// An answer took this long.
    pub(super) fn answered(&mut self, after: Duration) {
        let faded = self.slowest * 7 / 8 + after / 8;
        self.slowest = after.max(faded).min(MOST);
    }

    /// None came within [`Patience::now`]: it would have taken longer.
    pub(super) fn exhausted(&mut self) {
        self.slowest = (self.now() / 2).min(MOST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_grows_with_what_answers_take_and_shrinks_again() {
        let mut patience = Patience::default();
        assert_eq!(patience.now(), LEAST);
        patience.answered(Duration::from_millis(900));
        assert_eq!(patience.now(), Duration::from_millis(3_600));
        for _ in 0..100 {
            patience.answered(Duration::from_millis(2));
        }
        assert_eq!(patience.now(), LEAST);
        // Nothing is known of an answer that did not come but that it takes longer.
        let mut waited = Duration::ZERO;
        for _ in 0..5 {
            assert!(patience.now() > waited || patience.now() == MOST);
            waited = patience.now();
            patience.exhausted();
        }
        assert_eq!(patience.now(), MOST);
        patience.answered(Duration::from_secs(100));
        assert_eq!(patience.now(), MOST);
    }
}
