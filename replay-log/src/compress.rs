//! One long-lived zstd frame, flushed after each batch: what streams and segments have in common.
//!
//! A flush ends a block, so that everything pushed before can be decompressed at once; the window
//! lives on, so that the next batch is compressed against the ones before. The frame never ends:
//! a connection or a segment simply stops.

use std::io;

use bytes::BytesMut;
use thiserror::Error;
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

/// Of the fastest kind, without an entropy coder's tables: batches are small and flushed one by one.
/// By `benches/codec` it takes half the time of level 1 (1.0 µs a batch for 2.0) and 4 % more bytes.
const LEVEL: i32 = -3;
/// The window, as a power of two: what either side keeps of the past. 128 KiB hold the batches of
/// the last tens of milliseconds under load.
const WINDOW_LOG: u32 = 17;
/// What every zstd frame begins with; the decoder's older formats are not for us.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// How much is decompressed in one step.
const STEP: usize = 64 << 10;

/// Why compressed bytes cannot be read.
#[derive(Debug, Error)]
pub enum DecompressError {
    /// zstd refuses them.
    #[error("zstd cannot decompress the bytes")]
    Zstd(#[source] io::Error),
    /// They are something else.
    #[error("the compressed bytes do not begin as zstd does")]
    NotZstd,
    /// The zstd frame ends, which ours never do.
    #[error("the compressed bytes end where they should go on")]
    Ended,
}

/// The writing side.
pub(crate) struct Compressor {
    encoder: Encoder<'static>,
}

impl Compressor {
    pub(crate) fn new() -> Self {
        let set_up = || {
            let mut encoder = Encoder::new(LEVEL)?;
            encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
            encoder.set_parameter(CParameter::ContentSizeFlag(false))?;
            // Batches have checksums of their own.
            encoder.set_parameter(CParameter::ChecksumFlag(false))?;
            Ok::<_, io::Error>(encoder)
        };
        Self {
            encoder: set_up().expect("zstd takes these parameters, or there is no memory"),
        }
    }

    /// Begins a new frame that needs nothing of what came before.
    pub(crate) fn restart(&mut self) {
        let done = self.encoder.reinit();
        done.expect("resetting a zstd session cannot fail");
    }

    /// Appends `raw`, compressed and flushed, to `out`.
    pub(crate) fn compress(&mut self, raw: &[u8], out: &mut Vec<u8>) {
        let mut input = InBuffer::around(raw);
        out.reserve(zstd::zstd_safe::compress_bound(raw.len()) + 64);
        loop {
            let start = out.len();
            let mut output = OutBuffer::around_pos(out, start);
            let left = if input.pos() < raw.len() {
                let hint = self.encoder.run(&mut input, &mut output);
                hint.map(|_| 1)
            } else {
                self.encoder.flush(&mut output)
            };
            // Its only errors are misuse and a failed allocation.
            if left.expect("zstd compresses whatever it is given") == 0 {
                return;
            }
            if out.len() == out.capacity() {
                out.reserve(STEP);
            }
        }
    }
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

/// The reading side. Its memory is the window and one step's output.
pub(crate) struct Decompressor {
    decoder: Decoder<'static>,
    scratch: Vec<u8>,
    /// How many bytes of the frame's magic were seen.
    magic: usize,
    /// The last step filled its output: there may be more without further input.
    more: bool,
}

impl Decompressor {
    pub(crate) fn new() -> Self {
        let set_up = || {
            let mut decoder = Decoder::new()?;
            decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
            Ok::<_, io::Error>(decoder)
        };
        Self {
            decoder: set_up().expect("zstd takes these parameters, or there is no memory"),
            scratch: Vec::with_capacity(STEP),
            magic: 0,
            more: false,
        }
    }

    /// Expects a new frame.
    pub(crate) fn restart(&mut self) {
        let done = self.decoder.reinit();
        done.expect("resetting a zstd session cannot fail");
        self.magic = 0;
        self.more = false;
    }

    /// Decompresses some of `input`, 64 KiB at the most, onto the end of `out`. Returns how much
    /// of the input it took, or `None` when there is nothing to do without more of it.
    pub(crate) fn step(
        &mut self,
        input: &[u8],
        out: &mut BytesMut,
    ) -> Result<Option<usize>, DecompressError> {
        if input.is_empty() && !self.more {
            return Ok(None);
        }
        for (byte, expected) in input.iter().zip(&ZSTD_MAGIC[self.magic..]) {
            if byte != expected {
                return Err(DecompressError::NotZstd);
            }
        }
        self.scratch.clear();
        let mut source = InBuffer::around(input);
        let mut output = OutBuffer::around(&mut self.scratch);
        let hint = self
            .decoder
            .run(&mut source, &mut output)
            .map_err(DecompressError::Zstd)?;
        let taken = source.pos();
        self.magic = ZSTD_MAGIC.len().min(self.magic + taken);
        self.more = self.scratch.len() == self.scratch.capacity();
        out.extend_from_slice(&self.scratch);
        if hint == 0 {
            return Err(DecompressError::Ended);
        }
        Ok((taken > 0 || !self.scratch.is_empty()).then_some(taken))
    }
}

impl std::fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}
