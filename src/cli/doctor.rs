//! `doctor`: what this host can do, as a table or as JSON.

use comfy_table::Table;

use super::failure::{Exit, Failure};
use super::output;
use crate::doctor::{self, Report, Verdict};

/// What `doctor` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON, figures included
    #[arg(long)]
    json: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let bar = output::spinner();
    let report = doctor::examine(|what| {
        bar.set_message(what);
        bar.tick();
    });
    bar.finish_and_clear();
    if args.json {
        output::json(&report)?;
    } else {
        output::line(format_args!("{}", table(&report)))?;
    }
    match report
        .findings
        .iter()
        .find(|f| f.verdict == Verdict::Lacking)
    {
        None => Ok(()),
        Some(finding) => Err(Failure::new(
            Exit::Unavailable,
            format!("guests cannot be protected on this host: {}", finding.found),
        )),
    }
}

fn table(report: &Report) -> Table {
    let mut table = output::table(["", "what", "found"]);
    for finding in &report.findings {
        let sign = match finding.verdict {
            Verdict::Good => "ok",
            Verdict::Note => "note",
            Verdict::Lacking => "MISSING",
        };
        let found = match &finding.advice {
            Some(advice) => format!("{}\n{advice}", finding.found),
            None => finding.found.clone(),
        };
        table.add_row([sign, finding.what, &found]);
    }
    table
}
