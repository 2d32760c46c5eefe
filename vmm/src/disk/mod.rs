//! The host's side of a disk: a sealed base, an overlay that takes the writes, and a worker that
//! does the I/O outside the vCPU thread.
//!
//! ```text
//!   DiskRequest ──▶ worker ──▶ overlay ──┬─▶ data file   (chunks that were written)
//!        ▲                               ├─▶ map file    (which chunks those are)
//!   DiskCompletion ◀──┘                  └─▶ base        (everything else, never written)
//! ```
//!
//! Every copy executes the same requests on its own overlay, recorder and replayer alike.

pub mod base;
mod map;
pub mod overlay;
mod storage;
#[cfg(test)]
mod testing;
pub mod worker;

pub use base::{Base, BaseError};
pub use overlay::{Overlay, OverlayError};
pub use storage::Storage;
pub use worker::{
    DiskCompletion, DiskError, DiskNews, DiskWorker, Finish, Notify, SyncError, WorkerGone,
};

/// What a flush means.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// A finished flush has reached the disk of this host.
    #[default]
    Sync,
    /// A finished flush has reached the page cache: it outlives this process, not this host. For
    /// measurements, and for copies whose owner chose it.
    PageCache,
}
