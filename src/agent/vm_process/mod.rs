//! One VMM process per VM, a child of its agent that dies with it: the handle that the agent
//! holds ([`VmProcess`]), the process itself ([`child`]), and what they say to each other
//! ([`ipc`]).

pub mod child;
mod disks;
mod host;
pub mod ipc;

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, BytesMut};
use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

pub use disks::{DiskSetupError, open_disks};
pub use ipc::{DiskSetup, FailureKind, FromVm, IpcError, Start, StartAs, ToVm};

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
}

/// A running VMM process. Dropping it kills the process.
pub struct VmProcess {
    child: Child,
    reader: OwnedReadHalf,
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
    stream: OwnedWriteHalf,
    queue: BytesMut,
    broken: bool,
}

impl VmProcess {
    /// Starts a VMM process from this program's own file.
    ///
    /// Call it on a thread that lives as long as the machine: the kernel ends the process with the
    /// *thread* that started it.
    pub fn spawn(start: Start) -> Result<Self, SpawnError> {
        let binary = std::env::current_exe().map_err(|source| SpawnError::Spawn {
            binary: PathBuf::from("/proc/self/exe"),
            source,
        })?;
        Self::spawn_from(&binary, start)
    }

    /// The same from another file of the same build (tests are not the program).
    pub fn spawn_from(binary: &Path, start: Start) -> Result<Self, SpawnError> {
        let failed = |source| SpawnError::Spawn {
            binary: binary.to_owned(),
            source,
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed)?;
        ours.set_nonblocking(true).map_err(failed)?;
        let child = Command::new(binary)
            .arg(SUBCOMMAND)
            .arg(std::process::id().to_string())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let (reader, stream) = UnixStream::from_std(ours).map_err(failed)?.into_split();
        let out = Out {
            stream,
            queue: BytesMut::new(),
            broken: false,
        };
        let shared = Arc::new(Shared {
            out: Mutex::new(out),
            wake: Notify::new(),
        });
        let writer = tokio::spawn(write_queued(Arc::clone(&shared)));
        let sender = VmSender { shared };
        sender.send(&ToVm::Start(Box::new(start)))?;
        Ok(Self {
            child,
            reader,
            input: BytesMut::with_capacity(64 << 10),
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
            match self.reader.read_buf(&mut self.input).await {
                Ok(0) => return Ok(None),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
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
        self.child.start_kill()?;
        self.child.wait().await
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
    /// Says something. What the socket does not take at once is queued; see [`Self::queued`].
    pub fn send(&self, message: &ToVm) -> Result<(), IpcError> {
        let bytes = ipc::encode(message, Vec::new())?;
        let mut out = self
            .shared
            .out
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if out.broken {
            return Err(io::Error::from(ErrorKind::BrokenPipe).into());
        }
        let sent = if out.queue.is_empty() {
            match out.stream.try_write(&bytes) {
                Ok(sent) => sent,
                Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                Err(error) => {
                    out.broken = true;
                    return Err(error.into());
                }
            }
        } else {
            0
        };
        if sent < bytes.len() {
            out.queue.extend_from_slice(&bytes[sent..]);
            self.shared.wake.notify_one();
        }
        Ok(())
    }

    /// How many bytes the process has not taken yet. Whoever feeds a log keeps this bounded.
    pub fn queued(&self) -> usize {
        self.shared
            .out
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .queue
            .len()
    }
}

/// Writes what [`VmSender::send`] could not, until the process is gone.
async fn write_queued(shared: Arc<Shared>) {
    loop {
        shared.wake.notified().await;
        loop {
            let wrote = {
                let mut out = shared.out.lock().unwrap_or_else(PoisonError::into_inner);
                if out.queue.is_empty() {
                    break;
                }
                let Out { stream, queue, .. } = &mut *out;
                match stream.try_write(queue) {
                    Ok(sent) => {
                        queue.advance(sent);
                        true
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => false,
                    Err(_) => {
                        out.broken = true;
                        return;
                    }
                }
            };
            if !wrote {
                writable(&shared).await;
            }
        }
    }
}

/// Waits until the socket takes more. The lock is held only while it is polled.
async fn writable(shared: &Shared) {
    std::future::poll_fn(|context| {
        let out = shared.out.lock().unwrap_or_else(PoisonError::into_inner);
        let stream: &UnixStream = out.stream.as_ref();
        stream.poll_write_ready(context)
    })
    .await
    .unwrap_or_default();
}
