//! `run`: a guest on this host alone.

use std::path::PathBuf;

use super::failure::{Exit, Failure};

/// What `run` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which image; see `understudy images`
    image: String,
    /// Record the guest into this folder
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    Err(Failure::new(
        Exit::Unavailable,
        format!("this version cannot run {} yet", args.image),
    ))
}
