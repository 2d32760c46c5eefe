//! Whom no record concerns gets no promise, no log and no stream of it.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct StrangersLearnNothing;

impl Invariant for StrangersLearnNothing {
    fn name(&self) -> &'static str {
        "strangers_learn_nothing"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Leaked { to, what } => Err(format!("{to}, whom no record concerns, got {what}")),
            _ => Ok(()),
        }
    }
}
