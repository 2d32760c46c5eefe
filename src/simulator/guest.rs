//! What belongs to one VM, wherever it runs: its gateways with their clients, and what is checked.

use super::facts::Checker;
use super::gateway::{Gateway, Highest};
use super::setup::Setup;
use crate::protocol::Policy;
use replay_log::Term;

/// A VM.
pub(super) struct Guest {
    /// The one that it is created with.
    pub(super) policy: Policy,
    pub(super) gateways: Vec<Gateway>,
    pub(super) highest: Highest,
    pub(super) checker: Checker,
    /// Counts its starts from power-on.
    pub(super) next_machine: u64,
    /// An order that only the simulation knew of.
    pub(super) untold: Option<&'static str>,
    /// How often an operator has looked for an order in vain.
    pub(super) unnamed: u32,
    /// What earlier terms than this let out belongs to a history that was given up, in part.
    pub(super) given_up_before: Term,
    /// Reigns have failed at one place, and nobody claims any more.
    pub(super) stopped: bool,
}

impl Guest {
    pub(super) fn new(policy: Policy, gateways: usize, setup: &Setup) -> Self {
        let gateway = |number| Gateway::new(number, setup.hosts, setup.delay);
        Self {
            policy,
            gateways: (0..gateways).map(gateway).collect(),
            highest: Highest::new(),
            checker: Checker::new(),
            next_machine: 0,
            untold: None,
            unnamed: 0,
            given_up_before: Term(0),
            stopped: false,
        }
    }

    /// Some answers may be taken back now: an operator said so. Gateways may be ahead of the guest:
    /// they begin anew.
    pub(super) fn forget_answers(&mut self) {
        self.highest.clear();
        for gateway in &mut self.gateways {
            gateway.forget_answers();
            gateway.restart();
        }
    }

    /// A host and all gateways do not hear each other any more.
    pub(super) fn block_gateways(&mut self, host: usize) {
        for gateway in &mut self.gateways {
            gateway.blocks[host] += 1;
        }
    }

    /// One reason less for that.
    pub(super) fn unblock_gateways(&mut self, host: usize) {
        for gateway in &mut self.gateways {
            gateway.blocks[host] -= 1;
        }
    }
}
