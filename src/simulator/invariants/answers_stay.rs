//! No answer that a client has seen is ever taken back: a counter never repeats a value, and is
//! above whatever its clients had seen when they asked.

use std::collections::BTreeSet;

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct AnswersStay {
    seen: BTreeSet<(u32, u64)>,
}

impl Invariant for AnswersStay {
    fn name(&self) -> &'static str {
        "answers_stay"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::LossAccepted { .. } => self.seen.clear(),
            Fact::Answered { key, value, floor } => {
                if value <= floor {
                    return Err(format!(
                        "counter {key} answered {value} to a client that asked after {floor}"
                    ));
                }
                if !self.seen.insert((*key, *value)) {
                    return Err(format!("counter {key} answered {value} twice"));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
