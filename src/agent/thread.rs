//! The thread on which a host's heartbeats are sent and heard: a runtime of its own, before other
//! work where the system lets us.
//!
//! A busy machine must not look like a dead one. What computes or waits for disks runs on the
//! runtime's blocking threads (`spawn_blocking`), which have ordinary priority.

use std::io;

use rustix::process::{Pid, getpriority_process, setpriority_process};
use tokio::runtime::Builder;
use tokio::sync::oneshot;

/// The niceness asked for: about thirty times the weight of an ordinary thread.
const NICE: i32 = -15;
/// The niceness of a thread that hands things on: behind heartbeats, before all that computes.
const AHEAD: i32 = -10;

/// Runs a future on a thread of its own, with a runtime that nothing else shares, and waits for
/// its end.
pub async fn on_own_thread<F, Fut, T>(name: &str, run: F) -> io::Result<T>
where
    F: FnOnce() -> Fut + Send + 'static,
    Fut: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let (tell, done) = oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let outcome = block_on(run);
            // Whoever waited may have gone.
            let _ = tell.send(outcome);
        })?;
    let ended = |_| io::Error::other("the thread ended without a result");
    done.await.map_err(ended)?
}

fn block_on<F, Fut, T>(run: F) -> io::Result<T>
where
    F: FnOnce() -> Fut,
    Fut: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let before = getpriority_process(None)?;
    // Without the right to it (CAP_SYS_NICE) the thread stays as it is, and suspicion adapts to
    // heartbeats that come late.
    if let Err(error) = setpriority_process(None, NICE) {
        tracing::info!(%error, "heartbeats have no priority over other work");
    }
    let runtime = Builder::new_current_thread()
        .enable_all()
        .on_thread_start(move || set_nice(before))
        .build()?;
    // A task, because waking what `block_on` itself polls costs a system call each time.
    let task = runtime.spawn(run());
    runtime.block_on(task).map_err(io::Error::other)
}

/// Gives up the priority that the calling thread inherited from its maker. Says whether it had any:
/// then it has the right to take it back.
pub fn ordinary(nice: i32) -> bool {
    let inherited = getpriority_process(None).unwrap_or(nice);
    set_nice(nice);
    inherited < nice
}

/// Puts the calling thread behind the one that heartbeats live on, if that has made it, and before all that
/// computes. For threads that hand on what clients wait for, and whose work is bounded.
pub fn behind_heartbeats() {
    if getpriority_process(None).is_ok_and(|inherited| inherited < AHEAD) {
        set_nice(AHEAD);
    }
}

/// Calls `start` with a little more than ordinary priority: a thread that it makes inherits that. For
/// threads that hand on what clients wait for, and compute nothing themselves. `may`: this process
/// has the right to it.
pub fn ahead_of_others<T>(may: bool, start: impl FnOnce() -> T) -> T {
    if !may {
        return start();
    }
    set_nice(AHEAD);
    let started = start();
    set_nice(0);
    started
}

/// Sets the priority of the calling thread.
fn set_nice(nice: i32) {
    ThreadId::own().set_nice(nice);
}

/// A thread of this process.
#[derive(Clone, Copy, Debug)]
pub struct ThreadId(Option<Pid>);

impl ThreadId {
    /// The calling thread.
    pub fn own() -> Self {
        Self(Pid::from_raw(nix::unistd::gettid().as_raw()))
    }

    /// Sets its priority.
    pub fn set_nice(self, nice: i32) {
        // What the kernel calls a process here is a thread.
        if let Err(error) = setpriority_process(self.0, nice) {
            tracing::debug!(%error, nice, "the priority stays as it is");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_thread_itself_has_priority() {
        let ours = getpriority_process(None).expect("a niceness");
        let (own, blocking) = on_own_thread("test", async || {
            let own = getpriority_process(None).expect("a niceness");
            let blocking = tokio::task::spawn_blocking(|| getpriority_process(None))
                .await
                .expect("it ran")
                .expect("a niceness");
            (own, blocking)
        })
        .await
        .expect("it ran");
        assert_eq!(blocking, ours);
        assert_eq!(getpriority_process(None).expect("a niceness"), ours);
        if own == ours {
            println!("SKIPPED: this user may not raise priorities");
        } else {
            assert_eq!(own, NICE);
        }
    }
}
