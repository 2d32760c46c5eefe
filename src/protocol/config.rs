//! What a node is told when it is made: who it is, its patience, and what survived on its disk.

use replay_log::{LogTip, Term};
use serde::{Deserialize, Serialize};

use super::message::Claim;
use super::mutation::Mutation;
use super::name::{DiskId, HostName, Incarnation, VmName};
use super::record::{Acks, Committed};
use super::time::Span;

/// So many entries are executed in no time: nobody waits for them. (The last ones of a log are executed
/// only when more follows, and from a guest that computes without exits nothing does.)
pub(super) const BACKLOG_FREE: u64 = 2_000;

/// Everything fixed about a node.
#[derive(Clone, Debug)]
pub struct Config {
    /// This host.
    pub host: HostName,
    /// The VM.
    pub vm: VmName,
    /// How long what may take.
    pub timing: Timing,
    /// How much may wait.
    pub bounds: Bounds,
    pub(crate) mutation: Option<Mutation>,
}

impl Config {
    /// The configuration of a host for a VM, with default patience.
    pub fn new(host: HostName, vm: VmName) -> Self {
        Self {
            host,
            vm,
            timing: Timing::default(),
            bounds: Bounds::default(),
            mutation: None,
        }
    }

    /// Makes the node wrong on purpose; the simulator must notice.
    #[must_use]
    pub(crate) fn with_mutation(mut self, mutation: Option<Mutation>) -> Self {
        self.mutation = mutation;
        self
    }
}

/// How long what may take. None of it is needed for safety.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between two heartbeats. A replica answers each with a report.
    pub heartbeat: Span,
    /// A primary is never suspected after less silence.
    pub suspicion_floor: Span,
    /// However irregular its heartbeats were, it is suspected after this much.
    pub suspicion_ceiling: Span,
    /// A copy that has heard the primary within this time vouches for it.
    pub lease: Span,
    /// How much longer each copy waits than the one before it in the order of claiming.
    pub stagger: Span,
    /// How long a claimant-to-be waits for somebody to vouch for the primary.
    pub inquiry: Span,
    /// However far others are, it waits no longer than this.
    pub inquiry_most: Span,
    /// How long a claimant that has enough seals waits for those of the other reachable copies.
    pub seal_grace: Span,
    /// How long it waits for those that have answered its inquiry, and so are alive.
    pub seal_grace_awake: Span,
    /// How long a claimant waits for the sealed copies to take the log they lack.
    pub bring_along: Span,
    /// When a claim that has not come through is given up.
    pub claim_patience: Span,
    /// When nobody has run the guest for so long, an operator is told what it takes.
    pub despair: Span,
    /// Between two questions of a primary whether the keeper still has the record.
    pub keeper_check: Span,
    /// Between two attempts at anything that failed.
    pub retry: Span,
    /// After this much silence of a replica the primary removes it.
    pub shrink_after: Span,
    /// A replica that lacks only what was recorded within this time may become a member: output
    /// waits until it holds that as well, and so for no longer than this.
    pub join_lag: Span,
    /// Execution lag of a replica over which the primary is slowed.
    pub lag_limit: Span,
    /// For no longer than this is the primary slowed for a replica that does not catch up.
    pub slow_patience: Span,
    /// How long a planned switchover may take before it is given up.
    pub switchover_patience: Span,
    /// A node that is called later than this after the last time was itself not running: what it
    /// did not hear meanwhile means nothing.
    pub attention: Span,
}

impl Timing {
    /// After so long a node wants to be called again if nothing happens: a little later than the
    /// next heartbeat comes, if it comes, and before it would count as not running.
    pub(super) fn doze(&self) -> Span {
        let slack = self.attention.minus(self.heartbeat);
        self.heartbeat.plus(Span::from_nanos(slack.as_nanos() / 2))
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Span::from_millis(20),
            suspicion_floor: Span::from_millis(200),
            suspicion_ceiling: Span::from_millis(1_000),
            lease: Span::from_millis(150),
            stagger: Span::from_millis(100),
            inquiry: Span::from_millis(20),
            inquiry_most: Span::from_millis(600),
            seal_grace: Span::from_millis(40),
            seal_grace_awake: Span::from_millis(500),
            bring_along: Span::from_millis(150),
            claim_patience: Span::from_millis(1_000),
            despair: Span::from_millis(3_000),
            keeper_check: Span::from_millis(10_000),
            retry: Span::from_millis(200),
            shrink_after: Span::from_millis(1_000),
            join_lag: Span::from_millis(500),
            lag_limit: Span::from_millis(500),
            slow_patience: Span::from_millis(5_000),
            switchover_patience: Span::from_millis(3_000),
            attention: Span::from_millis(30),
        }
    }
}

/// How much may wait. What happens at a bound is [`super::Action::Throttle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Log bytes that the primary has recorded and that are not committed.
    pub uncommitted_log: u64,
    /// Bytes of output that wait for commit.
    pub waiting_output: u64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            uncommitted_log: 32 << 20,
            waiting_output: 8 << 20,
        }
    }
}

/// What a node must find again after a restart. Small; replaced as a whole, durably.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Durable {
    /// The disk that the holding was begun on.
    pub disk: DiskId,
    /// The present holding. 0 means that there has never been one.
    pub incarnation: Incarnation,
    /// What acknowledging meant in this holding.
    pub acks: Acks,
    /// The promise to hear no older term.
    pub promise: Option<Claim>,
    /// An earlier promise was to another claim on the same state of the record, and that one may come
    /// through yet: this holding stays bound although [`Durable::promise`] is renounced.
    pub bound_before: bool,
    /// The highest term that was claimed or reigned by, as far as this host knew.
    pub highest: Term,
    /// The last term by which the guest ran live here: whose disks this host has.
    pub live: Term,
    /// The last term that this host claimed in order to boot the guest: if that claim came through,
    /// it has the disks, too.
    pub booting: Term,
    /// The newest state of the record that this host has seen: a keeper that has less has been set
    /// back.
    pub seen: Option<Committed>,
}

/// What a node is restored from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restored {
    /// What was last persisted; the default on a host that has never known the VM.
    pub durable: Durable,
    /// The log that was found on disk, whole batches, checked; the default when there is none.
    pub log: LogTip,
    /// The store is damaged (a flipped bit, segments gone), so acknowledged log may be missing.
    /// To be said at every start until [`super::Action::DropLog`] has replaced the store.
    pub damaged: bool,
    /// The disk that all this was found on. Another one than [`Durable::disk`]: the folder was
    /// copied here or put back from a backup, and is not the holding that a record names.
    pub disk: DiskId,
    /// Random bits, drawn anew at every start: incarnations and runs are made of them.
    pub fresh: u64,
}
