//! Nobody deletes the last log: a copy that holds everything that was let out deletes its log only
//! while another log that holds it exists somewhere. What was given up, by an operator's order or by
//! a boot from disks, is evidence: the last log with it may be set aside, and is not deleted.

use replay_log::{LogIndex, Store};

use super::super::facts::{Fact, Invariant, Released, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct LastLogStays {
    now: Released,
    given_up: Vec<Released>,
}

impl Invariant for LastLogStays {
    fn name(&self) -> &'static str {
        "last_log_stays"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        if let Fact::LossAccepted { .. } | Fact::Lost { .. } = fact
            && self.now != view.released
        {
            self.given_up.push(self.now);
        }
        self.now = view.released;
        let Fact::Dropped { log, aside: false } = fact else {
            return Ok(());
        };
        let holds = |released: &&Released| {
            released.index > LogIndex::START
                && log.chain_at(released.index).ok().flatten() == Some(released.chain)
        };
        let last = |released: &&Released| {
            let mut others = view.hosts.iter();
            !others.any(|host| host.chain_at(released.index) == Some(released.chain))
        };
        let all = self.given_up.iter().chain([&self.now]);
        match all.filter(holds).find(last) {
            Some(released) => Err(format!(
                "the last log with what was let out through {} was deleted",
                released.index
            )),
            None => Ok(()),
        }
    }
}
