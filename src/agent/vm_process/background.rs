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

use crate::agent::thread::set_nice;
use crate::protocol::{Span, Time};

/// The least that a thread can have: it gets what nobody else wants, and a little.
const BACKGROUND: i32 = 19;
/// A vCPU that has had something left to execute for this long is not in the background.
const BEHIND: Span = Span::from_millis(20);

/// Watches over one vCPU, which is the process's main thread. The thread that brings it the log says
/// [`Background::fed`]: it has ordinary priority, so it comes to that however busy the host is.
#[derive(Debug)]
pub struct Background {
    /// In nanoseconds; 0: nothing is left to execute.
    behind_since: AtomicU64,
    yields: AtomicBool,
    /// It may be taken out of the background again; else it is never put there.
    reversible: bool,
    /// It has gone live, or was never a replica.
    ended: AtomicBool,
}

impl Background {
    /// For a vCPU with ordinary priority. `reversible`: this process has the right to raise
    /// priorities.
    pub const fn new(reversible: bool) -> Self {
        Self {
            behind_since: AtomicU64::new(0),
            yields: AtomicBool::new(false),
            reversible,
            ended: AtomicBool::new(false),
        }
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

    /// The vCPU, which calls this, has executed everything.
    pub fn drained(&self) {
        self.behind_since.store(0, Ordering::Relaxed);
        let stays = !self.reversible || self.ended.load(Ordering::Acquire);
        if !stays && !self.yields.swap(true, Ordering::AcqRel) {
            set_nice(BACKGROUND);
        }
    }

    /// The vCPU is about to go live: from now on clients wait for it.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.leave();
    }

    fn leave(&self) {
        if self.yields.swap(false, Ordering::AcqRel) {
            crate::agent::thread::set_nice_of_main(0);
        }
    }
}
