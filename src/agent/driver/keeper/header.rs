//! What machine a log is of, by its first entry.

use replay_log::{Batch, DecodeError, Entry, Header, LogIndex, ReadError, Store};
use thiserror::Error;

/// Why a log's header is not known.
#[derive(Debug, Error)]
pub enum HeaderError {
    /// The beginning cannot be read, or is gone.
    #[error("the log cannot be replayed: its beginning cannot be read")]
    Read(#[from] ReadError),
    /// It cannot be understood.
    #[error("the log cannot be replayed: its beginning cannot be understood")]
    Garbled(#[from] DecodeError),
    /// It is none.
    #[error("the log cannot be replayed: it does not begin with a machine")]
    None,
}

pub(super) fn first_header(store: &dyn Store) -> Result<Option<Header>, HeaderError> {
    if store.tip().index == LogIndex::START {
        return Ok(None);
    }
    match store.read_from(LogIndex::START)?.next_batch()? {
        Some(batch) => header_of(&batch).map(Some),
        None => Ok(None),
    }
}

pub(super) fn header_of(first: &Batch) -> Result<Header, HeaderError> {
    match first.decode()?.into_iter().next() {
        Some(Entry::Header(header)) => Ok(header),
        _ => Err(HeaderError::None),
    }
}
