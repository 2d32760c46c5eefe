use bytes::Bytes;
use replay_log::{Arrival, GuestTime, TimerId};
use vm_memory::{Address as _, Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::super::testing::{Bench, timer_due};
use super::*;
use crate::tape::Command;

#[test]
fn the_clock_reads_in_halves_that_belong_together() {
    let mut bench = Bench::new();
    bench.tape.now = 7 << 32;
    let low = bench.inl(layout::CLOCK_LOW);
    bench.tape.now = 9 << 32;
    let high = bench.inl(layout::CLOCK_HIGH);
    assert_eq!((high, low), (7, 1_000_000_007));
    bench.tape.now = 4_000_000_000;
    assert_eq!(bench.inl(layout::CLOCK_MILLIS), 5_000);
}

#[test]
fn a_short_reading_says_when_it_is_not_enough() {
    let mut bench = Bench::new();
    // The tape's clock goes on by a second with each reading.
    bench.tape.now = 5 << 31;
    let stale = bench.inl(layout::CLOCK_SHORT);
    assert_eq!(stale, (1 << 31) + 1_000_000_007, "never read in full");
    bench.inl(layout::CLOCK_LOW);
    assert_eq!(
        bench.inl(layout::CLOCK_SHORT) >> 31,
        1,
        "3 s are more than 31 bits"
    );
    bench.tape.now = 7 << 31;
    bench.inl(layout::CLOCK_LOW);
    assert_eq!(bench.inl(layout::CLOCK_SHORT), 2_000_000_014);
    bench.tape.now = 2 << 31;
    assert_eq!(bench.inl(layout::CLOCK_SHORT) >> 31, 1);
}

#[test]
fn a_distance_begins_at_the_time_that_was_told() {
    let mut bench = Bench::new();
    bench.tape.now = 6_000_000_000;
    bench.inl(layout::CLOCK_SHORT);
    bench.outl(layout::TIMER_DISTANCE, 9);
    bench.outl(layout::TIMER_DISTANCE, 0);
    let arm = |nanos: Option<u64>| Command::ArmTimer {
        timer: TimerId(0),
        deadline: nanos.map(GuestTime),
    };
    let expected = [arm(Some(7_000_000_016)), arm(None)];
    assert_eq!(bench.tape.commands, expected);
}

#[test]
fn accesses_of_the_wrong_size_ask_nothing() {
    let mut bench = Bench::new();
    assert_eq!(bench.inb(layout::CLOCK_LOW), 0xff);
    bench.outb(layout::TIMER_HIGH, 1);
    bench.outb(layout::POWER, 1);
    assert_eq!(bench.tape.now, 0);
    assert!(bench.tape.commands.is_empty());
    assert_eq!(bench.platform.ended(), None);
}

#[test]
fn unclaimed_addresses_read_as_ones() {
    let mut bench = Bench::new();
    for (space, address) in [
        (Space::Port, 0x80),
        (Space::Port, 0xffff),
        (Space::Port, u64::MAX),
        (Space::Mmio, 0),
        (Space::Mmio, layout::VIRTIO_BASE + 3 * layout::VIRTIO_WINDOW),
        (Space::Mmio, u64::MAX - 1),
    ] {
        let mut data = [0; 4];
        bench.read(space, address, &mut data);
        assert_eq!(data, [0xff; 4]);
        bench.write(space, address, &[0; 4]);
    }
}

#[test]
fn entropy_comes_from_the_tape_in_the_size_asked_for() {
    let mut bench = Bench::new();
    assert_eq!(bench.inl(layout::ENTROPY), 0x0403_0201);
    assert_eq!(bench.inb(layout::ENTROPY), 1);
}

#[test]
fn a_tape_with_the_wrong_answer_is_an_error() {
    let mut bench = Bench::new();
    bench.tape.confused = true;
    for port in [
        layout::CLOCK_LOW,
        layout::CLOCK_MILLIS,
        layout::CLOCK_SHORT,
        layout::ENTROPY,
    ] {
        let result = bench.platform.read(
            Space::Port,
            port.into(),
            &mut [0; 4],
            &bench.memory,
            &mut bench.tape,
        );
        assert!(matches!(result, Err(TapeError::Host { .. })));
    }
}

#[test]
fn the_timer_interrupts_once_per_arming() {
    let mut bench = Bench::new();
    bench.init_pic();
    bench.outl(layout::TIMER_LOW, 5);
    assert!(bench.tape.commands.is_empty());
    bench.outl(layout::TIMER_HIGH, 1);
    bench.outl(layout::TIMER_MILLIS, 3);
    bench.outl(layout::TIMER_MILLIS, 0);
    bench.outl(layout::TIMER_MILLIS, 4);
    let arm = |nanos: Option<u64>| Command::ArmTimer {
        timer: TimerId(0),
        deadline: nanos.map(GuestTime),
    };
    let expected = [
        arm(Some((1 << 32) + 5)),
        arm(Some(3_000_000)),
        arm(None),
        arm(Some(4_000_000)),
    ];
    assert_eq!(bench.tape.commands, expected);

    bench.deliver(timer_due()).unwrap();
    assert_eq!(bench.platform.acknowledge_interrupt(), 0x20);
    bench.outb(0x20, 0x20);
    assert!(!bench.platform.interrupt_waits());
    bench.outl(layout::TIMER_MILLIS, 5);
    bench.deliver(timer_due()).unwrap();
    assert!(bench.platform.interrupt_waits());
}

#[test]
fn a_deadline_that_crossed_the_disarming_is_ignored() {
    let mut bench = Bench::new();
    bench.init_pic();
    bench.outl(layout::TIMER_MILLIS, 5);
    bench.outl(layout::TIMER_MILLIS, 0);
    bench.deliver(timer_due()).unwrap();
    assert!(!bench.platform.interrupt_waits());
    let unknown = Arrival::TimerDue { timer: TimerId(2) };
    assert!(matches!(
        bench.deliver(unknown),
        Err(MachineError::CannotTake { .. })
    ));
}

#[test]
fn console_output_is_one_command_per_exit() {
    let mut bench = Bench::new();
    bench.outb(layout::SERIAL, b'a');
    bench
        .platform
        .write_repeated(
            Space::Port,
            layout::SERIAL.into(),
            1,
            b"bcd",
            &bench.memory,
            &mut bench.tape,
        )
        .unwrap();
    let expected = ["a", "bcd"].map(|text| Command::Console(Bytes::from(text)));
    assert_eq!(bench.tape.commands, expected);
}

#[test]
fn typed_bytes_interrupt_and_are_read() {
    let mut bench = Bench::new();
    bench.init_pic();
    bench.outb(layout::SERIAL + 1, 1);
    let room = bench.can_take().console;
    assert!(room > 0);
    let bytes = Bytes::from_static(b"ok");
    bench.deliver(Arrival::Console { bytes }).unwrap();
    assert_eq!(bench.can_take().console, room - 2);
    assert_eq!(bench.platform.acknowledge_interrupt(), 0x24);
    bench.outb(0x20, 0x20);
    assert_eq!(bench.inb(layout::SERIAL), b'o');
    assert_eq!(bench.inb(layout::SERIAL + 5) & 1, 1);
    assert_eq!(bench.inb(layout::SERIAL), b'k');
    assert_eq!(bench.inb(layout::SERIAL + 5) & 1, 0);
    assert!(!bench.platform.interrupt_waits());

    let bytes = Bytes::from(vec![0; room + 1]);
    assert!(bench.deliver(Arrival::Console { bytes }).is_err());
    assert_eq!(bench.can_take().console, room);

    // The line went down when the last byte was read, so that this is another edge.
    let bytes = Bytes::from_static(b"!");
    bench.deliver(Arrival::Console { bytes }).unwrap();
    assert!(bench.platform.interrupt_waits());
    // In loopback what is typed waits outside.
    bench.outb(layout::SERIAL + 4, 0x10);
    assert_eq!(bench.can_take().console, 0);
    bench.outb(layout::SERIAL + 4, 0);
    assert_eq!(bench.can_take().console, room - 1);
}

#[test]
fn the_transmitter_interrupts_a_driver_that_asks_for_it() {
    let mut bench = Bench::new();
    bench.init_pic();
    bench.outb(layout::SERIAL + 1, 2);
    assert_eq!(bench.platform.acknowledge_interrupt(), 0x24);
    assert_eq!(bench.inb(layout::SERIAL + 2) & 0xf, 2);
    bench.outb(0x20, 0x20);
    assert!(!bench.platform.interrupt_waits());
    bench.outb(layout::SERIAL, b'x');
    assert!(bench.platform.interrupt_waits());
}

#[test]
fn the_power_port_ends_the_guest() {
    for (value, end) in [
        (1, Some(GuestEnd::PowerOff)),
        (2, Some(GuestEnd::Reset)),
        (3, None),
    ] {
        let mut bench = Bench::new();
        bench.outl(layout::POWER, value);
        assert_eq!(bench.platform.ended(), end);
    }
}

#[test]
fn a_kernel_that_knows_acpi_can_end_the_guest() {
    let mut bench = Bench::new();
    let mut control = [0xff; 2];
    bench.read(Space::Port, layout::ACPI_CONTROL.into(), &mut control);
    assert_eq!(control, [1, 0], "ACPI is on");
    assert_eq!(bench.inl(layout::ACPI_STATUS), 0, "no event, none enabled");
    bench.write(Space::Port, layout::ACPI_ENABLE.into(), &[0x20, 1]);
    assert_eq!(bench.inl(layout::ACPI_STATUS), 0x0120_0000);
    for (port, bytes, end) in [
        (layout::ACPI_CONTROL, &[1, 0x14][..], None),
        (layout::ACPI_CONTROL, &[1, 0x30], None),
        (layout::ACPI_CONTROL, &[1, 0x34], Some(GuestEnd::PowerOff)),
        (layout::ACPI_CONTROL, &[1, 0x34, 0, 0], None),
        (layout::ACPI_RESET, &[1], None),
        (layout::ACPI_RESET, &[2], Some(GuestEnd::Reset)),
    ] {
        let mut bench = Bench::new();
        bench.write(Space::Port, port.into(), bytes);
        assert_eq!(bench.platform.ended(), end, "{port:#x} {bytes:x?}");
    }
}

#[test]
fn idle_ends_with_an_arrival_or_an_interrupt() {
    let mut bench = Bench::new();
    bench.init_pic();
    bench.outb(layout::IDLE, 0);
    assert!(bench.platform.idle());
    bench.deliver(timer_due()).unwrap();
    assert!(!bench.platform.idle());

    bench.outl(layout::TIMER_MILLIS, 1);
    bench.deliver(timer_due()).unwrap();
    bench.outl(layout::IDLE, 0);
    assert!(bench.platform.idle(), "0 waits for what comes from now on");
    bench.platform.acknowledge_interrupt();
    assert!(!bench.platform.idle());
}

#[test]
fn a_careful_guest_does_not_oversleep() {
    let mut bench = Bench::new();
    bench.outb(layout::IDLE, 1);
    assert!(bench.platform.idle());
    // Both arrive before the guest executes again: it will see them.
    bench.deliver(timer_due()).unwrap();
    bench.deliver(timer_due()).unwrap();
    assert!(!bench.platform.idle());
    bench.outb(layout::IDLE, 1);
    assert!(bench.platform.idle());
    bench.deliver(timer_due()).unwrap();
    // This one arrives at another exit than the idle port's.
    bench.inl(layout::CLOCK_LOW);
    bench.deliver(timer_due()).unwrap();
    bench.outb(layout::IDLE, 1);
    assert!(!bench.platform.idle());
    bench.outb(layout::IDLE, 1);
    assert!(bench.platform.idle());
}

#[test]
fn a_text_is_printed_in_one_exit() {
    let mut bench = Bench::new();
    let text = vec![b'x'; 5000];
    bench.memory.write_slice(&text, GuestAddress(4000)).unwrap();
    bench.outl(layout::PRINT, 3);
    assert!(bench.tape.commands.is_empty(), "nobody said where");
    bench.outl(layout::PRINT_WHERE, 4000);
    let printed = [(0, 0), (3, 3), (4096, 4096), (4097, 4096), (u32::MAX, 4096)];
    for (asked, printed) in printed {
        bench.outl(layout::PRINT, asked);
        let expected = (printed > 0).then(|| Command::Console(text[..printed].to_vec().into()));
        assert_eq!(bench.tape.commands.pop(), expected);
    }
    let end = bench.memory.last_addr().raw_value() as u32;
    for nowhere in [end, u32::MAX] {
        bench.outl(layout::PRINT_WHERE, nowhere);
        bench.outl(layout::PRINT, 2);
    }
    assert!(bench.tape.commands.is_empty(), "not all of it is in memory");
}

#[test]
fn everything_a_guest_can_change_changes_the_digest() {
    let mut bench = Bench::new();
    let mut seen = std::collections::HashSet::from([bench.digest()]);
    let mut check = |what: &str, bench: &Bench| {
        assert!(seen.insert(bench.digest()), "{what} is not in the digest");
    };
    bench.inl(layout::CLOCK_LOW);
    bench.inl(layout::CLOCK_LOW);
    bench.inl(layout::CLOCK_LOW);
    bench.inl(layout::CLOCK_LOW);
    bench.inl(layout::CLOCK_LOW);
    check("the clock's latch", &bench);
    for (known, what) in [(2, "the time that was told"), (3, "what is known of it")] {
        bench.tape.now = known << 31;
        bench.inl(layout::CLOCK_LOW);
        bench.tape.now = 9 << 32;
        bench.inl(layout::CLOCK_MILLIS);
        check(what, &bench);
    }
    bench.outl(layout::TIMER_LOW, 1);
    check("the timer's latch", &bench);
    bench.outl(layout::TIMER_HIGH, 1);
    check("the deadline", &bench);
    bench.deliver(timer_due()).unwrap();
    check("a due timer", &bench);
    bench.outb(layout::SERIAL + 7, 1);
    check("a serial register", &bench);
    let bytes = Bytes::from_static(b"a");
    bench.deliver(Arrival::Console { bytes }).unwrap();
    check("the receive queue", &bench);
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 9)] {
        bench.outb(port, value);
        check("the interrupt controller", &bench);
    }
    bench.outb(layout::IDLE, 0);
    check("idle", &bench);
    bench.write(Space::Port, layout::ACPI_ENABLE.into(), &[0x20, 0]);
    check("ACPI's enabled events", &bench);
    bench.outl(layout::PRINT_WHERE, 1);
    check("where a text stands", &bench);
    for device in [0, 1, 2, 5, 6] {
        bench.set_reg(device, 0x70, 1);
        check("a virtio status", &bench);
    }
    bench.outl(layout::POWER, 1);
    check("power", &bench);
}
