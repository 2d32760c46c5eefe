//! Taking a thread out of everybody's way, and back (sched(7), `SCHED_IDLE`).
//!
//! The lowest niceness is not enough: who wakes up beside such a thread waits for the end of its
//! slice, and a processor that executes nothing else does not count as free. To one with nothing
//! but `SCHED_IDLE` on it the scheduler brings whoever wakes up, at once.

use vmm_sys_util::errno;

/// A thread of this process.
#[derive(Clone, Copy, Debug)]
pub struct Thread(libc::pid_t);

impl Thread {
    /// The calling thread.
    pub fn own() -> Self {
        // SAFETY: takes nothing and cannot fail.
        Self(unsafe { libc::gettid() })
    }

    /// Lets it execute only when nothing else wants its processor, or as an ordinary thread again.
    /// The way back needs `CAP_SYS_NICE` or an `RLIMIT_NICE` that allows its niceness.
    pub fn set_background(self, background: bool) -> Result<(), errno::Error> {
        let policy = if background {
            libc::SCHED_IDLE
        } else {
            libc::SCHED_OTHER
        };
        let parameters = libc::sched_param { sched_priority: 0 };
        // SAFETY: the kernel only reads the parameters.
        let result = unsafe { libc::sched_setscheduler(self.0, policy, &raw const parameters) };
        if result == 0 {
            Ok(())
        } else {
            Err(errno::Error::last())
        }
    }
}
