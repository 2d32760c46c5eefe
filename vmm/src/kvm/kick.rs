//! Taking the vCPU out of the guest from another thread.
//!
//! A kick is a signal to the vCPU thread plus `immediate_exit` in the mapped run page, so that it
//! is lost neither inside the guest nor just before entering it:
//!
//! ```text
//! kicker:  pending = 1, immediate_exit = 1, signal
//! vCPU, after EINTR of a run:        immediate_exit = 0, pending = 0   (kicked)
//! vCPU, after EINTR of a completion: immediate_exit = 0, if pending { immediate_exit = 1 }
//! ```
//!
//! Whatever the interleaving, a kick either is what ended the run, or leaves `immediate_exit` set
//! for the next one. Too many kicks are harmless: they are never numbered.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    // SAFETY: no memory is involved.
    static THREAD_ID: i32 = unsafe { libc::gettid() };
}

/// Takes the vCPU out of the guest, from any thread. After the machine is gone it does nothing.
#[derive(Clone)]
pub struct Kicker(Arc<Shared>);

struct Shared {
    /// `immediate_exit` in the run page; `None` once the machine is gone.
    flag: Mutex<Option<FlagPointer>>,
    pending: AtomicBool,
    /// The thread that entered the guest last, 0 before the first time.
    thread: AtomicI32,
}

struct FlagPointer(NonNull<AtomicU8>);

// SAFETY: an atomic may be reached from any thread; `Shared::flag` guards that it is mapped.
unsafe impl Send for FlagPointer {}

impl Kicker {
    /// Kicks. The machine's current `enter(Run)`, or its next one, comes back as kicked.
    pub fn kick(&self) {
        let flag = self.0.flag.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(FlagPointer(immediate_exit)) = &*flag else {
            return;
        };
        self.0.pending.store(true, Ordering::SeqCst);
        // SAFETY: the run page is mapped as long as the pointer is there, and we hold its lock.
        unsafe { immediate_exit.as_ref() }.store(1, Ordering::SeqCst);
        let thread = self.0.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: no memory is involved. The signal has a handler that does nothing, so even
            // a reused thread id of this process comes to no harm.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal_number()) };
        }
    }
}

/// The vCPU's end of its kickers.
pub(super) struct KickTarget(Arc<Shared>);

impl KickTarget {
    /// The target for a vCPU whose `immediate_exit` is here.
    ///
    /// # Safety
    ///
    /// `immediate_exit` must stay mapped until the target is dropped.
    pub(super) unsafe fn new(immediate_exit: NonNull<u8>) -> Result<Self, errno::Error> {
        install_handler()?;
        Ok(Self(Arc::new(Shared {
            flag: Mutex::new(Some(FlagPointer(immediate_exit.cast()))),
            pending: AtomicBool::new(false),
            thread: AtomicI32::new(0),
        })))
    }

    pub(super) fn kicker(&self) -> Kicker {
        Kicker(Arc::clone(&self.0))
    }

    /// The calling thread is about to enter the guest.
    pub(super) fn entering(&self) {
        let thread = THREAD_ID.with(|id| *id);
        if self.0.thread.load(Ordering::Relaxed) != thread {
            // A blocked signal would not take the vCPU out; failing to unblock only makes kicks
            // late (immediate_exit still works).
            let _ = unblock_signal(signal_number());
            self.0.thread.store(thread, Ordering::SeqCst);
        }
    }

    /// A run was interrupted: the kick has done its work.
    pub(super) fn take(&self, immediate_exit: &AtomicU8) {
        immediate_exit.store(0, Ordering::SeqCst);
        self.0.pending.store(false, Ordering::SeqCst);
    }

    /// A completion is over: a kick that came meanwhile is kept for the next run.
    pub(super) fn keep(&self, immediate_exit: &AtomicU8) {
        immediate_exit.store(0, Ordering::SeqCst);
        if self.0.pending.load(Ordering::SeqCst) {
            immediate_exit.store(1, Ordering::SeqCst);
        }
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        *self.0.flag.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// The signal of kicks.
fn signal_number() -> c_int {
    SIGRTMIN() + 1
}

extern "C" fn ignore(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

fn install_handler() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(signal_number(), ignore))
}
