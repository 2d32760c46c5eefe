//! Our recorder and QEMU's own, with the same kernel, RAM disk and script, each relative to itself:
//! ours in a host of the lab, QEMU's on this machine.

use std::time::Instant;

use crate::common::{Figures, median};
use crate::qemu::{Qemu, Way};
use crate::stage::Stage;

/// From power-on to power-off. It needs no disk and no network, and does what the other figures are
/// of: computes, makes processes, serves Redis, here over loopback.
const SCRIPT: &str = "head -c 16m /dev/zero >/tmp/block; \
    sha256sum /tmp/block /tmp/block /tmp/block /tmp/block; \
    for i in $(seq 500); do /bin/true; done; \
    redis-server --save '' --daemonize yes >/dev/null; \
    until redis-cli ping >/dev/null 2>&1; do :; done; \
    redis-cli -r 2000 incr n | tail -n 1";
/// What it says last.
const LAST: &str = "2000";

/// What a round found of one recorder.
struct Round {
    /// A recording, as long as a run without.
    record: f64,
    /// A replay, as long as the recording.
    replay: f64,
    /// Bytes of the log.
    log: f64,
}

/// The medians of rounds.
fn middle(rounds: &[Round]) -> Round {
    let of = |what: fn(&Round) -> f64| median(&mut rounds.iter().map(what).collect::<Vec<_>>());
    Round {
        record: of(|round| round.record),
        replay: of(|round| round.replay),
        log: of(|round| round.log),
    }
}

/// Prints the figures of the two recorders.
pub fn compare(stage: &Stage, rounds: usize, figures: &mut Figures) {
    let (mut ours, mut theirs, mut counted) = (Vec::new(), Vec::new(), Vec::new());
    let mut compressed = Vec::new();
    let image = stage.telling("script", SCRIPT);
    let qemu = Qemu::new(stage.image(), SCRIPT, stage.folder());
    for round in 0..rounds {
        ours.push(our_round(stage, &image, round));
        let (their, count) = their_round(&qemu, round);
        theirs.push(their);
        counted.push(count);
        compressed.push(qemu.log_bytes().1);
    }
    let (ours, theirs) = (middle(&ours), middle(&theirs));
    println!(
        "the same script, time of a recording / without: {:.3} here, {:.3} by QEMU (counting \
         instructions alone: {:.3})",
        ours.record,
        theirs.record,
        median(&mut counted)
    );
    figures.below_one("  ours of QEMU's", ours.record / theirs.record);
    println!(
        "  time of a replay / a recording: {:.3} here, {:.3} by QEMU",
        ours.replay, theirs.replay
    );
    figures.below_one("  ours of QEMU's", ours.replay / theirs.replay);
    println!(
        "  log of the script: {:.0} kB here, {:.0} kB by QEMU (compressed: {:.0} kB)",
        ours.log / 1e3,
        theirs.log / 1e3,
        median(&mut compressed) / 1e3
    );
    figures.below_one("  ours of QEMU's", ours.log / theirs.log);
}

/// Whether the recording or the run without goes first, in turns: how long both took.
fn in_turn(round: usize, off: impl FnOnce() -> f64, on: impl FnOnce() -> f64) -> (f64, f64) {
    if round.is_multiple_of(2) {
        let off = off();
        (off, on())
    } else {
        let on = on();
        (off(), on)
    }
}

fn our_round(stage: &Stage, image: &str, round: usize) -> Round {
    const LOG: &str = "/data/log-script";
    stage.run(&["rm", "-rf", LOG]);
    let ran = |words: &[&str]| {
        let began = Instant::now();
        let said = stage.run(words);
        let seconds = began.elapsed().as_secs_f64();
        assert!(said.lines().any(|line| line.trim() == LAST), "{said}");
        seconds
    };
    let (off, on) = in_turn(
        round,
        || ran(&["understudy", "run", image, "--unrecorded"]),
        || ran(&["understudy", "run", image, "--record", LOG]),
    );
    let replay = ran(&["understudy", "replay", LOG, "--image", image, "--console"]);
    println!("  here: {off:.1} s, recorded {on:.1} s, replayed {replay:.1} s");
    Round {
        record: on / off,
        replay: replay / on,
        log: stage.log(LOG).bytes,
    }
}

/// Of QEMU; and how long it takes when it counts instructions and records nothing, by itself.
fn their_round(qemu: &Qemu<'_>, round: usize) -> (Round, f64) {
    let mut recorded = String::new();
    let (off, on) = in_turn(
        round,
        || qemu.run(Way::Plain).0,
        || {
            let (seconds, said) = qemu.run(Way::Record);
            recorded = said;
            seconds
        },
    );
    assert!(
        recorded.lines().any(|line| line.trim() == LAST),
        "{recorded}"
    );
    let (replay, replayed) = qemu.run(Way::Replay);
    assert_eq!(replayed, recorded, "QEMU replays something else");
    let (counted, _) = qemu.run(Way::Counted);
    println!(
        "  QEMU: {off:.1} s, recorded {on:.1} s, replayed {replay:.1} s, counted {counted:.1} s"
    );
    let round = Round {
        record: on / off,
        replay: replay / on,
        log: qemu.log_bytes().0,
    };
    (round, counted / off)
}
