//! Terms lead to reigns: while nothing is broken anew, no more than a few are claimed or committed
//! in a row without a guest that runs by one of them.

use replay_log::Term;

use super::super::facts::{Fact, Invariant, View};

/// So many terms may be committed in a row without a guest that runs: a new primary may find that
/// its VMM cannot go on.
const COMMITTED: u32 = 4;
/// So many terms may be claimed in a row.
const CLAIMED: u32 = 40;

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct TermsComeToLife {
    committed: u32,
    claimed: u32,
    term: Term,
}

impl Invariant for TermsComeToLife {
    fn name(&self) -> &'static str {
        "terms_come_to_life"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Disturbed | Fact::WentLive => {
                self.committed = 0;
                self.claimed = 0;
            }
            Fact::Recorded(record) if record.term > self.term => {
                self.term = record.term;
                self.committed += 1;
                if self.committed > COMMITTED {
                    return Err(format!(
                        "term {} is the {}th in a row that was committed, and by none of them the \
                         guest has run",
                        record.term, self.committed
                    ));
                }
            }
            Fact::Claimed { term } => {
                self.claimed += 1;
                if self.claimed > CLAIMED {
                    return Err(format!(
                        "term {term} is the {}th in a row that was claimed with enough copies \
                         there, and by none of them the guest has run",
                        self.claimed
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
