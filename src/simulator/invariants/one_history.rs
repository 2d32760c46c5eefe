//! Released outputs form one history: a number has one content, whoever lets it out, and numbers
//! follow one another.

use std::collections::BTreeMap;

use replay_log::FrameNumber;

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct OneHistory {
    outputs: BTreeMap<FrameNumber, u64>,
    /// After accepted loss, numbers are used again.
    passed: BTreeMap<u64, FrameNumber>,
}

impl Invariant for OneHistory {
    fn name(&self) -> &'static str {
        "one_history"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Booted | Fact::LossAccepted { .. } => *self = Self::default(),
            Fact::LetOut { number, content } => {
                let known = *self.outputs.entry(*number).or_insert(*content);
                if known != *content {
                    return Err(format!("output {} was let out with two contents", number.0));
                }
            }
            Fact::Passed {
                gateway,
                number,
                content,
                ..
            } => {
                if self.outputs.get(number) != Some(content) {
                    return Err(format!("output {} was passed but never let out", number.0));
                }
                let last = self.passed.insert(*gateway, *number);
                if last.is_some_and(|last| last.0 + 1 != number.0) {
                    return Err(format!(
                        "a gateway passed output {} after {}",
                        number.0,
                        last.unwrap_or_default().0
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
