//! Nobody deletes the last log: a copy that holds everything that was let out deletes its log only
//! while another log that holds it exists somewhere.

use replay_log::{LogIndex, Store};

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct LastLogStays;

impl Invariant for LastLogStays {
    fn name(&self) -> &'static str {
        "last_log_stays"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        let Fact::Dropped { log, aside: false } = fact else {
            return Ok(());
        };
        let released = view.released;
        let had = log.chain_at(released.index).ok().flatten() == Some(released.chain);
        if released.index == LogIndex::START || !had {
            return Ok(());
        }
        let mut others = view.hosts.iter();
        if others.any(|host| host.chain_at(released.index) == Some(released.chain)) {
            return Ok(());
        }
        Err(format!(
            "the last log with what was let out through {} was deleted",
            released.index
        ))
    }
}
