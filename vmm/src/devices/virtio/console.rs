//! The console device: one port, queue 0 receives, queue 1 sends. What is written to it is the same
//! output as what the serial port writes.
//!
//! Typed bytes wait in the device for receive buffers, as they wait in the serial port for its
//! reader, so that what can be taken does not depend on how the driver cuts its buffers.

use bytes::Bytes;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::ring::Ring;
use super::{Device, Outside, Tell, Trouble};
use crate::GuestMemory;
use crate::tape::Command;

/// The queue for what is typed.
pub const RECEIVE: usize = 0;
/// The queue for what the guest writes.
pub const SEND: usize = 1;

/// How many typed bytes wait for the driver at most.
const TYPED_MAX: usize = 256;
/// How much of one chain is written; what is longer is cut off. Linux sends 32 KiB at most.
const WRITE_MAX: usize = 64 << 10;
const QUEUE_SIZE: u16 = 64;

/// A console device.
#[derive(Debug, Default)]
pub struct Console {
    /// Typed, and not given to the driver yet.
    typed: Vec<u8>,
}

impl Console {
    /// How many typed bytes fit now.
    pub const fn room(&self) -> usize {
        TYPED_MAX - self.typed.len()
    }

    /// Takes typed bytes, which [`Console::room`] has allowed, and gives the driver what it has
    /// buffers for.
    pub fn receive(
        &mut self,
        bytes: &[u8],
        ring: &mut Ring,
        memory: &GuestMemory,
    ) -> Result<Tell, Trouble> {
        self.typed.extend_from_slice(bytes);
        self.hand_over(ring, memory)
    }

    fn hand_over(&mut self, ring: &mut Ring, memory: &GuestMemory) -> Result<Tell, Trouble> {
        let mut used = false;
        // Not `Ring::serve`: buffers are taken only for what was typed. Its bound holds here, too, as a
        // driver may offer buffers without room.
        for _ in 0..ring.max_size() {
            if self.typed.is_empty() {
                break;
            }
            let Some(chain) = ring.pop(memory)? else {
                break;
            };
            let count = self.typed.len().min(chain.writable.len() as usize);
            chain.writable.write(memory, &self.typed[..count])?;
            self.typed.drain(..count);
            ring.complete(memory, chain.head, count as u32)?;
            used = true;
        }
        if used {
            Ok(ring.tell(memory)?)
        } else {
            Ok(Tell::Nothing)
        }
    }

    /// All that is there leaves as one command.
    fn send(ring: &mut Ring, outside: &mut Outside<'_>) -> Result<Tell, Trouble> {
        let mut written = Vec::new();
        let sent = Self::collect(ring, outside.memory, &mut written);
        if !written.is_empty() {
            let command = Command::Console(Bytes::from(written));
            outside.tape.command(command)?;
        }
        sent
    }

    fn collect(
        ring: &mut Ring,
        memory: &GuestMemory,
        written: &mut Vec<u8>,
    ) -> Result<Tell, Trouble> {
        ring.serve(memory, |chain| {
            let count = WRITE_MAX.min(chain.readable.len() as usize);
            let before = written.len();
            written.resize(before + count, 0);
            chain.readable.read(memory, &mut written[before..])?;
            Ok(Some(0))
        })
    }
}

impl Device for Console {
    const KIND: u32 = VIRTIO_ID_CONSOLE;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE, QUEUE_SIZE];
    const UNNOTIFIED: &'static [usize] = &[];
    const FEATURES: u64 = 0;

    /// Neither size nor ports are offered, so nothing of it means anything.
    fn config(&self) -> &[u8] {
        &[]
    }

    fn notified(
        &mut self,
        queue: usize,
        ring: &mut Ring,
        outside: &mut Outside<'_>,
    ) -> Result<Tell, Trouble> {
        if queue == SEND {
            Self::send(ring, outside)
        } else {
            self.hand_over(ring, outside.memory)
        }
    }

    /// What was typed for a driver that is gone is for nobody.
    fn reset(&mut self) {
        self.typed.clear();
    }

    fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&(self.typed.len() as u64).to_le_bytes());
        hasher.update(&self.typed);
    }
}
