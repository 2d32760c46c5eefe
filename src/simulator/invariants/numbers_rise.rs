//! Terms and epochs only rise: those of the record, and those of every host's promises.

use std::collections::{BTreeMap, BTreeSet};

use replay_log::Term;

use super::super::facts::{Fact, Invariant, View};
use crate::protocol::{Incarnation, Version};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct NumbersRise {
    record: Version,
    reigns: BTreeSet<Term>,
    promises: BTreeMap<usize, (Incarnation, Term)>,
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
            // A host may learn late that it has won, but no term begins twice.
            Fact::Promoted { term, .. } if !self.reigns.insert(*term) => {
                return Err(format!("term {term} began twice"));
            }
            Fact::Persisted { host, durable } => {
                let promised = durable.promise.as_ref().map(|claim| claim.term);
                let now = (durable.incarnation, promised.unwrap_or_default());
                let before = self.promises.insert(*host, now).unwrap_or_default();
                if now.0 < before.0 || now.1 < before.1 {
                    return Err(format!("host {host} persisted {now:?} after {before:?}"));
                }
            }
            // A new disk knows of nothing, and begins to count its incarnations elsewhere.
            Fact::Replaced { host } => {
                self.promises.remove(host);
            }
            _ => {}
        }
        Ok(())
    }
}
