//! The vocabulary of the log: what can happen to a machine from outside, and how it is written down.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::position::{Position, Term};

/// Time as the guest knows it: nanoseconds since it was powered on. Never goes back.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct GuestTime(pub u64);

/// The BLAKE3 hash of everything an image consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ImageDigest(pub [u8; 32]);

/// The disk contents a log starts from: a sealed file, named by its hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DiskBase {
    /// BLAKE3 over the whole base.
    pub digest: [u8; 32],
    /// Its size in bytes, a multiple of 512.
    pub size: u64,
}

/// The first entry of every log: which machine this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The version of the machine model that gives this log its meaning.
    pub machine_model: u32,
    /// Which image was started.
    pub image: ImageDigest,
    /// The machine's configuration in the VMM's own encoding (memory, devices, command line).
    pub config: Bytes,
    /// What its disks contained, in device order.
    pub disks: Vec<DiskBase>,
    /// The term under which it was started.
    pub term: Term,
    /// Drawn at random at power-on: tells two boots apart and keys the memory scrub.
    pub boot: [u8; 16],
}

/// One run of a gateway process; a gateway that restarts is another one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct GatewayIncarnation(pub u64);

/// The number a frame has on its way to the guest (counted by its gateway, from 1) or from the
/// guest (counted by the machine over all its outputs, from 1).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct FrameNumber(pub u64);

/// Where an arriving frame came from, so that a new primary knows what to ask for again.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct FrameSource {
    /// Which gateway sent it.
    pub gateway: GatewayIncarnation,
    /// Its number there.
    pub number: FrameNumber,
}

/// The number of a disk request: counted over all disks of the machine, from 1.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct RequestNumber(pub u64);

/// One of the machine's timers.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct TimerId(pub u8);

/// How a disk request ended. A disk error on the primary is a failure of its host and is never
/// told to the guest, so there is no outcome for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskOutcome {
    /// The data is written (not necessarily durable).
    Written,
    /// Everything written before is durable.
    Flushed,
    /// The data was read; every copy reads its own disk and compares this hash of the data (the
    /// first 8 bytes of its BLAKE3).
    Read {
        /// First eight bytes of BLAKE3 of the data, little endian.
        hash: u64,
    },
}

/// Data from outside, delivered at a landmark.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Arrival {
    /// An Ethernet frame for network device 0.
    Frame {
        /// Who sent it, with its number.
        source: FrameSource,
        /// The frame, without virtio header and checksum.
        bytes: Bytes,
    },
    /// A disk request has finished.
    DiskDone {
        /// Which request.
        request: RequestNumber,
        /// How it ended.
        outcome: DiskOutcome,
    },
    /// An armed timer is due.
    TimerDue {
        /// Which timer.
        timer: TimerId,
    },
    /// Somebody typed on the console.
    Console {
        /// What was typed.
        bytes: Bytes,
    },
}

impl fmt::Display for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Frame { bytes, .. } => write!(f, "a frame of {} bytes", bytes.len()),
            Self::DiskDone { request, outcome } => {
                let done = match outcome {
                    DiskOutcome::Written => "a finished write",
                    DiskOutcome::Flushed => "a finished flush",
                    DiskOutcome::Read { .. } => "a finished read",
                };
                write!(f, "{done}, disk request {}", request.0)
            }
            Self::TimerDue { timer } => write!(f, "the deadline of timer {}", timer.0),
            Self::Console { bytes } => write!(f, "{} console bytes", bytes.len()),
        }
    }
}

/// The reply to something only the outside knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The time.
    Clock(GuestTime),
    /// Random bytes, as many as were asked for.
    Entropy(Bytes),
}

/// Everything that belongs to one landmark. Never split between batches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// The landmark.
    pub at: Position,
    /// What belongs to it.
    pub body: GroupBody,
}

/// The two kinds of group. One landmark has at most one exit group, followed by any number of
/// arrivals. An exit without answers and without outputs is not written down: the position of the
/// next entry says that it was passed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupBody {
    /// The answers and the number of outputs of one exit.
    Exit {
        /// In the order in which they were asked for.
        answers: Vec<Answer>,
        /// How many outputs (frames, console writes) the exit caused; the outputs themselves are
        /// made again by replay.
        outputs: u32,
    },
    /// One thing that arrived, delivered after the exit.
    Arrival(Arrival),
}

/// The digest of a machine's state, canonical: equal on every host (DESIGN.md section 2, rule 6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MarkDigest(pub u64);

/// "The primary has reached this position, with this state."
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The position reached, every arrival before this entry delivered.
    pub at: Position,
    /// Registers, devices, exits since the last mark, and the pages this mark scrubs.
    pub digest: MarkDigest,
}

/// A new primary's first entry: from here on the log is written under another term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TermChange {
    /// Where the new primary went live.
    pub at: Position,
    /// Its term.
    pub term: Term,
}

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// Which machine; entry 0 and nowhere else.
    Header(Header),
    /// What happened at a landmark.
    Group(Group),
    /// A digest to compare.
    Mark(Mark),
    /// Another primary goes on.
    Term(TermChange),
}

impl Entry {
    /// The position this entry belongs to.
    pub fn at(&self) -> Position {
        match self {
            Self::Header(_) => Position::START,
            Self::Group(group) => group.at,
            Self::Mark(mark) => mark.at,
            Self::Term(change) => change.at,
        }
    }
}
