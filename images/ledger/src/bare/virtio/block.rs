//! The block driver: a fixed number of slots, one request each.

use super::DeviceError;
use super::mmio::Window;
use super::queue::{Part, Queue, forever};

const ID: u32 = 2;
/// `VIRTIO_BLK_F_FLUSH`: writes can be made durable.
const FLUSH: u64 = 1 << 9;
const REQUESTS: u32 = 0;
const QUEUE_SIZE: u16 = 64;

/// Request types.
const READ: u32 = 0;
const WRITE: u32 = 1;
const SYNC: u32 = 4;

/// Descriptors of a slot: head, data, status.
const PARTS: u16 = 3;

/// What a request does. Data belongs to the caller, who keeps it until the request is done.
#[derive(Clone, Copy)]
pub enum Request {
    /// Read whole sectors.
    Read {
        /// From here.
        sector: u64,
        /// To here.
        to: *mut u8,
        /// Bytes.
        len: u32,
    },
    /// Write whole sectors.
    Write {
        /// To here.
        sector: u64,
        /// From here.
        from: *const u8,
        /// Bytes.
        len: u32,
    },
    /// Make all writes that were submitted before durable. (Virtio promises it for completed ones;
    /// the machine's disk takes requests in the order of submission.)
    Flush,
}

/// What the device reads and writes besides data.
#[repr(C)]
struct Slot {
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

/// The block device.
pub struct Block {
    queue: Queue,
    slots: *mut Slot,
    free: alloc::vec::Vec<u16>,
    sectors: u64,
}

/// A request failed.
pub struct Failed;

impl Block {
    /// Finds the device.
    ///
    /// # Safety
    /// `base` is the address of a virtio window of this machine.
    pub unsafe fn open(base: u64) -> Result<Self, DeviceError> {
        // SAFETY: as the caller vouches.
        let window = unsafe { Window::open(base, ID, FLUSH, "disk")? };
        let queue = window.queue(REQUESTS, QUEUE_SIZE)?;
        let sectors = u64::from(window.config(0)) | u64::from(window.config(4)) << 32;
        window.go_live();
        let count = queue.size() / PARTS;
        Ok(Self {
            queue,
            slots: forever(usize::from(count) * size_of::<Slot>(), 16, true).cast(),
            free: (0..count).collect(),
            sectors,
        })
    }

    /// How many sectors it has.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether a request can be submitted.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Submits a request; the device sees it at its next look. False if there is no room.
    ///
    /// # Safety
    /// The data stays where it is, and is not accessed, until the request is done.
    pub unsafe fn submit(&mut self, request: Request) -> bool {
        let Some(slot) = self.free.pop() else {
            return false;
        };
        let (kind, sector, data) = match request {
            Request::Read { sector, to, len } => (READ, sector, Some((to as u64, len, true))),
            Request::Write { sector, from, len } => {
                (WRITE, sector, Some((from as u64, len, false)))
            }
            Request::Flush => (SYNC, 0, None),
        };
        let memory = self.slots.wrapping_add(usize::from(slot));
        // SAFETY: there are as many slots as were ever free.
        unsafe {
            memory.write_volatile(Slot {
                kind,
                reserved: 0,
                sector,
                status: u8::MAX,
            });
        }
        let head = Part {
            address: memory as u64,
            len: 16,
            device_writes: false,
        };
        let status = Part {
            address: memory as u64 + 16,
            len: 1,
            device_writes: true,
        };
        let first = slot * PARTS;
        // SAFETY: the slot was free; the caller vouches for the data.
        unsafe {
            match data {
                Some((address, len, device_writes)) => {
                    let data = Part {
                        address,
                        len,
                        device_writes,
                    };
                    self.queue.write_chain(first, &[head, data, status]);
                }
                None => self.queue.write_chain(first, &[head, status]),
            }
        }
        self.queue.offer(first);
        true
    }

    /// Takes one request that is done.
    pub fn take_done(&mut self) -> Option<Result<(), Failed>> {
        let (first, _) = self.queue.take_used()?;
        let slot = first / PARTS;
        self.free.push(slot);
        let memory = self.slots.wrapping_add(usize::from(slot));
        // SAFETY: within the slots, as every descriptor is; the device has given it back.
        let status = unsafe { (&raw const (*memory).status).read_volatile() };
        Some(if status == 0 { Ok(()) } else { Err(Failed) })
    }
}
