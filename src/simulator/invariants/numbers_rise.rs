//! Terms and epochs only rise: those of the record, and those of every host's promises.

use std::collections::{BTreeMap, BTreeSet};

use replay_log::Term;

use super::super::facts::{Fact, Invariant, View};
use crate::protocol::Version;

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct NumbersRise {
    record: Version,
    reigns: BTreeSet<Term>,
    /// The highest term that each host has promised, and the highest that it has heard of.
    promises: BTreeMap<usize, (Term, Term)>,
}

impl Invariant for NumbersRise {
    fn name(&self) -> &'static str {
        "numbers_rise"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Recorded(record) => {
                let version = record.version();
                let before = std::mem::replace(&mut self.record, version);
                if version.term < before.term || version.epoch <= before.epoch {
                    return Err(format!("{version} was committed after {before}"));
                }
            }
            // What nobody had learnt of is gone.
            Fact::Recovered { version } => self.record = *version,
            // A host may learn late that it has won, but no term begins twice.
            Fact::Promoted { term, .. } if !self.reigns.insert(*term) => {
                return Err(format!("term {term} began twice"));
            }
            Fact::Persisted { host, durable } => {
                let (promised, heard) = self.promises.entry(*host).or_default();
                // A promise may end, when its claim is renounced: then it is none. It is never
                // taken back for one of a lower term.
                let promise = durable.promise.as_ref();
                let term = promise.map_or(Term(u64::MAX), |claim| claim.term);
                if term < *promised || durable.highest < *heard {
                    return Err(format!(
                        "host {host} persisted a promise of term {term}, having heard of {}, after \
                         {promised} and {heard}",
                        durable.highest
                    ));
                }
                *promised = promise.map_or(Term(0), |claim| claim.term);
                *heard = durable.highest;
            }
            // A new disk, or an old copy of one, knows of nothing that came later.
            Fact::Replaced { host } => {
                self.promises.remove(host);
            }
            _ => {}
        }
        Ok(())
    }
}
