//! The network device: queue 0 receives, queue 1 sends, no offloads.
//!
//! Frames to send become commands when the driver notifies (or goes idle). A frame that arrives
//! takes one receive chain; the device looks for one by itself at every landmark, so the driver
//! need not notify queue 0.

use bytes::Bytes;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::super::layout::MAX_FRAME;
use super::ring::Ring;
use super::{Device, Outside, Tell, Trouble};
use crate::GuestMemory;
use crate::tape::Command;

/// The queue for what the guest receives.
pub const RECEIVE: usize = 0;
/// The queue for what the guest sends.
pub const SEND: usize = 1;

/// The virtio header before each frame, `num_buffers` included.
const HEADER: usize = 12;
/// An Ethernet header.
const MIN_FRAME: usize = 14;

/// A network device.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
}

impl Net {
    /// A device with this MAC address.
    pub const fn new(mac: [u8; 6]) -> Self {
        Self { mac }
    }

    /// A frame arrives. One that does not fit the driver's buffer is dropped; the buffer stays.
    pub fn receive(frame: &[u8], ring: &mut Ring, memory: &GuestMemory) -> Result<Tell, Trouble> {
        let Some(chain) = ring.pop(memory)? else {
            return Ok(Tell::Nothing);
        };
        let length = HEADER + frame.len();
        if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) || length > chain.writable.len() as usize
        {
            ring.put_back();
            return Ok(Tell::Nothing);
        }
        let mut buffer = [0; HEADER + MAX_FRAME];
        // num_buffers: the frame fills one chain.
        buffer[HEADER - 2] = 1;
        buffer[HEADER..length].copy_from_slice(frame);
        chain.writable.write(memory, &buffer[..length])?;
        ring.complete(memory, chain.head, length as u32)?;
        Ok(ring.tell(memory)?)
    }

    fn send(ring: &mut Ring, outside: &mut Outside<'_>) -> Result<Tell, Trouble> {
        ring.serve(outside.memory, |mut chain| {
            if chain.readable.skip(HEADER as u32) {
                let length = chain.readable.len() as usize;
                if (MIN_FRAME..=MAX_FRAME).contains(&length) {
                    let mut frame = vec![0; length];
                    chain.readable.read(outside.memory, &mut frame)?;
                    outside.tape.command(Command::Frame(Bytes::from(frame)))?;
                }
            }
            Ok(Some(0))
        })
    }
}

impl Device for Net {
    const KIND: u32 = VIRTIO_ID_NET;
    const QUEUES: &'static [u16] = &[256, 256];
    const UNNOTIFIED: &'static [usize] = &[RECEIVE];
    const FEATURES: u64 = 1 << VIRTIO_NET_F_MAC;

    fn config(&self) -> &[u8] {
        &self.mac
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
            Ok(Tell::Nothing)
        }
    }

    fn reset(&mut self) {}

    /// It remembers nothing but its address, which is configuration.
    fn digest(&self, _hasher: &mut blake3::Hasher) {}
}
