//! A primary that hears nobody removes nobody: it is the one that is lost, and those it would remove
//! are the only ones that can go on.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct TheDeafRemoveNobody;

impl Invariant for TheDeafRemoveNobody {
    fn name(&self) -> &'static str {
        "the_deaf_remove_nobody"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Removed { host, for_ms } => Err(format!(
                "{} had a member removed when it had heard nobody for {for_ms} ms",
                view.hosts[*host].name
            )),
            _ => Ok(()),
        }
    }
}
