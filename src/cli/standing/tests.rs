use replay_log::{FrameNumber, LogIndex, LogTip, Position, Term};
use vmm::tape::{Ending, GuestEnd};

use super::*;
use crate::agent::operator::{GuestStatus, LinkFigures};
use crate::protocol::{Epoch, Health, Incarnation, Lineage, Member, Policy, SetBack, VmRun};

pub(in crate::cli) fn host(name: &str) -> HostName {
    HostName::new(name).expect("a name")
}

pub(in crate::cli) fn shop() -> VmName {
    VmName::new("shop").expect("a name")
}

fn member(name: &str, incarnation: u64) -> Member {
    Member {
        host: host(name),
        incarnation: Incarnation(incarnation),
    }
}

/// The record of a VM that a runs, with these replicas; every host is in incarnation 1.
pub(in crate::cli) fn record(members: &[&str]) -> Record {
    let hosts = ["a"].iter().chain(members).map(|name| host(name));
    Record {
        begins: LogIndex::START,
        follows: replay_log::Term(0),
        loss: false,
        lineage: Lineage(7),
        term: Term(3),
        epoch: Epoch(5),
        primary: member("a", 1),
        members: members.iter().map(|name| member(name, 1)).collect(),
        hosts: hosts.collect(),
        policy: Policy::default(),
        through: LogIndex(3),
        failed: None,
    }
}

pub(in crate::cli) fn node(role: RoleName, record: &Record) -> Status {
    Status {
        keeper_set_back: None,
        full: None,
        health: Health::Well,
        stopped_at: None,
        seen: None,
        role,
        record: Some(record.clone()),
        incarnation: Incarnation(1),
        promise: None,
        tip: LogTip::default(),
        stored: LogIndex(100),
        synced: LogIndex(0),
        executed: LogIndex(100),
        position: Position(40),
        committed: LogIndex(100),
        forgotten: FrameNumber(0),
        run: VmRun::default(),
        unprotected_since: None,
        stalled_since: None,
        throttled: false,
        primary_silence: None,
        followers: Vec::new(),
    }
}

fn follower(name: &str, executed: u64, lag: Span) -> FollowerStatus {
    FollowerStatus {
        health: Health::Well,
        host: host(name),
        incarnation: Incarnation(1),
        member: true,
        connected: true,
        held: LogIndex(1_000_000),
        executed: LogIndex(executed),
        lag,
        silence: Span::ZERO,
    }
}

/// A cluster that is made up: what each host says.
#[derive(Default)]
pub(in crate::cli) struct Told(pub(in crate::cli) Look);

impl Told {
    /// This host looks after the VM like this.
    pub(in crate::cli) fn says(mut self, name: &str, node: Status) -> Self {
        let vm = VmStatus {
            vm: shop(),
            node,
            guest: None,
            failure: None,
            log_bytes: None,
            store: crate::agent::operator::StoreFigures::default(),
            waiting_output: 0,
            gateways: 0,
            fetching: None,
        };
        let status = HostStatus {
            host: host(name),
            version: "1".to_owned(),
            now: Time::from_nanos(10_000_000_000),
            peers: BTreeMap::new(),
            journal: 0,
            witness: None,
            vms: vec![vm],
            space: None,
            aside: Vec::new(),
            link: LinkFigures::default(),
            silent: BTreeMap::new(),
            troubles: Vec::new(),
        };
        self.0.insert(host(name), Ok(status));
        self
    }

    /// The same with something changed.
    pub(in crate::cli) fn but(mut self, name: &str, change: impl FnOnce(&mut VmStatus)) -> Self {
        let status = self.0.get_mut(&host(name)).expect("has said something");
        change(&mut status.as_mut().expect("answers").vms[0]);
        self
    }

    pub(in crate::cli) fn down(mut self, name: &str) -> Self {
        self.0.insert(host(name), Err(OperatorError::NoWitness));
        self
    }

    fn sentence(&self) -> String {
        let vm = shop();
        Standing::of(&self.0, &vm)
            .expect("a record is known")
            .sentence()
    }

    fn cost(&self, to: &str) -> String {
        let vm = shop();
        let standing = Standing::of(&self.0, &vm).expect("a record is known");
        standing.cost(&host(to))
    }
}

#[test]
fn who_runs_it_and_who_may_succeed_and_how_soon() {
    let record = record(&["b", "c", "d", "e"]);
    let mut primary = node(RoleName::Primary, &record);
    primary.followers = vec![
        follower("b", 999_999, Span::from_millis(3)),
        // Replays from the beginning.
        follower("c", 410_000, Span::from_millis(40_000)),
        // Hangs in a guest that computes without an exit.
        follower("e", 999_990, Span::from_millis(77_000)),
    ];
    let replica = || node(RoleName::Member, &record);
    let told = Told::default()
        .says("a", primary)
        .says("b", replica())
        .says("c", replica())
        .says("d", replica())
        .but("d", |vm| {
            vm.node.health = Health::Unable;
            vm.failure = Some("the log's beginning is gone".to_owned());
        })
        .down("e");
    assert_eq!(
        told.sentence(),
        "a runs it in term 3, rule all, b may succeed; c may succeed in about 5.9 s; \
         d CANNOT SUCCEED: its VMM does not come to the end of what it holds (the log's beginning is \
         gone); e may succeed in about 77.0 s"
    );
}

#[test]
fn a_record_alone_runs_nothing() {
    let record = record(&["b"]);
    // After a power failure the old primary alone comes back: a learner, with another holding.
    let mut learner = node(RoleName::Learner, &record);
    learner.incarnation = Incarnation(2);
    let told = Told::default().says("a", learner.clone()).down("b");
    assert_eq!(
        told.sentence(),
        "NOBODY RUNS IT: a waits for b ('understudy switchover shop --to a --accept-loss' goes on \
         without, and may lose what only b held)"
    );
    // The same without anything in its log: it has the disks.
    learner.stored = LogIndex(0);
    let told = Told::default().says("a", learner.clone()).down("b");
    assert!(told.sentence().contains("a waits for b"));
    // The one that never ran it has nothing at all.
    let told = Told::default().says("b", learner.clone()).down("a");
    assert_eq!(
        told.sentence(),
        "NOBODY RUNS IT: no host that answers has it; start a"
    );
    let told = Told::default()
        .says("a", learner.clone())
        .says("b", learner);
    assert!(
        told.sentence()
            .contains("a boots it from its disks as soon as it may"),
        "{}",
        told.sentence()
    );
}

#[test]
fn hosts_that_have_just_started_ask_first() {
    let record = record(&["b"]);
    let mut starting = node(RoleName::Starting, &record);
    starting.incarnation = Incarnation(2);
    let told = Told::default()
        .says("a", starting.clone())
        .says("b", starting);
    assert_eq!(
        told.sentence(),
        "NOBODY RUNS IT: a, b find out what is known of it, which needs the witness"
    );
}

#[test]
fn replicas_that_are_enough_need_no_order() {
    let mut record = record(&["b", "c"]);
    let mut replica = node(RoleName::Member, &record);
    replica.primary_silence = Some(Span::from_millis(5_000));
    let told = |replica: &Status| {
        Told::default()
            .down("a")
            .says("b", replica.clone())
            .down("c")
    };
    // Every copy holds all that was acknowledged, so one is enough.
    assert_eq!(
        told(&replica).sentence(),
        "NOBODY RUNS IT: b may claim it, and needs the witness for that"
    );
    record.policy.rule = crate::protocol::Rule::Any(1);
    replica.record = Some(record.clone());
    assert!(
        told(&replica)
            .sentence()
            .contains("b waits for a, c ('understudy switchover shop --to b --accept-loss'"),
        "{}",
        told(&replica).sentence()
    );
    replica.role = RoleName::Claimant;
    assert_eq!(told(&replica).sentence(), "NOBODY RUNS IT: b claims it");
    replica.role = RoleName::GoingLive;
    replica.executed = LogIndex(90);
    assert_eq!(
        told(&replica).sentence(),
        "b reigns in term 3 and is about to run it: it has 10 entries of the log still to execute"
    );
}

/// Whoever asks may be cut off from a host that others hear well.
#[test]
fn a_primary_that_others_hear_runs_it() {
    let record = record(&["b"]);
    let mut replica = node(RoleName::Member, &record);
    replica.primary_silence = Some(Span::from_millis(20));
    let told = Told::default().down("a").says("b", replica);
    assert_eq!(
        told.sentence(),
        "a runs it in term 3, as b says: it does not answer here"
    );
}

/// A primary that was deposed and does not know it yet runs nothing that counts.
#[test]
fn the_newest_record_decides_between_two_primaries() {
    let old = record(&["b"]);
    let mut new = record(&[]);
    new.term = Term(4);
    new.primary = member("b", 1);
    let told = Told::default()
        .says("a", node(RoleName::Primary, &old))
        .says("b", node(RoleName::Primary, &new));
    assert_eq!(
        told.sentence(),
        "b runs it in term 4, rule all, UNPROTECTED"
    );
}

#[test]
fn a_guest_that_has_ended_is_told_first() {
    let record = record(&["b"]);
    let told = Told::default()
        .says("a", node(RoleName::Primary, &record))
        .but("a", |vm| {
            vm.guest = Some(GuestStatus {
                pid: None,
                recording: true,
                longest_deferral: Span::ZERO,
                silence: Span::ZERO,
                ended: Some(Ending {
                    how: GuestEnd::PowerOff,
                    at: Position(9),
                }),
            });
        });
    assert_eq!(
        told.sentence(),
        "a runs it in term 3, rule all; THE GUEST HAS ENDED: power off at position 9, b may succeed"
    );
}

#[test]
fn a_guest_that_no_host_survives_is_told_with_the_place() {
    let mut record = record(&["b"]);
    record.failed = Some(Stumble {
        at: Position(77),
        reigns: Stumble::LIMIT,
        reason: "ring 7 is torn".to_owned(),
    });
    let told = Told::default()
        .says("a", node(RoleName::Member, &record))
        .says("b", node(RoleName::Member, &record));
    assert_eq!(
        told.sentence(),
        "NOBODY RUNS IT: 2 reigns in a row failed at position 77: ring 7 is torn; 'understudy \
         switchover shop --to a --accept-loss' tries once more"
    );
}

#[test]
fn what_an_order_costs_is_told_beforehand() {
    let record = record(&["b", "c"]);
    let mut b = node(RoleName::Member, &record);
    b.primary_silence = Some(Span::from_millis(61_500));
    b.stored = LogIndex(97);
    let mut c = b.clone();
    c.stored = LogIndex(90);
    let told = Told::default().down("a").says("b", b).says("c", c);
    assert_eq!(
        told.cost("c"),
        "c would go on from entry 97 of the log, without 3 entries that are known to be committed; \
         whatever was acknowledged in the last 61.5 s, since c has heard a, may be lost; a cannot be \
         asked for more"
    );
    let told = Told::default().says("a", node(RoleName::Learner, &record));
    assert_eq!(
        told.cost("a"),
        "a would go on from entry 100 of the log, lacking nothing that is known to be committed; \
         whatever it acknowledged as the primary and had in memory only is lost; b, c cannot be asked \
         for more"
    );
    let mut empty = node(RoleName::Learner, &record);
    empty.stored = LogIndex(0);
    let told = Told::default().says("a", empty).down("b").down("c");
    assert!(
        told.cost("a").contains("it would boot from its disks"),
        "{}",
        told.cost("a")
    );
    assert_eq!(told.cost("b"), "b says nothing of shop");
}

/// A host that does not answer here may be known to its primary.
#[test]
fn a_full_disk_is_told_by_its_host_or_by_the_primary() {
    let mut record = record(&["b", "c"]);
    record.loss = true;
    let mut primary = node(RoleName::Primary, &record);
    primary.followers = vec![follower("c", 1_000_000, Span::ZERO)];
    primary.followers[0].health = Health::Full;
    let told = Told::default()
        .says("a", primary)
        .but("a", |vm| {
            vm.node.full = Some("No space left on device".to_owned());
        })
        .says("b", node(RoleName::Member, &record))
        .but("b", |vm| {
            vm.node.health = Health::Full;
            vm.node.full = Some("quota".to_owned());
        })
        .down("c");
    assert_eq!(
        told.sentence(),
        "a runs it in term 3, rule all, b CANNOT SUCCEED: its disk takes nothing more (quota); c \
         CANNOT SUCCEED: its disk takes nothing more; it began with less than was acknowledged \
         before; THE DISK OF a TAKES NOTHING MORE: No space left on device"
    );
}

#[test]
fn a_witness_that_hosts_know_better_is_why_nobody_claims() {
    let record = record(&["b"]);
    let told = Told::default()
        .down("a")
        .says("b", node(RoleName::Member, &record))
        .but("b", |vm| vm.node.keeper_set_back = Some(SetBack::Emptied));
    assert_eq!(
        told.sentence(),
        format!(
            "NOBODY RUNS IT: the witness has nothing of it, and b has seen term 3 epoch 5: {RECOVER}"
        )
    );
}
