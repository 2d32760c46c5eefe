//! What exits, completions and digests cost on this host. Prints figures and judges none:
//! `cargo test -p vmm --release --test kvm_costs -- --ignored --nocapture`.

mod common;

use std::time::{Duration, Instant};

use common::guest::Ring;
use common::tape::NoTape;
use common::{config, guests, kvm_is_here, machine};
use vmm::kvm::KvmMachine;
use vmm::machine::{DigestScope, Enter, Entered, Machine};
use vmm::tape::CpuState;

const EXITS: u32 = 20_000;

/// Runs a guest to its end, doing `at_exit` after each exit; the time per exit.
fn time(ring: Ring, mmio: bool, mut at_exit: impl FnMut(&mut KvmMachine)) -> Duration {
    let mut machine = machine(&config(), &guests::exits(ring, mmio, EXITS));
    let mut tape = NoTape::default();
    let begin = Instant::now();
    let mut exits = 0;
    while machine.cpu() == CpuState::Ready {
        let entered = machine
            .enter(Enter::Run, &mut tape)
            .expect("the guest runs");
        if entered == Entered::Exit {
            exits += 1;
            at_exit(&mut machine);
        }
    }
    begin.elapsed() / exits
}

fn complete(machine: &mut KvmMachine) {
    let mut tape = NoTape::default();
    while machine
        .enter(Enter::Complete, &mut tape)
        .expect("the I/O completes")
        != Entered::Settled
    {}
}

#[test]
#[ignore = "prints figures"]
fn costs() {
    if !kvm_is_here("costs") {
        return;
    }
    for (ring, mmio) in [
        (Ring::Zero, false),
        (Ring::Three, false),
        (Ring::Zero, true),
        (Ring::Three, true),
    ] {
        let plain = time(ring, mmio, |_| {});
        let settled = time(ring, mmio, complete);
        println!(
            "{ring:?}, MMIO {mmio}: exit {plain:?}, completion {:?}",
            settled.saturating_sub(plain)
        );
    }
    let settled = time(Ring::Three, false, complete);
    for (name, deep, scrub) in [
        ("shallow", false, 0),
        ("shallow, 4 pages", false, 4),
        ("deep", true, 0),
    ] {
        let scope = DigestScope {
            deep,
            scrub: (0x100, scrub),
            ..DigestScope::default()
        };
        let with = time(Ring::Three, false, |machine| {
            complete(machine);
            machine.digest(scope).expect("the state can be read");
        });
        println!("digest, {name}: {:?}", with.saturating_sub(settled));
    }
}
