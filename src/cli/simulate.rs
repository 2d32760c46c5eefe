//! `simulate`: whole clusters from one seed, in which everything fails, and every promise checked.

use std::time::{Duration, Instant};

use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::failure::{Exit, Failure};
use super::output;
use crate::protocol::Mutation;
use crate::simulator::{self, Counts, Options, Report};

/// So many failing seeds are printed before it ends.
const FAILURES_MAX: usize = 10;

/// What `simulate` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many seeds, from --first on
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    seeds: u64,
    /// The first seed
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    first: u64,
    /// Only this seed, in detail
    #[arg(long, value_name = "SEED", conflicts_with_all = ["seeds", "first"])]
    seed: Option<u64>,
    /// Break one rule of the protocol on purpose; the simulation must notice
    #[arg(long, value_name = "NAME", value_parser = mutation())]
    mutation: Option<Mutation>,
    /// With --seed: print every step
    #[arg(long, requires = "seed")]
    trace: bool,
}

/// Misspelt mutations are answered with the closest.
fn mutation() -> impl TypedValueParser<Value = Mutation> {
    let names = Mutation::ALL.map(Mutation::name);
    PossibleValuesParser::new(names).try_map(|name| name.parse::<Mutation>())
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let options = Options {
        mutation: args.mutation,
        trace: args.trace,
    };
    if let Some(seed) = args.seed {
        let report = simulator::run(seed, options);
        for line in &report.trace {
            output::line(line)?;
        }
        output::line(format_args!("seed {seed}: {}", words(&report.counts)))?;
        output::line(format_args!("trace {:016x}", report.trace_hash))?;
        return verdict(&[report]);
    }
    let began = Instant::now();
    let last = args.first.saturating_add(args.seeds);
    let bar = output::bar(args.seeds);
    let mut total = Counts::default();
    let mut failed = Vec::new();
    simulator::run_many(args.first..last, options, |report| {
        bar.inc(1);
        total.add(&report.counts);
        if report.violation.is_some() {
            failed.push(report);
        }
        failed.len() < FAILURES_MAX
    });
    bar.finish_and_clear();
    output::line(format_args!(
        "{} seeds in {}: {}",
        args.seeds,
        output::span(began.elapsed()),
        words(&total)
    ))?;
    verdict(&failed)
}

/// What happened, in words.
fn words(counts: &Counts) -> String {
    format!(
        "{} VMs, {} gateways, {} steps in {} of simulated time, {} faults; {} answers, {} promotions, \
         {} switchovers, {} cold boots, {} losses accepted, {} records, {} resynchronisations",
        counts.vms,
        counts.gateways,
        counts.steps,
        output::span(Duration::from_nanos(counts.simulated)),
        counts.faults,
        counts.answers,
        counts.promotions,
        counts.switchovers,
        counts.cold_boots,
        counts.losses_accepted,
        counts.records,
        counts.resynchronisations
    )
}

/// Prints every violation, with the command that replays it.
fn verdict(reports: &[Report]) -> Result<(), Failure> {
    let mut failed = 0;
    for report in reports {
        if let Some(violation) = &report.violation {
            failed += 1;
            output::line(format_args!("seed {}: {violation}", report.seed))?;
            output::line(format_args!("  replay with: {}", report.replay_command()))?;
        }
    }
    match failed {
        0 => Ok(()),
        1 => Err(Failure::new(
            Exit::Broken,
            "a promise was broken in a simulated cluster",
        )),
        _ => Err(Failure::new(
            Exit::Broken,
            format!("promises were broken in {failed} simulated clusters"),
        )),
    }
}
