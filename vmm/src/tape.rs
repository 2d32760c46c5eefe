//! The tape: the one way by which anything from outside reaches a machine.
//!
//! Devices and the run loop never see a host resource. What they need to know they ask as a
//! [`Query`], what they want done they say as a [`Command`], and what arrives is handed to them by
//! [`Tape::next`]. The recorder asks the host and writes the log; the replayer reads the log.

use std::fmt;

use bytes::Bytes;
use replay_log::{
    Answer, Arrival, GuestTime, Header, MarkDigest, Position, RequestNumber, TimerId,
};
use thiserror::Error;

/// Something only the outside knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// What time is it? Answered by [`Answer::Clock`].
    Clock,
    /// Random bytes, this many. Answered by [`Answer::Entropy`] of exactly that length.
    Entropy(u32),
}

/// What a disk request asks for. Offsets and lengths are in bytes and multiples of 512.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Read `len` bytes.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How many bytes.
        len: u32,
    },
    /// Write this data. It was copied out of guest memory when the request was submitted.
    Write {
        /// Where on the disk.
        offset: u64,
        /// What to write.
        data: Bytes,
    },
    /// Make every write that was submitted before durable.
    Flush,
}

/// A request to a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// Its number, given by the block device; completions name it.
    pub number: RequestNumber,
    /// Which of the machine's disks, from 0.
    pub disk: u8,
    /// What to do.
    pub op: DiskOp,
}

/// What a device asks of the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Send an Ethernet frame (network device 0). An output.
    Frame(Bytes),
    /// Write to the console. An output.
    Console(Bytes),
    /// Do something with a disk.
    Disk(DiskRequest),
    /// Let a timer fall due at this time, or disarm it.
    ArmTimer {
        /// Which timer; arming it again replaces its deadline.
        timer: TimerId,
        /// When, in guest time; `None` disarms.
        deadline: Option<GuestTime>,
    },
}

impl Command {
    /// Whether the world can see it: an output waits for output commit.
    pub const fn is_output(&self) -> bool {
        matches!(self, Self::Frame(_) | Self::Console(_))
    }
}

/// What the vCPU can do at a landmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CpuState {
    /// It can execute.
    Ready,
    /// It waits for an interrupt that can be injected (HLT).
    Halted,
    /// It asked to wait until anything arrives (the idle port).
    Idle,
    /// It will never execute again.
    Stopped(GuestEnd),
}

/// How a guest ends by its own doing; replicas agree about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestEnd {
    /// It switched itself off.
    PowerOff,
    /// It asked to be started again from the beginning.
    Reset,
    /// HLT with interrupts off: nothing can wake it.
    Dead,
    /// A triple fault.
    TripleFault,
    /// It made the CPU do what KVM cannot do for it: nothing can execute it any further.
    Unrunnable {
        /// What.
        why: Unrunnable,
        /// The address of the instruction (RIP).
        rip: u64,
    },
}

/// What a guest can ask of its CPU that KVM cannot do. It depends on the guest and on the kind of KVM
/// alone: every copy comes to it at the same instruction, so it is an end of the guest and no failure
/// of a host, and no other host can go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unrunnable {
    /// An instruction that KVM has to emulate and cannot: most often code in, or an access of an
    /// unusual kind to, the addresses of devices.
    Emulation,
    /// An exception while another was being delivered, in a combination that KVM does not know.
    Exceptions,
    /// An interrupt or exception whose delivery touches the addresses of devices: a descriptor table
    /// or a stack that lies there.
    Delivery,
    /// An exception that the host does not let a guest have, such as one of a lock over two cache
    /// lines where the host forbids them.
    Forbidden {
        /// Its vector.
        vector: u8,
    },
}

impl Unrunnable {
    /// Its number in the digest, and what belongs to it.
    pub(crate) const fn digested(self) -> (usize, u8) {
        match self {
            Self::Emulation => (1, 0),
            Self::Exceptions => (2, 0),
            Self::Delivery => (3, 0),
            Self::Forbidden { vector } => (4, vector),
        }
    }
}

impl fmt::Display for Unrunnable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Emulation => f.write_str("KVM cannot emulate the instruction"),
            Self::Exceptions => f.write_str("KVM cannot deliver an exception within another"),
            Self::Delivery => {
                f.write_str("KVM cannot deliver an interrupt or exception over device addresses")
            }
            Self::Forbidden { vector } => {
                write!(f, "the host forbids what raises exception {vector}")
            }
        }
    }
}

impl GuestEnd {
    /// Whether no guest that is well ends so.
    pub const fn is_crash(self) -> bool {
        match self {
            Self::PowerOff | Self::Reset => false,
            Self::Dead | Self::TripleFault | Self::Unrunnable { .. } => true,
        }
    }
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("power off"),
            Self::Reset => f.write_str("reset"),
            Self::Dead => f.write_str("dead (HLT with interrupts off)"),
            Self::TripleFault => f.write_str("triple fault"),
            Self::Unrunnable { why, rip } => write!(f, "unrunnable ({why} at {rip:#x})"),
        }
    }
}

/// A guest's end: how, and at which landmark. Every copy comes to the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Ending {
    /// How.
    pub how: GuestEnd,
    /// The last landmark.
    pub at: Position,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at position {}", self.how, self.at)
    }
}

/// What the machine can take at this landmark. What it cannot take waits outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// The network device has a receive buffer for a frame.
    pub frame: bool,
    /// How many typed bytes the console has room for.
    pub console: usize,
}

/// An arrival with what the log does not carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// What arrives, as the log has it.
    pub arrival: Arrival,
    /// The data of a finished read (every copy reads its own disk).
    pub data: Option<Bytes>,
}

/// What the run loop is to do between two groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Deliver this and ask again.
    Deliver(Delivery),
    /// Execute one slice.
    Run,
    /// Compute the digest, hand it to [`Tape::mark`], and ask again.
    Mark,
    /// There is nothing to do before something happens outside; ask again then.
    Wait,
    /// Leave the run loop at this landmark; it can be entered again.
    Pause,
}

/// Whether a landmark needs attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pending {
    /// The guest may execute on as it is.
    Nothing,
    /// [`Tape::next`] has something to say: complete pending I/O, then ask.
    Act,
    /// The log ends here for now. The guest is not entered, not even to complete pending I/O,
    /// because that may bring an exit which the log does not show.
    Hold,
}

/// Keys every digest of one log. It depends on all of the log's header, the boot that was drawn at
/// power-on included: no guest knows it, so none can choose what it writes so that two states have
/// one digest; and under a header in which anything was changed, no digest is equal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DigestKey([u8; 32]);

impl DigestKey {
    /// The key of the log that begins with this header.
    pub fn of(header: &Header) -> Self {
        let header = postcard::to_stdvec(header).expect("plain data always encodes");
        Self(blake3::derive_key("understudy state digests", &header))
    }

    /// The key itself.
    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// A tape: where the outside comes from.
pub trait Tape {
    /// What the digests of this log are keyed with.
    fn key(&self) -> DigestKey;

    /// Whether there is anything to do at this landmark but execute on. Cheap: it is asked after
    /// every exit, before pending I/O is completed.
    fn pending(
        &mut self,
        at: Position,
        cpu: CpuState,
        can_take: Sources,
    ) -> Result<Pending, TapeError>;

    /// What to do now. Called between groups only, with pending I/O completed.
    fn next(&mut self, at: Position, cpu: CpuState, can_take: Sources) -> Result<Next, TapeError>;

    /// Answers a device while an exit is served.
    fn answer(&mut self, query: Query) -> Result<Answer, TapeError>;

    /// Takes a command while an exit is served.
    fn command(&mut self, command: Command) -> Result<(), TapeError>;

    /// The exit that led to landmark `at` is served: its group ends.
    fn close(&mut self, at: Position) -> Result<(), TapeError>;

    /// The guest is about to execute; an interrupt may wait until it can take one.
    fn entering(&mut self, interrupt_waits: bool) {
        let _ = interrupt_waits;
    }

    /// Takes the digest asked for by [`Next::Mark`]: written down, or compared.
    fn mark(&mut self, at: Position, digest: MarkDigest) -> Result<(), TapeError>;
}

/// Why a tape cannot go on.
#[derive(Debug, Error)]
pub enum TapeError {
    /// The machine did not do what the log says it did.
    #[error("the replay diverged at position {at}: the log has {expected}, the machine {found}")]
    Diverged {
        /// The first landmark at which they differ.
        at: Position,
        /// What the log says.
        expected: String,
        /// What the machine did.
        found: String,
    },
    /// This copy's disk does not hold what the primary's did.
    #[error("the data of disk request {request:?} at position {at} is not what the primary read")]
    DiskDiffers {
        /// Where the completion was to be delivered.
        at: Position,
        /// The request.
        request: RequestNumber,
    },
    /// The host failed the machine (a disk error, a lost channel): never an event of the guest.
    #[error("the host cannot go on: {reason}")]
    Host {
        /// A sentence that says what failed.
        reason: String,
    },
}
