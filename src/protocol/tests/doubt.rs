//! What is not believed without proof: disks, keepers, peers. Each test names what was believed.

use super::trio::by_keeper;
use super::*;

const DISK: Policy = Policy {
    acks: Acks::Disk,
    ..START
};

/// Whether the journal of a host has a line with this code.
fn has(trio: &mut Trio, host: &str, code: &str) -> bool {
    trio.host(host).journal().contains(&code)
}

// --- disks ---------------------------------------------------------------------------------------

/// Copies hold the same bytes, so equal disks fill in the same second.
#[test]
fn full_disks_everywhere_cost_no_log_and_the_guest_goes_on_when_there_is_room() {
    for acks in [Acks::Memory, Acks::Disk] {
        let mut trio = Trio::paired(Policy { acks, ..START });
        trio.record_entries(3);
        let holdings = ["a", "b", "c"].map(|host| trio.host(host).durable.incarnation);
        let reason = || "no space left on device".to_owned();
        for host in ["b", "c", "a"] {
            trio.input(&name(host), Input::StoreFull { reason: reason() });
        }
        trio.pass(500);
        assert_eq!(trio.record().term, Term(1), "nobody else could go on");
        assert!(trio.host("a").paused, "the guest waits for room");
        assert!(has(&mut trio, "a", "waiting"));
        for host in ["a", "b", "c"] {
            trio.input(&name(host), Input::StoreRoom);
        }
        trio.pass(500);
        assert!(!trio.host("a").paused, "and goes on by itself");
        trio.record_entries(2);
        assert_eq!(trio.host("a").released, LogIndex(6));
        let now = ["a", "b", "c"].map(|host| trio.host(host).durable.incarnation);
        assert_eq!(holdings, now, "no holding was given up");
        assert!(!has(&mut trio, "b", "resynchronising"));
    }
}

#[test]
fn a_primary_whose_disk_is_full_lets_one_with_room_go_on_and_keeps_its_log() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(3);
    trio.host("a").keeps_up = true;
    let reason = "no space left on device".to_owned();
    trio.input(&name("a"), Input::StoreFull { reason });
    trio.pass(500);
    assert_eq!(trio.record().primary.host, name("b"));
    assert_eq!(trio.host("a").tip.index, LogIndex(4), "nothing is dropped");
    trio.input(&name("a"), Input::StoreRoom);
    trio.pass(2_000);
    assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record);
}

/// When its disk filled up nobody could go on; then a copy comes back whose disk is well.
#[test]
fn a_primary_that_waits_for_room_lets_a_copy_go_on_that_comes_later() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    let reason = || "no space left on device".to_owned();
    trio.host("b").keeps_up = true;
    for host in ["b", "c", "a"] {
        trio.input(&name(host), Input::StoreFull { reason: reason() });
    }
    trio.pass(300);
    assert!(trio.host("a").paused);
    assert_eq!(trio.record().term, Term(1));
    trio.input(&name("b"), Input::StoreRoom);
    trio.pass(1_000);
    assert_eq!(trio.record().primary.host, name("b"), "{:?}", trio.record);
    assert!(has(&mut trio, "a", "abdicated"));
}

/// More was sent than a store that hangs keeps waiting. What it did not take is sent again, with or
/// without a word that there is room, and nothing is missing in between.
#[test]
fn a_copy_whose_store_did_not_take_all_has_the_rest_again() {
    for acks in [Acks::Memory, Acks::Disk] {
        for told in [true, false] {
            let mut trio = Trio::paired(Policy {
                acks,
                on_loss: OnLoss::Stall,
                ..START
            });
            let before = trio.host("c").durable.incarnation;
            trio.record_entries(2);
            trio.host("c").store_overflows = true;
            trio.record_entries(3);
            if told {
                let reason = "64 MiB of the log wait for the disk".to_owned();
                trio.input(&name("c"), Input::StoreFull { reason });
            }
            trio.pass(300);
            assert_eq!(
                trio.host("a").released,
                LogIndex(3),
                "c does not have the rest"
            );
            trio.host("c").store_overflows = false;
            if told {
                trio.input(&name("c"), Input::StoreRoom);
            }
            trio.pass(1_000);
            let all = trio.host("a").tip;
            assert_eq!(trio.host("c").tip, all, "told: {told}");
            assert_eq!(trio.host("a").released, LogIndex(6));
            assert_eq!(
                trio.host("c").durable.incarnation,
                before,
                "it is the same holding"
            );
        }
    }
}

/// A guest that has gone on beyond its log is gone: it goes on from where the log ends, here or elsewhere.
#[test]
fn a_primary_whose_store_did_not_take_all_goes_on_from_the_end_of_its_log() {
    for hosts in [&["a", "b"][..], &["a"]] {
        let mut trio = Trio::with_hosts(hosts);
        trio.create_on(hosts, DISK);
        trio.record_entries(3);
        trio.pass(300);
        for host in hosts {
            trio.host(host).keeps_up = true;
        }
        trio.record_entries(1);
        let released = trio.host("a").released;
        trio.host("a").store_overflows = true;
        trio.record_entries(2);
        assert!(has(&mut trio, "a", "abdicated"));
        trio.host("a").store_overflows = false;
        trio.pass(5_000);
        assert!(trio.record().term > Term(1), "{:?}", trio.record());
        let reigns = trio.record().primary.host.clone();
        trio.record_on(reigns.as_str(), 2);
        trio.pass(500);
        let end = trio.host("a").tip;
        assert_eq!(end.index, LogIndex(released.0 + 2), "{hosts:?}");
        assert_eq!(trio.host(reigns.as_str()).released, end.index, "{hosts:?}");
    }
}

/// What else pauses a guest and lets it go on does not let it go on while the disk takes nothing.
#[test]
fn a_switchover_that_fails_does_not_let_a_guest_go_on_that_has_no_room() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(3);
    for host in ["b", "c", "a"] {
        let reason = "no space left on device".to_owned();
        trio.input(&name(host), Input::StoreFull { reason });
    }
    assert!(trio.host("a").paused);
    let order = Operator::Switchover {
        to: Some(name("b")),
    };
    trio.input(&name("a"), Input::Operator(order));
    trio.pass(20_000);
    assert!(has(&mut trio, "a", "switchover_failed") || has(&mut trio, "a", "operator_refused"));
    assert!(trio.host("a").paused, "there is no room yet");
    for host in ["b", "c", "a"] {
        trio.input(&name(host), Input::StoreRoom);
    }
    trio.pass(500);
    assert!(!trio.host("a").paused, "and goes on by itself");
}

/// A failed fsync: nobody knows what the disk has. The log is evidence and stays beside.
#[test]
fn a_log_that_has_become_doubtful_is_set_aside() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(3);
    let reason = "fsync failed".to_owned();
    trio.input(&name("c"), Input::StoreFailed { reason });
    assert_eq!(trio.host("c").dropped, Some(true));
    trio.pass(2_000);
    assert_eq!(trio.record().members.len(), 2, "it joins again, as another");
}

/// The folder was put back from a backup: with disk acknowledgements, too, it is another holding.
#[test]
fn a_folder_that_was_put_back_is_not_the_holding_that_the_record_names() {
    let mut trio = Trio::paired(DISK);
    let before = trio.host("c").durable.incarnation;
    assert_eq!(
        trio.record().member_on(&name("c")).map(|m| m.incarnation),
        Some(before)
    );
    trio.host("a").cut_off = true;
    trio.host("b").cut_off = true;
    trio.host("c").disk = DiskId(99);
    trio.restart("c");
    trio.pass(3_000);
    assert_ne!(trio.host("c").durable.incarnation, before);
    assert!(has(&mut trio, "c", "holding_lost"));
    assert_eq!(trio.record().term, Term(1), "nobody is promoted from it");
}

/// The whole disk went back, its identity with it: the record knows what its copies held.
#[test]
fn a_copy_with_less_than_the_record_says_does_not_claim() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(10);
    // A change of the record notes how far everybody is.
    trio.host("b").cut_off = true;
    trio.record_entries(1);
    trio.pass(1_500);
    assert!(trio.record().through > LogIndex(10), "{:?}", trio.record());
    trio.host("a").cut_off = true;
    trio.host("c").forget_after(LogIndex(5));
    trio.restart("c");
    trio.pass(3_000);
    assert!(has(&mut trio, "c", "holding_lost"));
    assert_eq!(trio.record().term, Term(1));
}

/// A disk that lied about its syncs: what its host says after the restart is less than it had said.
#[test]
fn a_copy_that_greets_with_less_than_it_held_is_not_counted() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(10);
    let before = trio.host("b").durable.incarnation;
    trio.host("b").forget_after(LogIndex(3));
    // Only the acknowledgements could have told: the record is older.
    trio.host("b").durable.seen = None;
    trio.restart("b");
    trio.pass(100);
    assert_ne!(
        trio.host("b").durable.incarnation,
        before,
        "it takes another"
    );
    assert!(has(&mut trio, "a", "peer_misbehaved"));
    trio.host("c").cut_off = true;
    trio.pass(3_000);
    trio.record_entries(1);
    assert_eq!(
        trio.host("b").tip.index,
        LogIndex(12),
        "it has all of it again"
    );
}

// --- the keeper ----------------------------------------------------------------------------------

#[test]
fn a_keeper_that_was_set_back_is_not_believed_and_said_so() {
    let mut trio = Trio::paired(START);
    let old = trio.record.clone();
    trio.host("c").cut_off = true;
    trio.record_entries(1);
    trio.pass(1_500);
    assert_eq!(trio.record().members.len(), 1);
    trio.record = old;
    trio.host("a").cut_off = true;
    trio.pass(3_000);
    assert!(has(&mut trio, "b", "keeper_set_back"));
    assert_eq!(trio.record().term, Term(1), "b does not claim on it");
    assert!(trio.host("b").node.status().keeper_set_back.is_some());
}

#[test]
fn an_emptied_keeper_lets_nobody_begin_a_vm_that_hosts_still_have() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(5);
    trio.record = None;
    for host in ["a", "b", "c"] {
        trio.restart(host);
    }
    trio.pass(500);
    let hosts = trio.names();
    let create = Operator::Create {
        hosts,
        policy: DISK,
    };
    trio.input(&name("a"), Input::Operator(create.clone()));
    assert!(has(&mut trio, "a", "operator_refused"));
    // Neither does one that has only the log.
    trio.host("b").durable.seen = None;
    trio.restart("b");
    trio.pass(500);
    trio.input(&name("b"), Input::Operator(create));
    assert!(has(&mut trio, "b", "operator_refused"));
    assert_eq!(trio.host("b").tip.index, LogIndex(6), "nothing is dropped");
    assert!(trio.record.is_none());
}

/// An operator gives the keeper the record back.
#[test]
fn a_keeper_that_has_the_record_again_is_believed_again() {
    let mut trio = Trio::paired(START);
    let kept = trio.record.take();
    trio.host("c").cut_off = true;
    trio.pass(2_000);
    assert!(has(&mut trio, "a", "keeper_set_back"));
    trio.record = kept;
    trio.pass(2_000);
    assert_eq!(trio.record().members.len(), 1, "c could be removed");
    assert!(trio.host("a").node.status().keeper_set_back.is_none());
}

// --- peers ---------------------------------------------------------------------------------------

#[test]
fn whoever_says_that_it_reigns_by_an_unknown_record_is_not_believed() {
    let mut trio = Trio::paired(START);
    trio.record_entries(2);
    let version = Version {
        term: Term(9),
        epoch: Epoch(9),
    };
    let authority = Authority::Reign(version);
    let tip = trio.host("b").tip;
    for message in [
        Message::Heartbeat {
            version,
            tail: LogIndex(99),
            committed: LogIndex(99),
            forget: FrameNumber(0),
        },
        Message::Stream {
            authority: authority.clone(),
            after: tip,
        },
        Message::Diverged { authority, tip },
    ] {
        let from = name("c");
        trio.input(&name("b"), Input::Message { from, message });
    }
    trio.pass(100);
    assert_eq!(trio.host("b").tip, tip);
    assert!(trio.host("b").dropped.is_none());
    trio.record_entries(1);
    assert_eq!(trio.host("a").released, LogIndex(4));
}

#[test]
fn a_host_that_the_record_does_not_concern_gets_neither_promise_nor_log() {
    let mut trio = Trio::new();
    trio.create_on(&["a", "b"], START);
    trio.record_entries(3);
    trio.pass(300);
    let claim = Claim {
        term: Term(2),
        claimant: name("c"),
        base: trio.record().version(),
    };
    trio.host("c").tip = LogTip::default();
    for message in [
        Message::Seal {
            claim,
            consent: true,
        },
        Message::Fetch {
            term: Term(2),
            after: LogTip::default(),
        },
    ] {
        let from = name("c");
        trio.input(&name("b"), Input::Message { from, message });
    }
    trio.pass(100);
    assert_eq!(trio.host("b").node.status().promise, None);
    assert!(trio.host("c").batches.is_empty(), "no log was sent");
    trio.record_entries(1);
    assert_eq!(trio.host("a").released, LogIndex(4), "output goes on");
}

/// The claimant's word that the primary consents counts for nothing.
/// An operator asks a host for what it once held. The copies would not even object: it is nobody to
/// them, and whether the primary lives is not its business.
#[test]
fn a_host_that_the_record_does_not_concern_is_not_ordered_to_reign() {
    let mut trio = Trio::paired(START);
    let pair = Operator::Pair {
        hosts: vec![name("a"), name("b")],
        policy: START,
    };
    trio.input(&name("a"), Input::Operator(pair));
    trio.pass(1_000);
    let before = trio.record().clone();
    assert!(!before.concerns(&name("c")), "{before:?}");
    for order in [Operator::AcceptLoss, Operator::StartOver] {
        trio.host("c").events.clear();
        trio.input(&name("c"), Input::Operator(order));
        trio.pass(500);
        assert!(has(&mut trio, "c", "operator_refused"));
        assert_eq!(*trio.record(), before);
    }
}

/// The record's keeper takes that from an operator, whoever reigns.
#[test]
fn a_primary_goes_on_when_its_record_names_another_host() {
    let mut trio = Trio::with_hosts(&["a", "b", "d"]);
    trio.create_on(&["a", "b"], START);
    trio.record_entries(1);
    trio.pass(200);
    let before = trio.record().clone();
    assert_eq!(before.members.len(), 1);
    trio.host("d").keeps_up = true;
    trio.record = Some(before.wanted_on(&name("d")));
    trio.record_entries(2);
    // A primary looks into its record now and then.
    trio.pass(12_000);
    trio.record_entries(2);
    assert_eq!(trio.record().term, before.term);
    assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record);
    let tip = trio.host("a").tip.index;
    assert_eq!(trio.host("a").released, tip);
}

#[test]
fn consent_is_the_primarys_to_give() {
    let mut trio = Trio::paired(START);
    let claim = Claim {
        term: Term(2),
        claimant: name("c"),
        base: trio.record().version(),
    };
    let message = Message::Seal {
        claim,
        consent: true,
    };
    let from = name("c");
    trio.input(&name("b"), Input::Message { from, message });
    assert_eq!(trio.host("b").node.status().promise, None);
}

/// A record is only news with its keeper's proof; nodes are handed nothing else.
#[test]
fn a_record_of_another_vm_of_this_name_is_no_news() {
    let mut trio = Trio::paired(START);
    let mut other = trio.record().clone();
    other.lineage = Lineage(other.lineage.0 ^ 1);
    other.term = Term(7);
    other.epoch = Epoch(70);
    other.primary.host = name("c");
    other.members = vec![];
    let from = name("c");
    let message = Message::Record(by_keeper(other));
    trio.input(&name("a"), Input::Message { from, message });
    trio.record_entries(1);
    assert_eq!(trio.host("a").released, LogIndex(2));
}

/// Every state that only an operator can end is told with the order that ends it.
#[test]
fn a_host_that_nobody_can_promote_says_what_it_takes() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    for host in ["a", "b"] {
        trio.host(host).cut_off = true;
    }
    // Its memory is gone: it is no copy any more, and has the log.
    trio.restart("c");
    trio.pass(4_000);
    let told = trio.host("c").events.iter().any(|event| match event {
        Event::Waiting { why } => why.contains("switchover vm --to c --accept-loss"),
        _ => false,
    });
    assert!(told, "{:?}", trio.host("c").journal());
    trio.input(&name("c"), Input::Operator(Operator::AcceptLoss));
    trio.pass(1_000);
    assert_eq!(trio.record().primary.host, name("c"));
    assert!(trio.record().loss, "and the record remembers");
}

/// What was let out and is in no log but this one is not deleted because another host was told to
/// go on without it.
#[test]
fn a_log_that_may_be_the_only_one_is_set_aside_and_not_deleted() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    trio.host("c").cut_off = true;
    trio.record_entries(1);
    trio.pass(1_500);
    trio.record_entries(5);
    for host in ["a", "b"] {
        trio.host(host).cut_off = true;
    }
    trio.host("c").cut_off = false;
    trio.restart("c");
    trio.pass(500);
    trio.input(&name("c"), Input::Operator(Operator::AcceptLoss));
    trio.pass(1_000);
    assert_eq!(trio.record().primary.host, name("c"));
    for host in ["a", "b"] {
        trio.host(host).cut_off = false;
        trio.restart(host);
    }
    trio.pass(2_000);
    for host in ["a", "b"] {
        assert_eq!(trio.host(host).dropped, Some(true), "{host}");
    }
}

/// What was never let out is held by whoever reigns as far as it counts: it need not be kept.
/// Both copies' disks had lied. What the old primary has let out is in its log alone.
#[test]
fn a_primary_knows_what_it_has_let_out_when_it_is_deposed() {
    let mut trio = Trio::paired(DISK);
    trio.record_entries(3);
    assert_eq!(trio.host("a").released, LogIndex(4));
    trio.host("a").cut_off = true;
    for host in ["b", "c"] {
        trio.host(host).forget_after(LogIndex(2));
        trio.restart(host);
    }
    trio.pass(1_000);
    assert_eq!(trio.record().begins, LogIndex(2), "{:?}", trio.record);
    trio.host("a").cut_off = false;
    trio.pass(1_000);
    assert_eq!(trio.host("a").dropped, Some(true));
}

#[test]
fn the_unanswered_end_of_a_dead_primarys_log_is_not_kept() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    for host in ["b", "c"] {
        trio.host(host).cut_off = true;
    }
    trio.record_entries(2);
    for host in ["b", "c"] {
        trio.host(host).cut_off = false;
    }
    trio.host("a").cut_off = true;
    trio.pass(1_000);
    assert_eq!(trio.record().term, Term(2));
    trio.host("a").cut_off = false;
    trio.restart("a");
    trio.pass(1_000);
    assert_eq!(trio.host("a").dropped, Some(false));
}

/// What a reign between had begun with is not known: one that began with everything that came after it
/// may have begun with less than this log has.
#[test]
fn a_log_from_before_a_reign_that_it_has_not_seen_is_set_aside() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    for host in ["b", "c"] {
        trio.host(host).cut_off = true;
    }
    trio.record_entries(2);
    for host in ["b", "c"] {
        trio.host(host).cut_off = false;
    }
    trio.host("a").cut_off = true;
    trio.pass(1_000);
    assert_eq!(trio.record().primary.host, name("b"));
    trio.record_on("b", 1);
    trio.pass(10);
    trio.host("b").cut_off = true;
    trio.pass(3_000);
    assert_eq!(trio.record().primary.host, name("c"), "{:?}", trio.record());
    assert_eq!(trio.record().follows, Term(2));
    trio.host("a").cut_off = false;
    trio.restart("a");
    trio.pass(1_000);
    assert_eq!(trio.host("a").dropped, Some(true));
}

/// All disks are lost: the name is not, and an order boots the guest anew.
#[test]
fn a_vm_of_which_nothing_is_left_starts_over_by_an_order() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    trio.input(&name("b"), Input::Operator(Operator::StartOver));
    assert!(has(&mut trio, "b", "operator_refused"), "it runs");
    for host in ["a", "b", "c"] {
        trio.host(host).lose_disk();
        trio.restart(host);
    }
    trio.pass(4_000);
    let told = trio.host("a").events.iter().any(|event| match event {
        Event::Waiting { why } => why.contains("--start-over"),
        _ => false,
    });
    assert!(told, "{:?}", trio.host("a").journal());
    trio.input(&name("a"), Input::Operator(Operator::StartOver));
    trio.pass(300);
    assert_eq!(trio.record().primary.host, name("a"));
    assert!(trio.record().loss);
    trio.record_entries(2);
    trio.pass(1_000);
    assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record);
}

/// While anybody who can be reached has anything, nothing starts over.
#[test]
fn nothing_starts_over_beside_somebody_who_has_the_log() {
    let mut trio = Trio::paired(START);
    trio.record_entries(3);
    trio.host("a").cut_off = true;
    trio.host("b").lose_disk();
    for host in ["b", "c"] {
        trio.restart(host);
    }
    trio.pass(500);
    trio.input(&name("b"), Input::Operator(Operator::StartOver));
    assert!(has(&mut trio, "b", "operator_refused"));
    trio.pass(500);
    assert_eq!(trio.record().term, Term(1));
}
