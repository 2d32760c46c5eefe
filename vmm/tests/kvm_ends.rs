//! Guests that end, or seem to, in ways that only a real CPU and a real KVM know: what they do to
//! themselves is theirs, is in the log, and is the same on every copy.

mod common;

use common::guest::{EXCEPTION, Guest, Ring, ok};
use common::kvm_is_here;
use common::run::{Recorded, Scenario, record_to_end, replay_to_end};
use iced_x86::code_asm::*;
use replay_log::Entry;
use vmm::devices::layout;
use vmm::kvm::{KvmKind, host_fingerprint};
use vmm::tape::{GuestEnd, Unrunnable};

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

/// The trap and the interrupt flag.
const TRAP: i32 = 0x100;
const INTERRUPTS: i32 = 0x200;

/// A guest that halts with the trap flag set has a debug exception to take, and no interrupt before
/// it: with interrupts on it does not wait for one, with interrupts off it is not dead.
#[test]
fn a_single_step_over_hlt_is_taken() {
    if !kvm_is_here("a single step over HLT") {
        return;
    }
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

/// Where there are device addresses and no device: nothing that is executed or addressed there works but
/// plain loads and stores.
const DEVICES: u64 = 0xe000_0000;

type Body = fn(&mut CodeAssembler);

/// What no KVM can emulate where RAX points to device addresses.
const IMPOSSIBLE: [(&str, Body); 6] = [
    ("a jump", |a| ok(a.jmp(rax))),
    ("FXSAVE", |a| ok(a.fxsave(ptr(rax)))),
    ("ADDPS", |a| ok(a.addps(xmm0, xmmword_ptr(rax)))),
    ("PSHUFB", |a| ok(a.pshufb(xmm0, xmmword_ptr(rax)))),
    ("FLD", |a| ok(a.fld(tbyte_ptr(rax)))),
    ("CMPXCHG16B", |a| ok(a.cmpxchg16b(ptr(rax)))),
];

/// What KVM cannot do for a guest is the guest's end, on every copy at the same landmark: were it a failure
/// of the host, each host in turn would fail.
#[test]
fn what_kvm_cannot_do_is_the_end_of_the_guest() {
    if !kvm_is_here("what KVM cannot do") {
        return;
    }
    let kind = host_fingerprint().expect("KVM is here").kvm;
    for ring in [Ring::Zero, Ring::Three] {
        for (name, body) in IMPOSSIBLE {
            let mut guest = Guest::new(ring);
            ok(guest.asm.mov(rax, DEVICES));
            body(&mut guest.asm);
            let name = format!("{name}, {ring:?}");
            let recorded = ends(&name, &Scenario::new(guest.build()));
            println!("{name}: {} at {}", recorded.end, recorded.at);
            if ring == Ring::Three && kind != KvmKind::Pvm {
                // A program gets #UD, and the guest's kernel is told.
                assert_eq!(recorded.end, GuestEnd::Reset, "{name}");
                assert_eq!(word(&recorded, EXCEPTION), 6, "{name}: #UD");
            } else {
                let GuestEnd::Unrunnable { why, rip } = recorded.end else {
                    panic!("{name}: {}", recorded.end);
                };
                assert_eq!(why, Unrunnable::Emulation, "{name}");
                let code = if name.starts_with("a jump") {
                    DEVICES..DEVICES + 1
                } else {
                    common::guest::CODE..common::guest::CODE + 0x1000
                };
                assert!(code.contains(&rip), "{name}: {rip:#x}");
            }
        }
    }
}

/// A delivery of an exception whose descriptor table lies among devices.
#[test]
fn tables_where_there_is_no_memory_end_the_guest() {
    if !kvm_is_here("tables where there is no memory") {
        return;
    }
    let mut guest = Guest::new(Ring::Zero);
    let a = &mut guest.asm;
    ok(a.mov(rax, DEVICES));
    ok(a.mov(qword_ptr(rsp - 8), rax));
    ok(a.mov(word_ptr(rsp - 10), 0xfff));
    ok(a.lidt(ptr(rsp - 10)));
    ok(a.ud2());
    let recorded = ends("tables", &Scenario::new(guest.build()));
    println!("tables: {}", recorded.end);
    assert!(recorded.end.is_crash(), "{}", recorded.end);
}

/// A copy that does not come to the end of the others, or comes to one that they do not, is another
/// machine.
#[test]
fn an_end_that_only_one_copy_comes_to_is_a_divergence() {
    if !kvm_is_here("an end of one copy alone") {
        return;
    }
    let guest = |body: Body| {
        let mut guest = Guest::new(Ring::Zero);
        ok(guest.asm.mov(rax, DEVICES));
        body(&mut guest.asm);
        guest.build()
    };
    let ends = || guest(|a| ok(a.jmp(rax)));
    let goes_on = || guest(|a| ok(a.mov(rbx, rax)));
    for (here, there) in [(ends(), goes_on()), (goes_on(), ends())] {
        let mut scenario = Scenario::new(here);
        let recorded = record_to_end(&scenario);
        scenario.image = there;
        let replayed = replay_to_end(&scenario, &recorded.batches, recorded.end);
        let error = replayed.err().expect("it is another machine");
        assert!(error.is_found_out(), "{error}");
        let said = error.to_string();
        assert!(
            said.contains(&format!("diverged at position {}", recorded.at)),
            "{said}"
        );
    }
}
