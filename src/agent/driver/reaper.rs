//! The VMM processes of one VM that were ended and are not gone yet. Nothing of the driver waits for
//! them but what would meet them: a run that uses the same disks.
//!
//! ```text
//!   ended ── SIGKILL ──► dying ── gone ──► memory given back, whoever waits goes on
//!                          │
//!                          └── not gone after LONG ──► told, once
//! ```

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use super::guest::Dying;
use crate::agent::link::lock;

/// A process that is not gone by then is told of. Taking a large guest's memory apart takes seconds.
const LONG: Duration = Duration::from_secs(5);
/// So long a run waits for the processes before it.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for the end of processes, each in a task of its own.
#[derive(Clone)]
pub struct Reaper {
    /// After so long a process is told of.
    long: Duration,
    dying: watch::Sender<usize>,
    /// The process ids of those that take long.
    undead: Arc<Mutex<BTreeSet<u32>>>,
}

impl Default for Reaper {
    fn default() -> Self {
        Self::new(LONG)
    }
}

/// What waits for processes until they are gone.
trait Remains: Send + 'static {
    fn pid(&self) -> Option<u32>;
    fn gone(&mut self) -> impl Future<Output = std::io::Result<()>> + Send;
}

impl Remains for Dying {
    fn pid(&self) -> Option<u32> {
        Self::pid(self)
    }

    fn gone(&mut self) -> impl Future<Output = std::io::Result<()>> + Send {
        Self::gone(self)
    }
}

impl Reaper {
    fn new(long: Duration) -> Self {
        Self {
            long,
            dying: watch::Sender::new(0),
            undead: Arc::default(),
        }
    }

    /// Waits for the end of a process. `long` is called once if that takes long.
    pub fn take(&self, dying: Dying, long: impl FnOnce(u32) + Send + 'static) {
        self.take_remains(dying, long);
    }

    fn take_remains(&self, mut dying: impl Remains, long: impl FnOnce(u32) + Send + 'static) {
        self.dying.send_modify(|count| *count += 1);
        let own = self.clone();
        tokio::spawn(async move {
            let pid = dying.pid();
            let gone = if let Ok(gone) = tokio::time::timeout(own.long, dying.gone()).await {
                gone
            } else {
                if let Some(pid) = pid {
                    lock(&own.undead).insert(pid);
                    long(pid);
                }
                dying.gone().await
            };
            if let Err(error) = gone {
                // It is not a child of ours any more: somebody else has waited for it.
                tracing::warn!(?pid, %error, "the end of a VMM process was not seen");
            }
            // Its memory is given back first: whoever waits may need it.
            drop(dying);
            if let Some(pid) = pid {
                lock(&own.undead).remove(&pid);
            }
            own.dying.send_modify(|count| *count -= 1);
        });
    }

    /// Whether a process is not gone yet.
    pub fn waits(&self) -> bool {
        *self.dying.borrow() > 0
    }

    /// Waits until all that are dying now or meanwhile are gone, for at most so long. The error is
    /// a sentence.
    pub async fn all_gone(&self, patience: Duration) -> Result<(), String> {
        let mut dying = self.dying.subscribe();
        let gone = dying.wait_for(|count| *count == 0);
        match tokio::time::timeout(patience, gone).await {
            // The sender is here: it does not end.
            Ok(_) => Ok(()),
            Err(_) => Err(self.undead().unwrap_or_else(|| {
                "the VMM process of the run before takes long to end".to_owned()
            })),
        }
    }

    /// What is to be told of processes that take long, if there are any.
    pub fn undead(&self) -> Option<String> {
        let undead = lock(&self.undead);
        let pids: Vec<_> = undead.iter().map(u32::to_string).collect();
        (!pids.is_empty()).then(|| does_not_die(&pids.join(", ")))
    }
}

/// What is said of VMM processes that do not die.
pub fn does_not_die(pids: &str) -> String {
    format!(
        "a VMM process of this VM does not die (pid {pids}): the kernel waits for something, \
         most likely a disk; until it is gone it keeps its memory and the VM's disks"
    )
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    /// A process that is gone when its end is told.
    struct Stuck(oneshot::Receiver<()>);

    impl Remains for Stuck {
        fn pid(&self) -> Option<u32> {
            Some(7)
        }

        async fn gone(&mut self) -> std::io::Result<()> {
            let _ = (&mut self.0).await;
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_process_that_does_not_die_is_told_of_and_waited_for() {
        let soon = Duration::from_millis(1);
        let reaper = Reaper::new(soon);
        assert_eq!(reaper.all_gone(soon).await, Ok(()), "there is none");
        let (end, stuck) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        reaper.take_remains(Stuck(stuck), move |pid| {
            let _ = tell.send(pid);
        });
        assert!(reaper.waits());
        assert_eq!(reaper.undead(), None, "most take a while");
        assert_eq!(told.await, Ok(7));
        let undead = reaper.undead().expect("it takes long");
        assert!(undead.contains("(pid 7)"), "{undead}");
        assert_eq!(reaper.all_gone(soon).await, Err(undead));
        drop(end);
        assert_eq!(reaper.all_gone(PATIENCE).await, Ok(()));
        assert!(!reaper.waits());
        assert_eq!(reaper.undead(), None);
    }
}
