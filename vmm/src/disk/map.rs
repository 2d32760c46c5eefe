//! Which chunks of an overlay were written: a file with a header and a byte per chunk.
//!
//! Two bits, written at opposite ends of a write, and each errs on its own safe side:
//!
//! ```text
//!   Clean ──touch (bit 1 durable)──▶ Reserved ──data written──▶ Present in memory
//!     ▲                                 │                           │ flush: data durable, then
//!     │                              power fails                    ▼         bit 2 durable
//!     │                                 ▼                       Present in the file
//!     └───────── discard ──────────── Stale
//! ```
//!
//! *Touched* is durable before a chunk's data can be: after any failure the touched chunks are all
//! that can differ from the base, so a disk that is ahead of the log can be brought back.
//! *Present* is durable only after the whole chunk is: a chunk that a power failure tore before its
//! first flush reads as the base again, which is what a disk without that write would hold.

use std::io;

use replay_log::DiskBase;

use super::storage::Storage;

/// Bytes of a disk that are copied together.
pub(super) const CHUNK: u64 = 64 << 10;
/// How many chunks are touched together, so that a disk that is filled in order does not sync its
/// map for every chunk.
const GROUP: usize = 16;

const MAGIC: &[u8; 8] = b"UNDMAP\0\x01";
/// Where the bytes of the chunks begin.
const HEADER: u64 = 4096;
const HEADER_USED: usize = 8 + 8 + 8 + 32;

const TOUCHED: u8 = 1;
const PRESENT: u8 = 2;

/// What is known of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Never written: the base has it, and the data file a hole.
    Clean,
    /// May be written; the data file has a hole still.
    Reserved,
    /// The data file holds something that cannot be trusted: the base has it.
    Stale,
    /// The data file has it.
    Present,
}

/// The header is not of an overlay of this base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Foreign {
    /// It is no map at all, or of another version.
    Unknown,
    /// It is the map of an overlay over another base.
    OtherBase(DiskBase),
}

/// The map of one overlay.
#[derive(Debug)]
pub(super) struct Map<F> {
    file: F,
    chunks: Vec<Chunk>,
    /// Chunks that are present and not written down as such.
    unsaved: Vec<usize>,
    /// Written to the file and not synced.
    unsynced: bool,
}

impl<F: Storage> Map<F> {
    /// Writes a new map; durable when this returns.
    pub(super) fn create(file: F, base: DiskBase) -> io::Result<Self> {
        let count = chunk_count(base.size)?;
        file.set_len(HEADER + count as u64)?;
        file.write_all_at(&header(base), 0)?;
        file.sync()?;
        Ok(Self {
            file,
            chunks: vec![Chunk::Clean; count],
            unsaved: Vec::new(),
            unsynced: false,
        })
    }

    /// Reads a map back.
    pub(super) fn open(file: F, base: DiskBase) -> io::Result<Result<Self, Foreign>> {
        let mut found = [0; HEADER_USED];
        file.read_exact_at(&mut found, 0)?;
        if found != header(base) {
            return Ok(Err(foreign(&found)));
        }
        let mut bytes = vec![0; chunk_count(base.size)?];
        file.read_exact_at(&mut bytes, HEADER)?;
        let chunks = bytes
            .into_iter()
            .map(|byte| match byte & (TOUCHED | PRESENT) {
                0 => Chunk::Clean,
                TOUCHED => Chunk::Stale,
                _ => Chunk::Present,
            })
            .collect();
        Ok(Ok(Self {
            file,
            chunks,
            unsaved: Vec::new(),
            // Another process may have left it in the page cache.
            unsynced: true,
        }))
    }

    pub(super) fn chunk(&self, chunk: usize) -> Chunk {
        self.chunks[chunk]
    }

    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// Writes down that these chunks may be written. With `sync`, that is durable on return.
    pub(super) fn touch(
        &mut self,
        chunks: impl Iterator<Item = usize>,
        sync: bool,
    ) -> io::Result<()> {
        let mut touched = false;
        for chunk in chunks {
            if self.chunks[chunk] != Chunk::Clean {
                continue;
            }
            // Groups are touched as a whole, so this one is clean as a whole.
            let start = chunk - chunk % GROUP;
            let end = (start + GROUP).min(self.chunks.len());
            let bytes = [TOUCHED; GROUP];
            self.file
                .write_all_at(&bytes[..end - start], HEADER + start as u64)?;
            self.chunks[start..end].fill(Chunk::Reserved);
            touched = true;
        }
        self.unsynced |= touched;
        if touched && sync { self.sync() } else { Ok(()) }
    }

    /// The data file has this chunk now, not durably yet.
    pub(super) fn present(&mut self, chunk: usize) {
        if self.chunks[chunk] != Chunk::Present {
            self.chunks[chunk] = Chunk::Present;
            self.unsaved.push(chunk);
        }
    }

    /// Nobody knows what the data file has of this chunk.
    pub(super) fn spoilt(&mut self, chunk: usize) {
        self.chunks[chunk] = Chunk::Stale;
    }

    /// Writes down which chunks are present. Where that is to survive a power failure, their data
    /// was synced before.
    pub(super) fn save(&mut self) -> io::Result<()> {
        self.unsaved.sort_unstable();
        for run in self.unsaved.chunk_by(|a, b| a + 1 == *b) {
            let bytes = vec![TOUCHED | PRESENT; run.len()];
            let Some(first) = run.first() else { continue };
            self.file.write_all_at(&bytes, HEADER + *first as u64)?;
            self.unsynced = true;
        }
        self.unsaved.clear();
        Ok(())
    }

    /// Makes what was written down durable.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.unsynced {
            self.file.sync()?;
            self.unsynced = false;
        }
        Ok(())
    }

    /// Forgets what is present, durably. What was touched stays so: see [`Map::clear`].
    pub(super) fn distrust_all(&mut self) -> io::Result<()> {
        self.unsaved.clear();
        for chunk in &mut self.chunks {
            if *chunk == Chunk::Present {
                *chunk = Chunk::Stale;
            }
        }
        let byte = |chunk: &Chunk| match chunk {
            Chunk::Clean => 0,
            _ => TOUCHED,
        };
        let bytes: Vec<u8> = self.chunks.iter().map(byte).collect();
        self.file.write_all_at(&bytes, HEADER)?;
        self.unsynced = true;
        self.sync()
    }

    /// Forgets everything, durably; the data file is one hole.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.unsaved.clear();
        self.chunks.fill(Chunk::Clean);
        let zeros = vec![0; self.chunks.len()];
        self.file.write_all_at(&zeros, HEADER)?;
        self.unsynced = true;
        self.sync()
    }
}

fn chunk_count(size: u64) -> io::Result<usize> {
    usize::try_from(size.div_ceil(CHUNK)).map_err(io::Error::other)
}

fn header(base: DiskBase) -> [u8; HEADER_USED] {
    let mut header = [0; HEADER_USED];
    header[0..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&CHUNK.to_le_bytes());
    header[16..24].copy_from_slice(&base.size.to_le_bytes());
    header[24..56].copy_from_slice(&base.digest);
    header
}

fn foreign(found: &[u8; HEADER_USED]) -> Foreign {
    let mut base = DiskBase {
        digest: [0; 32],
        size: 0,
    };
    let mut size = [0; 8];
    size.copy_from_slice(&found[16..24]);
    base.size = u64::from_le_bytes(size);
    base.digest.copy_from_slice(&found[24..56]);
    if header(base) == *found {
        Foreign::OtherBase(base)
    } else {
        Foreign::Unknown
    }
}
