//! The 8254 as kernels use it: one shot, periodic, latched reads, counter 2 through port 0x61.

use replay_log::{Arrival, GuestTime};

use super::super::layout::{PIC_MASTER, PIT, SPEAKER as PORT_61};
use super::super::testing::Bench;
use super::*;
use crate::tape::{Command, Delivery};

/// What the fake tape adds to the time whenever it is asked.
const STEP: u64 = 1_000_000_007;

/// A bench whose interrupt controller lets line 0 through as vector 0x20.
fn bench() -> Bench {
    let mut bench = Bench::new();
    for (port, value) in [(0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, 0xfe)] {
        bench.outb(PIC_MASTER + port, value);
    }
    bench
}

/// Programs a counter and writes both bytes of its count; the time it was loaded at.
fn load(bench: &mut Bench, counter: u8, mode: u8, count: u16) -> u64 {
    bench.outb(PIT + 3, counter << 6 | 0x30 | mode << 1);
    let [low, high] = count.to_le_bytes();
    bench.outb(PIT + u16::from(counter), low);
    bench.outb(PIT + u16::from(counter), high);
    bench.tape.now
}

fn due(bench: &mut Bench) {
    let arrival = Arrival::TimerDue { timer: PIT_TIMER };
    let delivery = Delivery {
        arrival,
        data: None,
    };
    bench
        .platform
        .deliver(delivery, &bench.memory)
        .expect("it is taken");
}

fn exit(bench: &mut Bench) {
    let tape = &mut bench.tape;
    bench.platform.exit_served(tape).expect("the tape obeys");
}

fn armed(bench: &mut Bench) -> Vec<Option<u64>> {
    let commands = std::mem::take(&mut bench.tape.commands);
    commands
        .into_iter()
        .map(|command| match command {
            Command::ArmTimer { timer, deadline } if timer == PIT_TIMER => {
                deadline.map(|GuestTime(nanos)| nanos)
            }
            other => panic!("{other:?} is not the 8254's"),
        })
        .collect()
}

/// Acknowledges the waiting interrupt and ends it.
fn acknowledge(bench: &mut Bench) -> u8 {
    let vector = bench.platform.acknowledge_interrupt();
    bench.outb(PIC_MASTER, 0x20);
    vector
}

#[test]
fn one_shot_interrupts_once() {
    let mut bench = bench();
    let loaded = load(&mut bench, 0, 4, 11_932);
    assert_eq!(armed(&mut bench), [Some(loaded + 10_000_151)]);
    assert!(!bench.platform.interrupt_waits());
    due(&mut bench);
    assert!(bench.platform.interrupt_waits());
    assert_eq!(acknowledge(&mut bench), 0x20);
    exit(&mut bench);
    assert!(armed(&mut bench).is_empty());
    due(&mut bench);
    assert!(!bench.platform.interrupt_waits(), "news of long ago");
}

#[test]
fn a_periodic_tick_is_armed_at_the_next_exit_and_none_is_lost() {
    let mut bench = bench();
    let loaded = load(&mut bench, 0, 2, 0);
    let period = |n: u64| loaded + (n * 65_536 * 1_000_000_000).div_ceil(1_193_182);
    assert_eq!(armed(&mut bench), [Some(period(1))]);
    for n in 1..=100 {
        // However late it is delivered, the next one is due where it belongs.
        bench.tape.now += 5 * STEP;
        due(&mut bench);
        assert!(armed(&mut bench).is_empty(), "an arrival commands nothing");
        assert_eq!(acknowledge(&mut bench), 0x20);
        exit(&mut bench);
        assert_eq!(armed(&mut bench), [Some(period(n + 1))]);
    }
}

#[test]
fn a_new_mode_disarms() {
    let mut bench = bench();
    load(&mut bench, 0, 2, 1000);
    assert_eq!(armed(&mut bench).len(), 1);
    bench.outb(PIT + 3, 0x38);
    assert_eq!(armed(&mut bench), [None]);
    bench.outb(PIT + 3, 0x38);
    assert!(armed(&mut bench).is_empty());
    due(&mut bench);
    assert!(!bench.platform.interrupt_waits());
}

#[test]
fn a_latched_count_stays_until_it_is_read() {
    let mut bench = bench();
    let loaded = load(&mut bench, 0, 0, 60_000);
    // 10 ms less the step that the question itself takes.
    bench.tape.now = (loaded + 10_000_000).wrapping_sub(STEP);
    bench.outb(PIT + 3, 0);
    bench.tape.now += 1_000_000_000;
    bench.outb(PIT + 3, 0);
    let count = u16::from_le_bytes([bench.inb(PIT), bench.inb(PIT)]);
    assert_eq!(count, 60_000 - 11_931);
    let asked = bench.tape.now;
    let _ = (bench.inb(PIT), bench.inb(PIT));
    assert_eq!(
        bench.tape.now,
        asked + STEP,
        "both halves are of one moment"
    );
}

#[test]
fn periodic_counts_start_again() {
    for (mode, expected) in [(2, 1000 - 193), (3, 1000 - 2 * 193)] {
        let mut bench = bench();
        let loaded = load(&mut bench, 0, mode, 1000);
        bench.tape.now = (loaded + 1_000_000).wrapping_sub(STEP);
        let count = u16::from_le_bytes([bench.inb(PIT), bench.inb(PIT)]);
        assert_eq!(count, expected, "mode {mode}");
    }
}

#[test]
fn the_status_tells_how_a_counter_is_programmed() {
    let mut bench = bench();
    bench.outb(PIT + 3, 0x34);
    bench.outb(PIT + 3, 0xe2);
    assert_eq!(bench.inb(PIT), 0x80 | 0x40 | 0x34, "no count yet");
    load(&mut bench, 0, 2, 1000);
    bench.outb(PIT + 3, 0xe2);
    assert_eq!(bench.inb(PIT) & 0x7f, 0x34);
}

#[test]
fn counter_2_is_gated_by_port_61() {
    let mut bench = bench();
    bench.outb(PORT_61, 0);
    bench.outb(PORT_61, 1);
    let loaded = load(&mut bench, 2, 0, 59_659);
    bench.tape.now = (loaded + 40_000_000).wrapping_sub(STEP);
    assert_eq!(bench.inb(PORT_61) & !REFRESH, GATE_2);
    bench.tape.now = (loaded + 60_000_000).wrapping_sub(STEP);
    assert_eq!(bench.inb(PORT_61) & !REFRESH, GATE_2 | OUT_2);
    bench.outb(PORT_61, 0);
    bench.outb(PORT_61, 3);
    bench.tape.now -= STEP;
    assert_eq!(bench.inb(PORT_61) & OUT_2, 0, "the gate starts it anew");
    assert!(armed(&mut bench).is_empty(), "only counter 0 interrupts");
}

#[test]
fn every_state_is_in_the_digest() {
    let digest = |bench: &Bench| {
        let mut hasher = blake3::Hasher::new();
        bench.platform.digest(&mut hasher);
        hasher.finalize()
    };
    let mut bench = bench();
    let mut seen = vec![digest(&bench)];
    let mut step = |bench: &Bench, what: &str| {
        let now = digest(bench);
        assert!(!seen.contains(&now), "{what} is not in the digest");
        seen.push(now);
    };
    bench.outb(PIT + 3, 0x34);
    step(&bench, "the mode");
    bench.outb(PIT, 0x10);
    step(&bench, "half a count");
    bench.outb(PIT, 0x20);
    step(&bench, "the count");
    bench.outb(PIT + 3, 0);
    step(&bench, "a latched count");
    bench.inb(PIT);
    step(&bench, "half a read");
    bench.outb(PIT + 3, 0xe2);
    step(&bench, "a latched status");
    bench.outb(PORT_61, 1);
    step(&bench, "the gate");
    bench.outb(PORT_61, 3);
    step(&bench, "the loudspeaker");
    bench.inb(PORT_61);
    step(&bench, "the refresh toggle");
}

#[test]
fn whatever_a_guest_writes_is_harmless() {
    let mut bench = bench();
    let mut value = 1u32;
    for _ in 0..20_000 {
        value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let [what, byte, ..] = value.to_be_bytes();
        match what % 8 {
            port @ 0..=3 => bench.outb(PIT + u16::from(port), byte),
            port @ 4..=6 => {
                bench.inb(PIT + u16::from(port) - 4);
            }
            _ => due(&mut bench),
        }
        exit(&mut bench);
        bench.tape.commands.clear();
        bench.tape.now = bench.tape.now.wrapping_mul(3);
    }
}
