//! One virtqueue: set up by the driver, walked by the virtio-queue crate, checked here.
//!
//! The crate ends a chain silently where a descriptor is bad. A driver that makes bad descriptors
//! is broken, and what it meant is unknown, so here that is a [`Lie`] and the device asks for a
//! reset. Chains are copied out as segments that were checked to lie within guest memory.

use std::sync::atomic::Ordering;

use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Address, Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions,
};

use super::{Tell, Trouble};
use crate::GuestMemory;

/// More descriptors than this in one chain are a lie; it bounds what a chain makes us keep.
const MAX_SEGMENTS: usize = 1024;

/// How a driver broke the rules of virtqueues.
#[derive(Debug, Error)]
pub enum Lie {
    /// The addresses or the size of a queue are impossible.
    #[error("the driver enabled a queue at an impossible place")]
    Setup(#[source] QueueError),
    /// A queue does not lie within guest memory.
    #[error("the driver enabled a queue outside guest memory")]
    OutsideMemory,
    /// The available ring cannot be right.
    #[error("the available ring makes no sense")]
    Ring(#[source] QueueError),
    /// The available ring promised a chain that cannot be read.
    #[error("the available ring names a chain that cannot be read")]
    NoChain,
    /// A chain that is empty, too long, loops, or breaks off.
    #[error("a descriptor chain is empty, endless or broken off")]
    Chain,
    /// A buffer that does not lie within guest memory.
    #[error("a descriptor points outside guest memory")]
    Buffer,
    /// A chain without the parts that the device needs.
    #[error("a request lacks its header or its status byte")]
    Request,
    /// Guest memory could not be accessed although it was checked before.
    #[error("a buffer cannot be accessed")]
    Access(#[source] GuestMemoryError),
}

/// A stretch of guest memory that was checked to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    address: GuestAddress,
    len: u32,
}

/// Consecutive stretches of guest memory: one side of a descriptor chain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(Vec<Segment>);

impl Segments {
    /// How many bytes they hold together. The crate refuses chains of 2^32 bytes and more.
    pub fn len(&self) -> u32 {
        self.0
            .iter()
            .fold(0, |sum, part| sum.saturating_add(part.len))
    }

    /// Fills `data` from the beginning of the segments.
    pub fn read(&self, memory: &GuestMemory, mut data: &mut [u8]) -> Result<(), Lie> {
        for part in &self.0 {
            let (now, later) = data.split_at_mut(data.len().min(part.len as usize));
            memory.read_slice(now, part.address).map_err(Lie::Access)?;
            data = later;
        }
        data.is_empty().then_some(()).ok_or(Lie::Request)
    }

    /// Writes `data` to the beginning of the segments.
    pub fn write(&self, memory: &GuestMemory, mut data: &[u8]) -> Result<(), Lie> {
        for part in &self.0 {
            let (now, later) = data.split_at(data.len().min(part.len as usize));
            memory.write_slice(now, part.address).map_err(Lie::Access)?;
            data = later;
        }
        data.is_empty().then_some(()).ok_or(Lie::Request)
    }

    /// Takes the first `count` bytes off; false, and nothing taken, when there are fewer.
    #[must_use]
    pub fn skip(&mut self, mut count: u32) -> bool {
        if count > self.len() {
            return false;
        }
        self.0.retain_mut(|part| {
            let taken = count.min(part.len);
            count -= taken;
            part.len -= taken;
            part.address = part.address.unchecked_add(u64::from(taken));
            part.len > 0
        });
        true
    }

    /// Takes the last byte off: where it stands.
    pub fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.0.last_mut()?;
        last.len -= 1;
        let address = last.address.unchecked_add(u64::from(last.len));
        if last.len == 0 {
            self.0.pop();
        }
        Some(address)
    }

    /// Adds where they stand.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&(self.0.len() as u64).to_le_bytes());
        for part in &self.0 {
            hasher.update(&part.address.0.to_le_bytes());
            hasher.update(&part.len.to_le_bytes());
        }
    }
}

/// A descriptor chain that the driver made available.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The index that the used ring names it by.
    pub head: u16,
    /// What the device reads.
    pub readable: Segments,
    /// What the device writes.
    pub writable: Segments,
}

/// What the driver says about a queue before it enables it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Setup {
    /// How many descriptors.
    pub size: u32,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the driver area (available ring).
    pub driver: u64,
    /// Guest address of the device area (used ring).
    pub device: u64,
}

/// A virtqueue.
#[derive(Debug)]
pub struct Ring {
    /// What the driver said so far.
    pub setup: Setup,
    queue: Queue,
}

impl Ring {
    /// A queue of at most `max_size` descriptors, not enabled.
    pub fn new(max_size: u16) -> Self {
        let queue = Queue::new(max_size).expect("the sizes of queues are powers of 2");
        Self {
            setup: Setup::default(),
            queue,
        }
    }

    /// The largest size.
    pub fn max_size(&self) -> u16 {
        self.queue.max_size()
    }

    /// Whether the driver has enabled it.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// As at power-on.
    pub fn reset(&mut self) {
        self.setup = Setup::default();
        self.queue.reset();
    }

    /// The driver enables the queue with what it has set up.
    pub fn enable(&mut self, memory: &GuestMemory) -> Result<(), Lie> {
        let setup = self.setup;
        let size = u16::try_from(setup.size).map_err(|_| Lie::Setup(QueueError::InvalidSize))?;
        self.queue.reset();
        self.queue.try_set_size(size).map_err(Lie::Setup)?;
        self.queue
            .try_set_desc_table_address(GuestAddress(setup.descriptors))
            .map_err(Lie::Setup)?;
        self.queue
            .try_set_avail_ring_address(GuestAddress(setup.driver))
            .map_err(Lie::Setup)?;
        self.queue
            .try_set_used_ring_address(GuestAddress(setup.device))
            .map_err(Lie::Setup)?;
        self.queue.set_ready(true);
        if self.queue.is_valid(memory) {
            Ok(())
        } else {
            self.queue.set_ready(false);
            Err(Lie::OutsideMemory)
        }
    }

    /// The driver disables the queue.
    pub fn disable(&mut self) {
        self.queue.set_ready(false);
    }

    /// Tells the driver that this queue needs no notifications.
    pub fn decline_notifications(&mut self, memory: &GuestMemory) -> Result<(), Lie> {
        self.queue.disable_notification(memory).map_err(Lie::Ring)
    }

    /// Whether the driver has made a chain available.
    pub fn available(&self, memory: &GuestMemory) -> bool {
        self.queue.ready()
            && self
                .queue
                .avail_idx(memory, Ordering::Acquire)
                .is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Takes the next available chain.
    pub fn pop(&mut self, memory: &GuestMemory) -> Result<Option<Chain>, Lie> {
        let mut heads = self.queue.iter(memory).map_err(Lie::Ring)?;
        let Some(mut chain) = heads.next() else {
            return if self.available(memory) {
                Err(Lie::NoChain)
            } else {
                Ok(None)
            };
        };
        let head = chain.head_index();
        let mut readable = Segments::default();
        let mut writable = Segments::default();
        let mut complete = false;
        for descriptor in chain.by_ref().take(MAX_SEGMENTS) {
            let (side, access) = if descriptor.is_write_only() {
                (&mut writable, Permissions::Write)
            } else if writable.0.is_empty() {
                (&mut readable, Permissions::Read)
            } else {
                return Err(Lie::Chain);
            };
            let (address, len) = (descriptor.addr(), descriptor.len());
            if !memory.check_range(address, len as usize, access) {
                return Err(Lie::Buffer);
            }
            if len > 0 {
                side.0.push(Segment { address, len });
            }
            complete = !descriptor.has_next();
        }
        complete
            .then_some(Some(Chain {
                head,
                readable,
                writable,
            }))
            .ok_or(Lie::Chain)
    }

    /// Leaves the chain that was taken last to be taken again.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver, `written` bytes of it written.
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, written: u32) -> Result<(), Lie> {
        self.queue
            .add_used(memory, head, written)
            .map_err(Lie::Ring)
    }

    /// Takes what is available, chain by chain, and tells the driver if any of it is used now:
    /// `serve` says how many bytes it wrote, or nothing of a chain that is given back later.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        mut serve: impl FnMut(Chain) -> Result<Option<u32>, Trouble>,
    ) -> Result<Tell, Trouble> {
        let mut used = false;
        // A whole ring is the most that can be available; the bound is for a driver whose rings
        // overlap, so that our own writes look like more.
        for _ in 0..self.max_size() {
            let Some(chain) = self.pop(memory)? else {
                break;
            };
            let head = chain.head;
            if let Some(written) = serve(chain)? {
                self.complete(memory, head, written)?;
                used = true;
            }
        }
        if used {
            Ok(self.tell(memory)?)
        } else {
            Ok(Tell::Nothing)
        }
    }

    /// Buffers were used: whether the driver is to be told. It can decline by a flag.
    pub fn tell(&self, memory: &GuestMemory) -> Result<Tell, Lie> {
        let flags: u16 = memory
            .read_obj(GuestAddress(self.queue.avail_ring()))
            .map_err(Lie::Access)?;
        let declined = u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0;
        Ok(if declined {
            Tell::Nothing
        } else {
            Tell::Driver
        })
    }

    /// Adds the setup and the indices.
    pub fn digest(&self, hasher: &mut blake3::Hasher) {
        let state = self.queue.state();
        for number in [
            u64::from(self.setup.size),
            self.setup.descriptors,
            self.setup.driver,
            self.setup.device,
            u64::from(state.size),
            u64::from(state.ready),
            u64::from(state.next_avail),
            u64::from(state.next_used),
            state.desc_table,
            state.avail_ring,
            state.used_ring,
        ] {
            hasher.update(&number.to_le_bytes());
        }
    }
}
