//! How long a simulated host waits for an answer of the keeper: as in production, several times as
//! long as its slowest answers have taken lately.

use super::queue::{Moment, SECOND};

/// No answer is given up sooner.
const LEAST: Moment = SECOND;
/// And none is waited for longer.
const MOST: Moment = 10 * SECOND;
/// So many times the slowest answer.
const TIMES: u64 = 4;

/// What a host has measured of its questions to the keeper.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct KeeperPatience {
    slowest: Moment,
}

impl KeeperPatience {
    /// How long the next answer is waited for.
    pub(super) fn span(self) -> Moment {
        (TIMES * self.slowest).clamp(LEAST, MOST)
    }

    /// An answer took so long.
    pub(super) fn answered(&mut self, took: Moment) {
        let faded = self.slowest * 7 / 8 + took / 8;
        self.slowest = took.max(faded).min(MOST);
    }

    /// No answer came in time: it would have taken longer.
    pub(super) fn unanswered(&mut self) {
        self.slowest = (self.span() / 2).min(MOST);
    }
}
