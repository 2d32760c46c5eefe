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

#[cfg(test)]
mod tests {
    use std::process::Stdio;
    use std::time::Duration;

    use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
    use tokio::process::Command;
    use tokio::time::timeout;

    use super::*;
    use crate::agent::testing::skipped;
    use crate::agent::vm_process::VmProcess;

    /// Only keeps a broken test from hanging.
    const PATIENCE: Duration = Duration::from_secs(30);

    /// Keeps a file from being opened (by a lease, `fcntl(2)`) from `held` on, says when somebody wants
    /// to, and lets them after a line of input (whose end would not do: the process that waits for the
    /// program has it open, too).
    const HOLDER: &str = "
import fcntl, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
file = open(sys.argv[1], 'rb')
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
signal.sigwait([signal.SIGIO])
print('wanted', flush=True)
sys.stdin.readline()
";

    #[tokio::test]
    async fn a_program_that_its_disk_does_not_give_out_keeps_nobody_waiting() {
        let test = "a_program_that_its_disk_does_not_give_out_keeps_nobody_waiting";
        let folder = tempfile::tempdir().expect("a folder");
        let program = folder.path().join("program");
        std::fs::copy("/bin/true", &program).expect("a program that does nothing");
        let mut holder = Command::new("python3");
        holder.args(["-c", HOLDER]).arg(&program);
        holder.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut holder = match holder.kill_on_drop(true).spawn() {
            Ok(holder) => holder,
            Err(error) => return skipped(test, &format!("python3 cannot be run: {error}")),
        };
        let said = holder.stdout.take().expect("piped");
        let mut said = BufReader::new(said).lines();
        let held = timeout(PATIENCE, said.next_line());
        let held = held.await.expect("it says something").expect("text");
        let Some(held) = held else {
            return skipped(test, &"the file system of temporary files has no leases");
        };
        assert_eq!(held, "held");

        let starter = Starter::new().expect("a thread");
        let starting = starter.spawn(Some(program), Vec::new());
        tokio::pin!(starting);
        // The one thread of this runtime hears that the program is wanted while it cannot be read.
        let wanted = tokio::select! {
            biased;
            _ = &mut starting => panic!("a program was started that could not be read"),
            line = timeout(PATIENCE, said.next_line()) => line.expect("in time").expect("text"),
        };
        assert_eq!(wanted.as_deref(), Some("wanted"));
        let mut lets = holder.stdin.take().expect("piped");
        lets.write_all(b"\n").await.expect("it listens");
        let started = timeout(PATIENCE, starting).await.expect("in time");
        let mut process = VmProcess::begin(started.expect("started")).expect("told");
        let said = timeout(PATIENCE, process.recv()).await.expect("in time");
        assert!(matches!(said, Ok(None)), "it has nothing to say: {said:?}");
    }
}
