//! What kind of cluster a seed simulates.

use super::queue::{MICRO, MILLI, Moment, SECOND};
use super::random::Random;
use crate::protocol::{Acks, LogFull, OnLoss, Policy, Rule, Span};

/// The cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) hosts: usize,
    pub(super) policy: Policy,
    /// One way between any two, in nanoseconds.
    pub(super) delay: Moment,
    /// Of a thousand packets.
    pub(super) loss: u64,
    /// How long the keeper takes to make a change durable: at least, at most.
    pub(super) keeper: (Moment, Moment),
    /// The connection to an unreachable peer is given up after this long.
    pub(super) idle: Moment,
    /// So many bytes of log may be under way to one host without an acknowledgement.
    pub(super) window: usize,
    /// A lane with more bytes than this behind it is closed, and its connection with it.
    pub(super) queue: usize,
}

impl Setup {
    pub(super) fn choose(random: &mut Random) -> Self {
        let hosts = *random.pick(&[2, 3, 3, 3, 4]);
        let acks = *random.pick(&[Acks::Memory, Acks::Disk]);
        let policy = policy(random, hosts, acks);
        let delay = *random.pick(&[
            40 * MICRO,
            150 * MICRO,
            150 * MICRO,
            500 * MICRO,
            500 * MICRO,
            4 * MILLI,
            4 * MILLI,
            25 * MILLI,
            80 * MILLI,
            300 * MILLI,
        ]);
        let keeper = *random.pick(&[
            (800 * MICRO, 800 * MICRO),
            (800 * MICRO, 3 * MILLI),
            (20 * MILLI, 20 * MILLI),
            (20 * MILLI, 110 * MILLI),
            (110 * MILLI, 110 * MILLI),
            (0, 3 * SECOND),
        ]);
        let idle = *random.pick(&[700 * MILLI, 3 * SECOND]);
        let window = *random.pick(&[2 << 10, 16 << 10, 8 << 20]);
        Self {
            hosts,
            policy,
            delay,
            loss: random.below(15),
            keeper,
            idle,
            window,
            // Control messages may be many while a path is blocked; the log keeps to its window.
            queue: *random.pick(&[4 * (window + (16 << 10)), 32 << 20]),
        }
    }

    /// What the connections measure of one another.
    pub(super) fn round_trip(&self) -> Span {
        Span::from_nanos(2 * self.delay + self.delay / 2)
    }

    /// Whether round trips are longer than what a new member may lack of the log.
    pub(super) fn is_far(&self) -> bool {
        self.delay > 120 * MILLI
    }

    /// How much longer everything takes where packets travel far and the keeper thinks long.
    pub(super) fn slowness(&self) -> Moment {
        30 * self.delay + 8 * self.keeper.1
    }
}

/// What a change of a record takes where the keeper is always slow.
pub(super) const SLOW_KEEPER: (Moment, Moment) = (1_500 * MILLI, 2_500 * MILLI);

/// Of a thousand seeds, those whose VMs have two gateways, and those with two VMs.
const SEVERAL: u64 = 125;

/// Of what a world has several. The seed's own number says so, and no draw of what decides
/// everything else: a world with one of each is what it would be if there were no others.
pub(super) struct Several {
    pub(super) vms: usize,
    /// Of each VM.
    pub(super) gateways: usize,
    /// Folders are put back from backups again and again: a fault that needs two strokes of chance,
    /// and so is rare in other worlds.
    pub(super) put_backs: bool,
    /// The keeper is always slower than hosts are patient at first: elsewhere it seldom is for long.
    pub(super) slow_keeper: bool,
    pub(super) random: Random,
}

impl Several {
    pub(super) fn new(seed: u64) -> Self {
        let mut random = Random::new(!seed);
        let mut one_or_two = || 1 + usize::from(random.chance(SEVERAL));
        let (gateways, vms) = (one_or_two(), one_or_two());
        let put_backs = gateways + vms > 2 && random.chance(500);
        let slow_keeper = gateways + vms > 2 && !put_backs && seed.is_multiple_of(2);
        Self {
            vms,
            gateways,
            put_backs,
            slow_keeper,
            random,
        }
    }

    /// How another VM than the first is protected.
    pub(super) fn policy(&mut self, setup: &Setup) -> Policy {
        let acks = *self.random.pick(&[Acks::Memory, Acks::Disk]);
        policy(&mut self.random, setup.hosts, acks)
    }
}

/// A policy that so many hosts can satisfy; others are refused.
pub(super) fn policy(random: &mut Random, hosts: usize, acks: Acks) -> Policy {
    let most = Rule::Any(if hosts > 2 { 2 } else { 1 });
    let rule = *random.pick(&[Rule::All, Rule::All, Rule::Quorum, Rule::Any(1), most]);
    let on_loss = *random.pick(&[
        OnLoss::Shrink,
        OnLoss::Shrink,
        OnLoss::Shrink,
        OnLoss::Stall,
    ]);
    let min_copies = *random.pick(&[1, 1, 1, 2]);
    Policy {
        rule,
        acks,
        on_loss,
        min_copies,
        log_full: LogFull::Stall,
    }
}
