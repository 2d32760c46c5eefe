//! One suite for every store: what [`Store`] promises, checked through nothing but the trait.
//!
//! A store's own tests hand [`all`] something that makes empty [`Place`]s. Each check panics with
//! what it expected. Everything in here is deterministic.

use bytes::Bytes;

use crate::batch::{Batch, BatchBuilder};
use crate::entry::{
    Answer, Arrival, Entry, FrameNumber, FrameSource, GatewayIncarnation, Group, GroupBody,
    GuestTime, Mark, MarkDigest,
};
use crate::position::{Chain, LogIndex, LogTip, Position, Term};
use crate::store::{AppendError, LogReader, ReadError, Store, TruncateError};

/// Where a store keeps its log: what is left of a store when its process is killed.
pub trait Place {
    /// Opens the store that is kept here, as a new process does; the one opened before is gone.
    fn open(&mut self) -> Box<dyn Store>;

    /// From now on there is no room for another byte here, or there is again.
    fn fill(&mut self, full: bool);

    /// From now on no sync succeeds, or each does again.
    fn break_syncs(&mut self, broken: bool);
}

/// Runs every check, each in a new place.
pub fn all(new: &mut dyn FnMut() -> Box<dyn Place>) {
    let checks: [fn(&mut dyn Place); 10] = [
        an_empty_log_is_at_its_start,
        what_was_appended_is_read_back,
        only_what_continues_the_log_is_taken,
        sync_makes_the_tip_durable,
        chains_are_known_where_batches_end,
        a_reader_goes_on_while_the_log_grows,
        the_log_is_cut_back_and_goes_on_differently,
        a_killed_process_loses_nothing,
        a_full_place_refuses_and_goes_on_when_there_is_room,
        a_failed_sync_makes_doubtful_and_is_the_end,
    ];
    for check in checks {
        check(new().as_mut());
    }
}

/// A few dozen to a few hundred bytes of log each, from nothing but `seed`: a log of `count`
/// batches that begins at `from`, under the terms from `term` on (a new one every 50 batches).
pub fn sample_batches(seed: u64, term: Term, from: LogIndex, count: usize) -> Vec<Batch> {
    let mut state = seed;
    let mut random = move || {
        // SplitMix64 (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let mut builder = BatchBuilder::new(term, from);
    let (mut at, mut frames) = (0, 0);
    let batches = (0..count).map(|i| {
        builder.set_term(Term(term.0 + i as u64 / 50));
        for _ in 0..=random() % 4 {
            at += random() % 9;
            frames += 1;
            let body = match random() % 3 {
                0 => GroupBody::Exit {
                    answers: vec![Answer::Clock(GuestTime(at * 1000))],
                    outputs: 0,
                },
                1 => GroupBody::Exit {
                    answers: Vec::new(),
                    outputs: 1,
                },
                _ => GroupBody::Arrival(Arrival::Frame {
                    source: FrameSource {
                        gateway: GatewayIncarnation(seed),
                        number: FrameNumber(frames),
                    },
                    bytes: (0..random() % 100)
                        .map(|_| random() as u8)
                        .collect::<Bytes>(),
                }),
            };
            let at = Position(at);
            let pushed = builder.push(&Entry::Group(Group { at, body }));
            pushed.expect("a sample is within the bounds");
        }
        let mark = Mark {
            at: Position(at),
            digest: MarkDigest(random()),
        };
        let pushed = builder.push(&Entry::Mark(mark));
        pushed.expect("a sample is within the bounds");
        builder.finish().expect("something was pushed")
    });
    batches.collect()
}

fn samples(count: usize) -> Vec<Batch> {
    sample_batches(1, Term(1), LogIndex::START, count)
}

/// Where the log ends after each of these batches.
fn tips(start: LogTip, batches: &[Batch]) -> Vec<LogTip> {
    let next = |tip: &mut LogTip, batch: &Batch| {
        *tip = batch.tip(tip.chain);
        Some(*tip)
    };
    batches.iter().scan(start, next).collect()
}

fn append_all(store: &mut dyn Store, batches: &[Batch]) {
    for batch in batches {
        let before = store.tip();
        let tip = store.append(batch).expect("the batch continues the log");
        assert_eq!(tip, batch.tip(before.chain), "append says the new tip");
        assert_eq!(tip, store.tip(), "the tip is where the last batch ends");
    }
}

fn read_all(reader: &mut dyn LogReader) -> Vec<Batch> {
    let mut batches = Vec::new();
    loop {
        let more = reader.next_batches(500).expect("the log can be read");
        if more.is_empty() {
            return batches;
        }
        batches.extend(more);
    }
}

fn read_from(store: &dyn Store, from: LogIndex) -> Vec<Batch> {
    read_all(store.read_from(from).expect("it is kept").as_mut())
}

/// A log that was never written.
pub fn an_empty_log_is_at_its_start(place: &mut dyn Place) {
    let mut store = place.open();
    let start = LogTip::default();
    assert_eq!(
        (store.base(), store.tip(), store.durable_tip()),
        (start, start, start)
    );
    assert_eq!(read_from(store.as_ref(), LogIndex::START), []);
    assert!(store.read_from(LogIndex(1)).is_err());
    assert_eq!(store.floor(LogIndex(7)).expect("readable"), Some(start));
    let chain = store.chain_at(LogIndex::START).expect("readable");
    assert_eq!(chain, Some(Chain::default()));
    assert_eq!(store.sync().expect("nothing to do"), start);
    let cut = store.truncate(LogIndex::START).expect("nothing to do");
    assert_eq!(cut, start);
}

/// Reading from any entry gives the batch that holds it and all that follow.
pub fn what_was_appended_is_read_back(place: &mut dyn Place) {
    let mut store = place.open();
    let batches = samples(120);
    append_all(store.as_mut(), &batches);
    assert_eq!(read_from(store.as_ref(), LogIndex::START), batches);
    for entry in (0..store.tip().index.0).step_by(7).map(LogIndex) {
        let holding = batches.partition_point(|batch| batch.end() <= entry);
        assert_eq!(read_from(store.as_ref(), entry), batches[holding..]);
    }
    assert_eq!(read_from(store.as_ref(), store.tip().index), []);
    let beyond = store.read_from(store.tip().index.plus(1));
    assert!(matches!(beyond, Err(ReadError::Beyond { .. })));
}

/// Neither a gap nor an overlap nor an older term.
pub fn only_what_continues_the_log_is_taken(place: &mut dyn Place) {
    let mut store = place.open();
    let batches = sample_batches(1, Term(5), LogIndex::START, 60);
    append_all(store.as_mut(), &batches[..55]);
    let tip = store.tip();
    for wrong in [&batches[56], &batches[54], &batches[0]] {
        let error = store.append(wrong).expect_err("it does not continue");
        let gap = AppendError::Gap {
            expected: tip.index,
            found: wrong.first(),
        };
        assert_eq!(error.to_string(), gap.to_string());
    }
    let old = &sample_batches(2, Term(4), tip.index, 1)[0];
    let error = store.append(old).expect_err("its term is over");
    assert!(matches!(error, AppendError::OldTerm { .. }), "{error}");
    assert_eq!(store.tip(), tip, "refusing changes nothing");
    append_all(store.as_mut(), &batches[55..]);
    assert_eq!(read_from(store.as_ref(), LogIndex::START), batches);
}

/// Up to where the log is durable is never overstated, and a sync brings it to the tip.
pub fn sync_makes_the_tip_durable(place: &mut dyn Place) {
    let mut store = place.open();
    for some in samples(30).chunks(10) {
        append_all(store.as_mut(), some);
        assert!(store.durable_tip().index <= store.tip().index);
        let synced = store.sync().expect("the disk works");
        assert_eq!((synced, store.durable_tip()), (store.tip(), store.tip()));
    }
}

/// And nowhere else; the floor of any other place is the last one before it.
pub fn chains_are_known_where_batches_end(place: &mut dyn Place) {
    let mut store = place.open();
    let batches = samples(80);
    append_all(store.as_mut(), &batches);
    let mut ends = vec![LogTip::default()];
    ends.extend(tips(LogTip::default(), &batches));
    for index in (0..=store.tip().index.0).map(LogIndex) {
        let floor = ends.iter().rfind(|tip| tip.index <= index).copied();
        assert_eq!(store.floor(index).expect("readable"), floor);
        let chain = floor.filter(|tip| tip.index == index).map(|tip| tip.chain);
        assert_eq!(store.chain_at(index).expect("readable"), chain);
    }
}

/// However appending and reading take turns, each batch is read once and in order.
pub fn a_reader_goes_on_while_the_log_grows(place: &mut dyn Place) {
    let mut store = place.open();
    let batches = samples(150);
    let mut reader = store.read_from(LogIndex::START).expect("readable");
    let mut late = store.read_from(LogIndex::START).expect("readable");
    let mut read = Vec::new();
    for (turn, some) in batches.chunks(7).enumerate() {
        append_all(store.as_mut(), some);
        match turn % 3 {
            0 => {}
            1 => read.extend(reader.next_batch().expect("readable")),
            _ => read.extend(read_all(reader.as_mut())),
        }
        assert_eq!(
            reader.position(),
            read.last().map_or(LogIndex::START, Batch::end)
        );
    }
    read.extend(read_all(reader.as_mut()));
    assert_eq!(read, batches);
    assert_eq!(read_all(late.as_mut()), batches);
    assert!(reader.next_batch().expect("readable").is_none());
}

/// Where two logs part is found by their floors; one is cut there and continued like the other.
pub fn the_log_is_cut_back_and_goes_on_differently(place: &mut dyn Place) {
    let mut store = place.open();
    let ours = samples(90);
    append_all(store.as_mut(), &ours);
    let mut ahead = store.read_from(LogIndex::START).expect("readable");
    assert_eq!(read_all(ahead.as_mut()), ours);
    let mut behind = store.read_from(LogIndex::START).expect("readable");
    assert!(behind.next_batch().expect("readable").is_some());

    let long = ours.iter().find(|batch| batch.len() > 1).expect("some are");
    let inside = long.first().plus(1);
    let error = store.truncate(inside).expect_err("no batch ends there");
    let nearest = match error {
        TruncateError::NotABoundary { nearest, .. } => nearest,
        other => panic!("expected a boundary error, not {other}"),
    };
    assert_eq!(nearest, long.first());
    let beyond = store.truncate(store.tip().index.plus(1));
    assert!(beyond.is_err(), "the log cannot be cut beyond its end");
    assert_eq!(read_from(store.as_ref(), LogIndex::START), ours);

    // From the end backwards: within a segment, across several, at the very start.
    for keep in [88, 60, 59, 10, 0] {
        let end = ours[keep].first();
        let cut = store.truncate(end).expect("a batch ends there");
        assert_eq!((cut.index, store.tip()), (end, cut));
        assert_eq!(read_from(store.as_ref(), LogIndex::START), ours[..keep]);
        let theirs = sample_batches(9, Term(7), end, 30);
        append_all(store.as_mut(), &theirs);
        let expected = [&ours[..keep], &theirs].concat();
        assert_eq!(read_from(store.as_ref(), LogIndex::START), expected);
        drop(store);
        store = place.open();
        assert_eq!(read_from(store.as_ref(), LogIndex::START), expected);
        store.truncate(end).expect("a batch ends there");
        assert_eq!(store.tip(), cut);
    }
    drop(store);
    // Both readers belong to the store that is gone, and so may see its end only.
    drop((ahead, behind));

    let mut store = place.open();
    append_all(store.as_mut(), &ours);
    let mut ahead = store.read_from(ours[50].first()).expect("readable");
    let mut behind = store.read_from(LogIndex::START).expect("readable");
    assert_eq!(read_all(ahead.as_mut()), ours[50..]);
    assert_eq!(
        behind.next_batch().expect("readable").as_ref(),
        ours.first()
    );
    store
        .truncate(ours[40].first())
        .expect("a batch ends there");
    let error = ahead.next_batch().expect_err("what it read is gone");
    assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
    assert_eq!(read_all(behind.as_mut()), ours[1..40]);
    // Nor does it go on when the log has grown again: that would be another log's end.
    append_all(store.as_mut(), &ours[40..]);
    let error = ahead.next_batch().expect_err("what it read is gone");
    assert!(matches!(error, ReadError::Truncated { .. }), "{error}");
}

/// What was appended is there when the process is gone, synced or not.
pub fn a_killed_process_loses_nothing(place: &mut dyn Place) {
    let batches = samples(120);
    for (turn, some) in batches.chunks(11).enumerate() {
        let mut store = place.open();
        append_all(store.as_mut(), some);
        if turn % 2 == 0 {
            store.sync().expect("the disk works");
        }
        let tip = store.tip();
        drop(store);
        let store = place.open();
        assert_eq!(store.tip(), tip);
        let all = read_from(store.as_ref(), LogIndex::START);
        assert_eq!(all, batches[..all.len()]);
        assert_eq!(all.last().map(Batch::end), Some(tip.index));
        let chain = store.chain_at(tip.index).expect("readable");
        assert_eq!(chain, Some(tip.chain));
    }
}

/// What is refused for want of room is not part of the log, everything else still is, and the same
/// batch is taken later.
pub fn a_full_place_refuses_and_goes_on_when_there_is_room(place: &mut dyn Place) {
    let batches = samples(120);
    let mut store = place.open();
    let mut reader = store.read_from(LogIndex::START).expect("readable");
    let mut taken = 0;
    for some in [1, 30, 2, 60] {
        append_all(store.as_mut(), &batches[taken..taken + some]);
        taken += some;
        let (tip, bytes) = (store.tip(), store.bytes());
        place.fill(true);
        for _ in 0..3 {
            let error = store.append(&batches[taken]).expect_err("there is no room");
            assert!(matches!(error, AppendError::Full(_)), "{error}");
            assert!(!error.is_doubtful());
            assert_eq!((store.tip(), store.bytes()), (tip, bytes));
        }
        let all = read_from(store.as_ref(), LogIndex::START);
        assert_eq!(all, batches[..taken], "it stays readable");
        let synced = store.sync().expect("what is there can be synced");
        assert_eq!((synced, store.durable_tip()), (tip, tip));
        place.fill(false);
    }
    append_all(store.as_mut(), &batches[taken..]);
    assert_eq!(
        read_all(reader.as_mut()),
        batches,
        "whoever reads on notices nothing"
    );
    // Nor does a process that finds the place full lose anything.
    place.fill(true);
    drop((store, reader));
    let mut store = place.open();
    assert_eq!(read_from(store.as_ref(), LogIndex::START), batches);
    let next = &sample_batches(2, Term(9), store.tip().index, 1);
    store.append(&next[0]).expect_err("there is no room");
    place.fill(false);
    append_all(store.as_mut(), next);
}

/// Nothing beyond what was durable before is ever claimed, and nothing more is taken.
pub fn a_failed_sync_makes_doubtful_and_is_the_end(place: &mut dyn Place) {
    let batches = samples(20);
    let mut store = place.open();
    append_all(store.as_mut(), &batches[..10]);
    let durable = store.sync().expect("the disk works");
    place.break_syncs(true);
    // A store that syncs every batch fails at the first of these.
    let appended = store.append(&batches[10]);
    let doubtful = match &appended {
        Ok(_) => store.sync().expect_err("the disk is broken").is_doubtful(),
        Err(error) => error.is_doubtful(),
    };
    assert!(doubtful, "a failed sync is no full disk");
    assert_eq!(store.durable_tip(), durable);
    place.break_syncs(false);
    for _ in 0..2 {
        let at = 10 + usize::from(appended.is_ok());
        let error = store.append(&batches[at]).expect_err("it has failed");
        assert!(matches!(error, AppendError::Poisoned(_)), "{error}");
        assert!(error.is_doubtful());
        let error = store.sync().expect_err("a later sync proves nothing");
        assert!(error.is_doubtful(), "{error}");
        store.truncate(LogIndex::START).expect_err("it has failed");
        assert_eq!(store.durable_tip(), durable);
    }
    let all = read_from(store.as_ref(), LogIndex::START);
    assert_eq!(all[..10], batches[..10], "it stays readable");
}
