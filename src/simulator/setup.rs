//! What kind of cluster a seed simulates.

use super::queue::{MICRO, MILLI, Moment};
use super::random::Random;
use crate::protocol::{Acks, OnLoss, Policy, Rule};

/// The cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) hosts: usize,
    pub(super) policy: Policy,
    pub(super) delay: Moment,
    pub(super) loss: u64,
    /// How long the keeper takes to make a change durable.
    pub(super) keeper: Moment,
}

impl Setup {
    pub(super) fn choose(random: &mut Random) -> Self {
        let hosts = *random.pick(&[2, 3, 3, 3, 4]);
        // One that so many hosts can satisfy; others are refused.
        let most = Rule::Any(if hosts > 2 { 2 } else { 1 });
        let rule = *random.pick(&[Rule::All, Rule::All, Rule::Quorum, Rule::Any(1), most]);
        let acks = *random.pick(&[Acks::Memory, Acks::Disk]);
        let on_loss = *random.pick(&[
            OnLoss::Shrink,
            OnLoss::Shrink,
            OnLoss::Shrink,
            OnLoss::Stall,
        ]);
        let min_copies = *random.pick(&[1, 1, 1, 2]);
        let delay = *random.pick(&[40 * MICRO, 150 * MICRO, 500 * MICRO, 4 * MILLI]);
        let keeper = *random.pick(&[800 * MICRO, 800 * MICRO, 20 * MILLI, 110 * MILLI]);
        Self {
            keeper,
            hosts,
            policy: Policy {
                rule,
                acks,
                on_loss,
                min_copies,
                ..Policy::default()
            },
            delay,
            loss: random.below(15),
        }
    }
}
