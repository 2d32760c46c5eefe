//! What the lab's parts say to each other, and how it is framed: a four-byte length, then postcard.
//!
//! ```text
//!   client ── Call, ToJob ──► keeper ── ToHost ──► the host's agent
//!          ◄── Reply ────────        ◄── FromHost ─
//! ```
//!
//! A job is what is done inside a host. Its data flows as far as the other end has room:
//! [`WINDOW`] bytes may be on the way, and `Took` makes room for more; so a client that does not
//! read blocks its own job and no other.

use std::io::{self, Read, Write};
use std::path::PathBuf;

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use super::state::{Delay, End, HostId, LabStatus, Setup};

/// The version of what keeper and host say to each other: a lab may be given another program for
/// its hosts.
pub const PROTOCOL: u32 = 1;
/// The name of the serial port between keeper and host.
pub const PORT: &str = "understudy.lab";
/// The longest message.
const MAX_MESSAGE: usize = 1 << 20;
/// How much data one message carries.
pub const CHUNK: usize = 32 << 10;
/// How many bytes of a job may be on the way in one direction.
pub const WINDOW: usize = 512 << 10;

/// Something to be done inside a host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Job {
    /// Run a program to its end; its output streams come back.
    Run(Vec<String>),
    /// Start a program that goes on by itself; its output goes to a file of the host.
    Detach(Vec<String>),
    /// Write a file: data follows.
    Put {
        /// Where.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Read a file: data comes back.
    Get {
        /// Which.
        path: PathBuf,
    },
}

/// To a job that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToJob {
    /// The next part of a file.
    Data(Bytes),
    /// The whole file was sent.
    End,
    /// So many bytes of what came were taken.
    Took(u32),
}

/// From a job.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromJob {
    /// From its standard output, or of a file.
    Out(Bytes),
    /// From its standard error.
    Err(Bytes),
    /// So many bytes of what was sent were taken.
    Took(u32),
    /// It has ended; nothing follows.
    Done(Result<Done, String>),
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Done {
    /// The program has ended with this exit code.
    Exited(i32),
    /// The program was ended by this signal.
    Signalled(i32),
    /// The program goes on.
    Detached(Detached),
    /// The file was written.
    Put,
    /// The file was read; these are its permissions.
    Got {
        /// As in `chmod`.
        mode: u32,
    },
}

/// A program that goes on by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detached {
    /// Its number in the host.
    pub pid: u32,
    /// Where its output goes, a file of the host.
    pub output: PathBuf,
}

/// From the keeper to a host's agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToHost {
    /// Do something under this number.
    Start(u32, Job),
    /// Something for a job.
    Job(u32, ToJob),
    /// Nobody waits for this job any more: end it.
    Cancel(u32),
}

/// From a host's agent to the keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromHost {
    /// The host is there. The first message.
    Hello {
        /// The version it speaks.
        protocol: u32,
    },
    /// Something from a job.
    Job(u32, FromJob),
}

/// What a client asks of the keeper: one call a connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Call {
    /// How is the lab?
    Status,
    /// Do something inside a host.
    Job(HostId, Job),
    /// Cut a host's power.
    Kill(HostId),
    /// Power it on, and answer when it is up.
    Start(HostId),
    /// Cut the link between two ends, or mend it.
    Link {
        /// One end.
        a: End,
        /// The other.
        b: End,
        /// Whether it is to be cut.
        cut: bool,
    },
    /// Lengthen the link between two ends.
    Delay {
        /// One end.
        a: End,
        /// The other.
        b: End,
        /// By how much, each way; nothing: as short as it was.
        delay: Delay,
    },
    /// End the lab.
    Down,
    /// Hold the connection: its end is the lab's.
    Watch,
}

/// From a client to the keeper.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromClient {
    /// The first message.
    Call(Call),
    /// Something for the job that it has started.
    Job(ToJob),
}

/// From the keeper to a client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Reply {
    /// It is done.
    Done,
    /// It cannot be done: a sentence.
    Refused(String),
    /// How the lab is.
    Status(LabStatus),
    /// Something from the job.
    Job(FromJob),
}

/// From whoever starts a lab to its keeper, over the keeper's standard input.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromStarter {
    /// What the lab is to be. The first message.
    Setup(Setup),
    /// The lab stays when the starter goes. Without it, the lab ends with the connection.
    Stay,
}

/// From the keeper to whoever starts the lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Progress {
    /// Something worth a line has happened.
    Note(String),
    /// A host answers.
    HostUp {
        /// Which.
        host: HostId,
        /// How long after the start, in milliseconds.
        after_ms: u64,
    },
    /// All hosts answer.
    Ready,
    /// There will be no lab: a sentence.
    Failed(String),
}

/// Why a message could not be read or written.
#[derive(Debug, Error)]
pub enum WireError {
    /// The other end is gone, or the connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// Nonsense came.
    #[error("a message cannot be read: {0}; are both ends of one version?")]
    Decode(#[from] postcard::Error),
    /// A length beyond what a message may have.
    #[error("a message of {0} bytes is too long; are both ends of one version?")]
    TooLong(usize),
}

/// A message as it is sent.
pub fn frame(message: &impl Serialize) -> Result<Vec<u8>, WireError> {
    let mut bytes = postcard::to_extend(message, vec![0; 4])?;
    let length = bytes.len() - 4;
    let header = u32::try_from(length)
        .ok()
        .filter(|_| length <= MAX_MESSAGE)
        .ok_or(WireError::TooLong(length))?;
    bytes[..4].copy_from_slice(&header.to_le_bytes());
    Ok(bytes)
}

fn length(header: [u8; 4]) -> Result<usize, WireError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_MESSAGE {
        return Err(WireError::TooLong(length));
    }
    Ok(length)
}

/// Whether a stream has ended where a message would begin: an orderly end.
fn ended(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
    )
}

/// Writes a message.
pub fn write(to: &mut impl Write, message: &impl Serialize) -> Result<(), WireError> {
    Ok(to.write_all(&frame(message)?)?)
}

/// Waits for a message; none at the end of the stream.
pub fn read<M: DeserializeOwned>(from: &mut impl Read) -> Result<Option<M>, WireError> {
    let mut header = [0; 4];
    match from.read_exact(&mut header) {
        Err(error) if ended(&error) => return Ok(None),
        other => other?,
    }
    let mut body = vec![0; length(header)?];
    from.read_exact(&mut body)?;
    Ok(Some(postcard::from_bytes(&body)?))
}

/// Writes a message.
pub async fn send(
    to: &mut (impl AsyncWrite + Unpin),
    message: &impl Serialize,
) -> Result<(), WireError> {
    Ok(to.write_all(&frame(message)?).await?)
}

/// Waits for a message; none at the end of the stream. Not to be cancelled half-way.
pub async fn receive<M: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
) -> Result<Option<M>, WireError> {
    let mut header = [0; 4];
    match from.read_exact(&mut header).await {
        Err(error) if ended(&error) => return Ok(None),
        other => other.map(|_| ())?,
    }
    let mut body = vec![0; length(header)?];
    from.read_exact(&mut body).await?;
    Ok(Some(postcard::from_bytes(&body)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_until_the_end() {
        let mut bytes = Vec::new();
        for id in 0..3 {
            write(&mut bytes, &ToHost::Cancel(id)).expect("written");
        }
        let mut from = &bytes[..];
        for id in 0..3 {
            let message = read(&mut from).expect("read");
            assert!(matches!(message, Some(ToHost::Cancel(it)) if it == id));
        }
        assert!(read::<ToHost>(&mut from).expect("the end").is_none());
    }

    #[test]
    fn nonsense_is_refused_before_it_is_kept() {
        let huge = read::<ToHost>(&mut &[255_u8; 16][..]);
        assert!(matches!(huge, Err(WireError::TooLong(_))));
        let torn = read::<ToHost>(&mut &[9, 0, 0, 0, 1][..]);
        assert!(matches!(torn, Err(WireError::Io(_))));
        let unknown = read::<ToHost>(&mut &[1, 0, 0, 0, 77][..]);
        assert!(matches!(unknown, Err(WireError::Decode(_))));
        let long = ToJob::Data(vec![0; MAX_MESSAGE].into());
        assert!(matches!(frame(&long), Err(WireError::TooLong(_))));
    }
}
