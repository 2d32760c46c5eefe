//! What the tests of devices share: a tape that answers from a script, a machine of devices and
//! memory, and a driver that builds real virtqueues.

use bytes::Bytes;
use replay_log::{
    Answer, Arrival, FrameSource, GuestTime, MarkDigest, Position, RequestNumber, TimerId,
};
use vm_memory::{Bytes as _, GuestAddress};

use super::layout::{VIRTIO_BASE, VIRTIO_WINDOW};
use super::platform::{Platform, Space};
use crate::GuestMemory;
use crate::config::MachineConfig;
use crate::machine::MachineError;
use crate::tape::{
    Command, CpuState, Delivery, DigestKey, DiskRequest, Next, Pending, Query, Sources, Tape,
    TapeError,
};

/// Answers with a clock that advances by a second per question and with counted bytes; keeps
/// every command.
#[derive(Debug, Default)]
pub struct FakeTape {
    pub now: u64,
    pub commands: Vec<Command>,
    /// Answer a question with the other kind of answer.
    pub confused: bool,
}

impl Tape for FakeTape {
    fn key(&self) -> DigestKey {
        unreachable!("devices never ask this")
    }

    fn pending(&mut self, _: Position, _: CpuState, _: Sources) -> Result<Pending, TapeError> {
        unreachable!("devices never ask this")
    }

    fn next(&mut self, _: Position, _: CpuState, _: Sources) -> Result<Next, TapeError> {
        unreachable!("devices never ask this")
    }

    fn answer(&mut self, query: Query) -> Result<Answer, TapeError> {
        Ok(match (query, self.confused) {
            (Query::Clock, false) | (Query::Entropy(_), true) => {
                self.now += 1_000_000_007;
                Answer::Clock(GuestTime(self.now))
            }
            (Query::Entropy(count), false) => {
                Answer::Entropy((1..=count as u8).collect::<Vec<_>>().into())
            }
            (Query::Clock, true) => Answer::Entropy(Bytes::new()),
        })
    }

    fn command(&mut self, command: Command) -> Result<(), TapeError> {
        self.commands.push(command);
        Ok(())
    }

    fn close(&mut self, _at: Position) -> Result<(), TapeError> {
        unreachable!("devices never ask this")
    }

    fn mark(&mut self, _at: Position, _digest: MarkDigest) -> Result<(), TapeError> {
        unreachable!("devices never ask this")
    }
}

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub const MEMORY: usize = 1 << 20;
pub const DISK_SIZE: u64 = 64 * 512;

/// Devices with memory and a tape.
pub struct Bench {
    pub platform: Platform,
    pub memory: GuestMemory,
    pub tape: FakeTape,
}

impl Bench {
    pub fn new() -> Self {
        Self::with_disks(&[DISK_SIZE, DISK_SIZE])
    }

    pub fn with_disks(disks: &[u64]) -> Self {
        let config = MachineConfig {
            memory: MEMORY as u64,
            command_line: String::new(),
            mac: Some(MAC),
            disks: disks.to_vec(),
            acpi: false,
        };
        Self {
            platform: Platform::new(&config),
            memory: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
            tape: FakeTape::default(),
        }
    }

    pub fn read(&mut self, space: Space, address: u64, data: &mut [u8]) {
        self.platform
            .read(space, address, data, &self.memory, &mut self.tape)
            .unwrap();
    }

    pub fn write(&mut self, space: Space, address: u64, data: &[u8]) {
        self.platform
            .write(space, address, data, &self.memory, &mut self.tape)
            .unwrap();
    }

    pub fn inb(&mut self, port: u16) -> u8 {
        let mut data = [0];
        self.read(Space::Port, port.into(), &mut data);
        data[0]
    }

    pub fn outb(&mut self, port: u16, value: u8) {
        self.write(Space::Port, port.into(), &[value]);
    }

    pub fn inl(&mut self, port: u16) -> u32 {
        let mut data = [0; 4];
        self.read(Space::Port, port.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub fn outl(&mut self, port: u16, value: u32) {
        self.write(Space::Port, port.into(), &value.to_le_bytes());
    }

    /// Reads a register of virtio device `device`.
    pub fn reg(&mut self, device: u64, offset: u32) -> u32 {
        let mut data = [0; 4];
        let address = VIRTIO_BASE + device * VIRTIO_WINDOW + u64::from(offset);
        self.read(Space::Mmio, address, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register of virtio device `device`.
    pub fn set_reg(&mut self, device: u64, offset: u32, value: u32) {
        let address = VIRTIO_BASE + device * VIRTIO_WINDOW + u64::from(offset);
        self.write(Space::Mmio, address, &value.to_le_bytes());
    }

    pub fn deliver(&mut self, arrival: Arrival) -> Result<(), MachineError> {
        self.deliver_with(arrival, None)
    }

    pub fn deliver_with(
        &mut self,
        arrival: Arrival,
        data: Option<Bytes>,
    ) -> Result<(), MachineError> {
        self.platform
            .deliver(Delivery { arrival, data }, &self.memory)
    }

    pub fn can_take(&self) -> Sources {
        self.platform.can_take(&self.memory)
    }

    pub fn digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        self.platform.digest(&mut hasher);
        hasher.finalize()
    }

    /// Initialises both interrupt controllers as kernels do: vectors 0x20 and 0x28, nothing
    /// masked.
    pub fn init_pic(&mut self) {
        for (port, icw2, icw3) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            self.outb(port, 0x11);
            self.outb(port + 1, icw2);
            self.outb(port + 1, icw3);
            self.outb(port + 1, 1);
            self.outb(port + 1, 0);
        }
    }

    /// The disk requests among the commands, which are forgotten.
    pub fn take_disk_requests(&mut self) -> Vec<DiskRequest> {
        self.tape
            .commands
            .drain(..)
            .filter_map(|command| match command {
                Command::Disk(request) => Some(request),
                _ => None,
            })
            .collect()
    }
}

pub fn frame(bytes: &[u8]) -> Arrival {
    Arrival::Frame {
        source: FrameSource::default(),
        bytes: Bytes::copy_from_slice(bytes),
    }
}

pub fn timer_due() -> Arrival {
    Arrival::TimerDue { timer: TimerId(0) }
}

pub fn request(number: u64) -> RequestNumber {
    RequestNumber(number)
}

/// A part of a descriptor chain.
#[derive(Clone, Copy, Debug)]
pub enum Part {
    Readable(u64, u32),
    Writable(u64, u32),
}

/// A driver's side of one virtqueue, built in guest memory by hand.
pub struct DriverQueue {
    pub size: u16,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
    pub next_descriptor: u16,
    pub avail_index: u16,
    pub seen: u16,
}

impl DriverQueue {
    /// A queue whose rings begin at `at`.
    pub fn new(at: u64, size: u16) -> Self {
        let descriptors = at;
        let avail = descriptors + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        Self {
            size,
            descriptors,
            avail,
            used,
            next_descriptor: 0,
            avail_index: 0,
            seen: 0,
        }
    }

    pub fn put_descriptor(
        &self,
        memory: &GuestMemory,
        index: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = self.descriptors + 16 * u64::from(index);
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes a chain available; its head.
    pub fn add(&mut self, memory: &GuestMemory, parts: &[Part]) -> u16 {
        let head = self.next_descriptor;
        for (n, part) in parts.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = u16::from(n + 1 < parts.len());
            let (address, len, flags) = match *part {
                Part::Readable(address, len) => (address, len, more),
                Part::Writable(address, len) => (address, len, more | 2),
            };
            self.put_descriptor(memory, index, address, len, flags, self.next_descriptor);
        }
        self.offer(memory, head);
        head
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.avail_index % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail_index = self.avail_index.wrapping_add(1);
        let index = GuestAddress(self.avail + 2);
        memory.write_obj(self.avail_index, index).unwrap();
    }

    /// Asks for no interrupts.
    pub fn decline_interrupts(&self, memory: &GuestMemory) {
        memory.write_obj(1_u16, GuestAddress(self.avail)).unwrap();
    }

    /// The flags of the used ring.
    pub fn used_flags(&self, memory: &GuestMemory) -> u16 {
        memory.read_obj(GuestAddress(self.used)).unwrap()
    }

    /// The next used chain that was not seen yet: head and length.
    pub fn next_used(&mut self, memory: &GuestMemory) -> Option<(u32, u32)> {
        let index: u16 = memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        if index == self.seen {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((
            memory.read_obj(GuestAddress(slot)).unwrap(),
            memory.read_obj(GuestAddress(slot + 4)).unwrap(),
        ))
    }

    /// Tells the transport of device `device` where the queue is, and enables it.
    pub fn set_up(&self, bench: &mut Bench, device: u64, queue: u32) {
        bench.set_reg(device, 0x30, queue);
        bench.set_reg(device, 0x38, self.size.into());
        for (register, address) in [
            (0x80, self.descriptors),
            (0x90, self.avail),
            (0xa0, self.used),
        ] {
            bench.set_reg(device, register, address as u32);
            bench.set_reg(device, register + 4, (address >> 32) as u32);
        }
        bench.set_reg(device, 0x44, 1);
    }
}

/// Negotiates VERSION_1 and the given features up to FEATURES_OK.
pub fn negotiate(bench: &mut Bench, device: u64, features: u32) {
    bench.set_reg(device, 0x70, 0);
    bench.set_reg(device, 0x70, 1);
    bench.set_reg(device, 0x70, 3);
    bench.set_reg(device, 0x24, 0);
    bench.set_reg(device, 0x20, features);
    bench.set_reg(device, 0x24, 1);
    bench.set_reg(device, 0x20, 1);
    bench.set_reg(device, 0x70, 11);
    assert_eq!(bench.reg(device, 0x70), 11, "features were not accepted");
}

/// The last step: DRIVER_OK.
pub fn go_live(bench: &mut Bench, device: u64) {
    bench.set_reg(device, 0x70, 15);
    assert_eq!(bench.reg(device, 0x70), 15, "the device does not go live");
}
