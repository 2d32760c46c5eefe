//! What an agent and its VMM process say to each other, and how it is framed: a four-byte length,
//! then postcard. Both ends are the same binary, so there is no version; both still bound every
//! length, because a VMM process runs a guest that nobody trusts.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, Header, LogIndex, Position, Term};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm::host::Output;
use vmm::tape::GuestEnd;

/// The longest message: a kernel image with room to spare.
pub const MAX_MESSAGE: usize = 64 << 20;

/// A disk as this host has it. Its base is named by the header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSetup {
    /// The folder of the sealed bases.
    pub bases: PathBuf,
    /// The folder of the overlay that writes go to.
    pub overlay: PathBuf,
    /// Whether the guest's flush reaches the medium, or only the host's page cache.
    pub durable: bool,
}

/// What the VMM process does with its machine at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StartAs {
    /// A primary: record from power-on.
    Primary,
    /// A primary whose log nobody keeps: no recorder, to measure what recording costs.
    Unrecorded,
    /// A replica: replay what is fed.
    Replica,
}

/// Everything a VMM process needs to build its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// Which machine.
    pub header: Header,
    /// The kernel, an ELF file.
    pub kernel: Bytes,
    /// The disks, in device order.
    pub disks: Vec<DiskSetup>,
    /// What to be.
    pub start_as: StartAs,
}

/// From the agent to the VMM process.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToVm {
    /// The first message, and only the first.
    Start(Box<Start>),
    /// A frame for the guest (primary only).
    Frame {
        /// Who sent it.
        source: FrameSource,
        /// The frame.
        bytes: Bytes,
    },
    /// Console input (primary only).
    Console(Bytes),
    /// The next batch of the log, framed as in a segment (replica only).
    Batch(Bytes),
    /// Execute what was fed, all of it, then go on as the primary of this term.
    GoLive {
        /// The new term.
        term: Term,
        /// The end of the sealed log: what was fed must end here.
        at: LogIndex,
    },
    /// Stop at the next landmark, ship everything, say [`FromVm::Paused`]; or go on.
    Pause(bool),
    /// Hold the guest back, or let it go on.
    Throttle(bool),
    /// End. The process exits at once; nothing more comes from it.
    Stop,
}

/// From the VMM process to the agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromVm {
    /// The machine is built and stands at power-on.
    Ready,
    /// A batch of the log (primary), framed as in a segment.
    Shipped {
        /// The batch.
        batch: Bytes,
        /// The last landmark that the guest has passed.
        at: Position,
        /// The highest frame number of each gateway that it delivers.
        frames: Vec<FrameSource>,
    },
    /// An output. The batch that led to it was said before.
    Output(Output),
    /// How far the machine has executed (replica).
    Executed {
        /// How much of the log.
        through: LogIndex,
        /// The last landmark.
        at: Position,
    },
    /// The machine has gone live (after [`ToVm::GoLive`]).
    Live {
        /// Where.
        at: Position,
        /// The number of the last output its log led to.
        outputs: FrameNumber,
        /// The last frame of each gateway that its log delivered.
        frames: Vec<(GatewayIncarnation, FrameNumber)>,
    },
    /// The machine stands at a landmark with everything shipped (after [`ToVm::Pause`]).
    Paused {
        /// Where.
        at: Position,
        /// The end of the log.
        index: LogIndex,
    },
    /// The guest has ended by its own doing.
    Ended {
        /// How.
        end: GuestEnd,
        /// Where.
        at: Position,
    },
    /// The process cannot go on; it exits after this.
    Failed {
        /// What kind of failure.
        kind: FailureKind,
        /// A sentence.
        reason: String,
    },
}

/// What kind of failure ended a VMM process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The host: KVM, a disk, memory.
    Host,
    /// The replay differs from the log.
    Diverged,
    /// The data on this host's disk differs from the primary's.
    DiskDiffers,
    /// The log cannot be read or is another machine's.
    Log,
}

/// Why a message could not be read or written.
#[derive(Debug, Error)]
pub enum IpcError {
    /// The other end is gone, or the socket failed.
    #[error("the connection between the agent and its VMM process failed: {0}")]
    Io(#[from] io::Error),
    /// Nonsense came.
    #[error("a message between the agent and its VMM process cannot be read: {0}")]
    Decode(#[from] postcard::Error),
    /// A length beyond [`MAX_MESSAGE`].
    #[error("a message of {0} bytes between the agent and its VMM process is too long")]
    TooLong(usize),
}

/// Appends a framed message.
pub fn encode(message: &impl Serialize, out: Vec<u8>) -> Result<Vec<u8>, IpcError> {
    let start = out.len();
    let mut out = out;
    out.extend_from_slice(&[0; 4]);
    let mut out = postcard::to_extend(message, out)?;
    let len = out.len() - start - 4;
    let header = u32::try_from(len)
        .ok()
        .filter(|_| len <= MAX_MESSAGE)
        .ok_or(IpcError::TooLong(len))?;
    out[start..start + 4].copy_from_slice(&header.to_le_bytes());
    Ok(out)
}

/// Takes the first message off `input`: the message and how many bytes it took, or `None` when
/// more bytes are needed.
pub fn decode<M: DeserializeOwned>(input: &[u8]) -> Result<Option<(M, usize)>, IpcError> {
    let Some((header, rest)) = input.split_first_chunk::<4>() else {
        return Ok(None);
    };
    let len = u32::from_le_bytes(*header) as usize;
    if len > MAX_MESSAGE {
        return Err(IpcError::TooLong(len));
    }
    match rest.get(..len) {
        Some(body) => Ok(Some((postcard::from_bytes(body)?, len + 4))),
        None => Ok(None),
    }
}

/// Reads one message from a blocking stream; `None` at its end.
pub fn read<M: DeserializeOwned>(from: &mut impl Read) -> Result<Option<M>, IpcError> {
    let mut header = [0; 4];
    match from.read_exact(&mut header) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let len = u32::from_le_bytes(header) as usize;
    if len > MAX_MESSAGE {
        return Err(IpcError::TooLong(len));
    }
    let mut body = vec![0; len];
    from.read_exact(&mut body)?;
    Ok(Some(postcard::from_bytes(&body)?))
}

/// Writes one message to a blocking stream.
pub fn write(to: &mut impl Write, message: &impl Serialize) -> Result<(), IpcError> {
    let bytes = encode(message, Vec::new())?;
    to.write_all(&bytes)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_and_torn_ones_wait() {
        let frame = ToVm::Frame {
            source: FrameSource::default(),
            bytes: Bytes::from_static(b"x"),
        };
        let mut bytes = encode(&frame, Vec::new()).expect("encodes");
        bytes = encode(&ToVm::Stop, bytes).expect("encodes");
        for end in 0..5 {
            assert!(decode::<ToVm>(&bytes[..end]).expect("no error").is_none());
        }
        let (first, used) = decode::<ToVm>(&bytes).expect("decodes").expect("is whole");
        assert!(matches!(first, ToVm::Frame { bytes, .. } if bytes.as_ref() == b"x"));
        let (second, rest) = decode::<ToVm>(&bytes[used..])
            .expect("decodes")
            .expect("is whole");
        assert!(matches!(second, ToVm::Stop));
        assert_eq!(used + rest, bytes.len());
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(matches!(
            decode::<ToVm>(&[255; 8]),
            Err(IpcError::TooLong(_))
        ));
        assert!(matches!(
            read::<ToVm>(&mut &[255_u8; 8][..]),
            Err(IpcError::TooLong(_))
        ));
    }
}
