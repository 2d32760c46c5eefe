//! The simulated keeper of records: one record, compare-and-set, sometimes down.

use crate::protocol::{Committed, Proof, Record, Swapped, Version};

/// What a host asks of it.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Read,
    Swap {
        expect: Option<Version>,
        new: Box<Record>,
    },
}

/// What it says.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Read(Option<Committed>),
    Swapped(Swapped),
}

/// The keeper.
#[derive(Debug, Default)]
pub(super) struct Witness {
    /// Survives its crashes.
    pub(super) record: Option<Record>,
    pub(super) down: u32,
}

fn unproven(record: Record) -> Committed {
    Committed {
        record,
        proof: Proof::default(),
    }
}

impl Witness {
    fn committed(&self) -> Option<Committed> {
        self.record.clone().map(unproven)
    }

    /// Answers; the record has changed if the second value says so.
    pub(super) fn ask(&mut self, ask: Ask) -> (Answer, bool) {
        match ask {
            Ask::Read => (Answer::Read(self.committed()), false),
            Ask::Swap { expect, new } => {
                let current = self.record.as_ref().map(Record::version);
                if current == expect && new.may_follow(self.record.as_ref()).is_ok() {
                    self.record = Some(new.as_ref().clone());
                    (Answer::Swapped(Swapped::Done(unproven(*new))), true)
                } else {
                    let conflict = Swapped::Conflict(self.committed());
                    (Answer::Swapped(conflict), false)
                }
            }
        }
    }
}
