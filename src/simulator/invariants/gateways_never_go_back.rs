//! Once a gateway has passed a frame of term t it passes none below t.

use std::collections::BTreeMap;

use replay_log::Term;

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct GatewaysNeverGoBack {
    terms: BTreeMap<u64, Term>,
}

impl Invariant for GatewaysNeverGoBack {
    fn name(&self) -> &'static str {
        "gateways_never_go_back"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        if let Fact::Passed { gateway, term, .. } = fact {
            let last = self.terms.entry(*gateway).or_default();
            if term < last {
                return Err(format!(
                    "passed a frame of term {term} after one of term {last}"
                ));
            }
            *last = *term;
        }
        Ok(())
    }
}
