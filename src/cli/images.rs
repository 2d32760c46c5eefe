//! `images`: what can be run.

use super::failure::{Failure, OrExit as _};
use super::output;
use crate::doctor::offer::{self, Host};
use crate::images::{self, Image, Mode, Need};

/// What `images` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One image, for tools.
#[derive(serde::Serialize)]
struct Row {
    name: String,
    description: String,
    digest: String,
    memory: u64,
    disks: Vec<u64>,
    ports: Vec<u16>,
    modes: Vec<&'static str>,
    needs: Vec<Need>,
    runs_here: bool,
    why_not: Option<String>,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let host = Host::here();
    let images = images::embedded().or_fail()?;
    let rows: Vec<Row> = images.iter().map(|image| row(image, &host)).collect();
    if args.json {
        return output::json(&rows);
    }
    let heads = [
        "image",
        "memory",
        "disks",
        "ports",
        "protected by",
        "here?",
        "what",
    ];
    let mut table = output::table(heads);
    for row in &rows {
        let list = |items: Vec<String>| items.join(", ");
        table.add_row([
            row.name.clone(),
            output::memory(row.memory),
            list(row.disks.iter().map(|size| output::memory(*size)).collect()),
            list(row.ports.iter().map(u16::to_string).collect()),
            row.modes.join(", "),
            (if row.runs_here { "yes" } else { "no" }).to_owned(),
            row.description.clone(),
        ]);
    }
    output::line(format_args!("{table}"))?;
    for row in &rows {
        if let Some(why) = &row.why_not {
            output::line(format_args!(
                "\n{} does not run on this host: {why}.",
                row.name
            ))?;
        }
    }
    Ok(())
}

fn row(image: &Image, host: &Host) -> Row {
    let refused = offer::check(host, image, Mode::Replayed).err();
    Row {
        name: image.name.clone(),
        description: image.description.clone(),
        digest: output::hex(&image.digest().0),
        memory: image.memory,
        disks: image.disks.iter().map(|disk| disk.size).collect(),
        ports: image
            .network
            .as_ref()
            .map_or(Vec::new(), |network| network.ports.clone()),
        modes: image.modes.iter().map(|mode| word(*mode)).collect(),
        needs: image.needs.clone(),
        runs_here: refused.is_none(),
        why_not: refused.map(|why| why.to_string()),
    }
}

const fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Replayed => "replay",
        Mode::Checkpointed => "cuts",
        Mode::None => "nothing",
    }
}
