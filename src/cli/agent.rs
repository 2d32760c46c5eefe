//! `agent`: what a host runs, so that VMs can be on it.

use super::failure::{Exit, Failure, OrExit as _};
use super::process::{ConfigArgs, block_on_until_stopped};
use crate::agent::certs::Role;
use crate::agent::host;
use crate::doctor;

/// What `agent` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let config = args.config.load(Role::Host)?;
    if let Some(missing) = doctor::missing_kvm() {
        return Err(missing).or_exit(Exit::Unavailable);
    }
    block_on_until_stopped(&args.config, async |stop| {
        host::run(config, None, stop).await.or_fail()
    })
}
