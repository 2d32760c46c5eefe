//! Tests of nodes that talk to one another directly, in a world without delay or loss, and of the
//! rule that nothing here touches the outside. What happens when things fail is simulated
//! (`tests/simulation.rs`).

use replay_log::{FrameNumber, LogIndex, LogTip, Position, Term};

use super::*;

mod claims;
mod doubt;
mod joining;
mod progress;
mod trio;
mod wire;

use trio::Trio;

const START: Policy = Policy {
    rule: Rule::All,
    acks: Acks::Memory,
    on_loss: OnLoss::Shrink,
    min_copies: 1,
    log_full: LogFull::Stall,
};

fn name(host: &str) -> HostName {
    HostName::new(host).expect("a name")
}

#[test]
fn output_waits_for_every_replica_that_the_rule_names() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    assert_eq!(trio.host("a").released, LogIndex(4), "both hold it");
    trio.host("c").cut_off = true;
    trio.record_entries(1);
    assert_eq!(trio.host("a").released, LogIndex(4), "c does not");
    // Until the record is without it.
    trio.pass(1_100);
    assert_eq!(trio.record().members.len(), 1);
    assert_eq!(trio.host("a").released, LogIndex(5));
}

#[test]
fn a_witness_that_is_down_stops_nothing_but_changes() {
    let mut trio = Trio::paired(START);
    trio.keeper_down = true;
    trio.record_entries(2);
    assert_eq!(trio.host("a").released, LogIndex(3));
    trio.host("b").cut_off = true;
    trio.record_entries(1);
    trio.pass(5_000);
    assert_eq!(trio.host("a").released, LogIndex(3), "b cannot be removed");
    trio.keeper_down = false;
    trio.pass(500);
    assert_eq!(trio.host("a").released, LogIndex(4));
}

#[test]
fn a_dead_primary_is_replaced_within_a_quarter_of_a_second() {
    for rule in [Rule::All, Rule::Quorum, Rule::Any(1)] {
        let mut trio = Trio::paired(Policy { rule, ..START });
        trio.record_entries(5);
        trio.pass(60);
        trio.host("a").cut_off = true;
        let dead = trio.now;
        trio.pass(1_000);
        let live = trio.host("b").live_at.expect("b goes live");
        assert!(
            live.since(dead) <= Span::from_millis(250),
            "{}",
            live.since(dead)
        );
        assert_eq!(trio.record().term, Term(2));
        assert_eq!(
            trio.host("b").released,
            LogIndex(6),
            "what is committed may leave"
        );
        assert!(trio.host("c").live_at.is_none());
        let codes = trio.host("b").journal();
        for code in ["suspected", "claimed", "seals_won", "promoted", "went_live"] {
            assert!(codes.contains(&code), "{code} is missing in {codes:?}");
        }
    }
}

#[test]
fn a_primary_that_comes_back_is_deposed_and_follows() {
    let mut trio = Trio::paired(START);
    trio.host("a").cut_off = true;
    trio.pass(500);
    trio.host("a").cut_off = false;
    let before = trio.host("a").durable.incarnation;
    trio.record_entries(3);
    assert_eq!(trio.host("a").released, LogIndex(1), "nobody hears it");
    trio.pass(500);
    assert_eq!(trio.host("a").stopped, Some(StopReason::Deposed));
    assert!(trio.host("a").journal().contains(&"deposed"));
    assert!(trio.host("a").durable.incarnation > before);
    let new = Member {
        host: name("a"),
        incarnation: trio.host("a").durable.incarnation,
    };
    // `b` has not recorded since, so there is nothing to catch up with but its log.
    let tip = trio.host("b").tip;
    assert_eq!(trio.host("a").tip, tip);
    assert!(trio.record().members.contains(&new), "{:?}", trio.record);
}

#[test]
fn nobody_claims_while_somebody_hears_the_primary() {
    let mut trio = Trio::paired(START);
    let (a, b) = (name("a"), name("b"));
    // The connection between a and b is gone; c hears both.
    trio.input(&a, Input::PeerDown(b.clone()));
    trio.input(&b, Input::PeerDown(a));
    trio.pass(900);
    assert_eq!(trio.record().term, Term(1));
    assert!(trio.host("b").journal().contains(&"suspicion_lifted"));
    assert!(!trio.host("b").journal().contains(&"claimed"));
}

#[test]
fn two_hosts_without_a_third_party_promote_nobody() {
    let mut trio = Trio::paired(START);
    trio.keeper_down = true;
    trio.host("a").cut_off = true;
    trio.pass(3_000);
    assert!(trio.host("b").live_at.is_none() && trio.host("c").live_at.is_none());
    trio.keeper_down = false;
    trio.pass(500);
    let live = ["b", "c"].map(|host| trio.host(host).live_at.is_some());
    assert!(live[0] != live[1], "one of them, and not both: {live:?}");
}

#[test]
fn a_planned_switchover_needs_no_suspicion_and_loses_nothing() {
    let mut trio = Trio::paired(START);
    trio.record_entries(5);
    let to = Some(name("c"));
    let run = trio.host("c").node.status().run;
    let executed = trio.host("c").executed_all(run);
    trio.input(&name("c"), executed);
    trio.input(&name("a"), Input::Operator(Operator::Switchover { to }));
    trio.pass(100);
    assert_eq!(trio.record().primary.host, name("c"));
    assert_eq!(trio.host("a").stopped, Some(StopReason::HandedOver));
    assert_eq!(
        trio.record().members.len(),
        2,
        "the old primary holds it all"
    );
    assert_eq!(trio.host("c").released, LogIndex(6));
    assert!(!trio.host("c").journal().contains(&"suspected"));
}

#[test]
fn a_restart_with_memory_acknowledgements_costs_membership() {
    for (acks, kept) in [(Acks::Memory, false), (Acks::Disk, true)] {
        let durable = Durable {
            incarnation: Incarnation(3),
            acks,
            ..Durable::default()
        };
        let restored = Restored {
            durable,
            ..Restored::default()
        };
        let vm = VmName::new("vm").expect("a name");
        let node = Node::new(Config::new(name("a"), vm), restored, Time::default());
        assert_eq!(node.incarnation() == Incarnation(3), kept, "{acks:?}");
    }
}

/// A promise on a state of the record that its maker has not learnt yet is not replaced by one on
/// an earlier state, however high the term: it would hear again whom it has promised not to.
#[test]
fn a_promise_never_falls_back_to_an_earlier_state_of_the_record() {
    let mut trio = Trio::paired(START);
    let (b, c) = (name("b"), name("c"));
    let known = trio.record().version();
    let later = Version {
        epoch: Epoch(known.epoch.0 + 1),
        ..known
    };
    let seal = |claimant: &str, term: u64, base: Version| Input::Message {
        from: name(claimant),
        message: Message::Seal {
            claim: Claim {
                term: Term(term),
                claimant: name(claimant),
                base,
            },
            consent: true,
        },
    };
    // Nobody answers: what matters is what `c` promises.
    trio.host("a").cut_off = true;
    trio.host("b").cut_off = true;
    // Nor does it vouch for the primary.
    let message = Message::Abdicated {
        version: known,
        failed: None,
    };
    let from = name("a");
    trio.input(&c, Input::Message { from, message });
    trio.input(&c, seal("b", 5, later));
    let promise = |trio: &mut Trio| trio.host("c").node.status().promise.expect("a promise");
    assert_eq!(promise(&mut trio).base, later);
    trio.input(&c, seal("a", 6, known));
    assert_eq!(promise(&mut trio).base, later);
    assert_eq!(promise(&mut trio).claimant, b);
    trio.input(&c, seal("a", 6, later));
    assert_eq!(promise(&mut trio).term, Term(6));
}

#[test]
fn a_wild_term_is_heard_by_nobody() {
    let mut trio = Trio::paired(START);
    let base = trio.record().version();
    for host in ["a", "c"] {
        let claim = Claim {
            term: Term(u64::MAX),
            claimant: name("b"),
            base,
        };
        let message = Message::Seal {
            claim,
            consent: true,
        };
        let from = name("b");
        trio.input(&name(host), Input::Message { from, message });
    }
    assert!(trio.host("c").journal().contains(&"peer_misbehaved"));
    trio.host("a").cut_off = true;
    trio.pass(500);
    assert_eq!(trio.record().term, Term(2));
}

/// The store of an earlier holding may report late. What was dropped is held by nobody.
#[test]
fn a_report_of_more_than_was_appended_counts_for_nothing() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    let (incarnation, mut tip) = (trio.host("c").durable.incarnation, trio.host("c").tip);
    tip.index = LogIndex(900);
    for input in [
        Input::Stored { incarnation, tip },
        Input::Synced { incarnation, tip },
    ] {
        trio.input(&name("c"), input);
    }
    let status = trio.host("c").node.status();
    assert_eq!((status.stored, status.synced), (LogIndex(4), LogIndex(0)));
}

/// A replica whose VMM begins anew has the whole log before it: the guest is not held back for it.
/// One that executes and falls behind is waited for, but not for ever.
#[test]
fn the_guest_is_slowed_for_a_replica_that_lags_and_not_for_one_that_begins() {
    let mut trio = Trio::paired(START);
    let executed = |trio: &mut Trio, host: &str| {
        let run = trio.host(host).node.status().run;
        let input = trio.host(host).executed_all(run);
        trio.input(&name(host), input);
    };
    let throttled = |trio: &mut Trio| trio.host("a").node.status().throttled;
    // Both keep up, and are seen to.
    for _ in 0..20 {
        trio.record_entries(1);
        executed(&mut trio, "b");
        executed(&mut trio, "c");
        trio.pass(30);
    }
    let run = trio.host("c").node.status().run;
    let reason = "killed".to_owned();
    trio.input(
        &name("c"),
        Input::VmFailed {
            run,
            reason,
            at: Position(1),
        },
    );
    for _ in 0..80 {
        trio.record_entries(1);
        executed(&mut trio, "b");
        trio.pass(30);
    }
    assert!(!throttled(&mut trio), "c replays from the beginning");
    assert!(!trio.host("a").journal().contains(&"throttled"));
    // It has caught up; from now on it lags like anybody.
    executed(&mut trio, "c");
    trio.pass(100);
    for _ in 0..30 {
        trio.record_entries(1);
        executed(&mut trio, "b");
        trio.pass(30);
    }
    assert!(throttled(&mut trio), "c has executed nothing for 900 ms");
    // A guest that is held back records nothing, and still c does not come nearer.
    trio.pass(6_000);
    assert!(!throttled(&mut trio), "the guest goes on");
    let why = trio
        .host("a")
        .events
        .iter()
        .rev()
        .find_map(|event| match event {
            Event::Throttled { on: false, why } => Some(why.clone()),
            _ => None,
        });
    assert!(why.expect("a line").contains("waited for no more"));
}

/// An operator who accepts loss is told how much: what the primary had let out beyond what is held
/// here. Nobody who hears the primary takes such an order.
#[test]
fn loss_is_accepted_only_where_the_primary_is_not_heard() {
    let mut trio = Trio::paired(Policy {
        rule: Rule::Any(1),
        ..START
    });
    trio.record_entries(2);
    trio.pass(100);
    trio.input(&name("b"), Input::Operator(Operator::AcceptLoss));
    assert!(trio.host("b").journal().contains(&"operator_refused"));
    assert_eq!(trio.record().term, Term(1));
    // a and c held five entries more when both were lost: nobody is promoted by itself.
    let heartbeat = Message::Heartbeat {
        version: trio.record().version(),
        tail: LogIndex(9),
        committed: LogIndex(8),
        forget: FrameNumber(0),
    };
    let from = name("a");
    let message = heartbeat;
    trio.input(&name("b"), Input::Message { from, message });
    trio.host("a").cut_off = true;
    trio.host("c").cut_off = true;
    trio.pass(700);
    assert_eq!(
        trio.record().primary.host,
        name("a"),
        "two seals are needed"
    );
    trio.input(&name("b"), Input::Operator(Operator::AcceptLoss));
    trio.pass(700);
    assert_eq!(trio.record().primary.host, name("b"));
    let mut accepted = trio
        .host("b")
        .events
        .iter()
        .filter_map(|event| match event {
            Event::LossAccepted { entries, .. } => Some(*entries),
            _ => None,
        });
    assert_eq!(accepted.next(), Some(5));
}

#[test]
fn what_can_never_be_satisfied_is_refused() {
    let mut trio = Trio::paired(START);
    let before = trio.record().clone();
    for policy in [
        Policy {
            min_copies: 9,
            ..START
        },
        Policy {
            rule: Rule::Any(3),
            ..START
        },
    ] {
        let hosts = trio.names();
        trio.host("a").events.clear();
        let order = Operator::Pair { hosts, policy };
        trio.input(&name("a"), Input::Operator(order));
        trio.pass(300);
        assert_eq!(
            trio.host("a").journal()[0],
            "operator_refused",
            "{policy:?}"
        );
        assert_eq!(*trio.record(), before);
    }
}

#[test]
fn with_too_few_copies_a_new_primary_lets_nothing_out() {
    let stern = Policy {
        min_copies: 3,
        ..START
    };
    let mut trio = Trio::paired(stern);
    trio.host("a").cut_off = true;
    trio.record_entries(1);
    trio.pass(1_000);
    assert_eq!(trio.record().term, Term(2));
    assert_eq!(trio.host("b").released, LogIndex::START, "two of three");
    trio.host("a").cut_off = false;
    trio.pass(1_000);
    assert_eq!(trio.record().copies(), 3);
    assert!(trio.host("b").released > LogIndex::START);
}

/// What the protocol may not name. Clippy finds what is called; this also finds what is imported.
const FORBIDDEN: [&str; 13] = [
    "std::time",
    "std::net",
    "std::fs",
    "std::io",
    "std::thread",
    "std::env",
    "std::process",
    "std::sync::Mutex",
    "tokio",
    "quinn",
    "HashMap",
    "HashSet",
    "SystemRandom",
];

#[test]
fn the_sources_name_nothing_outside() {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/protocol");
    let mut folders = vec![here];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("the sources are there") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs") {
                seen += 1;
                let source = std::fs::read_to_string(&path).expect("a source");
                for forbidden in FORBIDDEN {
                    assert!(
                        !source.contains(forbidden),
                        "{} names {forbidden}",
                        path.display()
                    );
                }
            }
        }
    }
    assert!(seen > 15, "only {seen} sources were found");
}
