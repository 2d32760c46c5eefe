//! How much room there is where a host keeps everything, and a word in time when it becomes little.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use serde::{Deserialize, Serialize};

use super::journal::{Incident, Journal};

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
}

impl Space {
    /// Asks the system. Blocks for as long as the disk takes.
    pub fn of(folder: &Path) -> nix::Result<Self> {
        let figures = statvfs(folder)?;
        let unit = figures.fragment_size();
        Ok(Self {
            free: figures.blocks_available().saturating_mul(unit),
            total: figures.blocks().saturating_mul(unit),
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
}

impl SpaceFigures {
    /// What was seen last; `None` before that.
    pub fn last(&self) -> Option<Space> {
        let space = Space {
            free: self.free.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        };
        (space.total > 0).then_some(space)
    }

    fn set(&self, space: Space) {
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

/// Watches over the room in a host's data folder. Never ends.
pub async fn watch(folder: &Path, host: &str, journal: &Journal, figures: &SpaceFigures) {
    let mut warning = Warning::of(host);
    loop {
        let folder = folder.to_owned();
        // A disk that hangs keeps this waiting, and nobody else.
        match tokio::task::spawn_blocking(move || Space::of(&folder)).await {
            Ok(Ok(space)) => {
                figures.set(space);
                if let Some(incident) = warning.see(space) {
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
