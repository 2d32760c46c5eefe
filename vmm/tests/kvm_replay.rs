//! What is recorded on KVM replays equal, digest by digest, under a storm of kicks on both sides.

mod common;

use common::guest::Ring;
use common::run::{Scenario, record, replay};
use common::{guests, kvm_is_here};
use replay_log::{Batch, Entry, Mark};

/// Records under a storm of kicks, replays under another, and compares everything there is.
fn holds(name: &str, scenario: &Scenario) {
    if !kvm_is_here(name) {
        return;
    }
    let recorded = record(scenario);
    let replayed = replay(scenario, &recorded.batches).unwrap_or_else(|e| panic!("{name}: {e}"));
    println!(
        "{name}: {} landmarks, {} marks, {} and {} kicks, {} outputs",
        recorded.at,
        replayed.marks,
        recorded.kicks,
        replayed.kicks,
        recorded.outputs.len()
    );
    assert!(recorded.kicks > 0 && replayed.kicks > 0);
    assert_eq!(replayed.at, recorded.at);
    assert_eq!(replayed.outputs, recorded.outputs);
    assert!(replayed.marks >= scenario.marks_at_least);
    assert!(replayed.memory == recorded.memory, "{name}: memory differs");
}

#[test]
fn switching_off() {
    for ring in [Ring::Zero, Ring::Three] {
        holds("switching off", &Scenario::new(guests::off(ring)));
    }
}

#[test]
fn halting_until_the_timer_is_due() {
    holds("halting", &Scenario::new(guests::halting(60)));
}

#[test]
fn idling_until_the_timer_is_due() {
    holds("idling", &Scenario::new(guests::idling(Ring::Three, 60)));
}

#[test]
fn timer_interrupts_in_ring_0() {
    holds(
        "timer, ring 0",
        &Scenario::new(guests::interrupted(Ring::Zero, 60)),
    );
}

#[test]
fn timer_interrupts_in_ring_3() {
    holds(
        "timer, ring 3",
        &Scenario::new(guests::interrupted(Ring::Three, 60)),
    );
}

#[test]
fn ports_of_all_sizes_and_strings() {
    for ring in [Ring::Zero, Ring::Three] {
        holds("ports", &Scenario::new(guests::ports(ring, 4)));
    }
}

#[test]
fn mmio_of_all_sizes_and_strings() {
    for ring in [Ring::Zero, Ring::Three] {
        holds("MMIO", &Scenario::new(guests::mmio(ring, 4)).with_network());
    }
}

#[test]
fn floating_point() {
    holds(
        "floating point",
        &Scenario::new(guests::floating_point(300)),
    );
}

#[test]
fn frames_both_ways() {
    for ring in [Ring::Zero, Ring::Three] {
        holds(
            "frames",
            &Scenario::new(guests::echo(ring, 40))
                .with_network()
                .with_frames(40),
        );
    }
}

#[test]
fn disk_writes_flushes_and_reads() {
    for ring in [Ring::Zero, Ring::Three] {
        holds("disk", &Scenario::new(guests::disk(ring, 20)).with_disk());
    }
}

/// Guests that ask the outside nothing it could answer differently do exactly the same with and
/// without kicks: one digest after every single exit, in every run.
#[test]
fn kicks_leave_no_trace() {
    if !kvm_is_here("kicks leave no trace") {
        return;
    }
    for image in [
        guests::ports(Ring::Three, 2),
        guests::mmio(Ring::Three, 8),
        guests::floating_point(300),
    ] {
        let mut scenario = Scenario::new(image).with_network();
        scenario.mark_landmarks = 1;
        let stormy = marks(&record(&scenario).batches);
        scenario.storm = false;
        let quiet = marks(&record(&scenario).batches);
        assert!(quiet.len() > 200);
        assert_eq!(stormy, quiet);
    }
}

/// A replica whose guest differs in a single byte is found out.
#[test]
fn another_guests_log_diverges() {
    if !kvm_is_here("another guest's log") {
        return;
    }
    for (here, there) in [
        (guests::register(1), guests::register(2)),
        (guests::floating_point(40), guests::floating_point(41)),
        (guests::halting(4), guests::interrupted(Ring::Zero, 4)),
    ] {
        let mut scenario = Scenario::new(here);
        scenario.mark_landmarks = 1;
        let recorded = record(&scenario);
        scenario.image = there;
        let error = replay(&scenario, &recorded.batches)
            .err()
            .expect("it is another guest");
        let said = error.to_string();
        assert!(said.contains("diverged at position"), "{said}");
    }
}

fn marks(batches: &[Batch]) -> Vec<Mark> {
    batches
        .iter()
        .flat_map(|batch| batch.decode().expect("the log can be read"))
        .filter_map(|entry| match entry {
            Entry::Mark(mark) => Some(mark),
            _ => None,
        })
        .collect()
}
