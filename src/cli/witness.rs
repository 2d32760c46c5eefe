//! `witness`: keeps the records of a cluster.

use super::failure::{Failure, OrExit as _};
use super::process::{ConfigArgs, block_on_until_stopped};
use crate::agent::certs::Role;
use crate::agent::witness;

/// What `witness` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let config = args.config.load(Role::Witness)?;
    block_on_until_stopped(&args.config, async |stop| {
        witness::run(&config, stop).await.or_fail()
    })
}
