//! What changes the files of a log, and what is left of it when the system refuses half-way.
//!
//! The index says what the log is; a file may be longer for a while. Whatever stops a step, the index
//! still says what it said before, or (cutting back) what the log has become, and the next step first
//! brings the file in line:
//!
//! ```text
//!   a write stopped half-way          the open segment is cut to what the index says
//!   a segment could not be sealed     its trailer is cut off, it stays open
//!   a segment could not be made       its *.tmp is made anew
//!   a cut stopped half-way            the newest segment is opened and cut to what the index says
//! ```

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::index::{Segment, segment_path};
use super::scan::Checkpoint;
use super::survey::{MAKING, OPEN, SEALED};
use super::{FileStore, SegmentIo, SyncPolicy, doubt, format, reason};
use crate::batch::Batch;
use crate::compress::Compressor;
use crate::position::LogTip;
use crate::store::{IoFailure, Poisoned, Stopped, Store as _};

/// The open segment. Its path and length are in the index.
pub(super) struct Writing {
    pub(super) io: Box<dyn SegmentIo>,
    compressor: Compressor,
    /// Uncompressed bytes since the last place where reading can begin; `None` if the next batch
    /// has to begin with one, because the compressor is not the one that wrote what is before.
    since_checkpoint: Option<u64>,
    /// The file may be longer than the index says: nothing is written before it has been cut.
    overlong: bool,
}

/// What was refused is no loss.
fn full(failure: IoFailure) -> Stopped {
    Stopped::Full(failure)
}

impl FileStore {
    pub(super) fn open_for_writing(&self, path: &Path) -> Result<Writing, IoFailure> {
        let file = OpenOptions::new().append(true).open(path);
        Ok(Writing {
            io: (self.wrap)(file.map_err(IoFailure::new("open", path))?),
            compressor: Compressor::new(),
            since_checkpoint: None,
            overlong: false,
        })
    }

    /// Makes renamed, new and removed files durable.
    pub(super) fn sync_names(&self) -> Result<(), IoFailure> {
        if !self.syncs() {
            return Ok(());
        }
        self.dir_file
            .sync_all()
            .map_err(IoFailure::new("sync the folder", &self.dir))
    }

    pub(super) fn check_poisoned(&self) -> Result<(), Poisoned> {
        self.poisoned.clone().map_or(Ok(()), Err)
    }

    /// Notes a failure after which nobody knows what the disk holds.
    pub(super) fn poison<T>(&mut self, done: Result<T, Stopped>) -> Result<T, Stopped> {
        if let Err(Stopped::Doubtful(failure)) = &done {
            let reason = reason(failure);
            doubt::leave(&self.dir, &reason);
            self.poisoned = Some(Poisoned { reason });
        }
        done
    }

    /// Begins a segment at the tip.
    fn create_segment(&mut self) -> Result<(), Stopped> {
        let base = self.tip();
        let making = segment_path(&self.dir, base.index, MAKING);
        let path = segment_path(&self.dir, base.index, OPEN);
        let header = format::header(base);
        let made = self.make_file(&making, &path, &header);
        if made.is_err() {
            // Whatever is left of it would be made anew, or removed on opening.
            let _best_effort = fs::remove_file(&making);
        }
        // Nothing of the log is in it as yet, so nothing of the log is doubtful if it was not synced.
        let io = made.map_err(full)?;
        self.sync_names().map_err(Stopped::Doubtful)?;
        let len = header.len() as u64;
        self.index.lock().segments.push(Segment {
            path,
            base,
            tip: base,
            len,
            sealed: false,
            checkpoints: Some(vec![Checkpoint {
                offset: len,
                tip: base,
            }]),
        });
        self.writing = Some(Writing {
            io,
            compressor: Compressor::new(),
            since_checkpoint: Some(0),
            overlong: false,
        });
        Ok(())
    }

    fn make_file(
        &self,
        making: &Path,
        path: &Path,
        header: &[u8],
    ) -> Result<Box<dyn SegmentIo>, IoFailure> {
        match fs::remove_file(making) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(IoFailure::new("remove", making)(error));
            }
            _ => {}
        }
        // Appending: where a write that stopped half-way was cut off, the next one begins.
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(making);
        let mut io = (self.wrap)(file.map_err(IoFailure::new("create", making))?);
        io.write_all(header)
            .map_err(IoFailure::new("write to", making))?;
        if self.syncs() {
            io.sync().map_err(IoFailure::new("sync", making))?;
        }
        fs::rename(making, path).map_err(IoFailure::new("rename", making))?;
        Ok(io)
    }

    /// Path, length and tip of the segment that is written to.
    fn end_of_open(&self) -> (PathBuf, u64, LogTip) {
        let index = self.index.lock();
        let Some(last) = index.segments.last() else {
            unreachable!("the segment that is written to is in the index")
        };
        (last.path.clone(), last.len, last.tip)
    }

    /// Seals the open segment.
    fn seal(&mut self) -> Result<(), Stopped> {
        let (path, len, tip) = self.end_of_open();
        let syncs = self.syncs();
        let Some(writing) = &mut self.writing else {
            return Ok(());
        };
        let trailer = format::trailer(len, tip);
        writing.overlong = true;
        let write = writing.io.write_all(&trailer);
        write
            .map_err(IoFailure::new("write to", &path))
            .map_err(full)?;
        // Only where nothing is ever synced is a sealed segment looked at for a torn end: waiting
        // for a whole segment to reach the disk would hold up whoever appends.
        if syncs {
            let sync = writing.io.sync();
            sync.map_err(IoFailure::new("sync", &path))
                .map_err(Stopped::Doubtful)?;
        }
        if let Some(last) = self.index.lock().segments.last_mut() {
            rename_to(&self.dir, last, SEALED).map_err(full)?;
            last.len += trailer.len() as u64;
        }
        self.writing = None;
        self.sync_names().map_err(Stopped::Doubtful)?;
        if syncs {
            self.durable = self.tip();
            self.last_sync = Instant::now();
        }
        Ok(())
    }

    /// Whether the newest segment was cut back and its file could not be.
    pub(super) fn is_unfinished(&self) -> bool {
        let index = self.index.lock();
        self.writing.is_none() && index.segments.last().is_some_and(|last| !last.sealed)
    }

    /// Opens the newest segment and cuts it to what the index says, durably.
    pub(super) fn finish_cut(&mut self) -> Result<(), Stopped> {
        let (path, len, tip) = self.end_of_open();
        let mut writing = self.open_for_writing(&path).map_err(full)?;
        let cut = writing.io.set_len(len);
        cut.map_err(IoFailure::new("cut", &path)).map_err(full)?;
        if self.syncs() {
            let sync = writing.io.sync();
            sync.map_err(IoFailure::new("sync", &path))
                .map_err(Stopped::Doubtful)?;
            self.durable = tip;
        }
        self.writing = Some(writing);
        Ok(())
    }

    /// Leaves an open segment that ends where the index says.
    fn make_room(&mut self) -> Result<(), Stopped> {
        if self.is_unfinished() {
            self.finish_cut()?;
        }
        if self
            .writing
            .as_ref()
            .is_some_and(|writing| writing.overlong)
        {
            self.cut_rest()?;
        }
        let sealed = {
            let index = self.index.lock();
            let last = index.segments.last();
            last.is_some_and(|last| last.len >= self.options.segment_bytes)
        };
        if sealed {
            self.seal()?;
        }
        if self.writing.is_none() {
            self.create_segment()?;
        }
        Ok(())
    }

    /// Cuts off what a write left that stopped half-way.
    fn cut_rest(&mut self) -> Result<(), Stopped> {
        let (path, len, _) = self.end_of_open();
        if let Some(writing) = &mut self.writing {
            let cut = writing.io.set_len(len);
            cut.map_err(IoFailure::new("cut", &path)).map_err(full)?;
            writing.overlong = false;
        }
        Ok(())
    }

    /// Writes a batch to the open segment, durably if the policy says so.
    pub(super) fn write(&mut self, batch: &Batch) -> Result<LogTip, Stopped> {
        self.make_room()?;
        let (path, len, before) = self.end_of_open();
        let sync_due = match self.options.sync {
            SyncPolicy::Never | SyncPolicy::Explicit => false,
            SyncPolicy::Interval(interval) => self.last_sync.elapsed() >= interval,
            SyncPolicy::EveryBatch => true,
        };
        let Some(writing) = &mut self.writing else {
            unreachable!("make_room leaves a segment to write to")
        };
        self.chunk.clear();
        let due = writing
            .since_checkpoint
            .is_none_or(|since| since >= self.options.checkpoint_bytes);
        let checkpoint = due.then(|| {
            format::put_checkpoint(len, before, &mut self.chunk);
            writing.compressor.restart();
            writing.since_checkpoint = Some(0);
            Checkpoint {
                offset: len + self.chunk.len() as u64,
                tip: before,
            }
        });
        self.frame.clear();
        batch.encode_frame(&mut self.frame);
        let at = len + self.chunk.len() as u64;
        format::put_batch_chunk(at, &mut self.chunk, |out| {
            writing.compressor.compress(&self.frame, out);
        });
        let written = writing
            .io
            .write_all(&self.chunk)
            .map_err(IoFailure::new("write to", &path))
            .map_err(full)
            .and_then(|()| {
                if sync_due {
                    let sync = writing.io.sync();
                    sync.map_err(IoFailure::new("sync", &path))
                        .map_err(Stopped::Doubtful)?;
                }
                Ok(())
            });
        if let Err(stopped) = written {
            // The batch is not acknowledged and should not be found after a restart either. If it
            // cannot be cut off now, that is done before the next write; and after a restart a torn
            // end is cut off, and a whole batch was merely not acknowledged.
            writing.since_checkpoint = None;
            writing.overlong = writing.io.set_len(len).is_err();
            return Err(stopped);
        }
        writing.since_checkpoint = writing
            .since_checkpoint
            .map(|since| since + self.frame.len() as u64);
        let tip = batch.tip(before.chain);
        if let Some(last) = self.index.lock().segments.last_mut() {
            last.len += self.chunk.len() as u64;
            last.tip = tip;
            if let Some(checkpoints) = &mut last.checkpoints {
                checkpoints.extend(checkpoint);
            }
        }
        if sync_due {
            self.durable = tip;
            self.last_sync = Instant::now();
        }
        Ok(tip)
    }

    pub(super) fn sync_now(&mut self) -> Result<(), Stopped> {
        if self.is_unfinished() {
            self.finish_cut()?;
        }
        if let Some(writing) = &mut self.writing {
            let sync = writing.io.sync();
            sync.map_err(IoFailure::new("sync the log in", &self.dir))
                .map_err(Stopped::Doubtful)?;
        }
        self.durable = self.tip();
        self.last_sync = Instant::now();
        Ok(())
    }

    /// Cuts the log at a chunk's offset in the segment that begins at `base`: later segments go
    /// first, newest first, so that whatever stops this leaves a log that is merely longer.
    pub(super) fn cut(&mut self, base: LogTip, tip: LogTip, offset: u64) -> Result<(), Stopped> {
        let cut = self.cut_index(base, tip, offset);
        let now_at = self.tip();
        if self.durable.index > now_at.index {
            self.durable = now_at;
        }
        cut.map_err(full)?;
        self.sync_names().map_err(Stopped::Doubtful)?;
        self.finish_cut()
    }

    fn cut_index(&mut self, base: LogTip, tip: LogTip, offset: u64) -> Result<(), IoFailure> {
        let mut index = self.index.lock();
        index.truncations.push(tip.index);
        while index.segments.last().is_some_and(|last| last.base != base) {
            if let Some(last) = index.segments.last() {
                let gone = fs::remove_file(&last.path);
                gone.map_err(IoFailure::new("remove", &last.path))?;
            }
            self.writing = None;
            index.segments.pop();
        }
        if let Some(last) = index.segments.last_mut() {
            rename_to(&self.dir, last, OPEN)?;
            self.writing = None;
            last.tip = tip;
            last.len = offset;
            if let Some(known) = &mut last.checkpoints {
                known.retain(|checkpoint| checkpoint.offset <= offset);
            }
        }
        Ok(())
    }
}

/// Gives a segment the name of another state.
pub(super) fn rename_to(dir: &Path, segment: &mut Segment, ending: &str) -> Result<(), IoFailure> {
    let path = segment_path(dir, segment.base.index, ending);
    if path != segment.path {
        fs::rename(&segment.path, &path).map_err(IoFailure::new("rename", &segment.path))?;
    }
    segment.path = path;
    segment.sealed = ending == SEALED;
    Ok(())
}
