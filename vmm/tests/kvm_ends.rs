//! Guests that end, or seem to, in ways that only a real CPU and a real KVM know: what they do to
//! themselves is theirs, is in the log, and is the same on every copy.

mod common;

use common::guest::{EXCEPTION, Guest, Ring, ok};
use common::kvm_is_here;
use common::run::{Recorded, Scenario, record_to_end, replay_to_end};
use iced_x86::code_asm::*;
use replay_log::Entry;
use vmm::devices::layout;
use vmm::tape::GuestEnd;

/// Records and replays under storms of kicks; both must come to the same end.
fn ends(name: &str, scenario: &Scenario) -> Recorded {
    let recorded = record_to_end(scenario);
    let replayed = replay_to_end(scenario, &recorded.batches, recorded.end)
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(replayed.at, recorded.at, "{name}");
    assert_eq!(replayed.outputs, recorded.outputs, "{name}");
    assert!(replayed.memory == recorded.memory, "{name}: memory differs");
    let last = recorded.batches.last().expect("a log");
    let last = last.decode().expect("the log can be read").pop();
    assert!(
        matches!(last, Some(Entry::Mark(mark)) if mark.at == recorded.at),
        "{name}: the end is not marked: {last:?}"
    );
    recorded
}

fn word(recorded: &Recorded, at: u64) -> u64 {
    let at = at as usize;
    let bytes = recorded.memory[at..at + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight bytes"))
}

/// A guest that halts with the trap flag set has a debug exception to take, and no interrupt before
/// it: with interrupts on it does not wait for one, with interrupts off it is not dead.
#[test]
fn a_single_step_over_hlt_is_taken() {
    if !kvm_is_here("a single step over HLT") {
        return;
    }
    const TRAP: i32 = 0x100;
    const INTERRUPTS: i32 = 0x200;
    for (name, flags) in [("IF on", TRAP | INTERRUPTS), ("IF off", TRAP)] {
        let mut guest = Guest::new(Ring::Zero);
        guest.out32(layout::TIMER_MILLIS, 3);
        let a = &mut guest.asm;
        ok(a.pushfq());
        ok(a.and(qword_ptr(rsp), !(TRAP | INTERRUPTS)));
        ok(a.or(qword_ptr(rsp), flags));
        ok(a.popfq());
        ok(a.hlt());
        let recorded = ends(name, &Scenario::new(guest.build()));
        // The handler of what nobody expects: it notes down which, and asks for a reset.
        assert_eq!(recorded.end, GuestEnd::Reset, "{name}");
        assert_eq!(word(&recorded, EXCEPTION), 1, "{name}: #DB");
    }
}
