//! `replay`: a recorded log once more, with every digest checked.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use indicatif::ProgressBar;
use replay_log::{ImageDigest, LogIndex, Position, inspect};
use vmm::disk::{Base, Durability, Overlay};

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use crate::images::{self, Image};
use crate::offline::{self, LogError, OfflineError, Setup, Watch};

/// What `replay` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of the log
    dir: PathBuf,
    /// Stop when the machine has passed this position
    #[arg(long, value_name = "POSITION")]
    until: Option<u64>,
    /// The image it was recorded from, where it is not one of this program's own
    #[arg(long, value_name = "NAME|DIR")]
    image: Option<String>,
    /// The folder of the disk bases it starts from, where they are not empty
    #[arg(long, value_name = "DIR")]
    bases: Option<PathBuf>,
    /// Print what the guest says on its console
    #[arg(long)]
    console: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

struct Progress {
    bar: ProgressBar,
    console: bool,
}

impl Watch for Progress {
    fn progress(&mut self, entries: LogIndex, _: Position) {
        self.bar.set_message(format!("{entries} entries replayed"));
        self.bar.tick();
    }

    fn console(&mut self, bytes: &[u8]) {
        if self.console {
            let mut out = std::io::stdout().lock();
            // Nobody reads: the replay goes on all the same.
            let _ = out.write_all(bytes).and_then(|()| out.flush());
        }
    }
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let mut log = inspect(&args.dir).map_err(super::log::LogError::from)?;
    let first = log.next().transpose().or_exit(Exit::Corrupt)?;
    let mut first = first.map(|located| located.batch);
    let Some(batch) = &first else {
        let dir = args.dir.clone();
        return Err(super::log::LogError::Nothing { dir }.into());
    };
    let header = offline::header_of(batch).map_err(failure)?;
    let image = image(args, header.image)?;
    let scratch = tempfile::Builder::new()
        .prefix("understudy-replay-")
        .tempdir()
        .or_fail()?;
    let bases = args.bases.as_deref().unwrap_or(scratch.path());
    if args.bases.is_none() {
        for disk in &image.disks {
            disk.seal(bases).or_fail()?;
        }
    }
    let mut disks = Vec::new();
    for (number, name) in header.disks.iter().enumerate() {
        let base = Base::open(bases, *name).or_exit(Exit::Usage)?;
        let folder = scratch.path().join(number.to_string());
        disks.push(Overlay::open(&folder, base, Durability::PageCache).or_fail()?);
    }
    let setup = Setup {
        image: image.boot(),
        disks,
    };
    let mut watch = Progress {
        bar: output::spinner(),
        console: args.console,
    };
    let mut next = || -> Result<_, LogError> {
        match first.take() {
            Some(batch) => Ok(Some(batch)),
            None => Ok(log.next().transpose()?.map(|located| located.batch)),
        }
    };
    let began = Instant::now();
    let replayed = offline::replay(
        header,
        setup,
        &mut next,
        args.until.map(Position),
        &mut watch,
    );
    watch.bar.finish_and_clear();
    let replayed = replayed.map_err(failure)?;
    let took = began.elapsed();
    if args.json {
        return output::json(&serde_json::json!({
            "position": replayed.at.0,
            "entries": replayed.entries.0,
            "marks": replayed.marks,
            "outputs": replayed.outputs,
            "ended": replayed.ended,
            "milliseconds": took.as_secs_f64() * 1e3,
        }));
    }
    output::line(format_args!(
        "replayed {} entries to position {} in {}: {} digests, all equal",
        replayed.entries,
        replayed.at,
        output::span(took),
        replayed.marks
    ))?;
    if let Some(end) = replayed.ended {
        output::line(format_args!("the guest had ended: {end}"))?;
    } else if args.until.is_some_and(|until| replayed.at.0 < until) {
        output::line(format_args!("the log ends there"))?;
    }
    Ok(())
}

/// The image that was named, if it is the one that was recorded; or the one that was.
fn image(args: &Args, recorded: ImageDigest) -> Result<Image, Failure> {
    let Some(name) = &args.image else {
        return images::with_digest(recorded).or_exit(Exit::Usage);
    };
    let image = images::find(name).or_exit(Exit::Usage)?;
    if image.digest() == recorded {
        return Ok(image);
    }
    Err(format!(
        "{} was not recorded from {name}: name the image it was recorded from, in that version",
        args.dir.display()
    ))
    .or_exit(Exit::Usage)
}

fn failure(error: OfflineError) -> Failure {
    let exit = match &error {
        OfflineError::Kvm(_) => Exit::Unavailable,
        OfflineError::NoHeader | OfflineError::Read(_) => Exit::Corrupt,
        error if error.is_divergence() => Exit::Corrupt,
        _ => Exit::Failed,
    };
    Failure::new(exit, error)
}
