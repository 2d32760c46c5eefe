//! Whatever only an operator can end is said in a journal, with the order that ends it.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct OperatorsAreTold;

impl Invariant for OperatorsAreTold {
    fn name(&self) -> &'static str {
        "operators_are_told"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Untold { order } => Err(format!(
                "only {order:?} can help, and no journal has said so"
            )),
            _ => Ok(()),
        }
    }
}
