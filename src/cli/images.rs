//! `images`: what can be run.

use super::failure::{Failure, OrExit as _};
use super::output;
use crate::doctor;
use crate::images::{self, Image, Mode};

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
    runs_here: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let runs_here = doctor::missing_kvm().is_none();
    let images = images::embedded().or_fail()?;
    let rows: Vec<Row> = images.iter().map(|image| row(image, runs_here)).collect();
    if args.json {
        return output::json(&rows);
    }
    let mut table = output::table(["image", "memory", "disks", "ports", "protected by", "what"]);
    for row in rows {
        let list = |items: Vec<String>| items.join(", ");
        table.add_row([
            row.name,
            output::memory(row.memory),
            list(row.disks.iter().map(|size| output::memory(*size)).collect()),
            list(row.ports.iter().map(u16::to_string).collect()),
            row.modes.join(", "),
            row.description,
        ]);
    }
    output::line(format_args!("{table}"))?;
    if !runs_here {
        output::line(format_args!(
            "\nNone of them runs on this host: see 'understudy doctor'."
        ))?;
    }
    Ok(())
}

fn row(image: &Image, runs_here: bool) -> Row {
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
        runs_here,
    }
}

const fn word(mode: Mode) -> &'static str {
    match mode {
        Mode::Replayed => "replay",
        Mode::Checkpointed => "cuts",
        Mode::None => "nothing",
    }
}
