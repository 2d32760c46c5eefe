//! The log of a guest that runs on this host alone, written by a thread of its own: neither the
//! guest's frames nor its outputs wait while a batch is checked, compressed and written.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use bytes::Bytes;
use replay_log::{
    AppendError, Batch, FileOptions, FileStore, FrameError, LogIndex, OpenError, Store as _,
    SyncPolicy,
};
use thiserror::Error;

/// Batches that may wait for the thread; a guest that writes more than the disk takes waits then.
const BATCHES_WAITING: usize = 64;
/// Its niceness: about a tenth of the weight of an ordinary thread, so that it does not take a
/// processor from one that a client waits for, and yet comes to its turn on a busy host.
const NICE: i32 = 10;

/// Why a guest cannot be recorded, or not on.
#[derive(Debug, Error)]
pub enum RecordingError {
    /// The folder is in use.
    #[error("{} holds a log already: record into another folder", folder.display())]
    NotEmpty {
        /// Which.
        folder: PathBuf,
    },
    /// The folder.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The thread.
    #[error("there is no thread to write the recording: {0}")]
    Thread(#[source] std::io::Error),
    /// The log takes no more.
    #[error("the recording cannot go on")]
    Append(#[from] AppendError),
    /// The VMM process wrote a batch that is none.
    #[error("the VMM process wrote a batch that cannot be read")]
    Batch(#[from] FrameError),
    /// The VMM process wrote a part of a batch.
    #[error("the VMM process wrote a batch that is torn")]
    Torn,
}

/// How much was recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Where the log ends.
    pub end: LogIndex,
    /// How many bytes it takes.
    pub bytes: u64,
}

/// A log that is being written. Dropped, it leaves what has not been written yet to its thread.
#[derive(Debug)]
pub struct Recording {
    batches: SyncSender<Bytes>,
    thread: JoinHandle<Result<Recorded, RecordingError>>,
}

impl Recording {
    /// Begins a log in a folder that holds none.
    pub fn begin(folder: &Path) -> Result<Self, RecordingError> {
        let options = FileOptions {
            sync: SyncPolicy::Never,
            ..FileOptions::default()
        };
        let store = FileStore::open(folder, options)?;
        if store.tip().index != LogIndex::START {
            let folder = folder.to_owned();
            return Err(RecordingError::NotEmpty { folder });
        }
        let (batches, waiting) = sync_channel(BATCHES_WAITING);
        let thread = Builder::new()
            .name("recording".into())
            .spawn(move || write(store, &waiting))
            .map_err(RecordingError::Thread)?;
        Ok(Self { batches, thread })
    }

    /// Takes the next batch, as it was framed. Whether it can be written shows with a later one, or
    /// at the end. `false`: the log takes no more, and [`Recording::end`] says why.
    #[must_use]
    pub fn keep(&self, batch: Bytes) -> bool {
        self.batches.send(batch).is_ok()
    }

    /// Waits until everything is written.
    pub fn end(self) -> Result<Recorded, RecordingError> {
        drop(self.batches);
        match self.thread.join() {
            Ok(written) => written,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn write(mut store: FileStore, batches: &Receiver<Bytes>) -> Result<Recorded, RecordingError> {
    crate::agent::thread::ordinary(NICE);
    for framed in batches {
        let (batch, _) = Batch::decode_frame(&framed)?.ok_or(RecordingError::Torn)?;
        store.append(&batch)?;
    }
    Ok(Recorded {
        end: store.tip().index,
        bytes: store.bytes(),
    })
}

#[cfg(test)]
mod tests {
    use replay_log::{Entry, Position, Term, TermChange};

    use super::*;

    fn batch(term: u64, first: LogIndex) -> (Bytes, LogIndex) {
        let mut builder = replay_log::BatchBuilder::new(Term(term), first);
        let change = TermChange {
            at: Position(0),
            term: Term(term),
        };
        builder.push(&Entry::Term(change)).expect("fits");
        let batch = builder.finish().expect("not empty");
        let mut framed = Vec::new();
        batch.encode_frame(&mut framed);
        (framed.into(), batch.end())
    }

    #[test]
    fn everything_kept_is_in_the_log_at_the_end() {
        let folder = tempfile::tempdir().expect("a folder");
        let recording = Recording::begin(folder.path()).expect("begins");
        let mut end = LogIndex::START;
        for _ in 0..BATCHES_WAITING * 3 {
            let (framed, next) = batch(1, end);
            assert!(recording.keep(framed));
            end = next;
        }
        let recorded = recording.end().expect("written");
        assert_eq!(recorded.end, end);
        let again = Recording::begin(folder.path()).expect_err("it holds a log");
        assert!(matches!(again, RecordingError::NotEmpty { .. }), "{again}");
        let store = FileStore::open(folder.path(), FileOptions::default()).expect("opens");
        assert_eq!(store.tip().index, end);
    }

    #[test]
    fn what_cannot_be_written_ends_the_recording() {
        let (good, end) = batch(1, LogIndex::START);
        let gap = batch(1, LogIndex(7)).0;
        let mut damaged = good.to_vec();
        if let Some(last) = damaged.last_mut() {
            *last ^= 1;
        }
        for (bad, expected) in [
            (gap, "Append"),
            (damaged.into(), "Batch"),
            (good.slice(..good.len() - 1), "Torn"),
        ] {
            let folder = tempfile::tempdir().expect("a folder");
            let recording = Recording::begin(folder.path()).expect("begins");
            assert!(recording.keep(good.clone()));
            assert!(recording.keep(bad));
            // Sooner or later the thread is gone.
            while recording.keep(good.clone()) {}
            let error = recording.end().expect_err("not written");
            assert!(format!("{error:?}").starts_with(expected), "{error:?}");
            let store = FileStore::open(folder.path(), FileOptions::default()).expect("opens");
            assert_eq!(store.tip().index, end, "what came before is kept");
        }
    }
}
