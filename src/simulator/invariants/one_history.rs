//! Released outputs form one history: a number has one content, whoever lets it out, and numbers
//! follow one another.

use std::collections::BTreeMap;

use replay_log::{FrameNumber, GatewayIncarnation};

use super::super::facts::{Fact, Invariant, View};
use super::super::gateway::number_of;

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct OneHistory {
    /// What each of them is, and for whom; `None`: for every gateway.
    outputs: BTreeMap<FrameNumber, (u64, Option<usize>)>,
    /// The last one that each run of a gateway passed. After accepted loss, numbers are used again.
    passed: BTreeMap<u64, FrameNumber>,
}

impl Invariant for OneHistory {
    fn name(&self) -> &'static str {
        "one_history"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Booted | Fact::LossAccepted { .. } => *self = Self::default(),
            Fact::LetOut {
                number,
                content,
                to,
            } => {
                let output = (*content, *to);
                let known = *self.outputs.entry(*number).or_insert(output);
                if known != output {
                    return Err(format!("output {} was let out with two contents", number.0));
                }
            }
            Fact::Passed {
                gateway,
                number,
                content,
                ..
            } => return self.passed(*gateway, *number, *content),
            _ => {}
        }
        Ok(())
    }
}

impl OneHistory {
    fn passed(&mut self, run: u64, number: FrameNumber, content: u64) -> Result<(), String> {
        let gateway = number_of(GatewayIncarnation(run));
        let is_for_it = |to: &Option<usize>| to.is_none_or(|to| to == gateway);
        match self.outputs.get(&number) {
            Some((known, to)) if *known == content && is_for_it(to) => {}
            Some((_, Some(to))) if *to != gateway => {
                let number = number.0;
                return Err(format!(
                    "gateway {gateway} passed output {number}, which is for gateway {to}"
                ));
            }
            _ => return Err(format!("output {} was passed but never let out", number.0)),
        }
        let Some(last) = self.passed.insert(run, number) else {
            return Ok(());
        };
        let another = |between: u64| {
            let output = self.outputs.get(&FrameNumber(between));
            output.is_some_and(|(_, to)| !is_for_it(to))
        };
        if number <= last || !(last.0 + 1..number.0).all(another) {
            return Err(format!(
                "a gateway passed output {} after {}",
                number.0, last.0
            ));
        }
        Ok(())
    }
}
