//! The entropy device: one queue of buffers that are filled with random bytes from the tape.

use replay_log::Answer;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::super::clock;
use super::ring::{Lie, Ring};
use super::{Device, Outside, Tell, Trouble};
use crate::tape::Query;

/// How much of one buffer is filled; the specification lets a device use less than all of it.
const FILL_MAX: u32 = 64;
/// Together with [`FILL_MAX`] the most that one exit adds to the log: 1 KiB.
const QUEUE_SIZE: u16 = 16;

/// An entropy device. It remembers nothing.
#[derive(Debug)]
pub struct Rng;

impl Device for Rng {
    const KIND: u32 = VIRTIO_ID_RNG;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const UNNOTIFIED: &'static [usize] = &[];
    const FEATURES: u64 = 0;

    fn config(&self) -> &[u8] {
        &[]
    }

    fn notified(
        &mut self,
        _queue: usize,
        ring: &mut Ring,
        outside: &mut Outside<'_>,
    ) -> Result<Tell, Trouble> {
        ring.serve(outside.memory, |chain| {
            let count = chain.writable.len().min(FILL_MAX);
            if count == 0 {
                // At least one byte is to be placed, and there is no room for any.
                return Err(Lie::Request.into());
            }
            let bytes = match outside.tape.answer(Query::Entropy(count))? {
                Answer::Entropy(bytes) if bytes.len() == count as usize => bytes,
                other => return Err(clock::wrong_answer("random bytes", &other).into()),
            };
            chain.writable.write(outside.memory, &bytes)?;
            Ok(Some(count))
        })
    }

    fn reset(&mut self) {}

    fn digest(&self, _hasher: &mut blake3::Hasher) {}
}
