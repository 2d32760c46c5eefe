//! One VMM process per VM, a child of its agent that dies with it: the handle that the agent
//! holds ([`VmProcess`]), the process itself ([`child`]), and what they say to each other
//! ([`ipc`]).

mod background;
pub mod child;
mod disks;
mod host;
pub mod ipc;
mod prompter;
mod pulse;
mod starter;
mod watch;

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::agent::listen::listen;

pub use disks::{DiskSetupError, open_disks};
pub use ipc::{DiskSetup, FailureKind, FromVm, IpcError, Start, StartAs, ToVm};
pub use starter::Starter;
pub use watch::{Starved, Verdict, Watch};

/// How much of what a process says is read at once, in bytes.
const READ_AT_ONCE: usize = 64 << 10;

/// The hidden subcommand that makes this binary a VMM process.
pub const SUBCOMMAND: &str = "vmm-process";

/// Why a VMM process could not be started.
#[derive(Debug, Error)]
pub enum SpawnError {
    /// No socket or no process.
    #[error("the VMM process cannot be started from {binary}: {source}")]
    Spawn {
        /// The program.
        binary: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The first message cannot be sent.
    #[error(transparent)]
    Ipc(#[from] IpcError),
    /// The agent ends.
    #[error("no VMM process is started any more: the agent ends")]
    NoStarter,
}

/// A VMM process that has been started and told nothing yet. Dropping it kills the process.
pub struct Spawned {
    child: Child,
    stream: UnixStream,
    start: Vec<u8>,
}

/// What a process is told first, as it is sent. May be long: an image is part of it.
pub fn begin_with(start: Start) -> Result<Vec<u8>, IpcError> {
    ipc::encode(&ToVm::Start(Box::new(start)), Vec::new())
}

impl Spawned {
    /// Starts a process from this file, of the same build, or from this program's own. Blocks until
    /// the kernel has read its beginning.
    ///
    /// Call it on a thread that lives as long as the machine: the kernel ends the process with the
    /// *thread* that started it.
    pub fn new(binary: Option<&Path>, start: Vec<u8>) -> Result<Self, SpawnError> {
        let failed = |binary: &Path, source| SpawnError::Spawn {
            binary: binary.to_owned(),
            source,
        };
        let own = Path::new("/proc/self/exe");
        let binary = match binary {
            Some(binary) => binary.to_owned(),
            None => std::env::current_exe().map_err(|source| failed(own, source))?,
        };
        let failed = |source| failed(&binary, source);
        let (stream, theirs) = UnixStream::pair().map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        let child = Command::new(&binary)
            .arg(SUBCOMMAND)
            .arg(std::process::id().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        Ok(Self {
            child,
            stream,
            start,
        })
    }
}

/// A running VMM process. Dropping it kills the process.
pub struct VmProcess {
    child: Child,
    /// Listens for messages only: were it told of room to write, too, each message that the process
    /// takes would wake whoever sent it.
    reader: AsyncFd<UnixStream>,
    read: Box<[u8]>,
    input: BytesMut,
    sender: VmSender,
    writer: JoinHandle<()>,
}

/// Speaks to a VMM process without ever waiting for it.
#[derive(Clone)]
pub struct VmSender {
    shared: Arc<Shared>,
}

struct Shared {
    out: Mutex<Out>,
    wake: Notify,
}

struct Out {
    stream: UnixStream,
    queue: BytesMut,
    /// The socket is full, and the writer waits until it is not.
    blocked: bool,
    broken: bool,
}

impl VmProcess {
    /// Tells a process that has been started how to begin, without waiting for it.
    pub fn begin(spawned: Spawned) -> Result<Self, IpcError> {
        let Spawned {
            child,
            stream,
            start,
        } = spawned;
        let out = Out {
            stream: stream.try_clone()?,
            queue: Bytes::from(start).into(),
            blocked: false,
            broken: false,
        };
        let shared = Arc::new(Shared {
            out: Mutex::new(out),
            wake: Notify::new(),
        });
        let writer = tokio::spawn(write_queued(Arc::clone(&shared)));
        let sender = VmSender { shared };
        sender.flush()?;
        Ok(Self {
            child,
            reader: listen(stream, Interest::READABLE)?,
            read: vec![0; READ_AT_ONCE].into(),
            input: BytesMut::with_capacity(READ_AT_ONCE),
            sender,
            writer,
        })
    }

    /// The process id.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Speaks to the process.
    pub const fn sender(&self) -> &VmSender {
        &self.sender
    }

    /// The next thing the process says; `None` once it is gone. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<FromVm>, IpcError> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(Some(message));
            }
            let mut ready = self.reader.readable().await?;
            let read = &mut self.read;
            match ready.try_io(|stream| stream.get_ref().read(read)) {
                Err(_nothing_there) => {}
                Ok(Ok(0)) => return Ok(None),
                Ok(Ok(len)) => {
                    if len < READ_AT_ONCE {
                        // This was all; the next message is an event of its own.
                        ready.clear_ready();
                    }
                    self.input.extend_from_slice(&self.read[..len]);
                }
                Ok(Err(error)) if error.kind() == ErrorKind::Interrupted => {}
                Ok(Err(error)) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Ok(Err(error)) => return Err(error.into()),
            }
        }
    }

    /// Whether something has been read already that was not taken yet.
    pub fn has_more(&self) -> bool {
        !self.input.is_empty()
    }

    /// The next thing that has been read already.
    pub fn take(&mut self) -> Result<Option<FromVm>, IpcError> {
        let Some((message, used)) = ipc::decode(&self.input)? else {
            return Ok(None);
        };
        self.input.advance(used);
        Ok(Some(message))
    }

    /// Ends the process at once and waits for its end.
    pub async fn kill(mut self) -> io::Result<ExitStatus> {
        self.end()?;
        self.child.wait().await
    }

    /// Ends the process at once, without waiting for that: from now on it executes nothing of its
    /// own. Until [`Self::wait`] says that it is gone it may still have its memory, and what it had
    /// the kernel write may still be written. A process that is gone already is no error.
    pub fn end(&mut self) -> io::Result<()> {
        match self.child.start_kill() {
            // What tokio says of a process that has been waited for.
            Err(error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
            other => other,
        }
    }

    /// Waits for the end of a process that has nothing more to say.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait().await
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

impl VmSender {
    /// Says something. It leaves with [`Self::flush`], together with whatever else is said before:
    /// the process is woken once for all of it.
    pub fn send(&self, message: &ToVm) -> Result<(), IpcError> {
        let bytes = ipc::encode(message, Vec::new())?;
        let mut out = self.lock();
        if out.broken {
            return Err(io::Error::from(ErrorKind::BrokenPipe).into());
        }
        out.queue.extend_from_slice(&bytes);
        Ok(())
    }

    /// Sends what was said on its way. What the socket does not take at once follows when it does.
    pub fn flush(&self) -> Result<(), IpcError> {
        let mut out = self.lock();
        if out.queue.is_empty() || out.blocked {
            return Ok(());
        }
        match out.write() {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                out.blocked = true;
                self.shared.wake.notify_one();
            }
            Err(error) => {
                out.broken = true;
                return Err(error.into());
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Out> {
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Out> {
        // Nothing is half done while the lock is held, so a panic elsewhere does no harm here.
        self.out.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Out {
    /// Writes all that waits, or as much as the socket takes.
    fn write(&mut self) -> io::Result<()> {
        while !self.queue.is_empty() {
            match self.stream.write(&self.queue) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(sent) => self.queue.advance(sent),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Writes what [`VmSender::flush`] could not, until the process is gone.
async fn write_queued(shared: Arc<Shared>) {
    loop {
        shared.wake.notified().await;
        if let Err(error) = write_blocked(&shared).await {
            tracing::debug!(%error, "a VMM process takes nothing any more");
            shared.lock().broken = true;
            return;
        }
    }
}

/// Writes as the socket has room, until nothing waits.
async fn write_blocked(shared: &Shared) -> io::Result<()> {
    // A descriptor of its own, which listens for room as long as that is wanted.
    let stream = shared.lock().stream.try_clone()?;
    let room = listen(stream, Interest::WRITABLE)?;
    loop {
        let mut ready = room.writable().await?;
        let mut out = shared.lock();
        match out.write() {
            Ok(()) => {
                out.blocked = false;
                return Ok(());
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => ready.clear_ready(),
            Err(error) => return Err(error),
        }
    }
}
