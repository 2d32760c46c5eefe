//! The log of nondeterministic events of one virtual machine.
//!
//! A copy of a machine is its image, its disk base and this log: replaying the log from the
//! first entry gives the same machine in the same state. The crate knows entries, how they are
//! encoded, grouped in batches, chained, compressed and stored. It knows nothing of KVM, of
//! networks or of who may write.

pub mod batch;
pub mod codec;
mod compress;
pub mod conformance;
pub mod disk;
pub mod entry;
pub mod folder;
pub mod position;
pub mod store;
mod store_file;
mod store_memory;
pub mod stream;
#[cfg(test)]
mod testing;
pub mod varint;

pub use batch::{Batch, BatchBuilder, FrameError, MAX_BATCH, TARGET_BATCH};
pub use codec::{DecodeError, EncodeError, Entries, FORMAT_VERSION};
pub use compress::DecompressError;
pub use entry::{
    Answer, Arrival, DiskBase, DiskOutcome, Entry, FrameNumber, FrameSource, GatewayIncarnation,
    Group, GroupBody, GuestTime, Header, ImageDigest, Mark, MarkDigest, RequestNumber, TermChange,
    TimerId,
};
pub use position::{Chain, LogIndex, LogTip, Position, Term};
pub use store::{
    AppendError, Damage, DamageReason, IoFailure, LogReader, LogSource, OpenError, Poisoned,
    ReadError, Store, SyncError, TruncateError,
};
pub use store_file::inspect::{
    Inspector, LocatedBatch, Report, SegmentReport, TornEnd, inspect, verify,
};
pub use store_file::{FileOptions, FileStore, SyncPolicy};
pub use store_memory::{MemoryStore, Snapshot};
pub use stream::{StreamBytes, StreamDecoder, StreamEncoder, StreamError};
