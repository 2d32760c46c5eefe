//! Far hosts that are to be copies of a guest that is never idle.

use super::*;

/// One way. What is acknowledged was recorded twice as long ago.
const FAR: Span = Span::from_millis(40);

/// `a` alone with its guest, and `c` far away.
fn alone_with_a_far_host() -> Trio {
    let mut trio = Trio::new();
    trio.far = Some((name("c"), FAR));
    trio.host("c").keeps_up = true;
    let create = Operator::Create {
        hosts: vec![name("a")],
        policy: START,
    };
    trio.input(&name("a"), Input::Operator(create));
    trio.record_entries(1);
    trio.pass(1);
    trio
}

fn pair(trio: &mut Trio, policy: Policy) {
    let hosts = trio.names();
    let pair = Operator::Pair { hosts, policy };
    trio.input(&name("a"), Input::Operator(pair));
}

/// The guest records all the time; whether `c` becomes a member, and the longest time in which nothing
/// was released.
fn busy(trio: &mut Trio, millis: u64) -> (bool, u64) {
    let (mut waited, mut longest) = (0, 0);
    for _ in 0..millis {
        let before = trio.host("a").released;
        trio.record_entries(1);
        trio.pass(1);
        let released = trio.host("a").released;
        waited = if released > before { 0 } else { waited + 1 };
        longest = longest.max(waited);
        if trio.record().member_on(&name("c")).is_some() {
            assert!(
                trio.host("c").tip.index >= before,
                "c holds what was released"
            );
            return (true, longest);
        }
    }
    (false, longest)
}

#[test]
fn a_far_host_becomes_a_copy_of_a_guest_that_is_never_idle() {
    for rule in [Rule::All, Rule::Quorum, Rule::Any(1)] {
        let mut trio = alone_with_a_far_host();
        busy(&mut trio, 1_000);
        pair(&mut trio, Policy { rule, ..START });
        let (member, longest) = busy(&mut trio, 1_000);
        assert!(member, "under {rule:?}: {:?}", trio.record());
        // What it lacked had to come, and be acknowledged.
        assert!((1..=200).contains(&longest), "{longest} ms");
    }
}

#[test]
fn output_does_not_wait_long_for_a_host_that_takes_no_more() {
    let mut trio = alone_with_a_far_host();
    pair(&mut trio, START);
    // It answers, and what it is sent does not reach its store.
    trio.host("c").store_is_stuck = true;
    let (member, longest) = busy(&mut trio, 3_000);
    assert!(!member);
    assert!((100..=600).contains(&longest), "{longest} ms");
}

#[test]
fn a_host_that_cannot_start_the_guest_is_no_copy() {
    let mut trio = alone_with_a_far_host();
    trio.host("c").has_no_image = true;
    pair(&mut trio, START);
    let (member, longest) = busy(&mut trio, 1_000);
    assert!(!member, "it holds the log and cannot go on from it");
    assert!(trio.host("c").tip.index > LogIndex(900), "it does hold it");
    assert!(longest <= 1, "and nobody waits for it: {longest} ms");
    // Somebody brings the image.
    trio.host("c").has_no_image = false;
    let (member, _) = busy(&mut trio, 1_000);
    assert!(member);
}

#[test]
fn a_copy_that_begins_anew_while_it_is_claimed_joins_again() {
    let mut trio = Trio::paired(START);
    trio.far = Some((name("c"), Span::from_millis(10)));
    trio.host("a").cut_off = true;
    for _ in 0..1_000 {
        if trio.host("b").journal().contains(&"claimed") {
            break;
        }
        trio.pass(1);
    }
    // Its seal is on its way when it restarts, with its log but perhaps not all it acknowledged. The
    // claimant hears of that before it reigns.
    trio.keeper_down = true;
    trio.pass(15);
    trio.restart("c");
    let anew = trio.host("c").durable.incarnation;
    trio.pass(50);
    assert_eq!(trio.record().term, Term(1));
    trio.keeper_down = false;
    trio.pass(300);
    assert_eq!(trio.record().term, Term(2));
    let sealed = trio.host("b").events.iter().find_map(|event| match event {
        Event::RecordProposed { copies, .. } => Some(copies.clone()),
        _ => None,
    });
    let sealed = sealed.expect("a proposal");
    assert!(
        sealed
            .iter()
            .any(|copy| copy.host == name("c") && copy.incarnation != anew)
    );
    trio.pass(2_000);
    let member = trio.record().member_on(&name("c")).expect("a member");
    assert_eq!(member.incarnation, anew);
}

/// One that has caught up takes the place of a member that is lost, also where without either there
/// would be too few copies.
#[test]
fn a_lost_member_is_replaced_where_too_few_copies_would_be_left() {
    let mut trio = Trio::paired(Policy {
        min_copies: 2,
        ..START
    });
    trio.host("b").cut_off = true;
    for _ in 0..1_500 {
        trio.record_entries(1);
        trio.pass(1);
    }
    assert!(trio.record().member_on(&name("b")).is_none());
    trio.host("c").cut_off = true;
    trio.host("b").cut_off = false;
    trio.host("b").keeps_up = true;
    trio.restart("b");
    for _ in 0..3_000 {
        trio.record_entries(1);
        trio.pass(1);
    }
    assert!(trio.record().member_on(&name("b")).is_some());
    assert!(trio.record().member_on(&name("c")).is_none());
    assert!(trio.host("a").released > LogIndex(3_000), "output flows");
}
