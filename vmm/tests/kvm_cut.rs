//! A log of a real guest, cut at every group boundary of a sample: the replica goes live there and
//! serves on, and what both recorded replays as one log. And logs that somebody has changed: refused
//! where a checksum or the chain says so, reported with a position where they do not.

mod common;

use common::guest::Ring;
use common::run::{Recorded, Scenario, record, replay};
use common::{guests, kvm_is_here};
use replay_log::{Answer, Arrival, Batch, BatchBuilder, Chain, Entry, GroupBody, LogIndex, Term};
use vmm::replayer::Replayer;
use vmm::runner::{Runner, Turn};
use vmm::tape::GuestEnd;

/// So many frames the echo guest answers before it switches itself off.
const FRAMES: u32 = 12;

fn echo() -> Scenario {
    let mut scenario = Scenario::new(guests::echo(Ring::Three, FRAMES))
        .with_network()
        .with_frames(FRAMES);
    scenario.storm = false;
    scenario
}

fn entries(recorded: &Recorded) -> Vec<Entry> {
    recorded
        .batches
        .iter()
        .flat_map(|batch| batch.decode().expect("decodes"))
        .collect()
}

/// Writes entries into a valid log, one entry a batch: every entry is a group boundary here.
fn sealed(entries: &[Entry]) -> Vec<Batch> {
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    entries
        .iter()
        .map(|entry| {
            builder.push(entry).expect("fits");
            builder.finish().expect("is not empty")
        })
        .collect()
}

/// Replays the first batches, goes live, and runs the guest to its end; the whole log then, and how
/// many outputs there were in all.
fn resume(scenario: &Scenario, batches: &[Batch]) -> (Vec<Batch>, usize) {
    let mut tape = Replayer::new(scenario.host(41), scenario.header());
    let mut runner = Runner::new(scenario.machine());
    for batch in batches {
        tape.feed(batch).expect("feeds");
    }
    let turn = loop {
        let turn = runner.turn(&mut tape, 64).expect("replays");
        if turn != Turn::Ran && tape.drained() {
            break turn;
        }
    };
    let delivered = tape
        .ongoing()
        .frames
        .values()
        .map(|number| number.0)
        .max()
        .unwrap_or(0);
    let mut live = tape.go_live(scenario.policy(), Term(2)).expect("goes live");
    // The gateway sends again what the log does not show.
    live.host().skip_frames(delivered);
    for n in delivered as u32..scenario.frames {
        live.host().send_frame(Scenario::frame(n));
    }
    if !matches!(turn, Turn::Ended(_)) {
        loop {
            match runner.turn(&mut live, 64).expect("serves on") {
                Turn::Ended(end) => {
                    assert_eq!(end, GuestEnd::PowerOff);
                    break;
                }
                Turn::Waiting => live.host().advance(300_000),
                Turn::Ran | Turn::Paused => {}
            }
        }
    }
    live.flush().expect("ships");
    let outputs = live.host().outputs.len();
    let mut whole = batches.to_vec();
    whole.append(&mut live.host().batches);
    (whole, outputs)
}

#[test]
fn a_replica_goes_live_at_every_group_boundary() {
    if !kvm_is_here("cutting a log") {
        return;
    }
    let scenario = echo();
    let recorded = record(&scenario);
    let batches = sealed(&entries(&recorded));
    for cut in 1..=batches.len() {
        let (whole, outputs) = resume(&scenario, &batches[..cut]);
        assert_eq!(
            outputs,
            recorded.outputs.len(),
            "cut {cut}: each answer is made once"
        );
        let replayed = replay(&scenario, &whole).unwrap_or_else(|e| panic!("cut {cut}: {e}"));
        assert_eq!(replayed.outputs.len(), outputs, "cut {cut}");
    }
    println!("{} cuts", batches.len());
}

#[test]
fn a_flipped_bit_is_refused() {
    if !kvm_is_here("flipping bits") {
        return;
    }
    let recorded = record(&echo());
    let mut flipped = 0;
    for batch in &recorded.batches {
        let mut frame = Vec::new();
        batch.encode_frame(&mut frame);
        for bit in (0..frame.len() * 8).step_by(7) {
            let mut changed = frame.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            // A length that grew asks for more bytes: the frame is torn, which is refused, too.
            if let Ok(Some((other, _))) = Batch::decode_frame(&changed) {
                panic!("bit {bit} went unnoticed: {other:?}");
            }
            flipped += 1;
        }
    }
    assert!(flipped > 500, "{flipped} bits flipped");
}

/// Changes one entry, if it can be changed so that the machine must notice.
fn change(entry: &mut Entry, how: usize) -> bool {
    match entry {
        Entry::Mark(mark) => mark.digest.0 ^= 1 << (how % 64),
        Entry::Group(group) => match &mut group.body {
            GroupBody::Exit { answers, outputs } => match answers.first_mut() {
                Some(Answer::Clock(time)) => time.0 ^= 1 << (how % 40),
                Some(Answer::Entropy(_)) => return false,
                None => *outputs += 1,
            },
            GroupBody::Arrival(Arrival::Frame { bytes, .. }) => {
                let mut changed = bytes.to_vec();
                let at = how % changed.len();
                changed[at] ^= 0x10;
                *bytes = changed.into();
            }
            GroupBody::Arrival(_) => group.at.0 += 1,
        },
        Entry::Header(_) | Entry::Term(_) => return false,
    }
    true
}

/// Whoever changes a log and reseals checksums and chain is found by the replay. (The chain itself
/// differs, so replicas and `verify` against a known chain refuse it before that.)
#[test]
fn a_resealed_change_is_reported_with_its_position() {
    if !kvm_is_here("changing a log") {
        return;
    }
    let scenario = echo();
    let recorded = record(&scenario);
    let original = entries(&recorded);
    let chain = |batches: &[Batch]| batches.iter().fold(Chain::default(), |c, b| b.chain(c));
    let first = chain(&sealed(&original));
    let mut reported = 0;
    for which in (0..original.len()).step_by(3) {
        let mut changed = original.clone();
        if !change(&mut changed[which], which * 13) {
            continue;
        }
        let batches = sealed(&changed);
        assert_ne!(chain(&batches), first, "entry {which}: the chain is blind");
        let Err(error) = replay(&scenario, &batches) else {
            panic!("{:?} instead of {:?}", changed[which], original[which]);
        };
        assert!(error.contains("position"), "entry {which}: {error}");
        reported += 1;
    }
    assert!(reported > 10, "{reported} changes reported");
}
