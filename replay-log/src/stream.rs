//! Batches on a connection: a preamble, then one long-lived zstd frame, flushed after each batch.
//!
//! ```text
//! stream    = preamble, zstd(frame*)
//! preamble  = "ULST", format version (u32, little endian)
//! ```
//!
//! Both sides keep a 128 KiB window and at most one batch; what a peer claims or how well its
//! bytes compress changes nothing about that.

use bytes::{Buf, Bytes, BytesMut};
use thiserror::Error;

use crate::batch::{Batch, FrameError};
use crate::codec::FORMAT_VERSION;
use crate::compress::{Compressor, DecompressError, Decompressor};

/// What every stream begins with.
pub const STREAM_MAGIC: [u8; 4] = *b"ULST";
const PREAMBLE_LEN: usize = 8;

/// What went through a stream so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamBytes {
    /// Frames of batches, before compression.
    pub raw: u64,
    /// What was sent or received, preamble included.
    pub compressed: u64,
}

/// Why a stream cannot be read on; the connection has to be made anew.
#[derive(Debug, Error)]
pub enum StreamError {
    /// It is no stream of batches.
    #[error("the stream does not begin as a log stream does")]
    NotALog,
    /// Another version of the format.
    #[error(
        "the stream has format version {found}, this is version {FORMAT_VERSION}: \
         run the same version on both hosts"
    )]
    Version {
        /// The version it claims.
        found: u32,
    },
    /// Its compressed bytes are damaged.
    #[error("the stream cannot be decompressed")]
    Compression(#[source] DecompressError),
    /// What it contains is not a batch.
    #[error("the stream does not contain a batch where one should be")]
    Frame(#[source] FrameError),
    /// It failed before.
    #[error("the stream failed before and cannot be read on: connect again")]
    Failed,
}

/// The sending side of a stream.
#[derive(Debug)]
pub struct StreamEncoder {
    compressor: Compressor,
    frame: Vec<u8>,
    bytes: StreamBytes,
}

impl StreamEncoder {
    /// A stream that has not begun.
    pub fn new() -> Self {
        Self {
            compressor: Compressor::new(),
            frame: Vec::new(),
            bytes: StreamBytes::default(),
        }
    }

    /// What is to be sent so that the other side has this batch.
    pub fn push(&mut self, batch: &Batch) -> Bytes {
        self.frame.clear();
        batch.encode_frame(&mut self.frame);
        let mut out = Vec::new();
        if self.bytes.compressed == 0 {
            out.extend_from_slice(&STREAM_MAGIC);
            out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        }
        self.compressor.compress(&self.frame, &mut out);
        self.bytes.raw += self.frame.len() as u64;
        self.bytes.compressed += out.len() as u64;
        out.into()
    }

    /// What was pushed so far.
    pub fn bytes(&self) -> StreamBytes {
        self.bytes
    }
}

impl Default for StreamEncoder {
    fn default() -> Self {
        Self::new()
    }
}

/// The receiving side of a stream.
#[derive(Debug)]
pub struct StreamDecoder {
    decompressor: Decompressor,
    input: BytesMut,
    raw: BytesMut,
    begun: bool,
    failed: bool,
    bytes: StreamBytes,
}

impl StreamDecoder {
    /// A stream of which nothing was received.
    pub fn new() -> Self {
        Self {
            decompressor: Decompressor::new(),
            input: BytesMut::new(),
            raw: BytesMut::new(),
            begun: false,
            failed: false,
            bytes: StreamBytes::default(),
        }
    }

    /// Takes received bytes, however they are cut. They are kept as they are until polled for:
    /// poll until `None` after each call, and memory stays bounded.
    pub fn feed(&mut self, bytes: &[u8]) {
        if !self.failed {
            self.bytes.compressed += bytes.len() as u64;
            self.input.extend_from_slice(bytes);
        }
    }

    /// The next batch, or `None` if more bytes are needed. A batch is checked against its
    /// checksum; whether its entries decode and whether it continues the log is for the caller.
    pub fn poll(&mut self) -> Result<Option<Batch>, StreamError> {
        if self.failed {
            return Err(StreamError::Failed);
        }
        let polled = self.advance();
        if polled.is_err() {
            self.failed = true;
            self.input = BytesMut::new();
            self.raw = BytesMut::new();
        }
        polled
    }

    fn advance(&mut self) -> Result<Option<Batch>, StreamError> {
        if !self.begun && !self.begin()? {
            return Ok(None);
        }
        loop {
            let before = self.raw.len();
            // Either takes a frame, or refuses its length, or waits for at most the longest one:
            // `raw` never holds more than that and one step.
            if let Some(batch) = Batch::take_frame(&mut self.raw).map_err(StreamError::Frame)? {
                self.bytes.raw += (before - self.raw.len()) as u64;
                return Ok(Some(batch));
            }
            let step = self.decompressor.step(&self.input, &mut self.raw);
            match step.map_err(StreamError::Compression)? {
                Some(taken) => self.input.advance(taken),
                None => return Ok(None),
            }
        }
    }

    fn begin(&mut self) -> Result<bool, StreamError> {
        if !self
            .input
            .iter()
            .zip(&STREAM_MAGIC)
            .all(|(byte, magic)| byte == magic)
        {
            return Err(StreamError::NotALog);
        }
        if self.input.len() < PREAMBLE_LEN {
            return Ok(false);
        }
        self.input.advance(STREAM_MAGIC.len());
        let found = self.input.get_u32_le();
        if found != FORMAT_VERSION {
            return Err(StreamError::Version { found });
        }
        self.begun = true;
        Ok(true)
    }

    /// What was received so far; `raw` counts the batches that were polled.
    pub fn bytes(&self) -> StreamBytes {
        self.bytes
    }
}

impl Default for StreamDecoder {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::batch::{BatchBuilder, MAX_FRAME_LEN};
    use crate::entry::{Arrival, Entry, GroupBody};
    use crate::position::{LogIndex, Term};
    use crate::testing::{arbitrary_log, entries_of, group};

    fn batches(entries: &[Entry], each: usize) -> Vec<Batch> {
        let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
        entries
            .chunks(each)
            .filter_map(|some| {
                for entry in some {
                    builder.push(entry).unwrap();
                }
                builder.finish()
            })
            .collect()
    }

    fn encode(batches: &[Batch]) -> Vec<u8> {
        let mut encoder = StreamEncoder::new();
        batches.iter().flat_map(|b| encoder.push(b)).collect()
    }

    fn drain(decoder: &mut StreamDecoder, into: &mut Vec<Batch>) -> Result<(), StreamError> {
        while let Some(batch) = decoder.poll()? {
            into.push(batch);
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn batches_survive_however_the_bytes_are_cut(
            entries in arbitrary_log(40), each in 1..8usize, cut in 1..200usize,
        ) {
            let sent = batches(&entries, each);
            let bytes = encode(&sent);
            let (mut decoder, mut received) = (StreamDecoder::new(), Vec::new());
            for piece in bytes.chunks(cut) {
                decoder.feed(piece);
                drain(&mut decoder, &mut received).unwrap();
            }
            prop_assert_eq!(&received, &sent);
            prop_assert_eq!(decoder.bytes().compressed, bytes.len() as u64);
        }

        #[test]
        fn a_changed_byte_gives_no_other_batch(
            entries in arbitrary_log(20), at: prop::sample::Index, change in 1..=255u8,
        ) {
            let sent = batches(&entries, 3);
            let mut bytes = encode(&sent);
            let at = at.index(bytes.len());
            bytes[at] ^= change;
            let (mut decoder, mut received) = (StreamDecoder::new(), Vec::new());
            decoder.feed(&bytes);
            let _error_or_short = drain(&mut decoder, &mut received);
            prop_assert_eq!(&received[..], &sent[..received.len()]);
        }

        #[test]
        fn arbitrary_bytes_give_no_batch(input in vec(any::<u8>(), 0..400)) {
            for preamble in [&b"ULST\x01\0\0\0"[..], b"ULST\x01\0\0\0\x28\xb5\x2f\xfd\0\x38", b""] {
                let mut decoder = StreamDecoder::new();
                decoder.feed(preamble);
                decoder.feed(&input);
                prop_assert!(!matches!(decoder.poll(), Ok(Some(_))));
            }
        }
    }

    #[test]
    fn each_push_is_complete_by_itself() {
        let mut encoder = StreamEncoder::new();
        let mut decoder = StreamDecoder::new();
        for batch in batches(&entries_of(3), 2) {
            decoder.feed(&encoder.push(&batch));
            assert_eq!(decoder.poll().unwrap(), Some(batch));
            assert_eq!(decoder.poll().unwrap(), None);
        }
        assert_eq!(encoder.bytes(), decoder.bytes());
    }

    #[test]
    fn a_large_batch_of_noise_survives() {
        let mut noise = 1u32;
        let entries: Vec<_> = (0..15)
            .map(|at| {
                let bytes = (0..60_000).map(|_| {
                    noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (noise >> 24) as u8
                });
                let bytes = bytes.collect::<Vec<_>>().into();
                group(at, GroupBody::Arrival(Arrival::Console { bytes }))
            })
            .collect();
        let sent = batches(&entries, 15);
        assert!(sent[0].payload().len() > 800_000);
        let mut decoder = StreamDecoder::new();
        decoder.feed(&encode(&sent));
        assert_eq!(decoder.poll().unwrap().as_ref(), sent.first());
    }

    #[test]
    fn a_zip_bomb_is_refused_and_holds_no_memory() {
        // Many megabytes of one byte that begins no valid frame, and of one that begins a frame
        // of the longest length: neither may be inflated further than that.
        let mut longest = Vec::new();
        crate::varint::put(&mut longest, 1 << 20);
        for start in [&[0u8][..], &[1], &longest] {
            let mut bytes = b"ULST\x01\0\0\0".to_vec();
            let mut raw = start.to_vec();
            raw.resize(64 << 20, 0);
            Compressor::new().compress(&raw, &mut bytes);
            assert!(bytes.len() < 16 << 10);
            let mut decoder = StreamDecoder::new();
            decoder.feed(&bytes);
            assert!(matches!(decoder.advance(), Err(StreamError::Frame(_))));
            assert!(decoder.raw.capacity() <= 2 * MAX_FRAME_LEN);
            assert!(decoder.poll().is_err());
            assert!(matches!(decoder.poll(), Err(StreamError::Failed)));
        }
    }

    #[test]
    fn other_streams_are_refused_by_name() {
        let mut decoder = StreamDecoder::new();
        decoder.feed(b"GET / HTTP/1.1");
        assert!(matches!(decoder.poll(), Err(StreamError::NotALog)));
        let mut decoder = StreamDecoder::new();
        decoder.feed(b"ULST\x02\0\0\0");
        let error = decoder.poll().unwrap_err();
        assert!(matches!(error, StreamError::Version { found: 2 }));
        // The magic of a format that old versions of zstd wrote.
        let mut decoder = StreamDecoder::new();
        decoder.feed(b"ULST\x01\0\0\0\x27\xb5\x2f\xfd\0\0\0\0\0\0");
        assert!(matches!(
            decoder.poll(),
            Err(StreamError::Compression(DecompressError::NotZstd))
        ));
    }
}
