//! Takes the vCPU of an unprotected machine out of the guest when something has arrived or is due.
//!
//! A machine that is recorded is given things at its landmarks, and needs none of this. Until a kicker
//! is [set](Prompter::set), nothing happens here.

use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use vmm::host::HostTime;
use vmm::kvm::Kicker;

use crate::agent::clock;

/// Shared by all who bring the vCPU something.
#[derive(Default)]
pub struct Prompter {
    kicker: OnceLock<Kicker>,
    /// When something is due that nobody brings: a timer.
    due: Mutex<Option<HostTime>>,
    sooner: Condvar,
}

impl Prompter {
    /// From now on, the vCPU behind this kicker is taken out.
    pub fn set(self: &Arc<Self>, kicker: Kicker) -> std::io::Result<()> {
        if self.kicker.set(kicker).is_ok() {
            let own = Arc::clone(self);
            std::thread::Builder::new()
                .name("prompter".into())
                .spawn(move || own.watch())?;
        }
        Ok(())
    }

    /// Something is there for the vCPU.
    pub fn arrived(&self) {
        if let Some(kicker) = self.kicker.get() {
            kicker.kick();
        }
    }

    /// Something will be due then. What is due already, the vCPU finds by itself before it executes.
    pub fn due_at(&self, due: Option<HostTime>) {
        if self.kicker.get().is_none() {
            return;
        }
        let due = due.filter(|due| due.since(now()) > 0);
        let mut current = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        let sooner = due.is_some_and(|due| current.is_none_or(|current| due < current));
        *current = due;
        drop(current);
        if sooner {
            self.sooner.notify_one();
        }
    }

    /// Kicks at each deadline. The process ends with the machine, and this thread with it.
    fn watch(&self) {
        let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            due = match due.map(|due| due.since(now())) {
                None => self
                    .sooner
                    .wait(due)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(0) => {
                    *due = None;
                    self.arrived();
                    due
                }
                Some(left) => {
                    self.sooner
                        .wait_timeout(due, Duration::from_nanos(left))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0
                }
            };
        }
    }
}

fn now() -> HostTime {
    HostTime(clock::now().as_nanos())
}
