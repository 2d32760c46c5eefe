//! The log lane's compression: one long-lived zstd stream for each direction of a connection,
//! flushed after every write, so that later messages lean on earlier ones and nothing waits.

use std::io;

use bytes::{Bytes, BytesMut};
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

/// The fastest kind, as for segments: clients wait while a batch is compressed.
const LEVEL: i32 = -3;
/// How far back matches may lie (2 to this power); bounds the memory of both sides.
const WINDOW_LOG: u32 = 19;
/// How much room is added at a time.
const STEP: usize = 16 * 1024;

/// The sender's side.
pub(super) struct Compressor {
    encoder: Encoder<'static>,
}

impl Compressor {
    pub(super) fn new() -> io::Result<Self> {
        let mut encoder = Encoder::new(LEVEL)?;
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        Ok(Self { encoder })
    }

    /// Compresses these, flushed: the other side can read them to the end.
    pub(super) fn write(&mut self, frames: &[Bytes]) -> io::Result<Bytes> {
        let mut out = Vec::with_capacity(STEP);
        for frame in frames {
            let mut input = InBuffer::around(frame);
            while input.pos() < frame.len() {
                step(&mut out, |output| self.encoder.run(&mut input, output))?;
            }
        }
        while step(&mut out, |output| self.encoder.flush(output))? != 0 {}
        Ok(out.into())
    }
}

/// Runs one step of zstd with at least some room behind what `out` holds.
fn step(
    out: &mut Vec<u8>,
    run: impl FnOnce(&mut OutBuffer<'_, Vec<u8>>) -> io::Result<usize>,
) -> io::Result<usize> {
    if out.capacity() == out.len() {
        out.reserve(STEP);
    }
    let start = out.len();
    run(&mut OutBuffer::around_pos(out, start))
}

/// The receiver's side.
pub(super) struct Decompressor {
    decoder: Decoder<'static>,
    block: Vec<u8>,
}

impl Decompressor {
    pub(super) fn new() -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        // A peer that announces a larger window is refused instead of given the memory.
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
        Ok(Self {
            decoder,
            block: vec![0; STEP],
        })
    }

    /// Decompresses some of `input` and adds at most a block to `out`; says how much of the input
    /// it used. Done when all is used and nothing was added.
    pub(super) fn read(&mut self, input: &[u8], out: &mut BytesMut) -> io::Result<(usize, usize)> {
        let status = self.decoder.run_on_buffers(input, &mut self.block)?;
        let made = self.block.get(..status.bytes_written).unwrap_or_default();
        out.extend_from_slice(made);
        Ok((status.bytes_read, made.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(decompressor: &mut Decompressor, mut input: &[u8]) -> io::Result<BytesMut> {
        let mut out = BytesMut::new();
        loop {
            let (used, made) = decompressor.read(input, &mut out)?;
            input = &input[used..];
            if input.is_empty() && made == 0 {
                return Ok(out);
            }
        }
    }

    #[test]
    fn every_write_can_be_read_at_once_and_repetition_costs_little() {
        let mut compressor = Compressor::new().expect("zstd");
        let mut decompressor = Decompressor::new().expect("zstd");
        // Bytes that do not compress by themselves: only the memory of the stream can help.
        let noise: Vec<u8> = (0..40_000u32)
            .flat_map(|n| blake3::hash(&n.to_le_bytes()).as_bytes()[..1].to_vec())
            .collect();
        let mut sizes = Vec::new();
        for _ in 0..3 {
            let sent = compressor
                .write(&[Bytes::from(noise.clone()), Bytes::from_static(b"end")])
                .expect("compressed");
            sizes.push(sent.len());
            let got = read_all(&mut decompressor, &sent).expect("decompressed");
            assert_eq!(&got[..noise.len()], noise);
            assert_eq!(&got[noise.len()..], b"end");
        }
        assert!(sizes[1] < sizes[0] / 10, "{sizes:?}");
    }

    #[test]
    fn garbage_is_an_error() {
        let mut decompressor = Decompressor::new().expect("zstd");
        assert!(read_all(&mut decompressor, b"this is not zstd at all").is_err());
    }
}
