//! A disk that can be written: a base that stays as it is, and the chunks that were written since.
//!
//! A folder holds one overlay: `data`, as large as the disk and mostly hole, and `map`. See
//! [`super::map`] for what survives which failure. What a finished flush covers survives a power
//! failure; what was written after it may be there or not, sector by sector.
//!
//! An overlay whose file could not be synced refuses everything from then on: the kernel may have
//! dropped what it could not write, and a later success would claim what is not there.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use replay_log::DiskBase;
use thiserror::Error;

use super::base::{Base, BaseError, sync_folder};
use super::map::{CHUNK, Chunk, Foreign, Map};
use super::{Durability, Storage};

/// Why a disk cannot be read or written. Always a failure of the host.
#[derive(Debug, Error)]
pub enum OverlayError {
    /// A file operation failed.
    #[error("cannot {doing} the overlay of a disk: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// What came of it.
        source: io::Error,
    },
    /// A file or folder cannot be opened or made.
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// Another process has it.
    #[error("the disk overlay in {} is in use by another process: stop that one first", folder.display())]
    InUse {
        /// Its folder.
        folder: PathBuf,
    },
    /// The map is none of ours.
    #[error("the map of the disk overlay is corrupt or of another version: discard the overlay")]
    UnknownMap,
    /// The overlay lies over another base.
    #[error(
        "the disk overlay belongs to the base {} and not to {}: discard it, or use its base",
        blake3::Hash::from_bytes(found.digest).to_hex(),
        blake3::Hash::from_bytes(expected.digest).to_hex()
    )]
    OtherBase {
        /// The base in hand.
        expected: DiskBase,
        /// The base the overlay was made for.
        found: DiskBase,
    },
    /// A request for what the disk does not have.
    #[error("a request for {len} bytes at {offset} reaches beyond a disk of {size} bytes")]
    OutOfRange {
        /// Where.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The disk's size.
        size: u64,
    },
    /// It failed before.
    #[error("the disk could not be synced before, so nothing it holds is certain: replace it")]
    Failed,
    /// The new base could not be made.
    #[error(transparent)]
    Seal(#[from] BaseError),
}

/// A disk.
#[derive(Debug)]
pub struct Overlay<F = File> {
    base: Base,
    data: F,
    map: Map<F>,
    durability: Durability,
    /// Written to the data file and not synced.
    unsynced: bool,
    failed: bool,
}

impl Overlay {
    /// Opens the overlay in `folder`, or makes one there.
    pub fn open(folder: &Path, base: Base, durability: Durability) -> Result<Self, OverlayError> {
        replay_log::folder::make(folder).map_err(file("create the folder", folder))?;
        let (data_path, map_path) = (folder.join("data"), folder.join("map"));
        let mut options = File::options();
        options.read(true).write(true);
        let existing = match options.open(&map_path) {
            Ok(map) => Some(map),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(file("open", &map_path)(error)),
        };
        // A map without data would make every present chunk read as zeros.
        let data = options
            .create(existing.is_none())
            .open(&data_path)
            .map_err(file("open", &data_path))?;
        match data.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let folder = folder.to_owned();
                return Err(OverlayError::InUse { folder });
            }
            Err(TryLockError::Error(error)) => return Err(file("lock", &data_path)(error)),
        }
        if let Some(map) = existing {
            return Self::assemble(data, map, base, durability);
        }
        let draft = folder.join("map.tmp");
        let map = options
            .create(true)
            .truncate(true)
            .open(&draft)
            .map_err(file("create", &draft))?;
        let overlay = Self::create(data, map, base, durability)?;
        fs::rename(&draft, &map_path).map_err(file("rename", &draft))?;
        sync_folder(folder).map_err(file("sync the folder", folder))?;
        Ok(overlay)
    }
}

impl<F: Storage> Overlay<F> {
    /// Makes an overlay of two files; whatever they held is lost.
    pub fn create(
        data: F,
        map: F,
        base: Base,
        durability: Durability,
    ) -> Result<Self, OverlayError> {
        data.set_len(0)
            .and_then(|()| data.set_len(base.size()))
            .and_then(|()| data.sync())
            .map_err(io("create"))?;
        let map = Map::create(map, base.name()).map_err(io("create"))?;
        Ok(Self {
            base,
            data,
            map,
            durability,
            unsynced: false,
            failed: false,
        })
    }

    /// Takes up an overlay of two files again.
    pub fn assemble(
        data: F,
        map: F,
        base: Base,
        durability: Durability,
    ) -> Result<Self, OverlayError> {
        let map = match Map::open(map, base.name()).map_err(io("read the map of"))? {
            Ok(map) => map,
            Err(Foreign::Unknown) => return Err(OverlayError::UnknownMap),
            Err(Foreign::OtherBase(found)) => {
                let expected = base.name();
                return Err(OverlayError::OtherBase { expected, found });
            }
        };
        // A discard that was cut short may have left it empty; what is missing is hole.
        data.set_len(base.size())
            .map_err(io("restore the size of"))?;
        Ok(Self {
            base,
            data,
            map,
            durability,
            // Another process may have left writes in the page cache.
            unsynced: true,
            failed: false,
        })
    }

    /// The size of the disk in bytes.
    pub const fn size(&self) -> u64 {
        self.base.size()
    }

    /// What it lies over.
    pub const fn base(&self) -> &Base {
        &self.base
    }

    /// What a flush means from now on. The next flush covers what earlier ones did not.
    pub const fn set_durability(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// Reads `len` bytes from `offset`.
    pub fn read(&self, offset: u64, len: u32) -> Result<Bytes, OverlayError> {
        let end = self.check(offset, u64::from(len))?;
        let mut data = vec![0; len as usize];
        self.read_checked(offset..end, &mut data)?;
        Ok(data.into())
    }

    fn read_checked(&self, range: Range<u64>, data: &mut [u8]) -> Result<(), OverlayError> {
        let mut rest = data;
        for part in parts(range) {
            let (now, later) = rest.split_at_mut((part.range.end - part.range.start) as usize);
            match self.map.chunk(part.chunk) {
                Chunk::Present => self.data.read_exact_at(now, part.range.start),
                _ => self.base.read(part.range.start, now),
            }
            .map_err(io("read"))?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `data` at `offset`. It need not survive anything before the next flush.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), OverlayError> {
        let end = self.check(offset, data.len() as u64)?;
        let sync = self.durability == Durability::Sync;
        let touched = self
            .map
            .touch(parts(offset..end).map(|part| part.chunk), sync);
        self.certain(touched, "write the map of")?;
        let mut rest = data;
        for part in parts(offset..end) {
            let (now, later) = rest.split_at((part.range.end - part.range.start) as usize);
            self.unsynced = true;
            if let Err(source) = self.write_part(&part, now) {
                if self.map.chunk(part.chunk) != Chunk::Present {
                    self.map.spoilt(part.chunk);
                }
                return Err(io("write")(source));
            }
            self.map.present(part.chunk);
            rest = later;
        }
        Ok(())
    }

    /// Writes what falls into one chunk, and the rest of the chunk if the data file lacks it.
    fn write_part(&self, part: &Part, data: &[u8]) -> io::Result<()> {
        let hole = match self.map.chunk(part.chunk) {
            Chunk::Present => return self.data.write_all_at(data, part.range.start),
            Chunk::Clean | Chunk::Reserved => true,
            Chunk::Stale => false,
        };
        let start = part.chunk as u64 * CHUNK;
        let end = (start + CHUNK).min(self.size());
        let whole = part.range == (start..end);
        if whole || (hole && self.base.is_empty()) {
            return self.data.write_all_at(data, part.range.start);
        }
        let mut chunk = vec![0; (end - start) as usize];
        self.base.read(start, &mut chunk)?;
        let within = (part.range.start - start) as usize..(part.range.end - start) as usize;
        chunk[within].copy_from_slice(data);
        self.data.write_all_at(&chunk, start)
    }

    /// Makes every write before durable, as far as [`Durability`] asks for.
    pub fn flush(&mut self) -> Result<(), OverlayError> {
        if self.failed {
            return Err(OverlayError::Failed);
        }
        if self.durability == Durability::PageCache {
            return self.map.save().map_err(io("write the map of"));
        }
        if !self.unsynced {
            return Ok(());
        }
        let synced = self.data.sync();
        self.certain(synced, "sync")?;
        let saved = self.map.save().and_then(|()| self.map.sync());
        self.certain(saved, "sync the map of")?;
        self.unsynced = false;
        Ok(())
    }

    /// Forgets every write: the disk is its base again, durably.
    pub fn discard_all(&mut self) -> Result<(), OverlayError> {
        if self.failed {
            return Err(OverlayError::Failed);
        }
        // In this order a failure in between leaves chunks that read as the base.
        let size = self.size();
        let discarded = self
            .map
            .distrust_all()
            .and_then(|()| self.data.set_len(0))
            .and_then(|()| self.data.set_len(size))
            .and_then(|()| self.data.sync())
            .and_then(|()| self.map.clear());
        self.certain(discarded, "discard")?;
        self.unsynced = false;
        Ok(())
    }

    /// Where the disk can differ from its base, in order: everything that was ever written since
    /// the last discard lies within, even if a power failure has undone it.
    pub fn touched(&self) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for chunk in 0..self.map.len() {
            if self.map.chunk(chunk) == Chunk::Clean {
                continue;
            }
            let start = chunk as u64 * CHUNK;
            let end = (start + CHUNK).min(self.size());
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Makes a new base of what the disk holds now, in `folder`. The overlay stays as it is.
    pub fn seal_into_base(&self, folder: &Path) -> Result<Base, OverlayError> {
        if self.failed {
            return Err(OverlayError::Failed);
        }
        let mut content = Content {
            overlay: self,
            offset: 0,
        };
        Ok(Base::seal(folder, &mut content)?)
    }

    fn check(&self, offset: u64, len: u64) -> Result<u64, OverlayError> {
        if self.failed {
            return Err(OverlayError::Failed);
        }
        let size = self.size();
        offset
            .checked_add(len)
            .filter(|end| *end <= size)
            .ok_or(OverlayError::OutOfRange { offset, len, size })
    }

    /// Passes a result on; after an error nothing about the files is certain any more.
    fn certain(&mut self, result: io::Result<()>, doing: &'static str) -> Result<(), OverlayError> {
        self.failed |= result.is_err();
        result.map_err(io(doing))
    }
}

/// What of a request falls into one chunk.
struct Part {
    chunk: usize,
    range: Range<u64>,
}

/// Cuts a range that lies within a disk at the borders of chunks.
fn parts(range: Range<u64>) -> impl Iterator<Item = Part> {
    let mut start = range.start;
    std::iter::from_fn(move || {
        let chunk = start / CHUNK;
        let end = ((chunk + 1) * CHUNK).min(range.end);
        let part = Part {
            chunk: chunk as usize,
            range: start..end,
        };
        start = end;
        (part.range.start < part.range.end).then_some(part)
    })
}

/// The content of a disk from front to end.
struct Content<'a, F> {
    overlay: &'a Overlay<F>,
    offset: u64,
}

impl<F: Storage> Read for Content<'_, F> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let left = self.overlay.size() - self.offset;
        let count = data.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let end = self.offset + count as u64;
        self.overlay
            .read_checked(self.offset..end, &mut data[..count])
            .map_err(io::Error::other)?;
        self.offset = end;
        Ok(count)
    }
}

fn io(doing: &'static str) -> impl Fn(io::Error) -> OverlayError {
    move |source| OverlayError::Io { doing, source }
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OverlayError {
    let path = path.to_owned();
    move |source| OverlayError::File {
        doing,
        path,
        source,
    }
}

#[cfg(test)]
#[path = "overlay_tests.rs"]
mod tests;
