//! A guest that computes without exits gets its interrupts wherever a kick takes it out, if nobody is
//! to replay it, and only then.

mod common;

use common::guest::Ring;
use common::run::{Scenario, Storm};
use common::{guests, kvm_is_here};
use vmm::recorder::{Policy, Recorder};
use vmm::runner::{Runner, Turn};
use vmm::tape::GuestEnd;
use vmm::testing::MemoryHost;

/// Enough for the guests here, and an end to those that never get on.
const TURNS: u32 = 100_000;

fn tape(scenario: &Scenario) -> Recorder<MemoryHost> {
    let policy = Policy {
        record: false,
        ..Policy::default()
    };
    // Each kick looks at the clock.
    let host = MemoryHost::new(100_000, &[], 1);
    Recorder::start(host, policy, scenario.header()).expect("a host in memory")
}

#[test]
fn a_kick_is_as_good_as_a_landmark_where_nobody_replays() {
    if !kvm_is_here("interrupts without exits") {
        return;
    }
    for ring in [Ring::Three, Ring::Zero] {
        let scenario = Scenario::new(guests::computing(ring, 40));
        let mut tape = tape(&scenario);
        let machine = scenario.machine();
        let storm = Storm::start(machine.kicker());
        let mut runner = Runner::unrepeatable(machine);
        let end = (0..TURNS).find_map(|_| {
            let turn = runner.turn(&mut tape, 1).expect("no failure");
            matches!(turn, Turn::Ended(_)).then_some(turn)
        });
        drop(storm);
        assert_eq!(end, Some(Turn::Ended(GuestEnd::PowerOff)), "{ring:?}");
        assert!(runner.kicks() >= 40, "{ring:?}: {}", runner.kicks());
    }
}

#[test]
fn a_machine_that_can_be_replayed_is_given_nothing_between_landmarks() {
    if !kvm_is_here("no interrupts without exits") {
        return;
    }
    let scenario = Scenario::new(guests::computing(Ring::Three, 1));
    let mut tape = tape(&scenario);
    let machine = scenario.machine();
    let storm = Storm::start(machine.kicker());
    let mut runner = Runner::new(machine);
    while runner.kicks() < 200 {
        let turn = runner.turn(&mut tape, 64).expect("no failure");
        assert_eq!(turn, Turn::Ran);
    }
    drop(storm);
}
