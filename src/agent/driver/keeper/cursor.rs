//! Places in the log from which somebody reads on. What is not in memory is read on a blocking thread,
//! a good piece at once; meanwhile there is nothing to read.

use std::collections::VecDeque;
use std::io;

use replay_log::{Batch, LogIndex, LogReader, ReadError};
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::{FromStore, LogKeeper, Source};
use crate::agent::clock::now;
use crate::protocol::{Span, Time};

/// About so much is read at once.
const PIECE: usize = 1 << 20;
/// Where nothing could be read yet, it is read again after this long.
const BREATH: Span = Span::from_millis(5);
/// Where the system had no room for another open file, it is asked again after this long.
const PAUSE: Span = Span::from_millis(500);

/// A place in the log from which somebody reads on.
#[derive(Debug)]
pub struct Cursor {
    next: LogIndex,
    /// What has been read and not been asked for.
    ahead: VecDeque<Batch>,
    reading: Reading,
    not_before: Time,
}

#[derive(Debug)]
enum Reading {
    /// Nothing is read; this goes on where the last piece ended.
    Idle(Option<Box<dyn LogReader>>),
    Away(oneshot::Receiver<Piece>),
}

/// What was read, and what reads on.
#[derive(Debug)]
struct Piece {
    reader: Option<Box<dyn LogReader>>,
    batches: Result<Vec<Batch>, ReadError>,
}

impl Cursor {
    /// From here, where a batch begins.
    pub const fn new(next: LogIndex) -> Self {
        Self {
            next,
            ahead: VecDeque::new(),
            reading: Reading::Idle(None),
            not_before: Time::from_nanos(0),
        }
    }

    /// Where the next batch begins.
    pub const fn next(&self) -> LogIndex {
        self.next
    }

    fn give(&mut self, batch: Batch) -> Batch {
        self.next = batch.end();
        batch
    }

    /// Takes in what has been read by now. Says whether something still is.
    fn take_in(&mut self) -> Result<bool, ReadError> {
        let Reading::Away(piece) = &mut self.reading else {
            return Ok(false);
        };
        let piece = match piece.try_recv() {
            Ok(piece) => piece,
            Err(TryRecvError::Empty) => return Ok(true),
            // Only a runtime that ends lets a read go.
            Err(TryRecvError::Closed) => {
                self.reading = Reading::Idle(None);
                return Ok(false);
            }
        };
        self.reading = Reading::Idle(piece.reader);
        match piece.batches {
            // There is more, and it is on its way to the file: it is not asked for in a loop.
            Ok(batches) if batches.is_empty() => self.not_before = now().plus(BREATH),
            Ok(batches) => self.ahead.extend(batches),
            Err(ReadError::Io(failure)) if is_passing(&failure.source) => {
                self.not_before = now().plus(PAUSE);
            }
            Err(error) => return Err(error),
        }
        Ok(false)
    }
}

/// Whether the system may well do it a moment later: it had no descriptor or no memory left.
fn is_passing(error: &io::Error) -> bool {
    const EMFILE: i32 = 24;
    const ENFILE: i32 = 23;
    const ENOMEM: i32 = 12;
    matches!(error.raw_os_error(), Some(EMFILE | ENFILE | ENOMEM))
}

fn read_piece(source: &Source, from: LogIndex, reader: Option<Box<dyn LogReader>>) -> Piece {
    let reader = match reader {
        Some(reader) if reader.position() == from => Ok(reader),
        _ => source.read_from(from),
    };
    match reader {
        Ok(mut reader) => {
            let batches = reader.next_batches(PIECE);
            // Where a reader stands after an error means nothing.
            let reader = batches.is_ok().then_some(reader);
            Piece { reader, batches }
        }
        Err(error) => Piece {
            reader: None,
            batches: Err(error),
        },
    }
}

impl LogKeeper {
    /// Reads on from a place in the log. `None`: there is nothing yet, or it is being read; ask again
    /// after the store has said something. Never waits for a disk.
    pub fn read(&self, cursor: &mut Cursor) -> Result<Option<Batch>, ReadError> {
        if cursor.take_in()? {
            return Ok(None);
        }
        if let Some(batch) = cursor.ahead.pop_front() {
            return Ok(Some(cursor.give(batch)));
        }
        if cursor.next >= self.tip.index {
            return Ok(None);
        }
        if let Some(batch) = self.recent_at(cursor.next) {
            cursor.reading = Reading::Idle(None);
            return Ok(Some(cursor.give(batch)));
        }
        // What is not in memory has been written, so it is there to be read.
        if let Some(source) = &self.source
            && cursor.not_before <= now()
        {
            let (source, from) = (source.clone(), cursor.next);
            let reader = match &mut cursor.reading {
                Reading::Idle(reader) => reader.take(),
                Reading::Away(_) => None,
            };
            let (done, piece) = oneshot::channel();
            cursor.reading = Reading::Away(piece);
            let returns = self.returns.clone();
            tokio::task::spawn_blocking(move || {
                // Whoever asked may have gone.
                let _ = done.send(read_piece(&source, from, reader));
                let _ = returns.send(FromStore::read());
            });
        }
        Ok(None)
    }
}
