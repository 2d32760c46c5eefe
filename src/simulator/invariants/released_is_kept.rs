//! Each released output is in every later primary's log.

use std::collections::BTreeMap;

use replay_log::{LogTip, Term};

use super::super::facts::{Fact, Invariant, Released, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct ReleasedIsKept {
    /// Where reigns began.
    reigns: BTreeMap<Term, LogTip>,
    /// How far each of them let output out.
    released: BTreeMap<Term, Released>,
}

impl Invariant for ReleasedIsKept {
    fn name(&self) -> &'static str {
        "released_is_kept"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Lost { .. } | Fact::Booted | Fact::LossAccepted { .. } => *self = Self::default(),
            Fact::Promoted { host, term, tip } => {
                self.reigns.insert(*term, *tip);
                let host = &view.hosts[*host];
                // A host may learn late that it has won, when another reigns already.
                for (earlier, released) in self.released.range(..*term) {
                    let kept = released.index <= tip.index
                        && host.chain_at(released.index) == Some(released.chain);
                    if !kept {
                        return Err(format!(
                            "the log through {} with which term {term} begins on {} is without \
                             output that term {earlier} let out through {}",
                            tip.index, host.name, released.index
                        ));
                    }
                }
            }
            Fact::Released {
                host,
                term,
                through,
            } => {
                let host = &view.hosts[*host];
                let Some(chain) = host.chain_known(*through) else {
                    return Err(format!(
                        "{} let out through {through}, which is not the end of a batch it holds",
                        host.name
                    ));
                };
                let released = Released {
                    index: *through,
                    chain,
                };
                self.released.insert(*term, released);
                for (later, tip) in self.reigns.range(term.next()..) {
                    if *through > tip.index {
                        return Err(format!(
                            "{} let out through {through} by term {term}, and term {later} begins \
                             at {}",
                            host.name, tip.index
                        ));
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}
