//! The priority of a replica's vCPU: behind all other work as long as it keeps up.
//!
//! What a replica executes now or ten milliseconds later is the same to everybody, and on a host that
//! is also a primary, or runs an agent or a gateway, its slices would be in the way of work that
//! clients wait for. So it executes when nothing else wants the processor, until it has been behind
//! for a while.
//!
//! ```text
//!            ┌── nothing left to execute ──┐
//!            ▼                             │
//!   background ── behind for 20 ms ──► ordinary ── goes live ──► ordinary for good
//! ```

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm::kvm::Thread;

use crate::protocol::{Span, Time};

/// A vCPU that has had something left to execute for this long is not in the background.
const BEHIND: Span = Span::from_millis(20);

/// Watches over one vCPU's thread. The thread that brings it the log says [`Background::fed`]: it has
/// ordinary priority, so it comes to that however busy the host is.
#[derive(Debug)]
pub struct Background {
    vcpu: Thread,
    /// In nanoseconds; 0: nothing is left to execute.
    behind_since: AtomicU64,
    /// It is in the background.
    yields: AtomicBool,
    /// It may be taken out of the background again; else it is never put there.
    reversible: bool,
    /// It has gone live, or was never a replica.
    ended: AtomicBool,
}

impl Background {
    /// For the vCPU of the calling thread, which has ordinary priority. `reversible`: this process
    /// has the right to raise priorities.
    pub fn new(reversible: bool) -> Self {
        Self {
            vcpu: Thread::own(),
            behind_since: AtomicU64::new(0),
            yields: AtomicBool::new(false),
            reversible,
            ended: AtomicBool::new(false),
        }
    }

    /// Whether this process has the right to raise priorities.
    pub const fn reversible(&self) -> bool {
        self.reversible
    }

    /// The vCPU is about to get more of the log.
    pub fn fed(&self, now: Time) {
        let since = self.behind_since.load(Ordering::Relaxed);
        if since == 0 {
            self.behind_since.store(now.as_nanos(), Ordering::Relaxed);
        } else if now.since(Time::from_nanos(since)) >= BEHIND {
            self.leave();
        }
    }

    /// The vCPU has executed everything.
    pub fn drained(&self) {
        self.behind_since.store(0, Ordering::Relaxed);
        let stays = !self.reversible || self.ended.load(Ordering::Acquire);
        if !stays && !self.yields.swap(true, Ordering::AcqRel) {
            self.set(true);
        }
    }

    /// Somebody waits for a sign of life.
    pub fn asked(&self) {
        self.leave();
    }

    /// The vCPU is about to go live: from now on clients wait for it.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.leave();
    }

    fn set(&self, background: bool) {
        if let Err(error) = self.vcpu.set_background(background) {
            tracing::debug!(%error, background, "the replica's vCPU stays as it is");
        }
    }

    fn leave(&self) {
        if self.yields.swap(false, Ordering::AcqRel) {
            self.set(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The calling thread's scheduling policy is SCHED_IDLE (proc_pid_stat(5), field 41).
    fn in_background() -> bool {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").expect("a thread");
        let after = stat.rsplit(')').next().expect("fields");
        after.split_whitespace().nth(38) == Some("5")
    }

    #[test]
    fn a_replica_executes_in_the_background_while_it_keeps_up() {
        let at = |millis: u64| Time::from_nanos(1_000_000_000 + millis * 1_000_000);
        let both_ways = Thread::own().set_background(true);
        let both_ways = both_ways.and_then(|()| Thread::own().set_background(false));
        if both_ways.is_err() {
            println!("SKIPPED: this user may not raise priorities");
            return;
        }
        let background = Background::new(true);
        background.fed(at(0));
        assert!(!in_background(), "it has never kept up yet");
        background.drained();
        assert!(in_background());
        background.fed(at(100));
        background.fed(at(119));
        assert!(in_background());
        background.fed(at(120));
        assert!(!in_background(), "it has been behind for too long");
        background.drained();
        assert!(in_background());
        background.asked();
        assert!(!in_background(), "somebody waits for it");
        background.drained();
        assert!(in_background());
        background.end();
        background.drained();
        assert!(!in_background(), "clients wait for it now");
    }

    #[test]
    fn what_could_not_be_taken_back_is_not_done() {
        let background = Background::new(false);
        background.drained();
        assert!(!in_background());
    }
}
