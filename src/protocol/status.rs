//! What a node knows, for `status`, metrics and the simulator's invariants.

use replay_log::{FrameNumber, LogIndex, LogTip, Position};
use serde::{Deserialize, Serialize};

use super::message::{Claim, Health};
use super::name::{HostName, Incarnation, VmRun};
use super::record::{Committed, Record, Stumble, Version};
use super::time::{Span, Time};

/// What a host is to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoleName {
    /// It has restarted and does not know yet.
    Starting,
    /// The VM is unknown, or does not concern this host.
    Outsider,
    /// It takes the log, and is not (yet) a member.
    Learner,
    /// It is a member of the record: it may succeed.
    Member,
    /// It claims a term.
    Claimant,
    /// It reigns and replays the end of the log.
    GoingLive,
    /// It reigns and runs the guest.
    Primary,
    /// It reigns, and hands over.
    HandingOver,
}

/// How a follower does, as its primary sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowerStatus {
    /// Where.
    pub host: HostName,
    /// Which holding.
    pub incarnation: Incarnation,
    /// Whether the record names it.
    pub member: bool,
    /// Whether there is a connection.
    pub connected: bool,
    /// Through where it holds the log.
    pub held: LogIndex,
    /// Through where it has executed it.
    pub executed: LogIndex,
    /// How far its execution is behind.
    pub lag: Span,
    /// What keeps it from being counted on.
    pub health: Health,
    /// How long it has been silent.
    pub silence: Span,
}

/// What a keeper of records has that was set back, or emptied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SetBack {
    /// It does not know the VM.
    Emptied,
    /// It has an earlier state of the record, or another VM's of this name.
    To(Version),
}

/// A node's whole standing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What the host is to the VM.
    pub role: RoleName,
    /// The latest record it knows.
    pub record: Option<Record>,
    /// Its own holding.
    pub incarnation: Incarnation,
    /// Its own promise.
    pub promise: Option<Claim>,
    /// The end of its log.
    pub tip: LogTip,
    /// Through where it holds the log in memory.
    pub stored: LogIndex,
    /// Through where it holds the log on disk.
    pub synced: LogIndex,
    /// Through where its VMM has executed the log; on a primary the end of the log.
    pub executed: LogIndex,
    /// Where its guest is.
    pub position: Position,
    /// Through where the log is committed, as far as it knows.
    pub committed: LogIndex,
    /// The outputs that have reached their gateways, as far as it knows.
    pub forgotten: FrameNumber,
    /// The present run of the VMM.
    pub run: VmRun,
    /// Since when there is no replica, on a primary without one.
    pub unprotected_since: Option<Time>,
    /// Since when output has been waiting for too few copies, on a primary.
    pub stalled_since: Option<Time>,
    /// Whether the guest is slowed down.
    pub throttled: bool,
    /// What the keeper of records has, if that is less than this host has seen: no record changes
    /// until an operator has given it the newest.
    pub keeper_set_back: Option<SetBack>,
    /// Why the disk takes nothing more, if it does not.
    pub full: Option<String>,
    /// What keeps this copy from being counted on.
    pub health: Health,
    /// Where reign after reign has failed, if nobody claims any more because of that.
    pub stopped_at: Option<Stumble>,
    /// The newest record it has seen, with its keeper's proof.
    pub seen: Option<Committed>,
    /// On a replica, for how long the primary has been silent.
    pub primary_silence: Option<Span>,
    /// On a primary, how the others do.
    pub followers: Vec<FollowerStatus>,
}
