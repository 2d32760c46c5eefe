//! Logs of real guests, cut at every group boundary of a sample under a storm of kicks: the replica
//! goes live there and serves on, and what both recorded replays as one log. And logs that somebody
//! has changed: refused where a checksum says so; where checksums and chain were made anew, refused
//! or reported with a position.

mod common;

use common::guest::Ring;
use common::run::{NoReplay, Recorded, Scenario, record, replay, replay_on, run_live};
use common::{guests, kvm_is_here};
use replay_log::{Batch, BatchBuilder, Chain, Entry, LogIndex, Term};
use vmm::replayer::Replayer;
use vmm::runner::{Runner, Turn};
use vmm::tape::GuestEnd;

/// So many frames the echo guest answers before it switches itself off.
const FRAMES: u32 = 6;

fn echo() -> Scenario {
    Scenario::new(guests::echo(Ring::Three, FRAMES))
        .with_network()
        .with_frames(FRAMES)
}

fn disk() -> Scenario {
    Scenario::new(guests::disk(Ring::Three, 4)).with_disk()
}

/// Console output and random bytes.
fn ports() -> Scenario {
    Scenario::new(guests::ports(Ring::Three, 1))
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

/// Replays the first batches, goes live, and runs the guest to its end; the whole log then, how
/// many outputs there were in all, and how often the machine was kicked.
fn resume(scenario: &Scenario, batches: &[Batch]) -> (Vec<Batch>, usize, u64) {
    let mut tape = Replayer::new(scenario.host(41), scenario.header());
    let machine = scenario.machine();
    let storm = scenario.storm(&machine);
    let mut runner = Runner::new(machine);
    let turn = replay_on(&mut runner, &mut tape, batches).expect("replays");
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
    let end = match turn {
        Turn::Ended(end) => end,
        _ => run_live(&mut runner, &mut live, scenario, delivered as u32),
    };
    assert_eq!(end, GuestEnd::PowerOff, "the guest found something wrong");
    drop(storm);
    let outputs = live.host().outputs.len();
    let mut whole = batches.to_vec();
    whole.append(&mut live.host().batches);
    (whole, outputs, runner.kicks())
}

/// Cuts the log of a scenario at every group boundary.
fn cuts_hold(name: &str, scenario: &Scenario) {
    if !kvm_is_here(name) {
        return;
    }
    let recorded = record(scenario);
    assert!(recorded.kicks > 0, "{name}: no kick came");
    let batches = sealed(&entries(&recorded));
    let mut kicks = 0;
    for cut in 1..=batches.len() {
        let (whole, outputs, kicked) = resume(scenario, &batches[..cut]);
        assert!(kicked > 0, "{name}, cut {cut}: no kick came");
        kicks += kicked;
        assert_eq!(
            outputs,
            recorded.outputs.len(),
            "{name}, cut {cut}: each output is made once"
        );
        let replayed =
            replay(scenario, &whole).unwrap_or_else(|e| panic!("{name}, cut {cut}: {e}"));
        assert_eq!(replayed.outputs.len(), outputs, "{name}, cut {cut}");
    }
    println!("{name}: {} cuts, {kicks} kicks", batches.len());
}

#[test]
fn a_replica_of_a_server_goes_live_at_every_group_boundary() {
    cuts_hold("cutting the log of a server", &echo());
}

#[test]
fn a_replica_of_a_halting_guest_goes_live_at_every_group_boundary() {
    let scenario = Scenario::new(guests::halting(5));
    cuts_hold("cutting the log of a halting guest", &scenario);
}

#[test]
fn a_replica_of_an_interrupted_guest_goes_live_at_every_group_boundary() {
    for ring in [Ring::Zero, Ring::Three] {
        let scenario = Scenario::new(guests::interrupted(ring, 4));
        cuts_hold("cutting the log of an interrupted guest", &scenario);
    }
}

#[test]
fn a_replica_of_a_guest_with_a_disk_goes_live_at_every_group_boundary() {
    cuts_hold("cutting the log of a guest with a disk", &disk());
}

#[test]
fn a_flipped_bit_is_refused() {
    if !kvm_is_here("flipping bits") {
        return;
    }
    let recorded = record(&echo().quiet());
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

/// Flips one bit of what a batch's checksum covers (its numbers and its payload) and makes the
/// checksum anew. `None`: the bytes are no batch any more.
fn flip_and_reseal(batch: &Batch, bit: usize) -> Option<Batch> {
    let mut frame = Vec::new();
    batch.encode_frame(&mut frame);
    let body = body_of(batch, &frame);
    frame[body + bit / 8] ^= 1 << (bit % 8);
    let crc = crc32fast::hash(&frame[body..]);
    frame[body - 4..body].copy_from_slice(&crc.to_le_bytes());
    let (changed, len) = Batch::decode_frame(&frame).ok()??;
    assert_eq!(len, frame.len());
    Some(changed)
}

/// Where in a batch's frame the part begins that the checksum covers: after its length, whose bytes
/// but the last have their upper bit set, and the checksum itself.
fn body_of(batch: &Batch, frame: &[u8]) -> usize {
    let length = frame.iter().take_while(|byte| **byte & 0x80 != 0).count() + 1;
    let body = length + 4;
    assert!(frame.len() - body >= batch.payload().len());
    body
}

/// Flips every `step`-th bit of a log, one at a time, with checksum and chain made anew. How many
/// of them were refused, and how many diverged.
fn flips_are_found_out(name: &str, scenario: &Scenario, step: usize) -> (u32, u32) {
    let recorded = record(scenario);
    let chain = |batches: &[Batch]| batches.iter().fold(Chain::default(), |c, b| b.chain(c));
    let original = chain(&recorded.batches);
    let (mut refused, mut diverged) = (0, 0);
    let mut next = 0;
    for (which, batch) in recorded.batches.iter().enumerate() {
        let mut frame = Vec::new();
        batch.encode_frame(&mut frame);
        let bits = (frame.len() - body_of(batch, &frame)) * 8;
        while next < bits {
            let bit = next;
            next += step;
            let Some(changed) = flip_and_reseal(batch, bit) else {
                refused += 1;
                continue;
            };
            let mut batches = recorded.batches.clone();
            batches[which] = changed;
            // How many entries a payload holds is to be seen in the payload, which the chain covers.
            let miscounted = batches[which].len() != batch.len();
            assert!(
                chain(&batches) != original || miscounted,
                "{name}: the chain is blind for bit {bit} of batch {which}"
            );
            let Err(error) = replay(scenario, &batches) else {
                panic!("{name}: bit {bit} of batch {which} went unnoticed");
            };
            assert!(
                error.is_found_out(),
                "{name}, bit {bit} of batch {which}: {error}"
            );
            match error {
                NoReplay::Refused(_) => refused += 1,
                _ => diverged += 1,
            }
        }
        next -= bits;
    }
    println!("{name}: {refused} flips refused, {diverged} diverged");
    (refused, diverged)
}

/// Whoever changes a log and makes checksums and chain anew is found by the replay. (The chain
/// itself differs, so copies that know it refuse such a log before that.)
#[test]
fn a_resealed_flip_is_refused_or_reported_with_its_position() {
    if !kvm_is_here("flipping bits and resealing") {
        return;
    }
    let halting = Scenario::new(guests::halting(8));
    let interrupted = Scenario::new(guests::interrupted(Ring::Three, 4));
    for (name, scenario, step) in [
        ("server", echo(), 151),
        ("halting", halting, 7),
        ("interrupted", interrupted, 5),
        ("disk", disk(), 11),
        ("ports", ports(), 53),
    ] {
        let (refused, diverged) = flips_are_found_out(name, &scenario.quiet(), step);
        assert!(refused > 0 && diverged > 50, "{name}: too few were sampled");
    }
}
