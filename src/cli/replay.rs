//! `replay`: a recorded log once more, with every digest checked.

use std::path::PathBuf;

use super::failure::{Exit, Failure};

/// What `replay` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of the log
    dir: PathBuf,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    Err(Failure::new(
        Exit::Unavailable,
        format!("this version cannot replay {} yet", args.dir.display()),
    ))
}
