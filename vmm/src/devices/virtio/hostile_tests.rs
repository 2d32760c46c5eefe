//! Guests that write anything anywhere: the devices neither panic, nor hang, nor touch what is
//! not guest memory, and two machines that see the same stay the same.

use bytes::Bytes;
use proptest::prelude::*;
use replay_log::{Arrival, DiskOutcome};
use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::layout;
use crate::devices::platform::Space;
use crate::devices::testing::Part::{Readable, Writable};
use crate::devices::testing::{
    Bench, DISK_SIZE, DriverQueue, MEMORY, frame, go_live, negotiate, timer_due,
};
use crate::tape::{Command, DiskOp};

/// Where the rings of the devices' queues are: net's two, the disks', the console's two, entropy's.
const RINGS: [u64; 7] = [0x1000, 0x1200, 0x1400, 0x1600, 0x1800, 0x1a00, 0x1c00];
/// Which device and which of its queues each of them belongs to.
const QUEUES: [(u64, u32); 7] = [
    (0, 0),
    (0, 1),
    (1, 0),
    (2, 0),
    (layout::CONSOLE_WINDOW as u64, 0),
    (layout::CONSOLE_WINDOW as u64, 1),
    (layout::RNG_WINDOW as u64, 0),
];
/// Where buffers are; the rings lie just before them and are used as buffers, too.
const BUFFERS: u64 = 0x2000;
/// Request headers: type and sector, 16 bytes each.
const HEADERS: u64 = 0x3000;

#[derive(Clone, Debug)]
enum Step {
    Read(Space, u64, usize),
    Write(Space, u64, Vec<u8>),
    /// Overwrites part of a ring.
    Poke(u64, Vec<u8>),
    /// Makes a chain available and notifies.
    Chain(usize, Vec<Descriptor>),
    Frame(usize),
    Typed(usize),
    Timer,
    Finish,
    Acknowledge,
}

/// A descriptor as a driver might write it; `next` is counted from its own index.
#[derive(Clone, Debug)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn address() -> impl Strategy<Value = (Space, u64)> {
    let port = prop_oneof![
        prop::sample::select(vec![0x20_u64, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1]),
        0x3f8..0x400_u64,
        0x510..0x548_u64,
        any::<u64>(),
    ];
    let register = prop::sample::select(vec![
        0x10_u64, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84,
        0x90, 0x94, 0xa0, 0xa4, 0xfc, 0x100, 0x104,
    ]);
    let window = (0..8_u64, prop_oneof![4 => register, 1 => 0..0x1000_u64])
        .prop_map(|(n, at)| layout::VIRTIO_BASE + n * layout::VIRTIO_WINDOW + at);
    prop_oneof![
        port.prop_map(|at| (Space::Port, at)),
        window.prop_map(|at| (Space::Mmio, at)),
        any::<u64>().prop_map(|at| (Space::Mmio, at)),
    ]
}

fn descriptor(readable: bool) -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![
        8 => (0..64_u64).prop_map(|n| BUFFERS + n * 64),
        6 => (0..32_u64).prop_map(|n| HEADERS + n * 16),
        2 => (0..0x1000_u64).prop_map(|at| RINGS[0] + at),
        1 => (0..0x1000_u64).prop_map(|back| MEMORY as u64 - back),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        8 => prop::sample::select(vec![1_u32, 12, 16, 16, 60, 72, 512, 1024, 1500]),
        2 => 0..2000_u32,
        1 => any::<u32>(),
    ];
    let write = if readable { 0 } else { 2 };
    let flags = prop_oneof![30 => Just(1 | write), 2 => Just(write), 1 => any::<u16>()];
    let next = prop_oneof![30 => Just(1), 1 => 0..20_u16];
    (address, len, flags, next).prop_map(|(address, len, flags, next)| Descriptor {
        address,
        len,
        flags,
        next,
    })
}

fn chain() -> impl Strategy<Value = Vec<Descriptor>> {
    // A block request's header and status more often than chance would have them.
    let header = (0..32_u64).prop_map(|n| Descriptor {
        address: HEADERS + n * 16,
        len: 16,
        flags: 1,
        next: 1,
    });
    let status = Just(Descriptor {
        address: BUFFERS,
        len: 1,
        flags: 2,
        next: 0,
    });
    (
        prop::option::of(header),
        prop::collection::vec(descriptor(true), 0..3),
        prop::collection::vec(descriptor(false), 0..3),
        prop::option::of(status),
        prop::bool::weighted(0.9),
    )
        .prop_map(|(header, readable, writable, status, ends)| {
            let parts = header.into_iter().chain(readable).chain(writable);
            let mut chain: Vec<_> = parts.chain(status).collect();
            if let Some(last) = chain.last_mut().filter(|_| ends) {
                last.flags &= !1;
            }
            chain
        })
}

/// A disk request that may well be in order.
fn request() -> impl Strategy<Value = Vec<Descriptor>> {
    (0..32_u64, 0..5_u32, any::<bool>()).prop_map(|(header, sectors, reads)| {
        let part = |address, len, flags| Descriptor {
            address,
            len,
            flags,
            next: 1,
        };
        vec![
            part(HEADERS + header * 16, 16, 1),
            part(BUFFERS, sectors * 512, 1 | u16::from(reads) << 1),
            part(BUFFERS + 0x800, 1, 2),
        ]
    })
}

fn step() -> impl Strategy<Value = Step> {
    let data = prop_oneof![
        3 => prop_oneof![0..16_u32, any::<u32>()].prop_map(|word| word.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 1..9),
    ];
    let poke = prop::collection::vec(prop_oneof![0..20_u8, any::<u8>()], 1..24);
    prop_oneof![
        2 => (address(), 1..9_usize).prop_map(|((space, at), len)| Step::Read(space, at, len)),
        3 => (address(), data).prop_map(|((space, at), data)| Step::Write(space, at, data)),
        2 => (0..0x200_u64, poke).prop_map(|(at, data)| Step::Poke(RINGS[0] + at * 8, data)),
        6 => (2..4_usize, request()).prop_map(|(queue, chain)| Step::Chain(queue, chain)),
        12 => (0..QUEUES.len(), chain()).prop_map(|(queue, chain)| Step::Chain(queue, chain)),
        4 => (0..1600_usize).prop_map(Step::Frame),
        2 => (0..300_usize).prop_map(Step::Typed),
        1 => Just(Step::Timer),
        4 => Just(Step::Finish),
        1 => Just(Step::Acknowledge),
    ]
}

/// A machine with the drivers of its devices.
struct Guest {
    bench: Bench,
    drivers: [DriverQueue; QUEUES.len()],
}

impl Guest {
    fn new() -> Self {
        let bench = Bench::new();
        for (slot, kind) in (0..32).zip([0_u32, 1, 4, 8, 99].into_iter().cycle()) {
            let at = HEADERS + slot * 16;
            bench.memory.write_obj(kind, GuestAddress(at)).unwrap();
            let sector = if slot < 25 { slot * 3 } else { u64::MAX / slot };
            bench
                .memory
                .write_obj(sector, GuestAddress(at + 8))
                .unwrap();
        }
        let drivers = RINGS.map(|at| DriverQueue::new(at, 16));
        Self { bench, drivers }
    }

    /// Sets a device up properly unless it is live already, so that hostile rings are looked at
    /// at all.
    fn live(&mut self, device: u64) {
        if self.bench.reg(device, 0x70) == 15 {
            return;
        }
        negotiate(&mut self.bench, device, 0);
        for (queue, (owner, number)) in QUEUES.into_iter().enumerate() {
            if owner != device {
                continue;
            }
            let zeros = GuestAddress(RINGS[queue]);
            self.bench.memory.write_slice(&[0; 0x200], zeros).unwrap();
            self.drivers[queue] = DriverQueue::new(RINGS[queue], 16);
            self.drivers[queue].set_up(&mut self.bench, device, number);
        }
        go_live(&mut self.bench, device);
    }

    fn offer(&mut self, queue: usize, chain: &[Descriptor]) {
        let (device, number) = QUEUES[queue];
        self.live(device);
        let driver = &mut self.drivers[queue];
        let head = driver.next_descriptor;
        for descriptor in chain {
            let Descriptor {
                address,
                len,
                flags,
                next,
            } = *descriptor;
            let index = driver.next_descriptor;
            let next = (index + next) % 20;
            driver.next_descriptor = (index + 1) % 16;
            let next = if next == index + 1 {
                driver.next_descriptor
            } else {
                next
            };
            driver.put_descriptor(&self.bench.memory, index, address, len, flags, next);
        }
        driver.offer(&self.bench.memory, head);
        self.bench.set_reg(device, 0x50, number);
    }

    /// Answers a disk request, if there is one left.
    fn finish(&mut self, answered: &mut usize) {
        let mut requests = self
            .bench
            .tape
            .commands
            .iter()
            .filter_map(|command| match command {
                Command::Disk(request) => Some(request.clone()),
                _ => None,
            });
        let Some(request) = requests.nth(*answered) else {
            return;
        };
        *answered += 1;
        let (outcome, data) = match request.op {
            DiskOp::Read { len, .. } => (
                DiskOutcome::Read { hash: 0 },
                Some(Bytes::from(vec![3; len as usize])),
            ),
            DiskOp::Write { .. } => (DiskOutcome::Written, None),
            DiskOp::Flush => (DiskOutcome::Flushed, None),
        };
        let request = request.number;
        let arrival = Arrival::DiskDone { request, outcome };
        self.bench.deliver_with(arrival, data).unwrap();
    }

    fn run(&mut self, steps: &[Step]) {
        let mut answered = 0;
        for step in steps {
            let bench = &mut self.bench;
            match step {
                Step::Read(space, address, len) => bench.read(*space, *address, &mut vec![0; *len]),
                Step::Write(space, address, data) => bench.write(*space, *address, data),
                Step::Poke(address, data) => {
                    let address = GuestAddress(*address);
                    bench.memory.write_slice(data, address).unwrap();
                }
                Step::Chain(queue, chain) => self.offer(*queue, chain),
                Step::Frame(len) => {
                    if bench.can_take().frame {
                        bench.deliver(frame(&vec![5; *len])).unwrap();
                    }
                }
                Step::Typed(len) => {
                    let bytes = Bytes::from(vec![b'x'; bench.can_take().console.min(*len)]);
                    bench.deliver(Arrival::Console { bytes }).unwrap();
                }
                Step::Timer => bench.deliver(timer_due()).unwrap(),
                Step::Finish => self.finish(&mut answered),
                Step::Acknowledge => {
                    bench.platform.acknowledge_interrupt();
                }
            }
        }
    }
}

proptest! {
    #[test]
    fn no_guest_breaks_the_devices_or_their_repeatability(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let (mut first, mut second) = (Guest::new(), Guest::new());
        first.run(&steps);
        second.run(&steps);
        prop_assert_eq!(first.bench.digest(), second.bench.digest());
        prop_assert_eq!(&first.bench.tape.commands, &second.bench.tape.commands);
        for command in &first.bench.tape.commands {
            match command {
                Command::Frame(bytes) => prop_assert!((14..=1518).contains(&bytes.len())),
                Command::Disk(request) => {
                    prop_assert!(request.disk < 2);
                    let (offset, len) = match &request.op {
                        DiskOp::Read { offset, len } => (*offset, u64::from(*len)),
                        DiskOp::Write { offset, data } => (*offset, data.len() as u64),
                        DiskOp::Flush => (0, 0),
                    };
                    prop_assert!(offset % 512 == 0 && len % 512 == 0);
                    prop_assert!(offset + len <= DISK_SIZE);
                }
                // Not more than a whole queue of chains, each cut off at 64 KiB.
                Command::Console(bytes) => prop_assert!(bytes.len() <= 64 * (64 << 10)),
                Command::ArmTimer { .. } => {}
            }
        }
    }
}

/// A driver that reads as much as it can and resets its device before anything has come back.
#[test]
fn what_a_host_has_to_keep_for_a_driver_is_bounded() {
    const DISK: u64 = 1;
    const MIB: u64 = 1 << 20;
    let mut bench = Bench::with_disks(&[64 * MIB]);
    let request = |bench: &mut Bench| {
        negotiate(bench, DISK, 1 << 9);
        bench
            .memory
            .write_slice(&[0; 0x800], GuestAddress(RINGS[0]))
            .unwrap();
        let mut queue = DriverQueue::new(RINGS[0], 64);
        queue.set_up(bench, DISK, 0);
        go_live(bench, DISK);
        bench
            .memory
            .write_slice(&[0; 16], GuestAddress(HEADERS))
            .unwrap();
        let mut parts = vec![Readable(HEADERS, 16)];
        // All sixteen over each other: a device must not care.
        parts.extend([Writable(0x1_0000, 64 << 10); 16]);
        parts.push(Writable(BUFFERS, 1));
        queue.add(&bench.memory, &parts);
        bench.set_reg(DISK, 0x50, 0);
        queue.next_used(&bench.memory).is_none()
    };
    let taken = (0..100).filter(|_| request(&mut bench)).count();
    assert_eq!(taken, 24);
    // One that is finished makes room for another, whoever asked for it.
    let numbers: Vec<_> = bench
        .take_disk_requests()
        .iter()
        .map(|it| it.number)
        .collect();
    for request in [numbers[3], numbers[23]] {
        let data = Some(Bytes::from(vec![0; MIB as usize]));
        let outcome = DiskOutcome::Read { hash: 0 };
        let done = Arrival::DiskDone { request, outcome };
        bench.deliver_with(done, data).unwrap();
    }
    let taken = (0..100).filter(|_| request(&mut bench)).count();
    assert_eq!(taken, 2);
}
