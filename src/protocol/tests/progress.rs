//! Progress is life: who answers and does not come on is lost, and who hears nothing judges nobody.

use super::*;

/// Whether output is let out again within so many milliseconds, while the guest goes on.
fn flows_within(trio: &mut Trio, millis: u64) -> bool {
    let before = trio.host("a").released;
    for _ in 0..millis {
        trio.record_entries(1);
        trio.pass(1);
        if trio.host("a").released > before {
            return true;
        }
    }
    false
}

#[test]
fn a_replica_that_answers_and_stores_nothing_is_removed() {
    for acks in [Acks::Memory, Acks::Disk] {
        let mut trio = Trio::paired(Policy { acks, ..START });
        trio.host("b").store_is_stuck = true;
        assert!(flows_within(&mut trio, 1_500), "{acks:?}");
        assert!(trio.record().member_on(&name("b")).is_none());
        assert!(trio.record().member_on(&name("c")).is_some());
    }
}

#[test]
fn a_replica_whose_disk_is_full_is_removed_and_joins_again() {
    let mut trio = Trio::paired(START);
    trio.host("b").keeps_up = true;
    let reason = "full".to_owned();
    trio.input(&name("b"), Input::StoreFull { reason });
    assert!(flows_within(&mut trio, 1_500));
    assert!(trio.record().member_on(&name("b")).is_none());
    trio.input(&name("b"), Input::StoreRoom);
    for _ in 0..2_000 {
        trio.record_entries(1);
        trio.pass(1);
    }
    assert!(trio.record().member_on(&name("b")).is_some());
}

/// Its removal of everybody would reach the keeper, and it could not go on by it.
#[test]
fn a_primary_that_hears_nothing_removes_nobody() {
    let mut trio = Trio::paired(START);
    trio.record_entries(1);
    trio.host("a").deaf = true;
    trio.pass(2_500);
    assert_eq!(trio.record().term, Term(1));
    assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record());
    trio.host("a").deaf = false;
    assert!(flows_within(&mut trio, 500));
}

/// Its silence is its own: how long nobody has run the guest counts in time in which it could hear.
#[test]
fn a_host_that_stood_still_does_not_call_for_an_operator() {
    let mut trio = Trio::paired(START);
    trio.host("b").cut_off = true;
    trio.pass(8_000);
    trio.host("b").cut_off = false;
    trio.pass(5);
    let said = trio.host("b").journal();
    assert!(!said.contains(&"waiting"), "{said:?}");
}

/// min-copies keeps a member that is dead; another host can be added all the same.
#[test]
fn a_dead_member_that_has_to_stay_does_not_keep_others_out() {
    let policy = Policy {
        rule: Rule::Any(1),
        min_copies: 3,
        ..START
    };
    let mut trio = Trio::with_hosts(&["a", "b", "c", "d"]);
    trio.create_on(&["a", "b", "c"], policy);
    trio.record_entries(1);
    trio.pass(300);
    assert_eq!(trio.record().members.len(), 2);
    trio.host("b").cut_off = true;
    trio.host("d").keeps_up = true;
    let hosts = ["a", "b", "c", "d"].map(name).to_vec();
    let pair = Operator::Pair { hosts, policy };
    trio.input(&name("a"), Input::Operator(pair));
    for _ in 0..2_500 {
        trio.record_entries(1);
        trio.pass(1);
    }
    assert!(
        trio.record().member_on(&name("d")).is_some(),
        "{:?}",
        trio.record()
    );
}

/// Whoever has the log and has not executed it would keep clients waiting when it is promoted.
#[test]
fn a_host_is_no_member_before_its_guest_has_caught_up() {
    let mut trio = Trio::new();
    trio.create_on(&["a"], START);
    for _ in 0..4_000 {
        trio.record_entries(1);
        trio.pass(1);
    }
    let hosts = trio.names();
    let pair = Operator::Pair {
        hosts,
        policy: START,
    };
    trio.input(&name("a"), Input::Operator(pair));
    trio.host("c").keeps_up = true;
    for _ in 0..1_000 {
        trio.record_entries(1);
        trio.pass(1);
    }
    assert!(trio.record().member_on(&name("c")).is_some());
    assert!(
        trio.record().member_on(&name("b")).is_none(),
        "it has executed one entry"
    );
    let tip = trio.host("a").tip;
    assert_eq!(trio.host("b").tip, tip, "and holds everything");
}

/// An acknowledgement of another run of the VMM says nothing of what this one has executed.
#[test]
fn a_run_after_a_restart_is_another_one() {
    let mut trio = Trio::paired(Policy {
        acks: Acks::Disk,
        ..START
    });
    let before = trio.host("b").node.status().run;
    trio.restart("b");
    trio.pass(200);
    let after = trio.host("b").node.status().run;
    assert_ne!(before, after);
    trio.restart("b");
    trio.pass(200);
    assert_ne!(trio.host("b").node.status().run, after);
}

/// The same machine does the same on the next host: somebody has to look.
#[test]
fn after_two_reigns_that_fail_at_one_place_nobody_claims() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    for _ in 0..6 {
        let primary = trio.record().primary.host.clone();
        let host = primary.to_string();
        let run = trio.host(&host).node.status().run;
        let failed = Input::VmFailed {
            run,
            reason: "an instruction that KVM cannot emulate".to_owned(),
            at: Position(77),
        };
        trio.input(&primary, failed);
        trio.pass(5_000);
    }
    assert_eq!(trio.record().term, Term(2), "one more reign, and no third");
    let failed = trio.record().failed.clone().expect("the first failure");
    assert_eq!((failed.at, failed.reigns), (Position(77), 1));
    assert!(trio.host("c").journal().contains(&"guest_stops_hosts"));
    // An operator decides.
    trio.input(&name("c"), Input::Operator(Operator::AcceptLoss));
    trio.pass(1_000);
    assert_eq!(trio.record().term, Term(3));
}

/// What the outputs were that a gateway has received, only a log that has them can say: a copy that is
/// still taking the log makes none of them, and may go on with another history.
#[test]
fn a_copy_forgets_no_output_of_a_log_that_it_has_not_got() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    trio.host("a").cut_off = true;
    trio.pass(1_000);
    assert_eq!(trio.record().primary.host, name("b"));
    assert!(trio.record().begins > LogIndex(3));
    trio.host("b").cut_off = true;
    let version = trio.record().version();
    // Too few copies: nothing is committed by this reign, and what was before is received.
    let from_b = |message| Input::Message {
        from: name("b"),
        message,
    };
    let heartbeat = |number| Message::Heartbeat {
        version,
        tail: LogIndex(9),
        committed: LogIndex::START,
        forget: FrameNumber(number),
    };
    trio.input(&name("c"), from_b(heartbeat(7)));
    assert_eq!(trio.host("c").node.status().forgotten, FrameNumber(7));
    let reason = "fsync failed".to_owned();
    trio.input(&name("c"), Input::StoreFailed { reason });
    let stream = Message::Stream {
        authority: Authority::Reign(version),
        after: LogTip::default(),
    };
    trio.input(&name("c"), from_b(stream));
    trio.input(&name("c"), from_b(heartbeat(8)));
    assert_eq!(trio.host("c").node.status().forgotten, FrameNumber(0));
}

/// Whoever has heard the keeper only when its members had just fallen silent may hear nobody since.
#[test]
fn the_keepers_word_of_long_ago_does_not_help_a_deaf_primary() {
    let mut trio = Trio::paired(START);
    for host in ["b", "c"] {
        trio.host(host).cut_off = true;
    }
    trio.pass(100);
    let read = Input::RecordRead(Some(super::trio::by_keeper(trio.record().clone())));
    trio.input(&name("a"), read);
    trio.host("a").deaf = true;
    trio.pass(1_050);
    assert_eq!(trio.record().members.len(), 2, "nobody is removed");
    trio.host("a").deaf = false;
    trio.pass(1_500);
    assert_eq!(
        trio.record().members.len(),
        0,
        "whoever hears the keeper goes on"
    );
}

/// The end of its log is executed by nobody before more follows, and that may never come.
#[test]
fn a_guest_that_computes_for_ever_gets_its_copies() {
    let mut trio = Trio::new();
    trio.create_on(&["a"], START);
    trio.record_entries(20);
    trio.pass(5_000);
    let hosts = trio.names();
    let pair = Operator::Pair {
        hosts,
        policy: START,
    };
    trio.input(&name("a"), Input::Operator(pair));
    trio.pass(1_000);
    assert_eq!(trio.host("b").node.status().executed, LogIndex(1));
    assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record());
}

/// A replica's VMM that begins anew is heard of though nothing more is recorded.
#[test]
fn what_a_new_vmm_has_executed_is_told_without_new_log() {
    let mut trio = Trio::new();
    trio.create_on(&["a"], START);
    trio.record_entries(5);
    trio.host("c").has_no_image = true;
    let pair = Operator::Pair {
        hosts: ["a", "c"].map(name).to_vec(),
        policy: START,
    };
    trio.input(&name("a"), Input::Operator(pair));
    trio.pass(300);
    let run = trio.host("c").node.status().run;
    let failed = Input::VmFailed {
        run,
        reason: "no image".to_owned(),
        at: Position(0),
    };
    trio.input(&name("c"), failed);
    trio.host("c").has_no_image = false;
    trio.pass(3_000);
    assert_eq!(trio.record().members.len(), 1, "{:?}", trio.record());
}
