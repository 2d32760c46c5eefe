//! What two guests get done side by side in one host, one recorded and one not, in turns: each idles
//! while the other works. And the log of the one, idle and under load.

use std::time::{Duration, Instant};

use crate::common::{Figures, median};
use crate::guest::{Guest, Recorder};
use crate::stage::{LogStat, Stage};

/// What the throughput of a recorded guest is at least, of one that is not.
const BOUND: f64 = 0.95;
/// A round is so many turns of a few seconds, because a machine that others share is now fast and now
/// slow.
const TURNS: usize = 5;
/// Redis requests of each kind in one turn.
const REQUESTS: &str = "200";
/// How long the guests idle.
const IDLE: Duration = Duration::from_mins(1);

/// Work inside a guest, as much as fits a turn.
struct Work {
    name: &'static str,
    command: &'static str,
}

const WORKS: [Work; 3] = [
    // 16 MiB four times: a guest has no room for 64 beside the copy.
    Work {
        name: "sha256sum of 64 MiB",
        command: "sha256sum /tmp/block /tmp/block /tmp/block /tmp/block >/dev/null",
    },
    // By its path: the shell has a `true` of its own.
    Work {
        name: "400 fork+exec, five times in a round",
        command: "sh -c 'for i in $(seq 400); do /bin/true; done'",
    },
    // The guest tells hundredths of a second: a single copy would be too short.
    Work {
        name: "four copies of 16 MiB, each with fsync",
        command: "sh -c 'for i in $(seq 4); do \
            dd if=/tmp/block of=/data/copy bs=64k conv=fsync status=none; done'",
    },
];

/// A guest with Redis that answers on a port of the host, and a file to work on.
struct Worker<'a> {
    guest: Guest<'a>,
    port: u16,
}

impl<'a> Worker<'a> {
    fn start(stage: &'a Stage, image: &str, port: u16, recorder: Recorder) -> Self {
        let began = Instant::now();
        let mut guest = Guest::start(stage, image, port, recorder);
        println!(
            "recorder {recorder:?}: a shell after {:.1?}",
            began.elapsed()
        );
        guest.takes("head -c 16m /dev/urandom >/tmp/block");
        guest.types("redis-server --bind 0.0.0.0 --protected-mode no --save '' --daemonize yes");
        guest.takes("sh -c 'until redis-cli ping; do :; done'");
        Self { guest, port }
    }

    /// Requests a second, SET and INCR together, of clients on the lab's network.
    fn redis(&mut self, stage: &Stage) -> f64 {
        let port = self.port.to_string();
        let mut words = vec!["redis-benchmark", "-h", "10.88.0.1", "-p", &port];
        words.extend(["-t", "set,incr", "-c", "20", "-n", REQUESTS, "--csv"]);
        let said = stage.lab().machine(&words).output().expect("it starts");
        let text = String::from_utf8_lossy(&said.stdout).into_owned();
        let rates: Vec<f64> = text
            .lines()
            .filter_map(|line| line.split(',').nth(1)?.trim_matches('"').parse().ok())
            .collect();
        assert_eq!(rates.len(), 2, "redis-benchmark said {text}");
        2.0 / rates.iter().map(|rate| 1.0 / rate).sum::<f64>()
    }
}

/// The two guests.
struct Pair<'a> {
    off: Worker<'a>,
    on: Worker<'a>,
}

impl Pair<'_> {
    /// Measures both, one right after the other. Neither of them always goes first.
    fn turn(&mut self, number: usize, mut measured: impl FnMut(&mut Worker<'_>) -> f64) -> Turn {
        let (off, on) = if number.is_multiple_of(2) {
            let off = measured(&mut self.off);
            (off, measured(&mut self.on))
        } else {
            let on = measured(&mut self.on);
            (measured(&mut self.off), on)
        };
        Turn { off, on }
    }
}

/// What was measured of both.
#[derive(Clone, Copy)]
struct Turn {
    off: f64,
    on: f64,
}

/// Prints the figures of guests side by side.
pub fn compare(stage: &Stage, rounds: usize, figures: &mut Figures) {
    let image = stage.telling("shell", "");
    let mut pair = Pair {
        off: Worker::start(stage, &image, 6379, Recorder::Off),
        on: Worker::start(stage, &image, 6380, Recorder::On),
    };
    idle(stage, &pair.on, figures);
    redis(stage, &mut pair, rounds, figures);
    for work in &WORKS {
        inside(&mut pair, work, rounds, figures);
    }
    pair.off.guest.stop();
    pair.on.guest.stop();
}

/// The log of a guest that has nothing to do.
fn idle(stage: &Stage, worker: &Worker<'_>, figures: &mut Figures) {
    let log = || stage.log(worker.guest.log()).bytes;
    let (before, began) = (log(), Instant::now());
    std::thread::sleep(IDLE);
    let rate = (log() - before) / began.elapsed().as_secs_f64();
    figures.at_most("log of an idle guest", rate / 1e3, 4.0, " kB/s");
}

/// Requests from outside: how many, and what they leave in the log.
fn redis(stage: &Stage, pair: &mut Pair<'_>, rounds: usize, figures: &mut Figures) {
    let rate = |worker: &mut Worker<'_>| worker.redis(stage);
    let _warm_up = pair.turn(0, rate);
    let before = stage.log(pair.on.guest.log());
    let turns = (0..rounds * TURNS).map(|turn| pair.turn(turn, rate));
    let turns: Vec<Turn> = turns.collect();
    let after = stage.log(pair.on.guest.log());
    let [off, on] = medians(&turns);
    println!("redis-benchmark: {off:.0} requests/s with the recorder off, {on:.0} recorded");
    judge(turns.iter().map(|turn| turn.on / turn.off), figures);
    log_of_load(before, after, figures);
}

fn log_of_load(before: LogStat, after: LogStat, figures: &mut Figures) {
    let grown = |of: fn(&LogStat) -> f64| of(&after) - of(&before);
    let (bytes, frames, groups) = (grown(|l| l.bytes), grown(|l| l.frames), grown(|l| l.groups));
    println!("  its log: {bytes:.0} bytes for {frames:.0} bytes of frames and {groups:.0} groups");
    let bound = frames * 1.2 + groups * 4.0;
    figures.at_most("  of what it may be", bytes / bound, 1.0, "");
}

/// Work inside the guests.
fn inside(pair: &mut Pair<'_>, work: &Work, rounds: usize, figures: &mut Figures) {
    let seconds = |worker: &mut Worker<'_>| worker.guest.takes(work.command);
    let _warm_up = pair.turn(0, seconds);
    let turns = (0..rounds * TURNS).map(|turn| pair.turn(turn, seconds));
    let turns: Vec<Turn> = turns.collect();
    let [off, on] = medians(&turns);
    println!(
        "{}: {off:.2} s with the recorder off, {on:.2} s recorded",
        work.name
    );
    judge(turns.iter().map(|turn| turn.off / turn.on), figures);
}

/// Prints what the turns found, and how far they were apart.
fn judge(ratios: impl Iterator<Item = f64>, figures: &mut Figures) {
    let mut ratios: Vec<f64> = ratios.collect();
    let middle = median(&mut ratios);
    ratios.sort_by(f64::total_cmp);
    let (count, quarter) = (ratios.len(), ratios.len() / 4);
    let (low, high) = (ratios[quarter], ratios[count - 1 - quarter]);
    println!("  half of {count} turns found {low:.3} to {high:.3}");
    figures.at_least("  recorded, ratio", middle, BOUND, "");
}

fn medians(turns: &[Turn]) -> [f64; 2] {
    let of = |side: fn(&Turn) -> f64| median(&mut turns.iter().map(side).collect::<Vec<_>>());
    [of(|turn| turn.off), of(|turn| turn.on)]
}
