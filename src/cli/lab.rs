//! `lab`: several real hosts on this machine, each an emulated computer with a KVM of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use crate::lab::{
    Config, Delay, End, Event, HostId, HostStatus, Lab, LabError, LabFolder, LabStatus, StartError,
};

/// What `lab` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The lab's folder [default: understudy-lab in $XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR", global = true, env = "UNDERSTUDY_LAB")]
    dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the hosts, and return when all of them answer
    Up(Up),
    /// Show the hosts and their links
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Run a program in a host, or on this machine ("machine") in the lab's network
    ///
    /// Its output comes back, and its exit code. What it leaves running in the background is not waited
    /// for. Ctrl-C ends it.
    Run(Run),
    /// Copy a file into a host
    Put {
        /// Which host
        host: HostId,
        /// A file of this machine
        file: PathBuf,
        /// Where it is to be in the host; folders are made
        path: PathBuf,
    },
    /// Copy a file out of a host
    Get {
        /// Which host
        host: HostId,
        /// A file of the host
        path: PathBuf,
        /// Where it is to be on this machine
        file: PathBuf,
    },
    /// Cut a host's power: only its disk (/data) outlives that
    Kill {
        /// Which host
        host: HostId,
    },
    /// Power a host on, and return when it answers
    Start {
        /// Which host
        host: HostId,
    },
    /// Cut the link between two hosts, or a host and this machine ("machine")
    Partition {
        /// One end
        a: End,
        /// The other end
        b: End,
    },
    /// Mend a link that was cut
    Heal {
        /// One end
        a: End,
        /// The other end
        b: End,
    },
    /// Make the link between two hosts, or a host and this machine ("machine"), longer
    Delay {
        /// One end
        a: End,
        /// The other end
        b: End,
        /// How many milliseconds a packet travels, each way; 0 makes the link as short as it was
        ms: u32,
        /// How many of a hundred packets are lost, each way
        #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
        loss: f64,
    },
    /// End the lab: hosts, network, disks
    Down,
}

#[derive(Debug, clap::Args)]
struct Up {
    /// How many hosts: h1, h2, …
    #[arg(long, value_name = "N", default_value_t = 3)]
    hosts: u8,
    /// The program that the hosts run as `understudy`; this one if none is named
    #[arg(long, value_name = "FILE", env = "UNDERSTUDY_LAB_BINARY")]
    binary: Option<PathBuf>,
    /// The memory of each host in MiB
    #[arg(long, value_name = "MIB", default_value_t = 1500)]
    memory: u32,
}

#[derive(Debug, clap::Args)]
struct Run {
    /// Let the program go on by itself, its output in a file of the host
    #[arg(long)]
    detach: bool,
    /// Which host; "machine" is this one
    host: End,
    /// The program and what it is told
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Does it; the exit code of the program that it has run.
pub fn run(args: Args) -> Result<ExitCode, Failure> {
    let dir = args.dir.unwrap_or_else(LabFolder::default_dir);
    match args.command {
        Command::Up(up) => start(up, dir)?,
        Command::Down => end(&dir)?,
        Command::Status { json } => {
            show(&find(&dir)?.status().map_err(failure)?, json)?;
        }
        Command::Run(run) => return run_in(&find(&dir)?, &run),
        command => act(&find(&dir)?, command).map_err(failure)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn find(dir: &Path) -> Result<Lab, Failure> {
    Lab::find(dir).map_err(failure)
}

/// What is done without a word.
fn act(lab: &Lab, command: Command) -> Result<(), LabError> {
    match command {
        Command::Put { host, file, path } => lab.host(host)?.put(&file, &path),
        Command::Get { host, path, file } => lab.host(host)?.get(&path, &file),
        Command::Kill { host } => lab.host(host)?.kill(),
        Command::Start { host } => lab.host(host)?.start(),
        Command::Partition { a, b } => lab.partition(a, b),
        Command::Heal { a, b } => lab.heal(a, b),
        Command::Delay { a, b, ms, loss } => {
            let delay = Delay {
                ms,
                loss_percent: loss,
            };
            lab.delay(a, b, delay)
        }
        // Those that have something to say.
        Command::Up(_) | Command::Down | Command::Status { .. } | Command::Run(_) => Ok(()),
    }
}

fn start(up: Up, dir: PathBuf) -> Result<(), Failure> {
    let program = std::env::current_exe().or_fail()?;
    let config = Config {
        hosts: up.hosts,
        binary: up.binary,
        memory_mib: up.memory,
        dir,
        ..Config::new(&program)
    };
    let lab = Lab::up(&config, &mut |event| match event {
        Event::Note(note) => eprintln!("{note}"),
        Event::HostUp { host, after } => eprintln!("{host} is up after {}", output::span(after)),
    });
    let lab = lab.map_err(|error| {
        let exit = match error {
            StartError::Hosts(_) | StartError::Memory(_) => Exit::Usage,
            StartError::Missing(_) => Exit::Unavailable,
            _ => Exit::Failed,
        };
        Failure::new(exit, error)
    })?;
    show(&lab.status().map_err(failure)?, false)?;
    lab.stay().map_err(failure)
}

fn run_in(lab: &Lab, run: &Run) -> Result<ExitCode, Failure> {
    let End::Host(host) = run.host else {
        if run.detach {
            return Err("a program of this machine goes on by itself with the shell's '&'")
                .or_exit(Exit::Usage);
        }
        return lab
            .run_here(&run.command)
            .map(ExitCode::from)
            .map_err(failure);
    };
    let host = lab.host(host).map_err(failure)?;
    if run.detach {
        let detached = host.detach(&run.command).map_err(failure)?;
        output::line(format_args!(
            "process {} of {}; its output goes to {}",
            detached.pid,
            host.id(),
            detached.output.display()
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    let ended = host.run_to(&run.command, &mut io::stdout(), &mut io::stderr());
    match ended {
        Ok(ended) => Ok(ExitCode::from(ended.code())),
        Err(LabError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            Err(output::Unread).or_fail()
        }
        Err(error) => Err(failure(error)),
    }
}

fn end(dir: &Path) -> Result<(), Failure> {
    match Lab::find(dir) {
        Ok(lab) => lab.down().map_err(failure),
        Err(LabError::Ended(_)) => {
            if Lab::clean(dir).or_fail()? {
                eprintln!("cleaned up after a lab that had ended already");
            }
            Ok(())
        }
        Err(error) => Err(failure(error)),
    }
}

fn show(status: &LabStatus, json: bool) -> Result<(), Failure> {
    if json {
        return output::json(status);
    }
    let mut table = output::table(["host", "address", "state", "process", ""]);
    for host in &status.hosts {
        let pid = host.pid.map_or("-".to_owned(), |pid| pid.to_string());
        let address = host.address.to_string();
        table.add_row([
            host.name.to_string(),
            address,
            host.state.to_string(),
            pid,
            remark(host),
        ]);
    }
    table.add_row([
        "machine".to_owned(),
        status.machine.to_string(),
        String::new(),
        String::new(),
        format!("this one; the lab's keeper is process {}", status.keeper),
    ]);
    output::line(format_args!("{table}"))?;
    for link in &status.partitions {
        output::line(format_args!(
            "{} and {} are cut off from each other",
            link.0, link.1
        ))?;
    }
    for long in &status.delays {
        output::line(format_args!(
            "{} to {}: {}",
            long.link.0, long.link.1, long.delay
        ))?;
    }
    Ok(())
}

fn remark(host: &HostStatus) -> String {
    match (host.boot_ms, &host.why_off) {
        (_, Some(why)) => why.clone(),
        (Some(ms), None) => format!("booted in {}", output::span(Duration::from_millis(ms))),
        (None, None) => String::new(),
    }
}

fn failure(error: LabError) -> Failure {
    let exit = match error {
        LabError::NoHost(_) => Exit::Usage,
        _ => Exit::Failed,
    };
    Failure::new(exit, error)
}
