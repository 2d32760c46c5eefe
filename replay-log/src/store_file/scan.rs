//! Reads one segment from a place in it onwards, checking everything that can be checked.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::{Buf, BytesMut};

use super::format::{
    BASE_LEN, CHUNK_HEADER_LEN, ChunkHeader, ChunkKind, HEADER_LEN, read_base, read_chunk_header,
    read_header,
};
use crate::batch::{Batch, MAX_FRAME_LEN};
use crate::compress::Decompressor;
use crate::position::LogTip;
use crate::store::{Damage, DamageReason, IoFailure, ReadError};

/// How much is read from the file at once.
const READ: usize = 64 << 10;
/// A file's tail that reads as zeros from a sector's start on was never written ...
const SECTOR: u64 = 512;
/// ... if it is at least this long: fewer zeros can be contents.
const MIN_HOLE: u64 = 16;

/// A place in a segment from which it can be read without what is before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Checkpoint {
    /// Where the first chunk after it begins.
    pub(super) offset: u64,
    /// Where the log ends there.
    pub(super) tip: LogTip,
}

/// What stands at a place in a segment.
#[derive(Debug)]
pub(super) enum Found {
    Batch(Batch),
    Checkpoint,
    Trailer,
    /// Everything up to the end has been read.
    End,
}

/// Reads chunks. After an error it stays where it was.
#[derive(Debug)]
pub(super) struct Scanner {
    path: PathBuf,
    file: File,
    /// Up to where the file may be read: its length, or what its writer has vouched for.
    end: u64,
    offset: u64,
    buffer: BytesMut,
    decompressor: Decompressor,
    raw: BytesMut,
    base: LogTip,
    tip: LogTip,
}

impl Scanner {
    /// Opens a segment and reads its header.
    pub(super) fn open(path: &Path) -> Result<Self, ReadError> {
        let file = File::open(path).map_err(IoFailure::new("open", path))?;
        let end = file
            .metadata()
            .map_err(IoFailure::new("read the length of", path))?
            .len();
        let mut scanner = Self {
            path: path.to_owned(),
            file,
            end,
            offset: 0,
            buffer: BytesMut::new(),
            decompressor: Decompressor::new(),
            raw: BytesMut::new(),
            base: LogTip::default(),
            tip: LogTip::default(),
        };
        let len = end.min(HEADER_LEN as u64) as usize;
        let header = read_header(scanner.peek(len)?);
        scanner.base = header.map_err(|(offset, reason)| scanner.damage(offset, reason))?;
        scanner.tip = scanner.base;
        scanner.skip(HEADER_LEN);
        Ok(scanner)
    }

    /// Reads on from a checkpoint instead.
    pub(super) fn seek(&mut self, checkpoint: Checkpoint) {
        self.offset = checkpoint.offset;
        self.tip = checkpoint.tip;
        self.buffer.clear();
        self.decompressor.restart();
    }

    /// Where the log ends before the segment.
    pub(super) fn base(&self) -> LogTip {
        self.base
    }

    /// Where the next chunk begins.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Where the log ends before the next chunk.
    pub(super) fn tip(&self) -> LogTip {
        self.tip
    }

    /// The checkpoint at this place, to come back to it; right after the header or a checkpoint.
    pub(super) fn here(&self) -> Checkpoint {
        Checkpoint {
            offset: self.offset,
            tip: self.tip,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// More may be read now, or less.
    pub(super) fn set_end(&mut self, end: u64) {
        self.end = end;
    }

    pub(super) fn damage(&self, offset: u64, reason: DamageReason) -> Damage {
        Damage {
            segment: self.path.clone(),
            offset,
            reason,
        }
    }

    fn skip(&mut self, len: usize) {
        self.offset += len as u64;
        self.buffer.advance(len.min(self.buffer.len()));
    }

    /// The next `len` bytes, of which the caller knows that they are before the end.
    fn peek(&mut self, len: usize) -> Result<&[u8], ReadError> {
        while self.buffer.len() < len {
            let at = self.offset + self.buffer.len() as u64;
            let have = self.buffer.len();
            let room = self
                .end
                .saturating_sub(at)
                .min((READ as u64).max((len - have) as u64));
            self.buffer.resize(have + room as usize, 0);
            let read = self.file.read_at(&mut self.buffer[have..], at);
            self.buffer
                .truncate(have + read.as_ref().copied().unwrap_or_default());
            match read {
                // The file has become shorter than it was.
                Ok(0) => return Err(self.damage(self.offset, DamageReason::CutOff).into()),
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => return Err(IoFailure::new("read", &self.path)(source).into()),
            }
        }
        Ok(&self.buffer[..len])
    }

    fn left(&self) -> u64 {
        self.end.saturating_sub(self.offset)
    }

    /// The header of the next chunk, the whole of which is there, or `None` at the end.
    fn chunk(&mut self) -> Result<Option<ChunkHeader>, ReadError> {
        let left = self.left();
        if left == 0 {
            return Ok(None);
        }
        let offset = self.offset;
        let header = if left < CHUNK_HEADER_LEN as u64 {
            Err(DamageReason::CutOff)
        } else {
            read_chunk_header(self.peek(CHUNK_HEADER_LEN)?, offset)
        };
        let header = header.map_err(|reason| self.damage(offset, reason))?;
        if left < (CHUNK_HEADER_LEN + header.len) as u64 {
            return Err(self.damage(offset, DamageReason::CutOff).into());
        }
        Ok(Some(header))
    }

    /// Reads the next chunk.
    pub(super) fn next(&mut self) -> Result<Found, ReadError> {
        let Some(header) = self.chunk()? else {
            return Ok(Found::End);
        };
        let offset = self.offset;
        let whole = CHUNK_HEADER_LEN + header.len;
        let at_end = self.left() == whole as u64;
        let body = &self.peek(whole)?[CHUNK_HEADER_LEN..];
        if crc32fast::hash(body) != header.crc {
            return Err(self.damage(offset, DamageReason::ChunkChecksum).into());
        }
        let names = read_base(body);
        let found = match header.kind {
            ChunkKind::Batch => self
                .batch(header.len)
                .map(Found::Batch)
                .map_err(|reason| self.damage(offset, reason))?,
            _ if names != Some(self.tip) => {
                return Err(self.damage(offset, DamageReason::Chain).into());
            }
            ChunkKind::Checkpoint => {
                self.decompressor.restart();
                Found::Checkpoint
            }
            ChunkKind::Trailer if !at_end => {
                let after = offset + whole as u64;
                return Err(self.damage(after, DamageReason::AfterTrailer).into());
            }
            ChunkKind::Trailer => Found::Trailer,
        };
        self.skip(whole);
        Ok(found)
    }

    /// Decompresses the batch in the chunk at the start of the buffer.
    fn batch(&mut self, len: usize) -> Result<Batch, DamageReason> {
        let mut body = &self.buffer[CHUNK_HEADER_LEN..CHUNK_HEADER_LEN + len];
        self.raw.clear();
        while let Some(taken) = self
            .decompressor
            .step(body, &mut self.raw)
            .map_err(DamageReason::Compression)?
        {
            body = &body[taken..];
            if self.raw.len() > MAX_FRAME_LEN {
                return Err(DamageReason::NotOneBatch);
            }
        }
        let batch = Batch::take_frame(&mut self.raw).map_err(DamageReason::Frame)?;
        let batch = batch
            .filter(|_| self.raw.is_empty())
            .ok_or(DamageReason::NotOneBatch)?;
        if batch.first() != self.tip.index || batch.term() < self.tip.term {
            return Err(DamageReason::Discontinuous {
                expected: self.tip.index,
                last_term: self.tip.term,
                found: batch.first(),
                term: batch.term(),
            });
        }
        self.tip = batch.tip(self.tip.chain);
        Ok(batch)
    }

    /// What the trailer at `offset`, the last thing in the file, names; `None` if none is there.
    pub(super) fn trailer_at(&mut self, offset: u64) -> Result<Option<LogTip>, ReadError> {
        self.offset = offset;
        self.buffer.clear();
        let header = match self.chunk() {
            Ok(Some(header)) if header.kind == ChunkKind::Trailer => header,
            Ok(_) | Err(ReadError::Damaged(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let body = &self.peek(CHUNK_HEADER_LEN + BASE_LEN)?[CHUNK_HEADER_LEN..];
        Ok(read_base(body).filter(|_| crc32fast::hash(body) == header.crc))
    }

    /// Finds the checkpoints from here to the end without reading batches.
    pub(super) fn checkpoints(&mut self) -> Result<Vec<Checkpoint>, ReadError> {
        let mut found = vec![self.here()];
        while let Some(header) = self.chunk()? {
            let whole = CHUNK_HEADER_LEN + header.len;
            if header.kind == ChunkKind::Checkpoint {
                let offset = self.offset + whole as u64;
                let body = &self.peek(CHUNK_HEADER_LEN + BASE_LEN)?[CHUNK_HEADER_LEN..];
                // A damaged one is left for those who read through it to report.
                if let Some(tip) = read_base(body).filter(|_| crc32fast::hash(body) == header.crc) {
                    found.push(Checkpoint { offset, tip });
                }
            }
            self.skip(whole);
        }
        Ok(found)
    }

    /// Whether `damage`, found at this place of the log's last segment, is a write that was cut
    /// off by the end of the process or the host, rather than bytes that changed: the segment
    /// ends too early, or reads as zeros from some sector on.
    pub(super) fn is_torn(&mut self, damage: &Damage) -> Result<bool, ReadError> {
        match damage.reason {
            DamageReason::CutOff => Ok(true),
            DamageReason::ChunkHeader | DamageReason::ChunkChecksum => self.ends_in_a_hole(),
            _ => Ok(false),
        }
    }

    fn ends_in_a_hole(&self) -> Result<bool, ReadError> {
        let mut data_end = self.offset;
        let mut piece = vec![0; READ];
        let mut at = self.offset;
        while at < self.end {
            let len = (self.end - at).min(READ as u64) as usize;
            self.file
                .read_exact_at(&mut piece[..len], at)
                .map_err(IoFailure::new("read", &self.path))?;
            if let Some(last) = piece[..len].iter().rposition(|&byte| byte != 0) {
                data_end = at + last as u64 + 1;
            }
            at += len as u64;
        }
        let all_zero = data_end == self.offset;
        let hole = data_end.next_multiple_of(SECTOR);
        Ok(all_zero || self.end.saturating_sub(hole) >= MIN_HOLE)
    }
}
