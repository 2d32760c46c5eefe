//! Nobody deletes the last log: a copy that holds everything that was let out deletes its log only
//! while another log that holds it exists somewhere. What was given up, by an operator's order or by
//! a boot from disks, is evidence: the last log with it may be set aside, and is not deleted.
//!
//! Where disks lied and more was lost than the rule survives, nobody has given anything up, and no
//! record says so. Then only a host that knows how much was let out can see that the new reign has
//! begun with less, and only such a host is held to it: what was let out is not durable knowledge, and a
//! dead primary's log has nearly always an end that was never let out and counts for nothing.

use replay_log::{LogIndex, Store};

use super::super::facts::{Fact, Invariant, Released, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct LastLogStays {
    now: Released,
    given_up: Vec<GivenUp>,
}

/// What was let out and is in no reign's log any more.
#[derive(Debug)]
struct GivenUp {
    released: Released,
    /// Nobody was told.
    hidden: bool,
}

impl Invariant for LastLogStays {
    fn name(&self) -> &'static str {
        "last_log_stays"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        if let Fact::LossAccepted { .. } | Fact::Lost { .. } = fact
            && self.now != view.released
        {
            self.given_up.push(GivenUp {
                released: self.now,
                hidden: matches!(fact, Fact::LossAccepted { hidden: true, .. }),
            });
        }
        self.now = view.released;
        let Fact::Dropped {
            log,
            aside: false,
            knew,
        } = fact
        else {
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
        let told = |gone: &&GivenUp| !gone.hidden || *knew >= gone.released.index;
        let given_up = self.given_up.iter().filter(told).map(|gone| &gone.released);
        let all = given_up.chain([&self.now]);
        match all.filter(holds).find(last) {
            Some(released) => Err(format!(
                "the last log with what was let out through {} was deleted",
                released.index
            )),
            None => Ok(()),
        }
    }
}
