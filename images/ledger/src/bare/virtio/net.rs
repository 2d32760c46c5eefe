//! The network driver, as a device of smoltcp. Every buffer belongs to one descriptor forever:
//! received frames are read in place and offered again, frames to send are built in place.

use alloc::vec::Vec;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::DeviceError;
use super::mmio::Window;
use super::queue::{Part, Queue, forever};

const ID: u32 = 1;
/// `VIRTIO_NET_F_MAC`: the device has an address.
const MAC: u64 = 1 << 5;
const RECEIVE: u32 = 0;
const SEND: u32 = 1;
/// `virtio_net_hdr_v1`; all zeros when sending.
const HEADER: usize = 12;
/// An Ethernet frame without its checksum.
const FRAME: usize = 1514;
const BUFFER: usize = 2048;
const BUFFERS: u16 = 256;

/// Buffers of one direction and their queue.
struct Direction {
    queue: Queue,
    buffers: *mut u8,
}

/// The network device.
pub struct Net {
    mac: [u8; 6],
    receive: Direction,
    send: Direction,
    /// Send buffers that are free.
    free: Vec<u16>,
}

impl Direction {
    fn new(queue: Queue, device_writes: bool) -> Self {
        let count = queue.size();
        let mut direction = Self {
            buffers: forever(usize::from(count) * BUFFER, 64, false),
            queue,
        };
        for index in 0..count {
            direction.describe(index, BUFFER as u32, device_writes);
        }
        direction
    }

    fn describe(&mut self, index: u16, len: u32, device_writes: bool) {
        let part = Part {
            address: self.buffer(index) as u64,
            len,
            device_writes,
        };
        // SAFETY: the device does not own the descriptor: it is new, or was used and taken back.
        unsafe { self.queue.write_chain(index, &[part]) };
    }

    fn buffer(&self, index: u16) -> *mut u8 {
        assert!(
            index < self.queue.size(),
            "there is a buffer for every descriptor"
        );
        self.buffers.wrapping_add(usize::from(index) * BUFFER)
    }
}

impl Net {
    /// Finds the device and offers it all receive buffers.
    ///
    /// # Safety
    /// `base` is the address of a virtio window of this machine.
    pub unsafe fn open(base: u64) -> Result<Self, DeviceError> {
        // SAFETY: as the caller vouches.
        let window = unsafe { Window::open(base, ID, MAC, "network device")? };
        let mut mac = [0; 6];
        let address = u64::from(window.config(0)) | u64::from(window.config(4)) << 32;
        mac.copy_from_slice(&address.to_le_bytes()[..6]);
        let mut receive = Direction::new(window.queue(RECEIVE, BUFFERS)?, true);
        let send = Direction::new(window.queue(SEND, BUFFERS)?, false);
        window.go_live();
        for index in 0..receive.queue.size() {
            receive.queue.offer(index);
        }
        Ok(Self {
            mac,
            free: (0..send.queue.size()).collect(),
            receive,
            send,
        })
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Takes back the buffers of frames that were sent.
    pub fn reclaim(&mut self) {
        while let Some((index, _)) = self.send.queue.take_used() {
            self.free.push(index);
        }
    }
}

/// A frame that was received.
pub struct Received<'a> {
    receive: &'a mut Direction,
    index: u16,
    len: usize,
}

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        // SAFETY: the device has given the buffer back; it is offered again only below.
        let frame = unsafe {
            let start = self.receive.buffer(self.index).add(HEADER);
            core::slice::from_raw_parts(start, self.len)
        };
        let result = read(frame);
        self.receive.queue.offer(self.index);
        result
    }
}

/// A buffer for a frame to send.
pub struct Sending<'a> {
    send: &'a mut Direction,
    free: &'a mut Vec<u16>,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        assert!(len <= FRAME, "the stack was told how long a frame may be");
        let Some(index) = self.free.pop() else {
            unreachable!("a token is made only while a buffer is free");
        };
        // SAFETY: a free buffer is ours until it is offered below.
        let frame = unsafe {
            let start = self.send.buffer(index);
            start.write_bytes(0, HEADER + len);
            core::slice::from_raw_parts_mut(start.add(HEADER), len)
        };
        let result = write(frame);
        self.send.describe(index, (HEADER + len) as u32, false);
        self.send.queue.offer(index);
        result
    }
}

impl Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Self::RxToken<'_>, Self::TxToken<'_>)> {
        if self.free.is_empty() {
            return None;
        }
        let (index, written) = self.receive.queue.take_used()?;
        let len = (written as usize).clamp(HEADER, BUFFER) - HEADER;
        let received = Received {
            receive: &mut self.receive,
            index,
            len,
        };
        let sending = Sending {
            send: &mut self.send,
            free: &mut self.free,
        };
        Some((received, sending))
    }

    fn transmit(&mut self, _: Instant) -> Option<Self::TxToken<'_>> {
        (!self.free.is_empty()).then_some(Sending {
            send: &mut self.send,
            free: &mut self.free,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME;
        capabilities.checksum.ipv4 = Checksum::Both;
        capabilities.checksum.tcp = Checksum::Both;
        capabilities
    }
}
