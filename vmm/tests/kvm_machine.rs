//! The machine on KVM by itself: how guests end, what is denied, kicks, digests.

mod common;

use std::sync::mpsc;
use std::time::Duration;

use common::guest::{COUNTERS, EXCEPTION, Guest, Ring, ok};
use common::tape::NoTape;
use common::{config, guests, kvm_is_here, machine};
use replay_log::{Arrival, TimerId};
use vm_memory::{Bytes, GuestAddress};
use vmm::boot::BootImage;
use vmm::kvm::{KvmError, KvmMachine, host_fingerprint};
use vmm::machine::{DigestScope, Enter, Entered, Machine, MachineError};
use vmm::tape::{CpuState, Delivery, GuestEnd};

/// Runs until the vCPU cannot go on by itself; how many exits that took.
fn run(machine: &mut KvmMachine) -> Result<u32, MachineError> {
    let mut tape = NoTape::default();
    let mut exits = 0;
    while machine.cpu() == CpuState::Ready {
        exits += u32::from(machine.enter(Enter::Run, &mut tape)? == Entered::Exit);
        settle(machine)?;
    }
    Ok(exits)
}

fn settle(machine: &mut KvmMachine) -> Result<(), MachineError> {
    while machine.enter(Enter::Complete, &mut NoTape::default())? != Entered::Settled {}
    Ok(())
}

fn end_of(image: &BootImage) -> CpuState {
    let mut machine = machine(&config(), image);
    run(&mut machine).expect("the guest runs to its end");
    machine.cpu()
}

fn memory_word(machine: &KvmMachine, at: u64) -> u64 {
    machine
        .memory()
        .read_obj(GuestAddress(at))
        .expect("inside guest memory")
}

#[test]
fn guests_end_as_they_do() {
    if !kvm_is_here("guests end as they do") {
        return;
    }
    for (image, end) in [
        (guests::off(Ring::Three), GuestEnd::PowerOff),
        (guests::dead(), GuestEnd::Dead),
        (guests::triple_fault(), GuestEnd::TripleFault),
    ] {
        assert_eq!(end_of(&image), CpuState::Stopped(end));
    }
}

#[test]
fn a_halted_guest_takes_no_interrupt_that_does_not_wait() {
    if !kvm_is_here("a halted guest") {
        return;
    }
    let mut machine = machine(&config(), &guests::halting(1));
    run(&mut machine).expect("the guest runs until it halts");
    assert_eq!(machine.cpu(), CpuState::Halted);
    assert!(!machine.inject().expect("nothing to inject"));
    assert_eq!(machine.cpu(), CpuState::Halted);
}

#[test]
fn unlisted_msrs_are_denied() {
    if !kvm_is_here("unlisted MSRs") {
        return;
    }
    let mut machine = machine(&config(), &guests::msrs());
    let plain = guests::off(Ring::Zero);
    let exits = run(&mut machine).expect("the guest runs to its end");
    assert_eq!(machine.cpu(), CpuState::Stopped(GuestEnd::PowerOff));
    assert_eq!(
        memory_word(&machine, guests::GP_COUNT),
        6,
        "three registers, both ways"
    );
    // Only the listed register gave something: its value, rotated once for each other register.
    let folded = memory_word(&machine, guests::GP_COUNT + 8);
    assert_eq!(folded, 0x1234_5678u64.rotate_left(3 * 7));
    if machine.capabilities().msr_exits {
        let mut other = common::machine(&config(), &plain);
        let baseline = run(&mut other).expect("the guest runs to its end");
        assert_eq!(exits, baseline + 6, "each is a numbered exit");
    }
}

#[test]
fn an_exception_in_ring_3_is_the_guests_own_affair() {
    if !kvm_is_here("an exception in ring 3") {
        return;
    }
    let mut guest = Guest::new(Ring::Three);
    ok(guest.asm.ud2());
    let mut machine = machine(&config(), &guest.build());
    run(&mut machine).expect("the guest runs to its end");
    assert_eq!(machine.cpu(), CpuState::Stopped(GuestEnd::Reset));
    assert_eq!(memory_word(&machine, EXCEPTION), 6, "#UD");
}

#[test]
fn an_interrupt_waits_until_the_guest_lets_it_in() {
    if !kvm_is_here("an interrupt waits") {
        return;
    }
    let mut machine = machine(&config(), &guests::masked());
    let mut tape = NoTape::default();
    let mut exit = |machine: &mut KvmMachine| {
        let entered = machine.enter(Enter::Run, &mut tape);
        assert_eq!(entered.expect("the guest runs"), Entered::Exit);
        settle(machine).expect("its I/O completes");
        tape.commands.len()
    };
    while exit(&mut machine) == 0 {}
    let arrival = Arrival::TimerDue { timer: TimerId(0) };
    let delivery = Delivery {
        arrival,
        data: None,
    };
    machine.deliver(delivery).expect("the timer is armed");
    assert!(machine.interrupt_waits());
    assert!(
        !machine.inject().expect("KVM answers"),
        "interrupts are off"
    );
    exit(&mut machine);
    assert!(
        !machine.inject().expect("KVM answers"),
        "interrupts are still off"
    );
    exit(&mut machine);
    assert!(machine.inject().expect("KVM answers"), "now they are on");
    assert!(!machine.inject().expect("KVM answers"), "there was one");
    run(&mut machine).expect("the guest runs to its end");
    assert_eq!(memory_word(&machine, COUNTERS), 1);
}

#[test]
fn completion_finishes_the_io_and_nothing_more() {
    if !kvm_is_here("completion") {
        return;
    }
    let mut machine = machine(&config(), &guests::string_input());
    let mut tape = NoTape::default();
    let mut exits = 0;
    while memory_word(&machine, guests::STRING_TARGET) == 0 {
        assert_eq!(machine.cpu(), CpuState::Ready, "the input never came");
        machine
            .enter(Enter::Run, &mut tape)
            .expect("the guest runs");
        exits += 1;
        settle(&mut machine).expect("its I/O completes");
    }
    // What the tape's entropy is. The next exit is not this instruction's but switching off.
    assert_eq!(memory_word(&machine, guests::STRING_TARGET), 0x0302_0100);
    assert_eq!(
        run(&mut machine).expect("the guest runs to its end"),
        1,
        "after {exits} exits"
    );
}

#[test]
fn no_kick_is_lost() {
    const ROUNDS: u32 = 2000;
    /// So long no kick takes: after it, one is given up for lost.
    const LOST: Duration = Duration::from_secs(20);
    if !kvm_is_here("no kick is lost") {
        return;
    }
    let mut machine = machine(&config(), &guests::spin());
    let kicker = machine.kicker();
    let (go, going) = mpsc::channel::<u32>();
    let (done, kicked) = mpsc::channel::<()>();
    let kicks = std::thread::spawn(move || {
        for round in going {
            // From before the vCPU enters to long after it has.
            for _ in 0..round * 37 % 20_000 {
                std::hint::spin_loop();
            }
            kicker.kick();
            if kicked.recv_timeout(LOST).is_err() {
                // Nothing but a kick gets the other thread out, and this process to an end.
                eprintln!("a kick was lost in round {round}");
                std::process::abort();
            }
        }
    });
    let mut tape = NoTape::default();
    let mut rounds = 0;
    while rounds < ROUNDS {
        go.send(rounds).expect("the kicking thread waits");
        if rounds.is_multiple_of(3) {
            settle(&mut machine).expect("nothing is pending");
        }
        // The prologue's exits come first.
        while machine
            .enter(Enter::Run, &mut tape)
            .expect("the guest runs")
            != Entered::Kicked
        {}
        done.send(()).expect("the kicking thread waits");
        rounds += 1;
    }
    drop(go);
    kicks.join().expect("the kicking thread does not panic");
}

#[test]
fn a_kick_waits_for_the_next_run() {
    if !kvm_is_here("a kick waits") {
        return;
    }
    let mut machine = machine(&config(), &guests::spin());
    let kicker = machine.kicker();
    let mut tape = NoTape::default();
    for _ in 0..3 {
        kicker.kick();
        settle(&mut machine).expect("nothing is pending");
        assert_eq!(
            machine
                .enter(Enter::Run, &mut tape)
                .expect("the guest runs"),
            Entered::Kicked
        );
    }
    drop(machine);
    kicker.kick();
}

#[test]
fn digests_see_registers_exits_and_pages() {
    if !kvm_is_here("digests") {
        return;
    }
    let mut machine = machine(&config(), &guests::floating_point(10));
    let digest = |machine: &mut KvmMachine, scope| machine.digest(scope).expect("it can be read");
    let start = digest(&mut machine, DigestScope::default());
    assert_eq!(
        digest(&mut machine, DigestScope::default()),
        start,
        "nothing has happened"
    );
    machine
        .enter(Enter::Run, &mut NoTape::default())
        .expect("the guest runs");
    settle(&mut machine).expect("its I/O completes");
    let with_exits = digest(&mut machine, DigestScope::default());
    let without = digest(&mut machine, DigestScope::default());
    assert_ne!(with_exits, start);
    assert_ne!(with_exits, without, "the exits are forgotten");
    let deep = DigestScope {
        deep: true,
        ..DigestScope::default()
    };
    assert_ne!(digest(&mut machine, deep), without);

    let scrub = |first| DigestScope {
        scrub: (first, 2),
        ..DigestScope::default()
    };
    let (near, far) = (
        digest(&mut machine, scrub(10)),
        digest(&mut machine, scrub(900)),
    );
    machine
        .memory()
        .write_obj(1u8, GuestAddress(11 * 4096 + 5))
        .expect("inside guest memory");
    assert_ne!(digest(&mut machine, scrub(10)), near);
    assert_eq!(digest(&mut machine, scrub(900)), far);
}

#[test]
fn digests_see_a_register_that_nothing_else_shows() {
    if !kvm_is_here("digests of registers") {
        return;
    }
    let digests = |value| {
        let mut machine = machine(&config(), &guests::register(value));
        let mut digests = Vec::new();
        while machine.cpu() == CpuState::Ready {
            let entered = machine.enter(Enter::Run, &mut NoTape::default());
            entered.expect("the guest runs");
            settle(&mut machine).expect("its I/O completes");
            digests.push(
                machine
                    .digest(DigestScope::default())
                    .expect("it can be read"),
            );
        }
        digests
    };
    let (one, other) = (digests(1), digests(2));
    assert_eq!(one, digests(1));
    // The guests differ in RBX alone, and only from their last but one exit on.
    let before = one.len() - 2;
    assert_eq!(one[..before], other[..before]);
    assert!(
        one[before..]
            .iter()
            .zip(&other[before..])
            .all(|(a, b)| a != b)
    );
}

#[test]
fn the_dirty_log_shows_what_the_guest_wrote() {
    if !kvm_is_here("the dirty log") {
        return;
    }
    let image = guests::floating_point(1);
    let mut machine = KvmMachine::with_dirty_log(&config(), &image).expect("a machine");
    machine.dirty_log().expect("the log can be had");
    run(&mut machine).expect("the guest runs to its end");
    let log = machine.dirty_log().expect("the log can be had");
    let dirty = |address: u64| log[address as usize / 4096 / 64] >> (address / 4096 % 64) & 1 == 1;
    assert!(
        dirty(common::guest::FREE + 0x100),
        "where it stores its result"
    );
    assert!(!dirty(0x30_0000), "where it stores nothing");
}

#[test]
fn impossible_machines_are_refused() {
    if !kvm_is_here("impossible machines") {
        return;
    }
    let image = guests::off(Ring::Zero);
    let with = |change: fn(&mut vmm::config::MachineConfig)| {
        let mut config = config();
        change(&mut config);
        KvmMachine::new(&config, &image)
            .map(|_| ())
            .expect_err("it cannot be made")
    };
    assert!(matches!(with(|c| c.memory = 1 << 20), KvmError::Config(_)));
    assert!(matches!(with(|c| c.memory = 4 << 30), KvmError::Config(_)));
    assert!(matches!(with(|c| c.memory += 1), KvmError::Config(_)));
    assert!(matches!(
        with(|c| c.disks = vec![512; 9]),
        KvmError::Config(_)
    ));
    assert!(matches!(
        with(|c| c.command_line = "x".repeat(9000)),
        KvmError::Boot(_)
    ));
    let garbage = BootImage::new(vec![7; 5000]);
    assert!(matches!(
        KvmMachine::new(&config(), &garbage),
        Err(KvmError::Boot(_))
    ));
}

#[test]
fn the_fingerprint_is_steady_and_can_be_sent() {
    if !kvm_is_here("the fingerprint") {
        return;
    }
    let here = host_fingerprint().expect("KVM is here");
    let again = std::thread::spawn(host_fingerprint)
        .join()
        .expect("no panic")
        .expect("KVM is here");
    assert_eq!(here.compatible_with(&again), []);
    let sent = postcard::to_stdvec(&here).expect("it encodes");
    assert_eq!(
        postcard::from_bytes::<vmm::kvm::HostFingerprint>(&sent).expect("it decodes"),
        here
    );
}
