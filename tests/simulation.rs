//! The protocol, the run loop and the log in simulated clusters in which everything fails.
//!
//! `SEEDS=first..last cargo test --test simulation` simulates others than the five thousand.

use std::ops::Range;

use understudy::protocol::Mutation;
use understudy::simulator::{Counts, Options, Report, run, run_many};

/// Every mutation has to be caught within this many seeds.
const MUTATED_SEEDS: u64 = 500;

fn seeds() -> Range<u64> {
    let wanted = std::env::var("SEEDS").unwrap_or_else(|_| "0..5000".to_owned());
    let range = wanted
        .split_once("..")
        .and_then(|(first, last)| Some(first.parse().ok()?..last.parse().ok()?));
    range.expect("SEEDS is FIRST..LAST, for example 0..1000")
}

#[test]
fn every_promise_is_kept_whatever_fails() {
    let mut total = Counts::default();
    let mut failed: Vec<Report> = Vec::new();
    let seeds = seeds();
    run_many(seeds.clone(), Options::default(), |report| {
        total.add(&report.counts);
        if report.violation.is_some() {
            failed.push(report);
        }
        failed.len() < 10
    });
    println!("seeds {seeds:?}: {total:?}");
    failed.sort_by_key(|report| report.seed);
    for report in &failed {
        let violation = report.violation.as_ref().map(ToString::to_string);
        println!(
            "seed {}: {}\n  replay with: {}",
            report.seed,
            violation.unwrap_or_default(),
            report.replay_command()
        );
    }
    assert!(failed.is_empty(), "{} seeds failed", failed.len());
    // A simulation in which nothing happens proves nothing.
    assert!(total.answers > total.faults && total.promotions > 0 && total.switchovers > 0);
    // About one world in eight has two VMs, and one in eight two gateways for each.
    let worlds = seeds.end - seeds.start;
    assert!(worlds < 100 || worlds < total.vms && total.vms < total.gateways);
}

/// Whether a violation by a mutation shows that the rule is needed: getting stuck is no proof, as what
/// is taken away is safety, and what happens without the mutation, too, is another matter.
fn proves(report: &Report) -> bool {
    let Some(violation) = &report.violation else {
        return false;
    };
    violation.invariant != "progress"
        && run(report.seed, Options::default())
            .violation
            .is_none_or(|sound| sound.invariant != violation.invariant)
}

#[test]
fn every_mutation_is_caught() {
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let options = Options {
            mutation: Some(mutation),
            ..Options::default()
        };
        let mut caught: Option<Report> = None;
        let mut tried = 0;
        run_many(0..MUTATED_SEEDS, options, |report| {
            tried += 1;
            if proves(&report) {
                caught = Some(report);
            }
            caught.is_none()
        });
        let report = caught.as_ref();
        match report.and_then(|report| Some((report.seed, report.violation.as_ref()?))) {
            Some((seed, violation)) => {
                println!("{mutation}: caught by seed {seed} after {tried} seeds: {violation}");
            }
            None => missed.push(mutation.name()),
        }
    }
    assert!(
        missed.is_empty(),
        "not caught by {MUTATED_SEEDS} seeds: {missed:?}"
    );
}

#[test]
fn a_seed_replays_exactly() {
    for seed in [3, 77, 20_000] {
        let [first, second] = [(); 2].map(|()| run(seed, Options::default()));
        assert_eq!(first.trace_hash, second.trace_hash, "seed {seed}");
        assert_eq!(first.trace, second.trace, "seed {seed}");
        assert_eq!(first.counts, second.counts, "seed {seed}");
    }
    let other = run(4, Options::default());
    assert_ne!(run(3, Options::default()).trace_hash, other.trace_hash);
}

#[test]
fn showing_every_step_changes_nothing() {
    let quiet = run(11, Options::default());
    let shown = run(
        11,
        Options {
            trace: true,
            ..Options::default()
        },
    );
    assert_eq!(quiet.trace_hash, shown.trace_hash);
    assert!(shown.trace.len() > quiet.trace.len());
}
