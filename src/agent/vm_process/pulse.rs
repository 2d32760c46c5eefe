//! How a VMM process shows that it lives, however long its guest makes no exit.
//!
//! ```text
//!   agent ── Ping ──► reader ── inbox, kick ──► vCPU thread ── Pong, or Busy ──► agent
//!                       └── the vCPU's thread is where no inbox is looked at ── Busy ──► agent
//! ```
//!
//! The vCPU's thread answers, because it is the one that clients wait for. While it builds its machine,
//! or waits for its disk where it cannot look at what comes, the thread that reads the agent's
//! messages says so in its place.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use vmm::kvm::Kicker;

use super::ipc::{self, FromVm, IpcError};

/// The way to the agent. What is said at once arrives together.
#[derive(Clone)]
pub struct Voice(Arc<Mutex<UnixStream>>);

impl Voice {
    /// Speaks into this socket.
    pub fn new(agent: UnixStream) -> Self {
        Self(Arc::new(Mutex::new(agent)))
    }

    /// Says what is encoded in these bytes. Waits while the agent does not take it.
    pub fn say(&self, messages: &[u8]) -> std::io::Result<()> {
        let mut agent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        agent.write_all(messages)
    }
}

/// Where the vCPU's thread is.
pub struct Pulse {
    voice: Voice,
    /// Takes the vCPU out of the guest, once there is one.
    kicker: OnceLock<Kicker>,
    /// The vCPU's thread is where it hears nothing.
    away: AtomicBool,
}

impl Pulse {
    /// Of a process whose machine is not built yet.
    pub const fn new(voice: Voice) -> Self {
        Self {
            voice,
            kicker: OnceLock::new(),
            away: AtomicBool::new(true),
        }
    }

    /// The machine is built.
    pub fn built(&self, kicker: Kicker) {
        // There is one machine.
        let _ = self.kicker.set(kicker);
    }

    /// The vCPU's thread hears what comes from now on.
    pub fn hears(&self) {
        self.away.store(false, Ordering::Release);
    }

    /// The vCPU's thread waits for its disk for as long as `wait` takes, and hears nothing.
    pub fn away<T>(&self, wait: impl FnOnce() -> T) -> T {
        self.away.store(true, Ordering::Release);
        let waited = wait();
        self.hears();
        waited
    }

    /// The agent wants to know. The vCPU's thread has been sent the question.
    pub fn asked(&self, kick: bool) -> Result<(), IpcError> {
        if self.away.load(Ordering::Acquire) {
            let busy = ipc::encode(&FromVm::Busy, Vec::new())?;
            self.voice.say(&busy)?;
        } else if kick && let Some(kicker) = self.kicker.get() {
            kicker.kick();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::vm_process::ipc::Inlet;

    #[test]
    fn a_thread_that_hears_nothing_is_spoken_for() {
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        let pulse = Pulse::new(Voice::new(ours));
        let mut inlet = Inlet::new(theirs.try_clone().expect("a socket"));
        let mut busy = || matches!(inlet.messages::<FromVm>().as_deref(), Ok([FromVm::Busy]));
        pulse.asked(false).expect("said");
        assert!(busy(), "its machine is not built yet");
        pulse.hears();
        theirs.set_nonblocking(true).expect("an option");
        pulse.asked(true).expect("nothing to say");
        assert!(!busy(), "it answers for itself");
        pulse.away(|| pulse.asked(true)).expect("said");
        assert!(busy());
        pulse.asked(true).expect("nothing to say");
        assert!(!busy());
    }
}
