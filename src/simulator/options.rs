//! What a simulation is asked to do, and what it says at the end.

use std::fmt;

use crate::protocol::Mutation;

/// How to simulate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A deliberate bug in every node.
    pub mutation: Option<Mutation>,
    /// Keep every step as text, not only its hash.
    pub trace: bool,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant's name, which is its file's.
    pub invariant: &'static str,
    /// When, in nanoseconds of simulated time.
    pub at: u64,
    /// What was found.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = self.at / 1_000_000;
        write!(f, "{} at {millis} ms: {}", self.invariant, self.what)
    }
}

/// What happened in one simulation, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// VMs, in as many worlds or fewer.
    pub vms: u64,
    /// Gateways of theirs.
    pub gateways: u64,
    /// Simulated steps.
    pub steps: u64,
    /// Nanoseconds of simulated time.
    pub simulated: u64,
    /// Answers that clients got.
    pub answers: u64,
    /// Reigns that began.
    pub promotions: u64,
    /// Planned switchovers that succeeded.
    pub switchovers: u64,
    /// Boots from the disks of a host that had lost its memory.
    pub cold_boots: u64,
    /// Times an operator had to accept loss.
    pub losses_accepted: u64,
    /// Faults injected.
    pub faults: u64,
    /// Records committed.
    pub records: u64,
    /// Logs that were taken again from the beginning.
    pub resynchronisations: u64,
}

impl Counts {
    /// Adds up what happened in several simulations.
    pub fn add(&mut self, other: &Self) {
        self.vms += other.vms;
        self.gateways += other.gateways;
        self.steps += other.steps;
        self.simulated += other.simulated;
        self.answers += other.answers;
        self.promotions += other.promotions;
        self.switchovers += other.switchovers;
        self.cold_boots += other.cold_boots;
        self.losses_accepted += other.losses_accepted;
        self.faults += other.faults;
        self.records += other.records;
        self.resynchronisations += other.resynchronisations;
    }
}

/// The outcome of one seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// How it was simulated.
    pub options: Options,
    /// The first thing that went wrong.
    pub violation: Option<Violation>,
    /// What happened.
    pub counts: Counts,
    /// A hash over every step: equal for equal seeds and options.
    pub trace_hash: u64,
    /// The journal of all hosts, and every step if that was asked for.
    pub trace: Vec<String>,
}

impl Report {
    /// The command that does the same again and shows every step.
    pub fn replay_command(&self) -> String {
        let mutation = self.options.mutation;
        let mutation = mutation.map_or(String::new(), |m| format!(" --mutation {m}"));
        format!("understudy simulate --seed {}{mutation} --trace", self.seed)
    }
}
