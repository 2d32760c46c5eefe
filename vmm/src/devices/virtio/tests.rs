//! The transport and the devices as a driver sees them.

use bytes::Bytes;
use replay_log::{Arrival, DiskOutcome};
use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::layout;
use crate::devices::testing::Part::{Readable, Writable};
use crate::devices::testing::{
    Bench, DISK_SIZE, DriverQueue, MAC, MEMORY, frame, go_live, negotiate, request,
};
use crate::machine::MachineError;
use crate::tape::{Command, DiskOp};

const NET: u64 = 0;
const DISK: u64 = 1;
const STATUS: u32 = 0x70;
const NOTIFY: u32 = 0x50;
const INTERRUPTS: u32 = 0x60;
const ACK: u32 = 0x64;
const NEEDS_RESET: u32 = 64;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x9000;
const REPLY: u64 = 0xf000;

fn net() -> (Bench, DriverQueue, DriverQueue) {
    let mut bench = Bench::new();
    bench.init_pic();
    negotiate(&mut bench, NET, 1 << 5);
    let (receive, send) = (DriverQueue::new(0x1000, 8), DriverQueue::new(0x2000, 8));
    receive.set_up(&mut bench, NET, 0);
    send.set_up(&mut bench, NET, 1);
    go_live(&mut bench, NET);
    (bench, receive, send)
}

fn disk() -> (Bench, DriverQueue) {
    let mut bench = Bench::new();
    bench.init_pic();
    let queue = disk_driver(&mut bench);
    (bench, queue)
}

fn disk_driver(bench: &mut Bench) -> DriverQueue {
    negotiate(bench, DISK, 1 << 9);
    let queue = DriverQueue::new(0x1000, 16);
    bench
        .memory
        .write_slice(&[0; 0x400], GuestAddress(0x1000))
        .unwrap();
    queue.set_up(bench, DISK, 0);
    go_live(bench, DISK);
    queue
}

/// Writes a request header; headers lie 16 bytes apart.
fn header(bench: &Bench, slot: u64, kind: u32, sector: u64) -> u64 {
    let at = HEADER + slot * 16;
    bench.memory.write_obj(kind, GuestAddress(at)).unwrap();
    bench
        .memory
        .write_obj(sector, GuestAddress(at + 8))
        .unwrap();
    at
}

fn status_byte(bench: &Bench, at: u64) -> u8 {
    bench.memory.read_obj(GuestAddress(at)).unwrap()
}

fn done(number: u64, outcome: DiskOutcome) -> Arrival {
    Arrival::DiskDone {
        request: request(number),
        outcome,
    }
}

#[test]
fn the_transport_introduces_itself() {
    let mut bench = Bench::new();
    for (device, kind) in [(0, 1), (1, 2), (2, 2)] {
        assert_eq!(bench.reg(device, 0), 0x7472_6976);
        assert_eq!(bench.reg(device, 4), 2);
        assert_eq!(bench.reg(device, 8), kind);
        bench.set_reg(device, 0x14, 1);
        assert_eq!(bench.reg(device, 0x10), 1, "VERSION_1");
        bench.set_reg(device, 0x14, 2);
        assert_eq!(bench.reg(device, 0x10), 0);
        assert_eq!(bench.reg(device, 0xb0), u32::MAX, "no shared memory");
        assert_eq!(bench.reg(device, 0xfc), 0);
    }
    let mut mac = [0; 6];
    bench.read(
        crate::devices::platform::Space::Mmio,
        layout::VIRTIO_BASE + 0x100,
        &mut mac,
    );
    assert_eq!(mac, MAC);
    assert_eq!(bench.reg(DISK, 0x100), (DISK_SIZE / 512) as u32);
    assert_eq!(bench.reg(DISK, 0x114), 512);
    assert_eq!(bench.reg(DISK, 0xffc), 0, "beyond the configuration");
}

#[test]
fn features_that_are_not_offered_are_refused() {
    for (page, features) in [(0, 1), (1, 3), (2, 1)] {
        let mut bench = Bench::new();
        bench.set_reg(NET, STATUS, 3);
        bench.set_reg(NET, 0x24, 1);
        bench.set_reg(NET, 0x20, 1);
        bench.set_reg(NET, 0x24, page);
        bench.set_reg(NET, 0x20, features);
        bench.set_reg(NET, STATUS, 11);
        assert_eq!(bench.reg(NET, STATUS), 3);
        bench.set_reg(NET, STATUS, 15);
        assert_eq!(bench.reg(NET, STATUS), 3, "live without features");
    }
    let mut legacy = Bench::new();
    legacy.set_reg(NET, STATUS, 3);
    legacy.set_reg(NET, STATUS, 11);
    assert_eq!(legacy.reg(NET, STATUS), 3, "without VERSION_1");
}

#[test]
fn a_queue_at_an_impossible_place_is_not_enabled() {
    let good = DriverQueue::new(0x1000, 8);
    let place = |descriptors, avail, used, size| DriverQueue {
        size,
        descriptors,
        avail,
        used,
        ..DriverQueue::new(0x1000, 8)
    };
    for bad in [
        place(good.descriptors + 8, good.avail, good.used, 8),
        place(good.descriptors, good.avail + 1, good.used, 8),
        place(good.descriptors, good.avail, good.used + 2, 8),
        place(good.descriptors, good.avail, good.used, 0),
        place(good.descriptors, good.avail, good.used, 7),
        place(good.descriptors, good.avail, good.used, 512),
        place(MEMORY as u64 - 16, good.avail, good.used, 8),
        place(good.descriptors, MEMORY as u64 - 16, good.used, 8),
        place(good.descriptors, good.avail, MEMORY as u64 - 16, 8),
        place(u64::MAX - 15, good.avail, good.used, 8),
    ] {
        let mut bench = Bench::new();
        negotiate(&mut bench, NET, 0);
        bad.set_up(&mut bench, NET, 0);
        assert_eq!(bench.reg(NET, 0x44), 0);
        assert_eq!(bench.reg(NET, STATUS), 0b1011 | NEEDS_RESET);
        bench.set_reg(NET, STATUS, 0);
        assert_eq!(bench.reg(NET, STATUS), 0);
    }
}

#[test]
fn queues_are_set_up_between_features_and_driver_ok_only() {
    let mut bench = Bench::new();
    let queue = DriverQueue::new(0x1000, 8);
    queue.set_up(&mut bench, NET, 0);
    assert_eq!(bench.reg(NET, 0x44), 0);
    let (mut bench, ..) = net();
    bench.set_reg(NET, 0x30, 0);
    bench.set_reg(NET, 0x44, 0);
    assert_eq!(bench.reg(NET, 0x44), 1);
    bench.set_reg(NET, 0x30, 2);
    assert_eq!(bench.reg(NET, 0x44), 0, "there is no queue 2");
    assert_eq!(bench.reg(NET, 0x34), 0);
}

#[test]
fn frames_are_sent_when_notified() {
    let (mut bench, _, mut send) = net();
    let frame: Vec<u8> = (0..60).collect();
    bench
        .memory
        .write_slice(&frame, GuestAddress(DATA))
        .unwrap();
    // Header and frame in one part, then scattered.
    bench
        .memory
        .write_slice(&frame, GuestAddress(DATA + 0x10c))
        .unwrap();
    let whole = send.add(&bench.memory, &[Readable(DATA + 0x100, 72)]);
    let scattered = [
        Readable(HEADER, 7),
        Readable(HEADER, 5),
        Readable(DATA, 20),
        Readable(DATA + 20, 0),
        Readable(DATA + 20, 40),
    ];
    let scattered = send.add(&bench.memory, &scattered);
    assert!(bench.tape.commands.is_empty());
    bench.set_reg(NET, NOTIFY, 1);
    let expected = vec![Command::Frame(Bytes::from(frame)); 2];
    assert_eq!(bench.tape.commands, expected);
    assert_eq!(send.next_used(&bench.memory), Some((whole.into(), 0)));
    assert_eq!(send.next_used(&bench.memory), Some((scattered.into(), 0)));
    assert_eq!(send.next_used(&bench.memory), None);
    assert_eq!(bench.platform.acknowledge_interrupt(), 0x25);
    assert_eq!(bench.reg(NET, INTERRUPTS), 1);
    bench.set_reg(NET, ACK, 1);
    assert_eq!(bench.reg(NET, INTERRUPTS), 0);
}

#[test]
fn frames_that_ethernet_cannot_carry_are_dropped() {
    let (mut bench, _, mut send) = net();
    for len in [0, 5, 12, 12 + 13, 12 + 1519, 0x8_0000] {
        send.add(&bench.memory, &[Readable(DATA, len)]);
    }
    bench.set_reg(NET, NOTIFY, 1);
    assert!(bench.tape.commands.is_empty());
    let used = std::iter::from_fn(|| send.next_used(&bench.memory)).count();
    assert_eq!(used, 6);
    assert_eq!(bench.reg(NET, STATUS), 15);
    send.add(&bench.memory, &[Readable(DATA, 12 + 1518)]);
    send.add(&bench.memory, &[Readable(DATA, 12 + 14)]);
    bench.set_reg(NET, NOTIFY, 1);
    assert_eq!(bench.tape.commands.len(), 2);
}

#[test]
fn going_idle_notifies_all_queues() {
    let (mut bench, _, mut send) = net();
    let mut blocks = disk_driver_at(&mut bench, 0x3000);
    send.add(&bench.memory, &[Readable(DATA, 72)]);
    let flush = header(&bench, 0, 4, 0);
    blocks.add(&bench.memory, &[Readable(flush, 16), Writable(REPLY, 1)]);
    bench.outb(layout::IDLE, 0);
    assert!(matches!(
        bench.tape.commands[..],
        [Command::Frame(_), Command::Disk(_)]
    ));
    assert!(bench.platform.idle());
}

fn disk_driver_at(bench: &mut Bench, at: u64) -> DriverQueue {
    negotiate(bench, DISK, 1 << 9);
    let queue = DriverQueue::new(at, 16);
    queue.set_up(bench, DISK, 0);
    go_live(bench, DISK);
    queue
}

#[test]
fn frames_are_taken_only_with_a_buffer_and_a_live_driver() {
    let mut bench = Bench::new();
    assert!(!bench.can_take().frame);
    negotiate(&mut bench, NET, 0);
    let mut receive = DriverQueue::new(0x1000, 8);
    receive.set_up(&mut bench, NET, 0);
    receive.add(&bench.memory, &[Writable(DATA, 1600)]);
    assert!(!bench.can_take().frame, "not live yet");
    go_live(&mut bench, NET);
    assert!(bench.can_take().frame, "without being notified");
    assert_eq!(receive.used_flags(&bench.memory), 1, "and says so");
    bench.deliver(frame(&[9; 60])).unwrap();
    assert!(!bench.can_take().frame);
    assert!(matches!(
        bench.deliver(frame(&[9; 60])),
        Err(MachineError::CannotTake { .. })
    ));
    receive.add(&bench.memory, &[Writable(DATA, 1600)]);
    bench.set_reg(NET, STATUS, 0);
    assert!(!bench.can_take().frame, "after a reset");
}

#[test]
fn a_received_frame_has_a_header_and_may_be_scattered() {
    let (mut bench, mut receive, _) = net();
    let bytes: Vec<u8> = (1..=100).collect();
    let parts = [
        Writable(HEADER, 12),
        Writable(DATA, 30),
        Writable(REPLY, 1500),
    ];
    let head = receive.add(&bench.memory, &parts);
    bench.deliver(frame(&bytes)).unwrap();
    assert_eq!(receive.next_used(&bench.memory), Some((head.into(), 112)));
    let mut got = [0; 112];
    let (first, rest) = got.split_at_mut(12);
    let (second, third) = rest.split_at_mut(30);
    for (part, at) in [(first, HEADER), (second, DATA), (third, REPLY)] {
        bench.memory.read_slice(part, GuestAddress(at)).unwrap();
    }
    assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(got[12..], bytes);
    assert_eq!(bench.platform.acknowledge_interrupt(), 0x25);
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_the_buffer_stays() {
    let (mut bench, mut receive, _) = net();
    let head = receive.add(&bench.memory, &[Writable(DATA, 12 + 60)]);
    bench.deliver(frame(&[1; 61])).unwrap();
    bench.deliver(frame(&[1; 3000])).unwrap();
    bench.deliver(frame(&[1; 13])).unwrap();
    bench.deliver(frame(&[])).unwrap();
    assert_eq!(receive.next_used(&bench.memory), None);
    assert!(!bench.platform.interrupt_waits());
    bench.deliver(frame(&[2; 60])).unwrap();
    assert_eq!(receive.next_used(&bench.memory), Some((head.into(), 72)));
}

#[test]
fn a_polling_driver_never_needs_to_acknowledge() {
    let (mut bench, mut receive, mut send) = net();
    receive.decline_interrupts(&bench.memory);
    send.decline_interrupts(&bench.memory);
    for round in 0_u8..100 {
        receive.add(&bench.memory, &[Writable(DATA, 1600)]);
        assert!(bench.can_take().frame);
        bench.deliver(frame(&[round; 60])).unwrap();
        assert!(receive.next_used(&bench.memory).is_some());
        send.add(&bench.memory, &[Readable(DATA, 72)]);
        bench.set_reg(NET, NOTIFY, 1);
        assert!(send.next_used(&bench.memory).is_some());
        assert!(!bench.platform.interrupt_waits());
    }
    assert_eq!(bench.tape.commands.len(), 100);
    assert_eq!(bench.reg(NET, INTERRUPTS), 0);
}

#[test]
fn requests_go_out_in_order_and_come_back_in_any() {
    let (mut bench, mut queue) = disk();
    bench
        .memory
        .write_slice(&[7; 1024], GuestAddress(DATA))
        .unwrap();
    let write = header(&bench, 0, 1, 3);
    let flush = header(&bench, 1, 4, 0);
    let read = header(&bench, 2, 0, 63);
    let parts = [
        Readable(write, 16),
        Readable(DATA, 1000),
        Readable(DATA, 24),
        Writable(REPLY, 1),
    ];
    let write = queue.add(&bench.memory, &parts);
    let flush = queue.add(
        &bench.memory,
        &[Readable(flush, 16), Writable(REPLY + 1, 1)],
    );
    let parts = [
        Readable(read, 16),
        Writable(DATA, 100),
        Writable(DATA + 0x800, 413),
    ];
    let read = queue.add(&bench.memory, &parts);
    bench
        .memory
        .write_slice(&[0xee; 4], GuestAddress(REPLY))
        .unwrap();
    bench.set_reg(DISK, NOTIFY, 0);

    // What the guest does to its buffer from now on changes nothing.
    bench
        .memory
        .write_slice(&[8; 1024], GuestAddress(DATA))
        .unwrap();
    let requests = bench.take_disk_requests();
    let numbers: Vec<_> = requests
        .iter()
        .map(|request| (request.disk, request.number.0))
        .collect();
    assert_eq!(numbers, [(0, 1), (0, 2), (0, 3)]);
    let write_op = DiskOp::Write {
        offset: 3 * 512,
        data: Bytes::from(vec![7; 1024]),
    };
    let read_op = DiskOp::Read {
        offset: 63 * 512,
        len: 512,
    };
    let ops: Vec<_> = requests.into_iter().map(|request| request.op).collect();
    assert_eq!(ops, [write_op, DiskOp::Flush, read_op]);
    assert_eq!(queue.next_used(&bench.memory), None);

    let data = Bytes::from((0..512_u32).map(|n| n as u8).collect::<Vec<_>>());
    bench
        .deliver_with(done(3, DiskOutcome::Read { hash: 0 }), Some(data.clone()))
        .unwrap();
    assert_eq!(queue.next_used(&bench.memory), Some((read.into(), 513)));
    let mut got = [0; 512];
    let (first, second) = got.split_at_mut(100);
    bench.memory.read_slice(first, GuestAddress(DATA)).unwrap();
    bench
        .memory
        .read_slice(second, GuestAddress(DATA + 0x800))
        .unwrap();
    assert_eq!(got[..], data);
    assert_eq!(status_byte(&bench, DATA + 0x800 + 412), 0);
    assert_eq!(bench.platform.acknowledge_interrupt(), 0x2a);

    bench.deliver(done(1, DiskOutcome::Written)).unwrap();
    bench.deliver(done(2, DiskOutcome::Flushed)).unwrap();
    assert_eq!(queue.next_used(&bench.memory), Some((write.into(), 1)));
    assert_eq!(queue.next_used(&bench.memory), Some((flush.into(), 1)));
    assert_eq!(
        (status_byte(&bench, REPLY), status_byte(&bench, REPLY + 1)),
        (0, 0)
    );
}

#[test]
fn impossible_requests_are_refused_without_the_outside() {
    let (mut bench, mut queue) = disk();
    let cases: [(u32, u64, u32, u8); 9] = [
        (0, 64, 512, 1),
        (0, 63, 1024, 1),
        (0, u64::MAX, 512, 1),
        (0, u64::MAX / 512 + 1, 512, 1),
        (0, 0, 511, 1),
        (0, 0, 0, 1),
        (0, 0, DISK_SIZE as u32 + 512, 1),
        (8, 0, 19, 1),
        (99, 0, 512, 2),
    ];
    for (kind, sector, len, expected) in cases {
        let at = header(&bench, 0, kind, sector);
        bench
            .memory
            .write_obj(0xee_u8, GuestAddress(REPLY))
            .unwrap();
        let parts = [Readable(at, 16), Writable(DATA, len), Writable(REPLY, 1)];
        let head = queue.add(&bench.memory, &parts);
        bench.set_reg(DISK, NOTIFY, 0);
        assert_eq!(
            status_byte(&bench, REPLY),
            expected,
            "{kind} {sector} {len}"
        );
        assert_eq!(queue.next_used(&bench.memory), Some((head.into(), 1)));
    }
    assert!(bench.tape.commands.is_empty());
    assert_eq!(bench.reg(DISK, STATUS), 15);
}

#[test]
fn the_disk_tells_its_name() {
    let (mut bench, mut queue) = disk();
    let at = header(&bench, 0, 8, 0);
    queue.add(
        &bench.memory,
        &[Readable(at, 16), Writable(DATA, 20), Writable(REPLY, 1)],
    );
    bench.set_reg(DISK, NOTIFY, 0);
    let mut name = [0; 20];
    bench
        .memory
        .read_slice(&mut name, GuestAddress(DATA))
        .unwrap();
    assert_eq!(&name, b"understudy-disk-0\0\0\0");
    assert_eq!(queue.next_used(&bench.memory).unwrap().1, 21);
}

#[test]
fn numbers_are_counted_over_all_disks() {
    let (mut bench, mut first) = disk();
    let at = header(&bench, 0, 4, 0);
    first.add(&bench.memory, &[Readable(at, 16), Writable(REPLY, 1)]);
    negotiate(&mut bench, DISK + 1, 0);
    let mut second = DriverQueue::new(0x3000, 16);
    second.set_up(&mut bench, DISK + 1, 0);
    go_live(&mut bench, DISK + 1);
    second.add(&bench.memory, &[Readable(at, 16), Writable(REPLY, 1)]);
    bench.set_reg(DISK + 1, NOTIFY, 0);
    bench.set_reg(DISK, NOTIFY, 0);
    let requests = bench.take_disk_requests();
    let numbers: Vec<_> = requests
        .iter()
        .map(|request| (request.disk, request.number.0))
        .collect();
    assert_eq!(numbers, [(1, 1), (0, 2)]);
    bench.deliver(done(1, DiskOutcome::Flushed)).unwrap();
    assert!(second.next_used(&bench.memory).is_some());
    assert!(first.next_used(&bench.memory).is_none());
}

#[test]
fn completions_that_fit_no_request_are_refused() {
    let (mut bench, mut queue) = disk();
    let at = header(&bench, 0, 0, 0);
    queue.add(
        &bench.memory,
        &[Readable(at, 16), Writable(DATA, 512), Writable(REPLY, 1)],
    );
    bench.set_reg(DISK, NOTIFY, 0);
    let read = DiskOutcome::Read { hash: 0 };
    for (number, outcome, data) in [
        (1, DiskOutcome::Written, None),
        (1, DiskOutcome::Flushed, None),
        (1, read, None),
        (1, read, Some(511)),
        (2, read, Some(512)),
    ] {
        let data = data.map(|len| Bytes::from(vec![0; len]));
        assert!(matches!(
            bench.deliver_with(done(number, outcome), data),
            Err(MachineError::CannotTake { .. })
        ));
    }
    let data = Some(Bytes::from(vec![0; 512]));
    bench.deliver_with(done(1, read), data.clone()).unwrap();
    assert!(
        bench.deliver_with(done(1, read), data).is_err(),
        "only once"
    );
}

#[test]
fn a_reset_orphans_what_is_in_flight() {
    let (mut bench, mut queue) = disk();
    let at = header(&bench, 0, 0, 0);
    queue.add(
        &bench.memory,
        &[Readable(at, 16), Writable(DATA, 512), Writable(REPLY, 1)],
    );
    bench.set_reg(DISK, NOTIFY, 0);
    let mut queue = disk_driver(&mut bench);
    bench.memory.write_obj(0xee_u8, GuestAddress(DATA)).unwrap();
    let data = Some(Bytes::from(vec![0; 512]));
    bench
        .deliver_with(done(1, DiskOutcome::Read { hash: 0 }), data)
        .unwrap();
    assert_eq!(queue.next_used(&bench.memory), None);
    assert_eq!(
        status_byte(&bench, DATA),
        0xee,
        "memory of a driver that is gone was written"
    );
    queue.add(
        &bench.memory,
        &[Readable(at, 16), Writable(DATA, 512), Writable(REPLY, 1)],
    );
    bench.set_reg(DISK, NOTIFY, 0);
    let numbers: Vec<_> = bench
        .take_disk_requests()
        .iter()
        .map(|request| request.number.0)
        .collect();
    assert_eq!(numbers, [1, 2]);
}

#[test]
fn a_driver_that_resets_in_a_loop_is_bounded() {
    let mut bench = Bench::new();
    let mut refused = 0;
    for _ in 0..100 {
        let mut queue = disk_driver(&mut bench);
        let at = header(&bench, 0, 4, 0);
        for _ in 0..8 {
            queue.add(&bench.memory, &[Readable(at, 16), Writable(REPLY, 1)]);
        }
        bench.set_reg(DISK, NOTIFY, 0);
        refused += std::iter::from_fn(|| queue.next_used(&bench.memory)).count();
    }
    assert_eq!(bench.tape.commands.len(), 512);
    assert_eq!(refused, 800 - 512);
}

/// Something that no driver may do with its send queue.
type Lie = fn(&Bench, &mut DriverQueue);

#[test]
fn a_lying_driver_needs_a_reset_and_gets_nothing_more() {
    let lies: [(&str, Lie); 9] = [
        ("a buffer outside memory", |bench, queue| {
            queue.add(&bench.memory, &[Readable(MEMORY as u64 - 8, 16)]);
        }),
        ("a buffer at the end of the world", |bench, queue| {
            queue.add(&bench.memory, &[Readable(u64::MAX - 8, 72)]);
        }),
        ("a chain that loops", |bench, queue| {
            queue.put_descriptor(&bench.memory, 0, DATA, 16, 1, 1);
            queue.put_descriptor(&bench.memory, 1, DATA, 16, 1, 0);
            queue.offer(&bench.memory, 0);
        }),
        ("a chain that leaves the table", |bench, queue| {
            queue.put_descriptor(&bench.memory, 0, DATA, 72, 1, 700);
            queue.offer(&bench.memory, 0);
        }),
        ("a head outside the table", |bench, queue| {
            queue.offer(&bench.memory, 16);
        }),
        ("readable after writable", |bench, queue| {
            let parts = [Readable(DATA, 16), Writable(DATA, 16), Readable(DATA, 60)];
            queue.add(&bench.memory, &parts);
        }),
        ("more available than there is", |bench, queue| {
            bench
                .memory
                .write_obj(100_u16, GuestAddress(queue.avail + 2))
                .unwrap();
        }),
        ("an indirect table outside memory", |bench, queue| {
            queue.put_descriptor(&bench.memory, 0, MEMORY as u64, 64, 4, 0);
            queue.offer(&bench.memory, 0);
        }),
        ("an indirect table in an indirect table", |bench, queue| {
            queue.put_descriptor(&bench.memory, 0, queue.descriptors, 64, 4, 0);
            queue.offer(&bench.memory, 0);
        }),
    ];
    for (what, lie) in lies {
        let (mut bench, _, mut send) = net();
        lie(&bench, &mut send);
        bench.set_reg(NET, NOTIFY, 1);
        assert_eq!(bench.reg(NET, STATUS), 15 | NEEDS_RESET, "{what}");
        assert_eq!(bench.reg(NET, INTERRUPTS), 2, "{what}");
        assert!(bench.tape.commands.is_empty(), "{what}");
        bench.set_reg(NET, NOTIFY, 1);
        assert!(bench.tape.commands.is_empty(), "{what}");
        bench.set_reg(NET, STATUS, 0);
        assert_eq!(bench.reg(NET, STATUS), 0, "{what}");
        assert!(!bench.platform.can_take(&bench.memory).frame);
    }
}

#[test]
fn a_request_without_header_or_status_needs_a_reset() {
    for parts in [
        vec![Readable(HEADER, 15), Writable(REPLY, 1)],
        vec![Readable(HEADER, 16)],
        vec![Writable(REPLY, 17)],
    ] {
        let (mut bench, mut queue) = disk();
        queue.add(&bench.memory, &parts);
        bench.set_reg(DISK, NOTIFY, 0);
        assert_eq!(bench.reg(DISK, STATUS), 15 | NEEDS_RESET);
        assert!(bench.tape.commands.is_empty());
    }
}

#[test]
fn requests_in_flight_and_queue_indices_are_in_the_digest() {
    let (mut bench, mut queue) = disk();
    let mut seen = std::collections::HashSet::from([bench.digest()]);
    let at = header(&bench, 0, 4, 0);
    for _ in 0..2 {
        queue.add(&bench.memory, &[Readable(at, 16), Writable(REPLY, 1)]);
        bench.set_reg(DISK, NOTIFY, 0);
        assert!(seen.insert(bench.digest()));
    }
    bench.deliver(done(1, DiskOutcome::Flushed)).unwrap();
    assert!(seen.insert(bench.digest()));
    bench.set_reg(DISK, ACK, 1);
    assert!(seen.insert(bench.digest()));
    bench.set_reg(DISK, STATUS, 0);
    assert!(seen.insert(bench.digest()));
    bench.deliver(done(2, DiskOutcome::Flushed)).unwrap();
    assert!(seen.insert(bench.digest()), "orphans");
}
