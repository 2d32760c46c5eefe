//! Claims: their outcome is waited for, those that are given up cost nobody anything, and no copy
//! that is alive is left out.

use super::trio::by_keeper;
use super::*;

fn claims(trio: &mut Trio, host: &str) -> usize {
    let journal = trio.host(host).journal();
    journal.iter().filter(|code| **code == "claimed").count()
}

/// A swap that takes long is done all the same: whoever gives it up and claims again never reigns.
#[test]
fn a_slow_keeper_delays_a_promotion_and_does_not_prevent_it() {
    for slow in [900, 1_200, 3_000] {
        let mut trio = Trio::paired(START);
        trio.record_entries(2);
        trio.keeper_takes = Span::from_millis(slow);
        trio.host("a").cut_off = true;
        // It is asked twice: whether the record is still that one, and to change it.
        trio.pass(2 * slow + 1_500);
        assert_eq!(trio.record().primary.host, name("b"), "{slow} ms");
        assert!(trio.host("b").live_at.is_some(), "{slow} ms");
        assert_eq!(trio.record().term, Term(2), "no term was wasted");
    }
}

/// A keeper that is slow answers an earlier claim when the next one is under way: that the record was not
/// as that one expected is no news, and no reason to claim a third time.
#[test]
fn the_answer_to_an_earlier_claim_ends_no_later_one() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    let base = by_keeper(trio.record().clone());
    trio.keeper_takes = Span::from_millis(800);
    trio.host("a").cut_off = true;
    // Asked for the record first, then to change it.
    trio.pass(1_300);
    assert_eq!(claims(&mut trio, "b"), 1);
    let answer = Swapped::Conflict(Some(base));
    trio.input(&name("b"), Input::RecordSwapped(answer));
    trio.pass(1_500);
    assert_eq!(claims(&mut trio, "b"), 1, "{:?}", trio.host("b").journal());
    assert!(trio.host("b").live_at.is_some());
}

/// Neither a nor c is heard for longer than a copy vouches for its primary.
fn silent_for_a_while(trio: &mut Trio) {
    for host in ["a", "c"] {
        trio.host(host).cut_off = true;
    }
    trio.pass(150);
    for host in ["a", "c"] {
        trio.host(host).cut_off = false;
    }
}

/// Lets c promise itself to a claim of b to this term.
fn sealed_for_b(trio: &mut Trio, term: Term) -> Claim {
    let version = trio.record().version();
    let claim = Claim {
        term,
        claimant: name("b"),
        base: version,
    };
    let from = name("a");
    let failed = None;
    let message = Message::Abdicated { version, failed };
    trio.input(&name("c"), Input::Message { from, message });
    let from = name("b");
    let message = Message::Seal {
        claim: claim.clone(),
        consent: false,
    };
    trio.input(&name("c"), Input::Message { from, message });
    assert_eq!(trio.host("c").node.status().promise, Some(claim.clone()));
    claim
}

/// The first one has asked the keeper, perhaps, and may come through whatever became of the second.
#[test]
fn a_claim_that_was_given_up_frees_nobody_from_an_earlier_one() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    silent_for_a_while(&mut trio);
    sealed_for_b(&mut trio, Term(2));
    let claim = sealed_for_b(&mut trio, Term(3));
    trio.keeper_down = true;
    trio.record_entries(1);
    let stuck = trio.host("a").released;
    let from = name("b");
    let message = Message::Renounced { claim };
    trio.input(&name("c"), Input::Message { from, message });
    trio.pass(300);
    assert_eq!(trio.host("a").released, stuck, "c hears nobody");
    // Only the record frees it.
    trio.keeper_down = false;
    trio.pass(500);
    trio.record_entries(1);
    let released = trio.host("a").released;
    assert_eq!(released, trio.host("a").tip.index);
}

#[test]
fn a_claim_that_was_given_up_binds_nobody() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    // The primary is silent for long enough that b claims and c is sealed, and then is back, while
    // nobody can ask the keeper.
    silent_for_a_while(&mut trio);
    let claim = sealed_for_b(&mut trio, Term(2));
    trio.keeper_down = true;
    trio.record_entries(1);
    let stuck = trio.host("a").released;
    trio.pass(100);
    assert_eq!(trio.host("a").released, stuck, "c hears nobody");
    let from = name("b");
    let message = Message::Renounced { claim };
    trio.input(&name("c"), Input::Message { from, message });
    trio.pass(300);
    assert_eq!(trio.host("c").node.status().promise, None);
    trio.record_entries(1);
    let released = trio.host("a").released;
    assert_eq!(released, trio.host("a").tip.index);
}

/// Killed primary, then its successor: two copies, both alive, and never one of them alone.
#[test]
fn of_two_claimants_of_one_term_neither_stands_alone() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    trio.host("a").cut_off = true;
    let from = name("a");
    let version = trio.record().version();
    for host in ["b", "c"] {
        let from = from.clone();
        let message = Message::Abdicated {
            version,
            failed: None,
        };
        trio.input(&name(host), Input::Message { from, message });
    }
    trio.pass(400);
    let record = trio.record().clone();
    assert_eq!(record.term, Term(2));
    assert_eq!(record.members.len(), 1, "{record:?}");
}

/// A far host is alive, too.
#[test]
fn a_copy_whose_seal_takes_a_long_way_is_not_left_out() {
    let mut trio = Trio::paired(START);
    trio.far = Some((name("c"), Span::from_millis(150)));
    for (host, peer) in [("b", "c"), ("a", "c"), ("c", "b")] {
        let (host, peer) = (name(host), name(peer));
        let rtt = Span::from_millis(300);
        trio.input(&host, Input::Distance { host: peer, rtt });
    }
    trio.pass(400);
    trio.host("a").cut_off = true;
    trio.pass(3_000);
    let first = trio.host("b").events.iter().find_map(|event| match event {
        Event::RecordCommitted { members, .. } => Some(members.clone()),
        _ => None,
    });
    assert!(first.is_some());
    let proposed = trio.host("b").events.iter().find_map(|event| match event {
        Event::RecordProposed { copies, .. } => Some(copies.len()),
        _ => None,
    });
    assert_eq!(proposed, Some(2), "b and c");
}

/// What its VMM does not survive is no reason to leave a claim whose outcome nobody knows.
#[test]
fn a_claimant_whose_vmm_fails_stays_until_the_outcome_is_known() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    trio.keeper_takes = Span::from_millis(600);
    trio.host("a").cut_off = true;
    while claims(&mut trio, "b") == 0 {
        trio.pass(1);
    }
    trio.pass(100);
    let run = trio.host("b").node.status().run;
    let failed = Input::VmFailed {
        run,
        reason: "killed".to_owned(),
        at: Position(1),
    };
    trio.input(&name("b"), failed);
    trio.pass(2_000);
    assert_eq!(trio.record().primary.host, name("b"));
    assert!(trio.host("b").live_at.is_some(), "it begins its guest anew");
}

// --- planned switchovers -------------------------------------------------------------------------

fn switch(trio: &mut Trio) {
    let to = Some(name("b"));
    trio.input(&name("a"), Input::Operator(Operator::Switchover { to }));
}

#[test]
fn a_guest_is_not_stopped_for_a_switchover_that_no_keeper_can_record() {
    let mut trio = Trio::paired(START);
    trio.keeper_down = true;
    switch(&mut trio);
    trio.pass(50);
    assert!(!trio.host("a").paused);
    assert!(trio.host("a").journal().contains(&"switchover_failed"));
}

/// The keeper goes away just when the target is to claim: it renounces, and the guest goes on.
#[test]
fn a_paused_guest_goes_on_though_the_keeper_does_not_come_back() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    trio.keeper_takes = Span::from_millis(5);
    switch(&mut trio);
    // The target takes and executes everything; then the keeper is asked once more.
    for _ in 0..40 {
        let run = trio.host("b").node.status().run;
        let done = trio.host("b").executed_all(run);
        trio.input(&name("b"), done);
        trio.pass(1);
        if trio.host("a").journal().contains(&"handed_over") {
            break;
        }
        // It cannot hear of the claim that it is to make.
        trio.host("b").deaf = trio.host("a").paused;
    }
    trio.keeper_down = true;
    trio.host("b").deaf = false;
    trio.pass(5_000);
    assert!(!trio.host("a").paused);
    trio.record_entries(1);
    let released = trio.host("a").released;
    assert_eq!(released, trio.host("a").tip.index);
}

/// The target is away when it is to renounce, and has heard of nothing: it is asked again.
#[test]
fn a_target_that_comes_back_is_asked_to_renounce() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    trio.keeper_takes = Span::from_millis(5);
    switch(&mut trio);
    for _ in 0..40 {
        let run = trio.host("b").node.status().run;
        let done = trio.host("b").executed_all(run);
        trio.input(&name("b"), done);
        trio.pass(1);
        if trio.host("a").journal().contains(&"handed_over") {
            break;
        }
        trio.host("b").deaf = trio.host("a").paused;
    }
    trio.keeper_down = true;
    trio.pass(4_000);
    assert!(trio.host("a").paused, "nobody knows what b has done");
    trio.host("b").deaf = false;
    trio.restart("b");
    trio.pass(20);
    assert!(!trio.host("a").paused);
}

/// The target has asked the keeper, which is slow, and is started anew: that it knows nothing of it does
/// not mean that its claim cannot come through.
#[test]
fn a_target_that_was_started_anew_renounces_nothing_that_it_may_have_asked_for() {
    let acks = Acks::Disk;
    let mut trio = Trio::paired(Policy { acks, ..START });
    trio.record_entries(2);
    trio.keeper_takes = Span::from_millis(5);
    // What it is told arrives when the keeper is slow.
    trio.far = Some((name("b"), Span::from_millis(10)));
    switch(&mut trio);
    for _ in 0..200 {
        let run = trio.host("b").node.status().run;
        let done = trio.host("b").executed_all(run);
        trio.input(&name("b"), done);
        trio.pass(1);
        if trio.host("a").journal().contains(&"handed_over") {
            break;
        }
    }
    trio.keeper_takes = Span::from_millis(8_000);
    trio.pass(60);
    assert_eq!(claims(&mut trio, "b"), 1);
    trio.restart("b");
    for _ in 0..9_000 {
        if trio.record().primary.host != name("a") {
            break;
        }
        assert!(trio.host("a").paused, "b may have succeeded");
        trio.pass(1);
    }
    assert_eq!(trio.record().primary.host, name("b"));
}

#[test]
fn a_switchover_still_works() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    switch(&mut trio);
    for _ in 0..100 {
        let run = trio.host("b").node.status().run;
        let done = trio.host("b").executed_all(run);
        trio.input(&name("b"), done);
        trio.pass(1);
    }
    assert_eq!(trio.record().primary.host, name("b"));
    assert_eq!(trio.record().members.len(), 2);
}
