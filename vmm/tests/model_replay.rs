//! The run loop over the model machine: what is recorded replays equal, cut anywhere, kicked
//! anywhere, and a log that was changed is refused or reported.

use bytes::Bytes;
use proptest::prelude::*;
use replay_log::{
    Arrival, Batch, BatchBuilder, Entry, GroupBody, Header, ImageDigest, LogIndex, Term,
};
use vmm::host::Output;
use vmm::machine::MachineError;
use vmm::model::{DISK_SIZE, Model};
use vmm::recorder::{Policy, Recorder};
use vmm::replayer::Replayer;
use vmm::runner::{Runner, Turn};
use vmm::tape::{GuestEnd, TapeError};
use vmm::testing::MemoryHost;

fn header() -> Header {
    Header {
        machine_model: vmm::MACHINE_MODEL,
        image: ImageDigest([3; 32]),
        config: Bytes::new(),
        disks: Vec::new(),
        term: Term(1),
        boot: [9; 16],
    }
}

fn host(seed: u64) -> MemoryHost {
    MemoryHost::new(20_000, &[DISK_SIZE], seed)
}

/// What a primary left behind.
struct Recorded {
    batches: Vec<Batch>,
    outputs: Vec<Output>,
    counters: Vec<u64>,
}

/// Runs a primary under `requests` requests, `per_round` at a time, with kicks.
fn record(seed: u64, requests: u64, per_round: u64, kicks: u32) -> Recorded {
    let mut tape = Recorder::start(host(seed), Policy::default(), header()).expect("starts");
    let mut model = Model::new();
    model.kick(kicks);
    let mut runner = Runner::new(model);
    let mut sent = 0;
    while tape
        .host()
        .outputs
        .iter()
        .filter(|o| Model::read_answer(&o.bytes).is_some())
        .count()
        < requests as usize
    {
        while sent < requests && sent % per_round != per_round - 1 {
            tape.host()
                .send_frame(Model::request(sent, (sent * 7 + seed) as u32));
            sent += 1;
        }
        if sent < requests {
            tape.host().send_frame(Model::request(sent, sent as u32));
            sent += 1;
        }
        if runner.turn(&mut tape, 50).expect("runs") == Turn::Waiting {
            tape.host().advance(300_000);
        }
    }
    tape.host().send_frame(Bytes::from_static(b"off"));
    loop {
        match runner.turn(&mut tape, 50).expect("runs") {
            Turn::Ended(end) => break assert_eq!(end, GuestEnd::PowerOff),
            _ => tape.host().advance(300_000),
        }
    }
    Recorded {
        batches: std::mem::take(&mut tape.host().batches),
        outputs: std::mem::take(&mut tape.host().outputs),
        counters: runner.machine().counters().to_vec(),
    }
}

/// Replays everything; how the run loop ended.
fn replay(batches: &[Batch]) -> Result<(Turn, Replayer<MemoryHost>, Runner<Model>), String> {
    replay_as(header(), batches)
}

fn replay_as(
    header: Header,
    batches: &[Batch],
) -> Result<(Turn, Replayer<MemoryHost>, Runner<Model>), String> {
    let mut tape = Replayer::new(host(1), header);
    let mut runner = Runner::new(Model::new());
    for batch in batches {
        tape.feed(batch).map_err(|error| error.to_string())?;
        run_dry(&mut runner, &mut tape).map_err(|error| error.to_string())?;
    }
    let turn = run_dry(&mut runner, &mut tape).map_err(|error| error.to_string())?;
    Ok((turn, tape, runner))
}

fn run_dry(
    runner: &mut Runner<Model>,
    tape: &mut Replayer<MemoryHost>,
) -> Result<Turn, MachineError> {
    for _ in 0..10_000 {
        let turn = runner.turn(tape, 1_000)?;
        if turn != Turn::Ran && tape.drained() {
            return Ok(turn);
        }
    }
    panic!("the replay does not get on");
}

#[test]
fn a_recorded_run_replays_equal() {
    let recorded = record(5, 300, 9, 0);
    let (turn, mut tape, runner) = replay(&recorded.batches).expect("replays");
    assert_eq!(turn, Turn::Ended(GuestEnd::PowerOff));
    assert!(tape.marks() > 10, "the log has marks to compare");
    assert_eq!(tape.host().outputs, recorded.outputs);
    assert_eq!(runner.machine().counters(), recorded.counters);
}

#[test]
fn kicks_change_nothing() {
    let quiet = record(5, 100, 4, 0);
    let stormy = record(5, 100, 4, 400);
    // The host clock of the test moves with each look, so times differ; what the guest did must not.
    let arrivals = |entries: Vec<Entry>| {
        entries
            .iter()
            .filter(|e| matches!(e, Entry::Group(_)))
            .count()
            > 100
    };
    assert!(arrivals(entries(&quiet.batches)) && arrivals(entries(&stormy.batches)));
    assert_eq!(quiet.counters, stormy.counters);
    replay(&stormy.batches).expect("a stormy log replays on a quiet host");
}

/// Cut after any batch, a replica goes live there, serves on, and its log replays as one.
#[test]
fn a_replica_goes_live_at_every_cut() {
    let recorded = record(11, 40, 3, 0);
    for cut in 1..recorded.batches.len() {
        let (turn, tape, mut runner) = replay(&recorded.batches[..cut]).expect("replays");
        if matches!(turn, Turn::Ended(_)) {
            continue;
        }
        let floor = tape.ongoing().clock_floor;
        let made = tape.ongoing().outputs;
        let mut live = tape.go_live(Policy::default(), Term(2)).expect("goes live");
        live.host().outputs.clear();
        live.host().send_frame(Model::request(777, 3));
        for _ in 0..400 {
            if runner.turn(&mut live, 50).expect("runs") == Turn::Waiting {
                live.host().advance(700_000);
            }
        }
        let answered = live
            .host()
            .outputs
            .iter()
            .filter_map(|o| Model::read_answer(&o.bytes));
        assert!(
            answered.into_iter().any(|(tag, ..)| tag == 777),
            "cut {cut}: does not serve"
        );
        let numbers: Vec<u64> = live.host().outputs.iter().map(|o| o.number.0).collect();
        let expected: Vec<u64> = (made.0 + 1..).take(numbers.len()).collect();
        assert_eq!(numbers, expected, "outputs are numbered on");
        assert!(live.ongoing().clock_floor >= floor, "the clock went back");
        live.flush().expect("ships");
        let mut whole = recorded.batches[..cut].to_vec();
        whole.append(&mut live.host().batches);
        replay(&whole).unwrap_or_else(|error| panic!("cut {cut}: {error}"));
    }
}

#[test]
fn another_machines_log_is_refused() {
    let recorded = record(5, 3, 1, 0);
    let mut other = header();
    other.boot = [1; 16];
    let mut tape = Replayer::new(host(1), other);
    let error = tape.feed(&recorded.batches[0]).expect_err("is refused");
    assert!(error.to_string().contains("boot"), "{error}");
}

#[test]
fn a_missing_batch_is_refused() {
    let recorded = record(5, 9, 1, 0);
    let mut tape = Replayer::new(host(1), header());
    tape.feed(&recorded.batches[0]).expect("feeds");
    assert!(tape.feed(&recorded.batches[2]).is_err());
}

#[test]
fn a_disk_that_differs_is_found() {
    let recorded = record(5, 3, 1, 0);
    let mut own = host(1);
    own.disk(0)[600] ^= 1;
    let mut tape = Replayer::new(own, header());
    let mut runner = Runner::new(Model::new());
    recorded
        .batches
        .iter()
        .for_each(|batch| tape.feed(batch).expect("feeds"));
    let error = (0..1_000)
        .find_map(|_| runner.turn(&mut tape, 100).err())
        .expect("is found");
    assert!(
        matches!(error, MachineError::Tape(TapeError::DiskDiffers { .. })),
        "{error}"
    );
}

#[test]
fn a_failed_disk_is_a_failure_of_the_host() {
    let mut own = host(1);
    own.broken_disk = true;
    let mut tape = Recorder::start(own, Policy::default(), header()).expect("starts");
    let error = Runner::new(Model::new())
        .turn(&mut tape, 100)
        .expect_err("fails");
    assert!(
        matches!(error, MachineError::Tape(TapeError::Host { .. })),
        "{error}"
    );
}

/// Writes the entries into a fresh, valid log: as somebody would who changes a log and knows how
/// checksums and chains are made.
fn reseal(entries: &[Entry]) -> Vec<Batch> {
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    entries
        .iter()
        .filter_map(|entry| {
            if let Entry::Term(change) = entry {
                builder.set_term(change.term);
            }
            builder.push(entry).ok()?;
            builder.finish()
        })
        .collect()
}

fn entries(batches: &[Batch]) -> Vec<Entry> {
    let entries = batches.iter().flat_map(|b| b.decode().expect("decodes"));
    entries.collect()
}

/// A header that was changed where it is read, too, keys other digests.
#[test]
fn a_changed_header_is_found_at_the_first_mark() {
    let recorded = entries(&record(5, 9, 2, 0).batches);
    let changes: [fn(&mut Header); 3] = [
        |header| header.boot[3] ^= 1,
        |header| header.image.0[9] ^= 1,
        |header| header.config = Bytes::from_static(b"more"),
    ];
    for change in changes {
        let (mut changed, mut other) = (recorded.clone(), header());
        change(&mut other);
        changed[0] = Entry::Header(other.clone());
        let error = replay_as(other, &reseal(&changed)).err();
        let error = error.expect("no digest is equal");
        assert!(error.contains("diverged at position"), "{error}");
    }
}

/// A log of two terms: the second primary took over half way.
fn two_terms() -> Vec<Entry> {
    let first = record(11, 20, 3, 0);
    let half = &first.batches[..first.batches.len() / 2];
    let (_, tape, mut runner) = replay(half).expect("replays");
    let mut live = tape.go_live(Policy::default(), Term(4)).expect("goes live");
    live.host().skip_frames(1_000);
    live.host().send_frame(Model::request(777, 3));
    for _ in 0..40 {
        if runner.turn(&mut live, 50).expect("runs") == Turn::Waiting {
            live.host().advance(700_000);
        }
    }
    live.flush().expect("ships");
    let mut whole = entries(half);
    whole.append(&mut entries(&live.host().batches));
    whole
}

#[test]
fn a_term_begins_where_its_primary_went_live() {
    let whole = two_terms();
    replay(&reseal(&whole)).expect("replays");
    let change = |entry: &Entry| matches!(entry, Entry::Term(_));
    let at = whole.iter().position(change).expect("there is one");
    for moved in [-1_i64, 1] {
        let mut changed = whole.clone();
        if let Entry::Term(change) = &mut changed[at] {
            change.at.0 = change.at.0.checked_add_signed(moved).expect("inside");
        }
        let error = replay(&reseal(&changed)).err().expect("is found");
        assert!(error.contains("diverged at position"), "{error}");
    }
}

/// What the machine had no room for when it is said to have arrived.
#[test]
fn an_arrival_that_cannot_be_taken_is_reported_with_its_position() {
    let recorded = entries(&record(5, 9, 2, 0).batches);
    let frame = |entry: &Entry| {
        matches!(
            entry,
            Entry::Group(group) if matches!(group.body, GroupBody::Arrival(Arrival::Frame { .. }))
        )
    };
    let which = recorded.iter().position(frame).expect("there is one");
    let mut changed = recorded.clone();
    for _ in 0..20 {
        changed.insert(which, recorded[which].clone());
    }
    let error = replay(&reseal(&changed)).err().expect("is found");
    assert!(error.contains("diverged at position"), "{error}");
    assert!(error.contains("cannot take it"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// One event changed, dropped or doubled in a log that is valid otherwise: the replay reports a
    /// divergence, or (where the event cannot matter any more) ends in the same state.
    #[test]
    fn a_changed_log_is_reported(which in 1_usize..400, how in 0_u8..4) {
        let recorded = record(21, 60, 5, 0);
        let before = entries(&recorded.batches);
        let mut entries = before.clone();
        let which = which % entries.len();
        prop_assume!(which > 0);
        match (how, &mut entries[which]) {
            (0, _) => { entries.remove(which); }
            (1, _) => { let copy = entries[which].clone(); entries.insert(which, copy); }
            (2, Entry::Mark(mark)) => mark.digest.0 ^= 1,
            (_, Entry::Group(group)) => match &mut group.body {
                GroupBody::Exit { outputs, .. } => *outputs += 1,
                GroupBody::Arrival(Arrival::Frame { bytes, .. }) => {
                    let mut changed = bytes.to_vec();
                    changed[0] ^= 1;
                    *bytes = changed.into();
                }
                GroupBody::Arrival(_) => group.at.0 += 1,
            },
            _ => return Ok(()),
        }
        match replay(&reseal(&entries)) {
            Err(_) => {}
            Ok((_, mut tape, runner)) => {
                prop_assert!(matches!(before[which], Entry::Mark(_)), "{:?} went unnoticed", before[which]);
                prop_assert_eq!(&tape.host().outputs.len(), &recorded.outputs.len());
                prop_assert_eq!(runner.machine().counters(), &recorded.counters[..]);
            }
        }
    }
}
