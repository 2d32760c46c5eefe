//! How long a simulated host waits for an answer of the keeper: as long as its answers have taken
//! before, several times over.

use super::queue::{Moment, SECOND};

/// No answer is given up sooner.
const LEAST: Moment = SECOND;
/// And none is waited for longer.
const MOST: Moment = 10 * SECOND;
/// So many times the worst of the smoothed round trips.
const TIMES: u64 = 4;

/// What a host has measured of its questions to the keeper.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KeeperPatience {
    read: Option<Moment>,
    swap: Option<Moment>,
    /// How many questions in a row had no answer.
    unanswered: u32,
}

impl KeeperPatience {
    /// How long the next answer is waited for.
    pub(super) fn span(&self) -> Moment {
        let worst = self.read.max(self.swap).unwrap_or(0);
        let span = (TIMES * worst).max(LEAST) << self.unanswered.min(4);
        span.min(MOST)
    }

    /// An answer took so long.
    pub(super) fn answered(&mut self, swap: bool, took: Moment) {
        self.unanswered = 0;
        let smoothed = if swap { &mut self.swap } else { &mut self.read };
        *smoothed = Some(smoothed.map_or(took, |before| before - before / 8 + took / 8));
    }

    /// No answer came in time.
    pub(super) fn unanswered(&mut self) {
        self.unanswered += 1;
    }
}
