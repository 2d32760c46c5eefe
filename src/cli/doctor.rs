//! `doctor`: what this host can do, as a table or as JSON.

use comfy_table::Table;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use crate::doctor::{self, Report, Verdict};
use crate::images;

/// What `doctor` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON, figures included
    #[arg(long)]
    json: bool,
    /// Say of this image, too, whether it runs here: a folder with a manifest
    #[arg(long = "image", value_name = "DIR")]
    images: Vec<String>,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let more: Result<Vec<_>, _> = args.images.iter().map(|name| images::find(name)).collect();
    let more = more.or_exit(Exit::Usage)?;
    let bar = output::spinner();
    let report = doctor::examine(&more, |what| {
        bar.set_message(what);
        bar.tick();
    });
    bar.finish_and_clear();
    if args.json {
        output::json(&report)?;
    } else {
        output::line(format_args!("{}\n", findings(&report)))?;
        output::line(format_args!("{}", offers(&report)))?;
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

fn findings(report: &Report) -> Table {
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

fn offers(report: &Report) -> Table {
    let mut table = output::table(["image", "mode", "here?", ""]);
    for offer in &report.images {
        let here = if offer.here { "yes" } else { "no" };
        let why = offer.why.as_deref().unwrap_or_default();
        table.add_row([&offer.image, &offer.mode.to_string(), here, why]);
    }
    table
}
