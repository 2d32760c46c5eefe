//! The virtual Ethernet device between smoltcp and the numbered frames: two queues.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};
use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// The largest Ethernet frame that is sent to a guest, in bytes: 14 of header and 1,500 of payload.
pub const MAX_ETHERNET_FRAME: usize = 1_514;

/// How many bytes are allocated at once for frames that are built.
const FRAME_ARENA: usize = 16 * 1024;

/// Frames on their way between the stack and the guest.
pub(super) struct FrameDevice {
    /// The frame being handed to the stack.
    incoming: Option<Bytes>,
    outgoing: VecDeque<Bytes>,
    /// Frames are cut from here, so that a frame costs no allocation of its own.
    arena: BytesMut,
    /// How many frames may wait in `outgoing` before the device says that it is full.
    room: usize,
}

impl FrameDevice {
    pub(super) fn new() -> Self {
        Self {
            incoming: None,
            outgoing: VecDeque::new(),
            arena: BytesMut::new(),
            room: 0,
        }
    }

    /// The next thing the stack receives.
    pub(super) fn offer(&mut self, frame: Bytes) {
        self.incoming = Some(frame);
    }

    /// The next frame for the guest.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        self.outgoing.pop_front()
    }

    /// Whether the stack may send another frame on its own account.
    pub(super) fn is_full(&self) -> bool {
        self.outgoing.len() >= self.room
    }

    /// Opens the device for one frame more; gives the room there was before.
    pub(super) fn open(&mut self) -> usize {
        std::mem::replace(&mut self.room, self.outgoing.len() + 1)
    }

    /// Sets how many frames may wait.
    pub(super) fn set_room(&mut self, frames: usize) {
        self.room = frames;
    }
}

impl phy::Device for FrameDevice {
    type RxToken<'a> = Received;
    type TxToken<'a> = Transmit<'a>;

    fn receive(&mut self, _now: Instant) -> Option<(Received, Transmit<'_>)> {
        // Answers to what was received are few (a reset, an ARP reply): they pass even when the
        // device is full, or a full device could never drain.
        let frame = self.incoming.take()?;
        Some((Received(frame), Transmit(self)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Transmit<'_>> {
        (!self.is_full()).then_some(Transmit(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_ETHERNET_FRAME;
        // What comes from the guest comes over authenticated links: checking it again finds
        // nothing, and a guest may leave the sums to its device. The guest may check ours.
        let mut checksum = ChecksumCapabilities::default();
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = Checksum::Tx;
        capabilities.checksum = checksum;
        capabilities
    }
}

/// A frame from the guest.
pub(super) struct Received(Bytes);

impl phy::RxToken for Received {
    fn consume<R, F>(self, f: F) -> R
    where
        F: FnOnce(&[u8]) -> R,
    {
        f(&self.0)
    }
}

/// The permission to send one frame.
pub(super) struct Transmit<'a>(&'a mut FrameDevice);

impl phy::TxToken for Transmit<'_> {
    fn consume<R, F>(self, len: usize, f: F) -> R
    where
        F: FnOnce(&mut [u8]) -> R,
    {
        let device = self.0;
        if device.arena.capacity() < len {
            device.arena = BytesMut::with_capacity(FRAME_ARENA.max(len));
        }
        device.arena.resize(len, 0);
        let mut frame = device.arena.split_to(len);
        let result = f(&mut frame);
        device.outgoing.push_back(frame.freeze());
        result
    }
}
