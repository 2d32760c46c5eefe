//! The command line: one file a command, each with its `Args` and a function `run` that does it.
//!
//! What a command has to say goes to stdout, how it goes and why it fails to stderr. A command
//! fails with a [`Failure`]: one sentence, one exit code.

pub mod failure;
pub mod output;
pub mod suggest;

mod agent;
mod demo;
mod doctor;
mod events;
mod gateway;
mod images;
mod init;
mod lab;
mod log;
mod naming;
pub mod operator;
mod pair;
mod process;
mod records;
mod remove;
mod replay;
mod run;
mod simulate;
mod standing;
pub mod status;
mod switchover;
pub mod waiting;
mod witness;

use std::future::Future;
use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing_subscriber::EnvFilter;

use failure::{EXIT_CODES, Exit, Failure, OrExit as _};

/// Says what to log, in the syntax of `tracing_subscriber::EnvFilter`.
const LOG_VARIABLE: &str = "UNDERSTUDY_LOG";

/// Keeps a virtual machine alive on unreliable hosts.
///
/// A guest runs on a primary host; every nondeterministic event that reaches it is recorded and
/// streamed to replicas, which replay it. When the primary fails, a replica goes on where it was,
/// and clients keep their TCP connections.
#[derive(Debug, Parser)]
#[command(name = "understudy", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a cluster: its certificates, and a folder for each of its processes
    Init(init::Args),
    /// Run VMs on this host, as primary or replica
    Agent(agent::Args),
    /// Keep the records of a cluster, so that two hosts never both reign
    Witness(witness::Args),
    /// Publish TCP ports of a VM, beside its clients
    Gateway(gateway::Args),
    /// Start a VM with replicas, or change where its copies are
    Pair(pair::Args),
    /// Show how hosts and VMs do
    Status(status::Args),
    /// Let a replica of a VM reign, with nothing lost
    Switchover(switchover::Args),
    /// Let a host forget a VM of which it is no copy any more, and delete what it has of it
    Remove(remove::Args),
    /// Show what each host decided, and why
    Events(events::Args),
    /// Run a guest on this host alone, in the foreground
    Run(run::Args),
    /// Replay a recorded log and check every digest in it
    Replay(replay::Args),
    /// Look into a recorded log
    Log(log::Args),
    /// List the guest images that can be run
    Images(images::Args),
    /// Kill a primary under load on this machine, and tell what its clients saw
    Demo(demo::Args),
    /// Check every promise in simulated clusters in which everything fails
    Simulate(simulate::Args),
    /// Say what this host can do, and what it lacks
    Doctor(doctor::Args),
    /// Run several real hosts on this machine, each with a KVM of its own, even without VMX or SVM
    Lab(lab::Args),
    /// Be the process that runs one guest; started by agents
    #[command(name = crate::agent::vm_process::SUBCOMMAND, hide = true)]
    VmmProcess {
        /// The process that started this one
        agent: u32,
    },
    /// Be the process that owns a lab's hosts; started by `lab up`
    #[command(name = crate::lab::keeper::SUBCOMMAND, hide = true)]
    LabKeeper,
    /// Take a lab's commands inside a host; started by its init
    #[command(name = crate::lab::host::SUBCOMMAND, hide = true)]
    LabHost,
    /// Become another program that ends with the process that started it
    #[command(name = crate::lab::exec::SUBCOMMAND, hide = true)]
    LabExec {
        /// The process that started this one
        parent: u32,
        /// The program and what it is told
        #[arg(last = true)]
        command: Vec<String>,
    },
}

/// The whole program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr();
    let ended = match cli.command {
        Command::VmmProcess { agent } => return crate::agent::vm_process::child::run(agent),
        Command::LabKeeper => return crate::lab::keeper::run(),
        Command::LabExec { parent, command } => return crate::lab::exec::run(parent, &command),
        Command::Lab(args) => lab::run(args),
        command => dispatch(command).map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(|failure| failure.report())
}

fn dispatch(command: Command) -> Result<(), Failure> {
    match command {
        Command::Init(args) => init::run(&args),
        Command::Agent(args) => agent::run(&args),
        Command::Witness(args) => witness::run(&args),
        Command::Gateway(args) => gateway::run(&args),
        Command::Pair(args) => pair::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Switchover(args) => switchover::run(&args),
        Command::Remove(args) => remove::run(&args),
        Command::Events(args) => events::run(&args),
        Command::Run(args) => run::run(&args).map_err(blame_host),
        Command::Replay(args) => replay::run(&args).map_err(blame_host),
        Command::Log(args) => log::run(&args),
        Command::Images(args) => images::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Simulate(args) => simulate::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::LabHost => block_on(async { crate::lab::host::serve().await.or_fail() }),
        // Their exit codes are not ours.
        Command::VmmProcess { .. }
        | Command::Lab(_)
        | Command::LabKeeper
        | Command::LabExec { .. } => Ok(()),
    }
}

/// A guest that does not start because there is no KVM: no failure of the command but of the host.
fn blame_host(failure: Failure) -> Failure {
    match crate::doctor::missing_kvm() {
        Some(missing) if failure.to_string().contains(&missing.to_string()) => {
            failure.with_exit(Exit::Unavailable)
        }
        _ => failure,
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}

/// Runs a command that does I/O until it ends, or until Ctrl-C or SIGTERM: then it is dropped,
/// and whatever it holds (processes, folders, sockets) with it.
fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().build().or_fail()?;
    runtime.block_on(async {
        tokio::select! {
            ended = command => ended,
            interrupted = interrupted() => Err(interrupted),
        }
    })
}

async fn interrupted() -> Failure {
    match Interrupts::listen() {
        Ok(mut interrupts) => interrupts.one().await,
        Err(error) => return Failure::new(Exit::Failed, error),
    }
    Failure::new(Exit::Interrupted, "interrupted")
}

/// Ctrl-C and SIGTERM, heard from the moment this is made. Needs a runtime.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn one(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
