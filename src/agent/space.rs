//! How much room there is where a host keeps everything, what of it is set aside, and a word in time
//! when it becomes little, or when the logs of all VMs together may not fit.

mod folders;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::journal::{Incident, Journal};
use super::link::lock;
pub use folders::SetAside;
use folders::{Folders, Logs};

/// How often it is looked at.
const EVERY: Duration = Duration::from_secs(5);
/// It is little from this part of all on, in per mille, and up to [`SPREAD`] less by the host's name:
/// equal hosts hold the same bytes, and should not all be told in the same second.
const LITTLE: u64 = 900;
const SPREAD: u64 = 20;
/// It is no longer little when so much less is used, in per mille.
const RELIEF: u64 = 20;

/// The room of the file system that a host's data folder lies on, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// What can still be written.
    pub free: u64,
    /// All of it.
    pub total: u64,
    /// So little is left that it was told.
    pub low: bool,
}

impl Space {
    /// Asks the system. Blocks for as long as the disk takes.
    pub fn of(folder: &Path) -> nix::Result<Self> {
        let figures = statvfs(folder)?;
        let unit = figures.fragment_size();
        Ok(Self {
            free: figures.blocks_available().saturating_mul(unit),
            total: figures.blocks().saturating_mul(unit),
            low: false,
        })
    }

    /// How much of it is used, in per mille.
    pub fn used(self) -> u64 {
        let used = self.total.saturating_sub(self.free);
        (u128::from(used) * 1000 / u128::from(self.total.max(1))) as u64
    }
}

/// The newest figures, for whoever asks.
#[derive(Debug, Default)]
pub struct SpaceFigures {
    free: AtomicU64,
    total: AtomicU64,
    low: AtomicBool,
    aside: Mutex<Vec<SetAside>>,
}

impl SpaceFigures {
    /// What was seen last; `None` before that.
    pub fn last(&self) -> Option<Space> {
        let space = Space {
            free: self.free.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
            low: self.low.load(Ordering::Relaxed),
        };
        (space.total > 0).then_some(space)
    }

    /// The logs and disks that are set aside.
    pub fn aside(&self) -> Vec<SetAside> {
        lock(&self.aside).clone()
    }

    fn set(&self, space: Space) {
        self.low.store(space.low, Ordering::Relaxed);
        self.free.store(space.free, Ordering::Relaxed);
        self.total.store(space.total, Ordering::Relaxed);
    }
}

/// Whether there is little room, with a word when that changes.
#[derive(Debug)]
struct Warning {
    from: u64,
    is_little: bool,
}

impl Warning {
    fn of(host: &str) -> Self {
        let hash = blake3::hash(host.as_bytes());
        let earlier = u64::from(hash.as_bytes()[1]) * SPREAD / 256;
        Self {
            from: LITTLE - earlier,
            is_little: false,
        }
    }

    fn see(&mut self, space: Space) -> Option<Incident> {
        let used = space.used();
        if !self.is_little && used >= self.from {
            self.is_little = true;
            return Some(Incident::SpaceLow {
                percent: (used / 10) as u8,
                free: space.free,
            });
        }
        if self.is_little && used + RELIEF < self.from {
            self.is_little = false;
        }
        None
    }
}

/// Whether the logs of all VMs here would fit if each came to its budget, with a word when that
/// changes: it is better told while the VMs are few and their logs small.
#[derive(Debug)]
struct Admission {
    budget: u64,
    /// So many VMs were told of.
    told: usize,
}

impl Admission {
    fn see(&mut self, space: Space, logs: Logs) -> Option<Incident> {
        let vms = logs.vms as u64;
        let budgets = self.budget.saturating_mul(vms);
        let room = space.free.saturating_add(logs.bytes);
        if budgets <= room {
            // What goes a little to and fro is told once.
            if budgets <= room / 20 * 19 {
                self.told = 0;
            }
            return None;
        }
        if self.told == logs.vms {
            return None;
        }
        self.told = logs.vms;
        Some(Incident::BudgetsExceedSpace {
            vms,
            budget: self.budget,
            lacking: budgets - room,
            fits: room / vms.max(1),
        })
    }
}

/// Watches over the room in a host's data folder, where each log may come to this budget. Never ends.
pub async fn watch(
    folder: &Path,
    host: &str,
    budget: u64,
    journal: &Journal,
    figures: &SpaceFigures,
) {
    let mut warning = Warning::of(host);
    let mut admission = Admission { budget, told: 0 };
    loop {
        let folder = folder.to_owned();
        let look = move || Space::of(&folder).map(|space| (space, Folders::of(&folder)));
        // A disk that hangs keeps this waiting, and nobody else.
        match tokio::task::spawn_blocking(look).await {
            Ok(Ok((mut space, found))) => {
                let low = warning.see(space);
                space.low = warning.is_little;
                figures.set(space);
                *lock(&figures.aside) = found.aside;
                for incident in [low, admission.see(space, found.logs)]
                    .into_iter()
                    .flatten()
                {
                    journal.write(None, incident);
                }
            }
            Ok(Err(error)) => tracing::debug!(%error, "the room on the disk is not known"),
            // Only a runtime that ends does not ask.
            Err(_) => return std::future::pending().await,
        }
        tokio::time::sleep(EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::testing::{SmallDisk, skipped};

    #[test]
    fn little_room_is_told_once_each_time() {
        let used = |per_mille| Space {
            free: 1_000_000 - per_mille * 1_000,
            total: 1_000_000,
            low: false,
        };
        let mut warning = Warning::of("a");
        let from = warning.from;
        assert!((LITTLE - SPREAD..=LITTLE).contains(&from));
        assert_eq!(warning.see(used(from - 1)), None);
        assert!(matches!(
            warning.see(used(from)),
            Some(Incident::SpaceLow { .. })
        ));
        // What goes a little to and fro is told once.
        for per_mille in [from + 50, from - 1, from, from - RELIEF, from] {
            assert_eq!(warning.see(used(per_mille)), None);
        }
        assert_eq!(warning.see(used(from - RELIEF - 1)), None);
        assert!(warning.see(used(from)).is_some());
        let all: std::collections::BTreeSet<u64> = ["a", "b", "c", "d", "e"]
            .map(|host| Warning::of(host).from)
            .into();
        assert!(all.len() > 2, "hosts differ: {all:?}");
    }

    /// Told when it comes about and whenever a VM is added, and never again and again.
    #[test]
    fn logs_that_may_not_fit_are_told_once_for_each_vm() {
        let space = |free| Space {
            free,
            total: 1_000,
            low: false,
        };
        let logs = |vms, bytes| Logs { vms, bytes };
        let mut admission = Admission {
            budget: 100,
            told: 0,
        };
        assert_eq!(admission.see(space(150), logs(1, 0)), None);
        // What the logs take already need not be free.
        assert_eq!(admission.see(space(150), logs(2, 50)), None);
        let told = admission.see(space(150), logs(2, 10));
        assert_eq!(
            told,
            Some(Incident::BudgetsExceedSpace {
                vms: 2,
                budget: 100,
                lacking: 40,
                fits: 80,
            })
        );
        assert!(told.expect("some").to_string().contains("log.retention"));
        assert_eq!(admission.see(space(140), logs(2, 20)), None);
        assert_eq!(admission.see(space(190), logs(2, 10)), None, "just enough");
        assert_eq!(admission.see(space(150), logs(2, 10)), None);
        assert!(admission.see(space(150), logs(3, 10)).is_some());
        assert_eq!(admission.see(space(900), logs(3, 10)), None);
        assert!(admission.see(space(150), logs(3, 10)).is_some());
    }

    #[test]
    fn a_real_disk_is_measured() {
        let disk = match SmallDisk::mount("size=1m") {
            Ok(disk) => disk,
            Err(why) => return skipped("a_real_disk_is_measured", &why),
        };
        let before = Space::of(disk.path()).expect("known");
        assert_eq!(before.total, 1 << 20);
        std::fs::write(disk.path().join("file"), vec![1; 950 << 10]).expect("room");
        let after = Space::of(disk.path()).expect("known");
        assert!(after.used() >= LITTLE && before.used() < 100, "{after:?}");
    }
}
