//! What the commands that stay (agent, witness, gateway, run) have in common: their configuration,
//! the end by a signal, and whom they die with.

use std::future::Future;
use std::path::PathBuf;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use thiserror::Error;

use super::Interrupts;
use super::failure::{Exit, Failure, OrExit as _};
use crate::agent::certs::Role;
use crate::agent::limits::raise_descriptors;
use crate::config::Config;

/// Where a process finds who it is.
#[derive(Clone, Debug, clap::Args)]
pub struct ConfigArgs {
    /// The folder that `understudy init` wrote for this process, or its understudy.toml
    #[arg(long, value_name = "PATH")]
    pub config: PathBuf,
    /// End when the process of this number ends, which has started this one
    #[arg(long, value_name = "PID", hide = true)]
    die_with: Option<i32>,
}

/// Why a process does not start.
#[derive(Debug, Error)]
enum StartError {
    #[error("{} is the configuration of a {found}, not of a {wanted}: start it with 'understudy {}'", file.display(), command(*found))]
    OtherRole {
        file: PathBuf,
        found: Role,
        wanted: Role,
    },
    #[error("the process {0} that this one was to end with has ended already")]
    Orphaned(i32),
}

const fn command(role: Role) -> &'static str {
    match role {
        Role::Host => "agent",
        Role::Witness => "witness",
        Role::Gateway => "gateway",
        Role::Operator => "status",
    }
}

impl ConfigArgs {
    /// Loads the configuration and checks that it is one for this role.
    pub fn load(&self, wanted: Role) -> Result<Config, Failure> {
        let config = Config::load(&self.config).or_fail()?;
        if config.role != wanted {
            return Err(StartError::OtherRole {
                file: self.config.clone(),
                found: config.role,
                wanted,
            })
            .or_exit(Exit::Usage);
        }
        Ok(config)
    }

    /// Asks the kernel to end this process with the one that started it.
    fn die_with_parent(&self) -> Result<(), Failure> {
        let Some(parent) = self.die_with else {
            return Ok(());
        };
        prctl::set_pdeathsig(Signal::SIGKILL).or_fail()?;
        // It may have ended before the kernel knew; then somebody else is our parent by now.
        if getppid() == Pid::from_raw(parent) {
            Ok(())
        } else {
            Err(StartError::Orphaned(parent)).or_fail()
        }
    }
}

/// Runs something that stays until it is told to stop: by Ctrl-C or SIGTERM, and that is success.
/// The future that it gets resolves then.
pub fn block_on_until_stopped<F>(args: &ConfigArgs, run: F) -> Result<(), Failure>
where
    F: AsyncFnOnce(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) -> Result<(), Failure>,
{
    args.die_with_parent()?;
    raise_descriptors();
    until_stopped(run)
}

/// The same for what is started by hand.
pub fn until_stopped<F>(run: F) -> Result<(), Failure>
where
    F: AsyncFnOnce(std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) -> Result<(), Failure>,
{
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().build().or_fail()?;
    runtime.block_on(async {
        // Before anything else: who sees it work may tell it to stop.
        let mut interrupts = Interrupts::listen().or_fail()?;
        run(Box::pin(async move { interrupts.one().await })).await
    })
}
