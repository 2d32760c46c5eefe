//! Equal digests at equal positions: no copy's machine ever does anything but what the log says.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct DigestsAgree;

impl Invariant for DigestsAgree {
    fn name(&self) -> &'static str {
        "digests_agree"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Diverged { host, what } => Err(format!("on host {host}: {what}")),
            _ => Ok(()),
        }
    }
}
