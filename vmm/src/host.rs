//! The edge of the host that a recorder and a replayer stand on: the clock, entropy, what arrives,
//! the disks, and where the log and the outputs go.
//!
//! In production it is the VMM process (channels, a disk worker, a socket to the agent); in the
//! simulator a simulated host. Recorder and replayer are the same code on both.

use bytes::Bytes;
use replay_log::{Batch, FrameNumber, FrameSource, LogIndex, Position, RequestNumber};

use crate::tape::{DiskRequest, Sources, TapeError};

/// The host's own clock in nanoseconds from a point that does not matter; it never goes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostTime(pub u64);

impl HostTime {
    /// The nanoseconds since an earlier time; 0 when it is not earlier.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The time this many nanoseconds on.
    #[must_use]
    pub const fn plus(self, nanos: u64) -> Self {
        Self(self.0.saturating_add(nanos))
    }
}

/// What a disk gave back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskData {
    /// The data that was read.
    Read(Bytes),
    /// The data is written.
    Written,
    /// Everything written before is durable.
    Flushed,
}

/// A disk request that has finished on this host. One that failed never becomes a completion: it
/// is a failure of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskReply {
    /// Which request.
    pub number: RequestNumber,
    /// What came of it.
    pub data: DiskData,
}

/// Something that reached the host and is meant for the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromOutside {
    /// An Ethernet frame from a gateway.
    Frame {
        /// Who sent it, with its number.
        source: FrameSource,
        /// The frame.
        bytes: Bytes,
    },
    /// A disk request has finished.
    Disk(DiskReply),
    /// Somebody typed on the console.
    Console(Bytes),
}

/// Something for the machine, and when it reached the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Came {
    /// When.
    pub at: HostTime,
    /// What.
    pub what: FromOutside,
}

/// An output of the machine, made by the primary and again by every replay.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Output {
    /// Counted over all outputs of the machine, from 1: the same on every copy.
    pub number: FrameNumber,
    /// The log must be held through here before the output may be let out.
    pub needs: LogIndex,
    /// What it is.
    pub kind: OutputKind,
    /// Its content.
    pub bytes: Bytes,
}

/// What the world sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum OutputKind {
    /// An Ethernet frame of network device 0.
    Frame,
    /// Console bytes.
    Console,
}

/// A finished batch on its way to the log's stores and to the replicas.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shipment {
    /// The batch.
    pub batch: Batch,
    /// The last landmark that the guest has passed.
    pub at: Position,
    /// The highest frame number of each gateway whose arrival is written in it.
    pub frames: Vec<FrameSource>,
}

/// A host, as a recorder or a replayer sees it.
pub trait Host {
    /// What time it is.
    fn now(&mut self) -> HostTime;

    /// Fills `out` with random bytes that nobody can predict.
    fn entropy(&mut self, out: &mut [u8]) -> Result<(), TapeError>;

    /// Whether [`Host::arrival`] has something that the machine can take now. Cheap; asked after
    /// every exit.
    fn arrival_waits(&mut self, can_take: Sources) -> bool;

    /// The next thing for the machine that it can take now. Frames come in order, and those it
    /// cannot take wait here. A disk error ends here, as [`TapeError::Host`].
    fn arrival(&mut self, can_take: Sources) -> Result<Option<Came>, TapeError>;

    /// Submits the requests of one exit, in order, to this host's own disks.
    fn submit(&mut self, requests: Vec<DiskRequest>) -> Result<(), TapeError>;

    /// Takes a finished batch (recorder only).
    fn ship(&mut self, shipment: Shipment) -> Result<(), TapeError>;

    /// Takes an output, in order. When it may be let out is not the machine's business.
    fn output(&mut self, output: Output) -> Result<(), TapeError>;

    /// Sends on its way what [`Host::ship`] and [`Host::output`] took: a batch and the outputs
    /// that wait for it leave together.
    fn send(&mut self) -> Result<(), TapeError>;
}
