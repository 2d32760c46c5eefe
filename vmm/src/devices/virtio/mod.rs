//! Virtio 1.2: the MMIO transport, and the network, block, console and entropy devices.
//!
//! A device is what implements [`Device`], and [`mmio::Mmio`] is everything that all of them share.

pub mod block;
pub mod console;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod rng;

use replay_log::RequestNumber;

use crate::GuestMemory;
use crate::tape::{Tape, TapeError};
use ring::{Lie, Ring};

/// What a device may touch while it serves an access of the guest.
pub struct Outside<'a> {
    /// Guest memory.
    pub memory: &'a GuestMemory,
    /// The tape.
    pub tape: &'a mut dyn Tape,
    /// Numbers the disk requests of all disks.
    pub requests: &'a mut RequestCounter,
}

/// Counts disk requests over all disks of a machine, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestCounter(u64);

impl RequestCounter {
    /// The number of the next request.
    pub const fn draw(&mut self) -> RequestNumber {
        self.0 += 1;
        RequestNumber(self.0)
    }

    /// How many were drawn.
    pub const fn drawn(self) -> u64 {
        self.0
    }
}

/// Why a device stopped serving.
#[derive(Debug)]
pub enum Trouble {
    /// The guest broke the rules: the device needs a reset, nothing else happens.
    Guest(Lie),
    /// The tape cannot go on.
    Tape(TapeError),
}

impl From<Lie> for Trouble {
    fn from(lie: Lie) -> Self {
        Self::Guest(lie)
    }
}

impl From<TapeError> for Trouble {
    fn from(error: TapeError) -> Self {
        Self::Tape(error)
    }
}

/// Whether the driver wants to hear of used buffers now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Tell {
    /// Nothing was used, or the driver asked not to be interrupted.
    Nothing,
    /// Raise the interrupt.
    Driver,
}

/// What is special about one kind of virtio device.
pub trait Device {
    /// The device ID of the specification.
    const KIND: u32;

    /// The largest size of each of its queues, powers of 2.
    const QUEUES: &'static [u16];

    /// Queues that the device looks at by itself, so that the driver need not notify it.
    const UNNOTIFIED: &'static [usize];

    /// Feature bits, without those of the transport.
    const FEATURES: u64;

    /// The configuration space; what lies beyond reads as zero.
    fn config(&self) -> &[u8];

    /// The driver has made buffers available in a queue.
    fn notified(
        &mut self,
        queue: usize,
        ring: &mut Ring,
        outside: &mut Outside<'_>,
    ) -> Result<Tell, Trouble>;

    /// The driver has reset the device; its queues are reset already.
    fn reset(&mut self);

    /// Adds what only this kind of device remembers.
    fn digest(&self, hasher: &mut blake3::Hasher);
}

#[cfg(test)]
mod console_tests;
#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod tests;
