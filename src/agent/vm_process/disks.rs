//! Opens a machine's disks as this host has them: base and overlay.

use replay_log::{DiskBase, Header};
use thiserror::Error;
use vmm::disk::{Base, BaseError, Durability, Overlay, OverlayError};

use super::ipc::DiskSetup;

/// Why a disk cannot be opened.
#[derive(Debug, Error)]
pub enum DiskSetupError {
    /// The header and the host do not agree on how many disks there are.
    #[error("the log's machine has {wanted} disks, the host has set up {found}")]
    Count {
        /// By the header.
        wanted: usize,
        /// By the host.
        found: usize,
    },
    /// The base.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The overlay.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
}

/// Opens all disks at their base: what an earlier run wrote to the overlays is discarded, because
/// the machine starts from power-on.
pub fn open_disks(header: &Header, setups: &[DiskSetup]) -> Result<Vec<Overlay>, DiskSetupError> {
    if header.disks.len() != setups.len() {
        let (wanted, found) = (header.disks.len(), setups.len());
        return Err(DiskSetupError::Count { wanted, found });
    }
    header
        .disks
        .iter()
        .zip(setups)
        .map(|(name, setup)| open(*name, setup))
        .collect()
}

fn open(name: DiskBase, setup: &DiskSetup) -> Result<Overlay, DiskSetupError> {
    let base = Base::open(&setup.bases, name)?;
    let durability = if setup.durable {
        Durability::Sync
    } else {
        Durability::PageCache
    };
    let mut overlay = Overlay::open(&setup.overlay, base, durability)?;
    overlay.discard_all()?;
    Ok(overlay)
}
