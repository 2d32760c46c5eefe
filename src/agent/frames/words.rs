//! What is said about an agent's end of the frames: its limits, its events, what it counts.

use replay_log::{FrameNumber, GatewayIncarnation};
use thiserror::Error;

use crate::gateway::frames::Refusal;
use crate::protocol::Span;

/// What one VM keeps for its gateways.
#[derive(Clone, Copy, Debug)]
pub struct FrameLimits {
    /// How many gateways may be served at the same time.
    pub gateways: usize,
    /// How many sessions there may be, welcomed or not.
    pub sessions: usize,
    /// How many of them may be of one gateway, by its certificate.
    pub sessions_each: usize,
    /// How long a session may wait for its welcome, and then for its refusal to be taken. A gateway
    /// asks anew more often than that.
    pub welcome_within: Span,
    /// Bytes of outputs kept for one gateway for as long as it may be away. One that has more to take
    /// holds the guest back, if it goes on making more, and is dropped when it takes nothing.
    pub outputs: usize,
    /// How long a gateway that has more to take than that may take nothing.
    pub patience: Span,
    /// Bytes of frames that wait for the machine, for each gateway; beyond it nothing is read from
    /// the gateway.
    pub arrivals: usize,
    /// How long a gateway may be away before it is dropped and what was kept for it is forgotten.
    pub absence: Span,
    /// How long it may be away when another run of the same gateway is served. Hardly ever are both
    /// alive, so it is short; not so short that a lost connection is taken for a lost process.
    pub replaced: Span,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            gateways: 64,
            sessions: 512,
            sessions_each: 8,
            welcome_within: Span::from_millis(3_000),
            outputs: 4 << 20,
            patience: Span::from_millis(5_000),
            arrivals: 1 << 20,
            absence: Span::from_millis(60_000),
            replaced: Span::from_millis(5_000),
        }
    }
}

/// Something the journal should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameEvent {
    /// A gateway is served.
    Welcomed {
        /// Which.
        gateway: GatewayIncarnation,
        /// The last of its frames that the machine has or will get.
        logged: FrameNumber,
        /// How many outputs are sent to it again.
        resent: usize,
    },
    /// A gateway was turned away.
    Refused {
        /// Which.
        gateway: GatewayIncarnation,
        /// Why.
        why: Refusal,
    },
    /// A gateway stayed away for too long, or took nothing for too long; what was kept for it is
    /// forgotten and it cannot go on.
    Dropped {
        /// Which.
        gateway: GatewayIncarnation,
        /// Why.
        why: DropReason,
        /// How many outputs were forgotten.
        outputs: usize,
    },
}

/// Why a gateway was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// It was away longer than [`FrameLimits::absence`].
    Absent,
    /// It lacked more than [`FrameLimits::outputs`], and took nothing for
    /// [`FrameLimits::patience`].
    TooFarBehind,
}

/// A gateway broke the rules: its session is closed, nothing else is disturbed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the gateway broke the frame protocol: {what}")]
pub struct GatewayError {
    /// How.
    pub what: &'static str,
}

/// What has gone through a port, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FramePortCounters {
    /// Frames handed to the machine.
    pub arrivals: u64,
    /// Frames that came a second time and were dropped.
    pub duplicates: u64,
    /// Outputs queued for gateways, once for each gateway.
    pub outputs: u64,
    /// Outputs that were sent again after a welcome.
    pub resent: u64,
    /// Outputs that nobody was there for.
    pub unclaimed: u64,
}
