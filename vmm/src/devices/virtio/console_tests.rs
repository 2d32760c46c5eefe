//! The console and the entropy device as a driver sees them.

use bytes::Bytes;
use replay_log::Arrival;
use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::layout;
use crate::devices::platform::Space;
use crate::devices::testing::Part::{Readable, Writable};
use crate::devices::testing::{Bench, DriverQueue, go_live, negotiate};
use crate::tape::Command;

const CONSOLE: u64 = layout::CONSOLE_WINDOW as u64;
const RNG: u64 = layout::RNG_WINDOW as u64;
const STATUS: u32 = 0x70;
const NOTIFY: u32 = 0x50;
const NEEDS_RESET: u32 = 64;
const DATA: u64 = 0x9000;

fn console() -> (Bench, DriverQueue, DriverQueue) {
    let mut bench = Bench::new();
    bench.init_pic();
    negotiate(&mut bench, CONSOLE, 0);
    let (receive, send) = (DriverQueue::new(0x1000, 8), DriverQueue::new(0x2000, 8));
    receive.set_up(&mut bench, CONSOLE, 0);
    send.set_up(&mut bench, CONSOLE, 1);
    go_live(&mut bench, CONSOLE);
    (bench, receive, send)
}

fn rng() -> (Bench, DriverQueue) {
    let mut bench = Bench::new();
    bench.init_pic();
    negotiate(&mut bench, RNG, 0);
    let queue = DriverQueue::new(0x1000, 8);
    queue.set_up(&mut bench, RNG, 0);
    go_live(&mut bench, RNG);
    (bench, queue)
}

fn typed(bytes: &'static [u8]) -> Arrival {
    let bytes = Bytes::from_static(bytes);
    Arrival::Console { bytes }
}

fn memory<const N: usize>(bench: &Bench, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    let at = GuestAddress(at);
    bench.memory.read_slice(&mut bytes, at).unwrap();
    bytes
}

#[test]
fn both_introduce_themselves() {
    let mut bench = Bench::with_disks(&[]);
    for (device, kind) in [(CONSOLE, 3), (RNG, 4)] {
        assert_eq!(bench.reg(device, 0), 0x7472_6976);
        assert_eq!(bench.reg(device, 8), kind);
        assert_eq!(bench.reg(device, 0x10), 0, "no features beyond VERSION_1");
        assert_eq!(bench.reg(device, 0x100), 0, "no configuration");
    }
    let mut beyond = [0; 4];
    let address = layout::VIRTIO_BASE + (RNG + 1) * layout::VIRTIO_WINDOW;
    bench.read(Space::Mmio, address, &mut beyond);
    assert_eq!(beyond, [0xff; 4]);
}

#[test]
fn what_is_written_in_one_exit_is_one_output() {
    let (mut bench, _, mut send) = console();
    let text = b"hello, world";
    bench.memory.write_slice(text, GuestAddress(DATA)).unwrap();
    send.add(
        &bench.memory,
        &[Readable(DATA, 3), Readable(DATA + 3, 4), Readable(DATA, 0)],
    );
    send.add(&bench.memory, &[Readable(DATA + 7, 5)]);
    bench.set_reg(CONSOLE, NOTIFY, 1);
    let expected = [Command::Console(Bytes::from_static(text))];
    assert_eq!(bench.tape.commands, expected);
    assert_eq!(send.next_used(&bench.memory), Some((0, 0)));
    assert_eq!(send.next_used(&bench.memory), Some((3, 0)));
    let line = 0x20 + layout::CONSOLE_IRQ;
    assert_eq!(bench.platform.acknowledge_interrupt(), line);
}

#[test]
fn a_chain_is_cut_off_where_an_output_ends() {
    let (mut bench, _, mut send) = console();
    send.add(&bench.memory, &[Readable(0, 1 << 20)]);
    bench.set_reg(CONSOLE, NOTIFY, 1);
    let [Command::Console(bytes)] = &bench.tape.commands[..] else {
        panic!("{} commands", bench.tape.commands.len());
    };
    assert_eq!(bytes.len(), 64 << 10);
}

#[test]
fn typed_bytes_go_to_the_virtio_console_once_it_is_live() {
    let mut serial = Bench::new();
    serial.deliver(typed(b"a")).unwrap();
    assert_eq!(serial.inb(layout::SERIAL), b'a');

    let (mut bench, mut receive, _) = console();
    let room = bench.can_take().console;
    bench.deliver(typed(b"abcde")).unwrap();
    assert_eq!(bench.can_take().console, room - 5, "no buffer yet");
    receive.add(&bench.memory, &[Writable(DATA, 2)]);
    receive.add(&bench.memory, &[Readable(DATA, 1)]);
    receive.add(
        &bench.memory,
        &[Writable(DATA + 2, 1), Writable(DATA + 3, 60)],
    );
    bench.set_reg(CONSOLE, NOTIFY, 0);
    assert_eq!(memory(&bench, DATA), *b"abcde");
    assert_eq!(receive.next_used(&bench.memory), Some((0, 2)));
    assert_eq!(receive.next_used(&bench.memory), Some((1, 0)), "no room");
    assert_eq!(receive.next_used(&bench.memory), Some((2, 3)));
    assert_eq!(bench.can_take().console, room);
    assert_eq!(bench.inb(layout::SERIAL + 5) & 1, 0, "nothing there");

    receive.add(&bench.memory, &[Writable(DATA, 8)]);
    bench.deliver(typed(b"z")).unwrap();
    assert_eq!(receive.next_used(&bench.memory), Some((4, 1)));

    let bytes = Bytes::from(vec![0; room + 1]);
    assert!(bench.deliver(Arrival::Console { bytes }).is_err());
    bench.set_reg(CONSOLE, STATUS, 0);
    bench.deliver(typed(b"s")).unwrap();
    assert_eq!(bench.inb(layout::SERIAL), b's', "its driver is gone");
}

#[test]
fn typed_bytes_die_with_the_driver_they_were_for() {
    let (mut bench, ..) = console();
    let room = bench.can_take().console;
    bench.deliver(typed(b"secret")).unwrap();
    negotiate(&mut bench, CONSOLE, 0);
    let mut receive = DriverQueue::new(0x4000, 8);
    receive.set_up(&mut bench, CONSOLE, 0);
    go_live(&mut bench, CONSOLE);
    assert_eq!(bench.can_take().console, room);
    receive.add(&bench.memory, &[Writable(DATA, 8)]);
    bench.set_reg(CONSOLE, NOTIFY, 0);
    assert_eq!(receive.next_used(&bench.memory), None);
}

#[test]
fn entropy_is_bounded_per_buffer_and_per_exit() {
    let (mut bench, mut queue) = rng();
    queue.add(&bench.memory, &[Writable(DATA, 3), Writable(DATA + 8, 2)]);
    queue.add(&bench.memory, &[Writable(DATA + 16, 4096)]);
    bench.set_reg(RNG, NOTIFY, 0);
    assert_eq!(queue.next_used(&bench.memory), Some((0, 5)));
    assert_eq!(queue.next_used(&bench.memory), Some((2, 64)));
    assert_eq!(memory(&bench, DATA), [1, 2, 3, 0, 0, 0, 0, 0, 4, 5, 0]);
    assert_eq!(memory::<1>(&bench, DATA + 16 + 63), [64]);
    assert_eq!(memory::<1>(&bench, DATA + 16 + 64), [0]);
    let line = 0x20 + layout::RNG_IRQ;
    assert_eq!(bench.platform.acknowledge_interrupt(), line);
}

#[test]
fn entropy_for_no_room_needs_a_reset() {
    let (mut bench, mut queue) = rng();
    queue.add(&bench.memory, &[Readable(DATA, 16)]);
    bench.set_reg(RNG, NOTIFY, 0);
    assert_eq!(bench.reg(RNG, STATUS), 15 | NEEDS_RESET);
}

#[test]
fn a_tape_with_the_wrong_answer_is_an_error() {
    let (mut bench, mut queue) = rng();
    queue.add(&bench.memory, &[Writable(DATA, 16)]);
    bench.tape.confused = true;
    let address = layout::VIRTIO_BASE + RNG * layout::VIRTIO_WINDOW + u64::from(NOTIFY);
    bench
        .platform
        .write(
            Space::Mmio,
            address,
            &[0; 4],
            &bench.memory,
            &mut bench.tape,
        )
        .unwrap_err();
}

#[test]
fn what_they_remember_is_in_the_digest() {
    let (mut bench, mut receive, _) = console();
    let mut seen = std::collections::HashSet::from([bench.digest()]);
    for byte in [&b"a"[..], b"b"] {
        bench.deliver(typed(byte)).unwrap();
        assert!(seen.insert(bench.digest()), "typed bytes");
    }
    receive.add(&bench.memory, &[Writable(DATA, 1)]);
    bench.set_reg(CONSOLE, NOTIFY, 0);
    assert!(seen.insert(bench.digest()), "one is read");

    let (mut bench, mut queue) = rng();
    let before = bench.digest();
    queue.add(&bench.memory, &[Writable(DATA, 1)]);
    bench.set_reg(RNG, NOTIFY, 0);
    assert_ne!(bench.digest(), before, "the queue's indices");
}
