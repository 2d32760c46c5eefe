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
use vmm::boot::BootImage;
use vmm::host::Output;
use vmm::tape::Ending;

/// The longest message: kernel and RAM disk with room to spare.
pub const MAX_MESSAGE: usize = 512 << 20;

/// The least that is read at once, in bytes.
const READ_STEP: usize = 64 << 10;

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
    /// The same without a cluster: nothing that it lets out waits for anybody.
    Recorded,
    /// A machine whose log nobody keeps: no recorder, to measure what recording costs.
    Unrecorded,
    /// A machine of which there can be no log: what arrives is delivered wherever the guest is.
    Unprotected,
    /// A replica: replay what is fed.
    Replica,
}

/// Everything a VMM process needs to build its machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// Which machine.
    pub header: Header,
    /// What it boots from.
    pub image: BootImage,
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
    /// Show that you live: [`FromVm::Pong`], or [`FromVm::Busy`].
    Ping {
        /// Take the vCPU out of the guest for it: the guest may make no exit for a long time.
        kick: bool,
    },
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
    /// Something that arrived has waited longer for the guest than anything before (primary).
    Deferred {
        /// How long, in nanoseconds.
        longest: u64,
    },
    /// The vCPU's thread lives, and its disk does what it is asked (after [`ToVm::Ping`]).
    Pong,
    /// The process lives, and its machine is being built, or its disk has done nothing of what it was
    /// asked since the last ping (after [`ToVm::Ping`]).
    Busy,
    /// The guest has ended by its own doing.
    Ended(Ending),
    /// The process cannot go on; it exits after this.
    Failed {
        /// What kind of failure.
        kind: FailureKind,
        /// The last landmark that the machine has passed.
        at: Position,
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

/// Messages from a blocking stream, as many at once as have come.
pub struct Inlet<R> {
    from: R,
    buffer: Vec<u8>,
    /// So much of the buffer is what was read and is not a whole message yet.
    filled: usize,
}

impl<R: Read> Inlet<R> {
    /// Reads from this stream.
    pub fn new(from: R) -> Self {
        Self {
            from,
            buffer: vec![0; READ_STEP],
            filled: 0,
        }
    }

    /// Waits until there is at least one message, and gives all that are whole; none at the
    /// stream's end.
    pub fn messages<M: DeserializeOwned>(&mut self) -> Result<Vec<M>, IpcError> {
        let mut messages = Vec::new();
        while messages.is_empty() {
            if self.filled == self.buffer.len() {
                // A long message: the buffer grows with what has come of it, not with what it says.
                self.buffer.resize(2 * self.filled, 0);
            }
            let read = match self.from.read(&mut self.buffer[self.filled..]) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if read == 0 {
                break;
            }
            self.filled += read;
            let mut taken = 0;
            while let Some((message, used)) = decode(&self.buffer[taken..self.filled])? {
                messages.push(message);
                taken += used;
            }
            self.buffer.copy_within(taken..self.filled, 0);
            self.filled -= taken;
        }
        Ok(messages)
    }
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
        bytes = encode(&ToVm::Pause(true), bytes).expect("encodes");
        for end in 0..5 {
            assert!(decode::<ToVm>(&bytes[..end]).expect("no error").is_none());
        }
        let (first, used) = decode::<ToVm>(&bytes).expect("decodes").expect("is whole");
        assert!(matches!(first, ToVm::Frame { bytes, .. } if bytes.as_ref() == b"x"));
        let (second, rest) = decode::<ToVm>(&bytes[used..])
            .expect("decodes")
            .expect("is whole");
        assert!(matches!(second, ToVm::Pause(true)));
        assert_eq!(used + rest, bytes.len());
    }

    /// Gives what it has in pieces of one size.
    struct Pieces<'a>(&'a [u8], usize);

    impl Read for Pieces<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let size = self.1.min(into.len()).min(self.0.len());
            let (piece, rest) = self.0.split_at(size);
            into[..size].copy_from_slice(piece);
            self.0 = rest;
            Ok(size)
        }
    }

    #[test]
    fn all_that_came_is_given_at_once_however_it_was_cut() {
        let frame = |len: usize| ToVm::Frame {
            source: FrameSource::default(),
            bytes: vec![7; len].into(),
        };
        let lens = [1, 90_000, 0, 200_000, 3];
        let mut bytes = Vec::new();
        for len in lens {
            bytes = encode(&frame(len), bytes).expect("encodes");
        }
        for piece in [1_000, 90_001, 1 << 20] {
            let mut inlet = Inlet::new(Pieces(&bytes, piece));
            let mut got = Vec::new();
            loop {
                let messages: Vec<ToVm> = inlet.messages().expect("messages");
                if messages.is_empty() {
                    break;
                }
                got.extend(messages.into_iter().map(|message| match message {
                    ToVm::Frame { bytes, .. } => bytes.len(),
                    other => panic!("{other:?}"),
                }));
            }
            assert_eq!(got, lens, "in pieces of {piece}");
        }
        let mut inlet = Inlet::new(&bytes[..20]);
        assert_eq!(inlet.messages::<ToVm>().expect("the first").len(), 1);
        assert!(inlet.messages::<ToVm>().expect("the end").is_empty());
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(matches!(
            decode::<ToVm>(&[255; 8]),
            Err(IpcError::TooLong(_))
        ));
        assert!(matches!(
            Inlet::new(&[255_u8; 8][..]).messages::<ToVm>(),
            Err(IpcError::TooLong(_))
        ));
    }
}
