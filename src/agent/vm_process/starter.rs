//! The thread that VMM processes are started from.
//!
//! Whoever starts a program waits until the kernel has read its beginning from a disk, and heartbeats
//! wait for no disk. The thread lives as long as the agent, because the kernel ends a process with the
//! *thread* that started it.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::{SpawnError, Spawned};

/// A process that is wanted.
struct Job {
    binary: Option<PathBuf>,
    start: Vec<u8>,
    done: oneshot::Sender<Result<Spawned, SpawnError>>,
}

/// Starts VMM processes without making its callers wait for the disk that the program is on.
pub struct Starter {
    jobs: Sender<Job>,
}

impl Starter {
    /// Makes the thread, with the priority of the calling one, which its processes know how to give
    /// up. Call it on the runtime that waits for the processes' ends.
    pub fn new() -> io::Result<Self> {
        let (jobs, wanted) = channel();
        let runtime = Handle::current();
        std::thread::Builder::new()
            .name("starter".into())
            .spawn(move || work(&runtime, &wanted))?;
        Ok(Self { jobs })
    }

    /// Starts a process from this file, or from this program's own, which is told how to begin
    /// ([`super::begin_with`]) when it is spoken to.
    pub async fn spawn(
        &self,
        binary: Option<PathBuf>,
        start: Vec<u8>,
    ) -> Result<Spawned, SpawnError> {
        let (done, spawned) = oneshot::channel();
        let job = Job {
            binary,
            start,
            done,
        };
        // Fails only with the thread, which ends with its last owner.
        let _ = self.jobs.send(job);
        spawned.await.unwrap_or(Err(SpawnError::NoStarter))
    }
}

fn work(runtime: &Handle, wanted: &Receiver<Job>) {
    let _entered = runtime.enter();
    while let Ok(job) = wanted.recv() {
        let spawned = Spawned::new(job.binary.as_deref(), job.start);
        // Whoever wanted it may have gone: then the process is ended.
        let _ = job.done.send(spawned);
    }
}
