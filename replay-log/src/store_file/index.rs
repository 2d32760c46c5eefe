//! What a store and its readers know about the segments, and how a place in them is found.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::scan::{Checkpoint, Found, Scanner};
use crate::batch::Batch;
use crate::position::{LogIndex, LogTip};
use crate::store::{DamageReason, LogReader, LogSource, ReadError, check_within};

/// One segment of an open store.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) path: PathBuf,
    pub(super) base: LogTip,
    pub(super) tip: LogTip,
    /// How many of its bytes are part of the log.
    pub(super) len: u64,
    pub(super) sealed: bool,
    /// Where reading can begin; `None` until somebody needs to know.
    pub(super) checkpoints: Option<Vec<Checkpoint>>,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    pub(super) segments: Vec<Segment>,
    /// To where the log was cut back, each time it was, so that readers notice.
    pub(super) truncations: Vec<LogIndex>,
}

impl Index {
    pub(super) fn base(&self) -> LogTip {
        self.segments.first().map(|s| s.base).unwrap_or_default()
    }

    pub(super) fn tip(&self) -> LogTip {
        self.segments.last().map(|s| s.tip).unwrap_or_default()
    }

    pub(super) fn bytes(&self) -> u64 {
        self.segments.iter().map(|s| s.len).sum()
    }

    fn holding(&mut self, index: LogIndex) -> Option<&mut Segment> {
        let after = self.segments.partition_point(|s| s.base.index <= index);
        self.segments.get_mut(after.checked_sub(1)?)
    }
}

/// The index, shared by a store and its readers.
#[derive(Clone, Debug, Default)]
pub(super) struct Shared(Arc<Mutex<Index>>);

/// A place in the log: between the end of a batch and the batch that holds the entry wanted.
#[derive(Debug)]
pub(super) struct Located {
    pub(super) floor: LogTip,
    /// Where the next chunk stands in the scanner's file.
    pub(super) offset: u64,
    /// The batch after the place, unless it is the log's end.
    pub(super) batch: Option<Batch>,
    /// Stands after that batch.
    pub(super) scanner: Scanner,
}

impl Shared {
    pub(super) fn new(index: Index) -> Self {
        Self(Arc::new(Mutex::new(index)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Index> {
        // Every change under the lock is complete before anything can panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds the last batch end not after `index`; `None` for a log without segments.
    pub(super) fn locate(&self, index: LogIndex) -> Result<Option<Located>, ReadError> {
        let Some((mut scanner, checkpoints)) = self.open_holding(index)? else {
            return Ok(None);
        };
        let checkpoints = match checkpoints {
            Some(known) => known,
            None => self.learn_checkpoints(&mut scanner)?,
        };
        let after = checkpoints.partition_point(|c| c.tip.index <= index);
        if let Some(nearest) = after.checked_sub(1).and_then(|i| checkpoints.get(i)) {
            scanner.seek(*nearest);
        }
        loop {
            let (floor, offset) = (scanner.tip(), scanner.offset());
            let batch = match scanner.next()? {
                Found::Checkpoint => continue,
                Found::Batch(batch) if batch.end() <= index => continue,
                Found::Batch(batch) => Some(batch),
                Found::Trailer | Found::End if floor.index == index => None,
                Found::Trailer | Found::End => {
                    return Err(scanner.damage(offset, DamageReason::NoTrailer).into());
                }
            };
            return Ok(Some(Located {
                floor,
                offset,
                batch,
                scanner,
            }));
        }
    }

    /// Opens the segment that holds `index`, under the lock: its file cannot be renamed meanwhile.
    #[allow(clippy::type_complexity, reason = "used once, two lines above")]
    fn open_holding(
        &self,
        index: LogIndex,
    ) -> Result<Option<(Scanner, Option<Vec<Checkpoint>>)>, ReadError> {
        let mut known = self.lock();
        check_within(known.base(), known.tip(), index)?;
        let Some(segment) = known.holding(index) else {
            return Ok(None);
        };
        let mut scanner = Scanner::open(&segment.path)?;
        scanner.set_end(segment.len);
        Ok(Some((scanner, segment.checkpoints.clone())))
    }

    /// Walks a segment of an earlier run to find its checkpoints, without holding up appends.
    fn learn_checkpoints(&self, scanner: &mut Scanner) -> Result<Vec<Checkpoint>, ReadError> {
        let base = scanner.tip().index;
        let found = scanner.checkpoints()?;
        let mut known = self.lock();
        if let Some(segment) = known.holding(base).filter(|s| s.base.index == base) {
            segment.checkpoints = Some(found.clone());
        }
        Ok(found)
    }

    fn reader(&self, from: LogIndex) -> Result<FileReader, ReadError> {
        let known = self.lock();
        check_within(known.base(), known.tip(), from)?;
        let truncations = known.truncations.len();
        drop(known);
        Ok(FileReader {
            shared: self.clone(),
            next: from,
            truncations,
            at: None,
        })
    }
}

impl LogSource for Shared {
    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        Ok(Box::new(self.reader(from)?))
    }

    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError> {
        let (base, tip) = {
            let known = self.lock();
            (known.base(), known.tip())
        };
        if index < base.index {
            return Ok(None);
        }
        if index >= tip.index {
            return Ok(Some(tip));
        }
        let located = self.locate(index)?;
        Ok(Some(located.map_or_else(LogTip::default, |at| at.floor)))
    }
}

/// Reads an open store's batches.
#[derive(Debug)]
pub(super) struct FileReader {
    shared: Shared,
    next: LogIndex,
    /// How many of the store's truncations it has seen.
    truncations: usize,
    /// Its place in a segment's file, if it has begun to read one.
    at: Option<Scanner>,
}

impl FileReader {
    /// Whether there is something to read. Learns up to where the segment may be read.
    fn refresh(&mut self) -> Result<bool, ReadError> {
        let known = self.shared.lock();
        let unseen = known.truncations.get(self.truncations..);
        if let Some(to) = unseen.and_then(|unseen| unseen.iter().min().copied()) {
            // What was read ahead may have been replaced.
            self.at = None;
            if to < self.next {
                return Err(ReadError::Truncated { to });
            }
            self.truncations = known.truncations.len();
        }
        check_within(known.base(), known.tip(), self.next)?;
        if let Some(scanner) = &mut self.at {
            // Sealing renames the file, but where it begins in the log stays.
            let segment = known
                .segments
                .iter()
                .rev()
                .find(|s| s.base.index <= self.next && s.base == scanner.base());
            match segment {
                Some(segment) => scanner.set_end(segment.len),
                None => self.at = None,
            }
        }
        Ok(self.next < known.tip().index)
    }

    fn read(&mut self) -> Result<Option<Batch>, ReadError> {
        while let Some(scanner) = &mut self.at {
            match scanner.next()? {
                Found::Batch(batch) => return Ok(Some(batch)),
                Found::Checkpoint => {}
                Found::Trailer | Found::End => self.at = None,
            }
        }
        let Some(located) = self.shared.locate(self.next)? else {
            return Ok(None);
        };
        self.at = Some(located.scanner);
        Ok(located.batch)
    }
}

impl LogReader for FileReader {
    fn next_batch(&mut self) -> Result<Option<Batch>, ReadError> {
        if !self.refresh()? {
            return Ok(None);
        }
        let read = self.read();
        match &read {
            Ok(Some(batch)) => self.next = batch.end(),
            Ok(None) => {}
            // Where the scanner stands after an error means nothing.
            Err(_) => self.at = None,
        }
        read
    }

    fn position(&self) -> LogIndex {
        self.next
    }
}

/// The name of a segment that begins at an index.
pub(super) fn segment_path(dir: &Path, first: LogIndex, ending: &str) -> PathBuf {
    dir.join(format!("{:020}.{ending}", first.0))
}
