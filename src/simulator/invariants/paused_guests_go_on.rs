//! A guest that was stopped for a switchover goes on within a bound, there or elsewhere, whatever
//! the keeper of records does; except while the target has asked the keeper for its record and
//! nobody knows what came of it.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct PausedGuestsGoOn;

impl Invariant for PausedGuestsGoOn {
    fn name(&self) -> &'static str {
        "paused_guests_go_on"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Watched(watched) => match &watched.paused {
                Some((host, span, most)) if span > most => Err(format!(
                    "the guest on {host} has stood paused for {} ms",
                    span / 1_000_000
                )),
                _ => Ok(()),
            },
            _ => Ok(()),
        }
    }
}
