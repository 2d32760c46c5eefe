//! The bytes of a segment: its header, and the chunks that follow.
//!
//! ```text
//! segment  = header, chunk*
//! header   = magic (8), format version (u32), 0 (u32), base (48), CRC-32 of all before (u32)
//! chunk    = length of body (u24), kind (u8), CRC-32 of body (u32),
//!            CRC-32 of these 8 bytes and the chunk's offset in the file as u64 (u32), body
//! base     = index (u64), term (u64), chain (32): where the log ends before what follows
//! kind 1 batch:      one frame of a batch, as the next flushed piece of the segment's zstd frame
//! kind 2 checkpoint: base; the zstd frame begins anew after it
//! kind 3 trailer:    base; the segment is complete
//! ```
//! All numbers are little endian. A chunk's header has a checksum of its own so that a damaged
//! length is never mistaken for a write that was cut off.

use crate::codec::FORMAT_VERSION;
use crate::position::{Chain, LogIndex, LogTip, Term};
use crate::store::DamageReason;

pub(super) const MAGIC: [u8; 8] = *b"\x89ULOG\r\n\x1a";
pub(super) const HEADER_LEN: usize = 68;
pub(super) const CHUNK_HEADER_LEN: usize = 12;
pub(super) const BASE_LEN: usize = 48;
pub(super) const TRAILER_LEN: usize = CHUNK_HEADER_LEN + BASE_LEN;
/// No chunk is longer: a frame of the longest length that does not compress at all.
const MAX_CHUNK: u32 = (crate::batch::MAX_FRAME_LEN + (64 << 10)) as u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ChunkKind {
    Batch,
    Checkpoint,
    Trailer,
}

pub(super) struct ChunkHeader {
    pub(super) kind: ChunkKind,
    pub(super) len: usize,
    pub(super) crc: u32,
}

fn put_base(base: LogTip, out: &mut Vec<u8>) {
    out.extend_from_slice(&base.index.0.to_le_bytes());
    out.extend_from_slice(&base.term.0.to_le_bytes());
    out.extend_from_slice(&base.chain.0);
}

/// Reads little-endian fields off the front of a slice that is known to be long enough, which
/// is asked for again rather than believed.
fn split<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = bytes.split_first_chunk()?;
    *bytes = rest;
    Some(*head)
}

pub(super) fn read_base(mut bytes: &[u8]) -> Option<LogTip> {
    Some(LogTip {
        index: LogIndex(u64::from_le_bytes(split(&mut bytes)?)),
        term: Term(u64::from_le_bytes(split(&mut bytes)?)),
        chain: Chain(split(&mut bytes)?),
    })
}

pub(super) fn header(base: LogTip) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER_LEN);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    put_base(base, &mut out);
    let crc = crc32fast::hash(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// Reads a header; `bytes` may be shorter than one. On an error, where in it and why.
pub(super) fn read_header(bytes: &[u8]) -> Result<LogTip, (u64, DamageReason)> {
    let known = MAGIC.len().min(bytes.len());
    if bytes[..known] != MAGIC[..known] {
        return Err((0, DamageReason::NotASegment));
    }
    let mut rest = &bytes[known..];
    let version = split(&mut rest).map(u32::from_le_bytes);
    if let Some(found) = version.filter(|found| *found != FORMAT_VERSION) {
        return Err((MAGIC.len() as u64, DamageReason::Version { found }));
    }
    let read = || {
        let (body, mut crc) = bytes.get(..HEADER_LEN)?.split_at(HEADER_LEN - 4);
        let crc = u32::from_le_bytes(split(&mut crc)?);
        Some((crc == crc32fast::hash(body), read_base(&body[16..])?))
    };
    match read() {
        Some((true, base)) => Ok(base),
        Some((false, _)) => Err((0, DamageReason::Header)),
        None => Err((0, DamageReason::CutOff)),
    }
}

fn header_crc(prefix: &[u8], offset: u64) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(prefix);
    crc.update(&offset.to_le_bytes());
    crc.finalize()
}

/// Appends a chunk that will stand at `offset` of its file; `body` appends its body.
fn put_chunk(kind: u8, offset: u64, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.extend_from_slice(&[0; CHUNK_HEADER_LEN]);
    body(out);
    let len = (out.len() - start - CHUNK_HEADER_LEN) as u32;
    assert!(len <= MAX_CHUNK, "a batch's frame is bounded");
    let (header, body) = out[start..].split_at_mut(CHUNK_HEADER_LEN);
    header[..4].copy_from_slice(&(len | u32::from(kind) << 24).to_le_bytes());
    header[4..8].copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    let crc = header_crc(&header[..8], offset);
    header[8..].copy_from_slice(&crc.to_le_bytes());
}

pub(super) fn put_batch_chunk(offset: u64, out: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    put_chunk(1, offset, out, body);
}

pub(super) fn put_checkpoint(offset: u64, base: LogTip, out: &mut Vec<u8>) {
    put_chunk(2, offset, out, |out| put_base(base, out));
}

pub(super) fn trailer(offset: u64, base: LogTip) -> Vec<u8> {
    let mut out = Vec::with_capacity(TRAILER_LEN);
    put_chunk(3, offset, &mut out, |out| put_base(base, out));
    out
}

/// Reads the header of the chunk at `offset` of its file.
pub(super) fn read_chunk_header(
    mut bytes: &[u8],
    offset: u64,
) -> Result<ChunkHeader, DamageReason> {
    let prefix = bytes.get(..8).ok_or(DamageReason::CutOff)?;
    let mut fields = || {
        Some((
            u32::from_le_bytes(split(&mut bytes)?),
            u32::from_le_bytes(split(&mut bytes)?),
            u32::from_le_bytes(split(&mut bytes)?),
        ))
    };
    let (word, crc, header) = fields().ok_or(DamageReason::CutOff)?;
    if header != header_crc(prefix, offset) {
        return Err(DamageReason::ChunkHeader);
    }
    let (kind, len) = ((word >> 24) as u8, word & 0x00ff_ffff);
    let kind = match kind {
        1 if len <= MAX_CHUNK => ChunkKind::Batch,
        2 if len as usize == BASE_LEN => ChunkKind::Checkpoint,
        3 if len as usize == BASE_LEN => ChunkKind::Trailer,
        _ => return Err(DamageReason::UnknownChunk { kind, len }),
    };
    Ok(ChunkHeader {
        kind,
        len: len as usize,
        crc,
    })
}
