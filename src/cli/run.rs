//! `run`: a guest on this host alone.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use super::process::until_stopped;
use crate::doctor::offer::{self, Host};
use crate::gateway::Publish;
use crate::images::{self, Mode};
use crate::local::{LocalError, LocalMachine, LocalRun, Log, Recorded, RecordingError};

/// What an arrival may wait before it is worth a word (DESIGN.md, section 2: the deferral limit).
pub(super) const LONG_DEFERRAL: Duration = Duration::from_millis(20);

/// So many entries before a crash are pointed at.
const LAST_ENTRIES: u64 = 20;

/// What `run` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which image: a name (see `understudy images`) or a folder with a manifest
    image: String,
    /// Record the guest into this folder, which must not hold a log yet
    #[arg(long, value_name = "DIR", conflicts_with = "unrecorded")]
    record: Option<PathBuf>,
    /// Publish a TCP port of the guest; without an address on 127.0.0.1
    #[arg(long, value_name = "[ADDRESS:]HOST:GUEST", value_parser = publish)]
    publish: Vec<Publish>,
    /// Run without the recorder, to see what recording costs
    #[arg(long)]
    unrecorded: bool,
    /// Type on the guest's console what comes on standard input
    #[arg(long)]
    console: bool,
    /// What the guest is run as
    #[arg(long, value_enum, default_value_t)]
    mode: RunMode,
}

/// What a guest can be run as here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum RunMode {
    /// What arrives waits for its next landmark, so that it can be recorded and replayed
    #[default]
    Replayed,
    /// What arrives interrupts it wherever it is, and nothing of it can be recorded
    None,
}

impl Args {
    /// What becomes of the guest's log.
    fn log(&self) -> Result<Log, Failure> {
        match (self.mode, &self.record, self.unrecorded) {
            (RunMode::None, None, false) => Ok(Log::Impossible),
            (RunMode::None, ..) => Err(Failure::new(
                Exit::Usage,
                "nothing of a guest can be recorded with --mode none: leave out --record and --unrecorded, or the mode",
            )),
            (RunMode::Replayed, Some(folder), _) => Ok(Log::Kept(folder.clone())),
            (RunMode::Replayed, None, true) => Ok(Log::Unwritten),
            (RunMode::Replayed, None, false) => Ok(Log::Dropped),
        }
    }
}

/// Reads `[ADDRESS:]HOST:GUEST`.
pub(super) fn publish(text: &str) -> Result<Publish, String> {
    let usage = || format!("'{text}' names no ports: write HOST:GUEST, for example 6379:6379");
    let (host, guest) = text.rsplit_once(':').ok_or_else(usage)?;
    let guest_port = guest.parse().map_err(|_| usage())?;
    let host = match host.parse::<u16>() {
        Ok(port) => SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port),
        Err(_) => host.parse().map_err(|_| usage())?,
    };
    Ok(Publish { host, guest_port })
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let image = images::find(&args.image).or_exit(Exit::Usage)?;
    let log = args.log()?;
    let mode = match log {
        Log::Impossible => Mode::None,
        _ => Mode::Replayed,
    };
    offer::check(&Host::here(), &image, mode).or_exit(Exit::Unavailable)?;
    let run = LocalRun {
        image,
        log,
        publish: args.publish.clone(),
        vmm_binary: None,
    };
    let typed = if args.console {
        Typed::standard_input()
    } else {
        Typed::nothing()
    };
    until_stopped(async |stop| serve(run, typed, stop).await)
}

/// What is typed on the guest's console.
struct Typed(mpsc::Receiver<Bytes>);

impl Typed {
    fn nothing() -> Self {
        Self(mpsc::channel(1).1)
    }

    /// Everything up to the end of standard input. Read by a thread of its own, which nobody waits
    /// for: there is no way to end a read that waits for somebody to type.
    fn standard_input() -> Self {
        let (typed, receiver) = mpsc::channel(16);
        std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while let Ok(count @ 1..) = std::io::stdin().lock().read(&mut buffer) {
                let bytes = Bytes::copy_from_slice(&buffer[..count]);
                if typed.blocking_send(bytes).is_err() {
                    break;
                }
            }
        });
        Self(receiver)
    }

    /// Never, once there is nothing more.
    async fn next(&mut self) -> Bytes {
        match self.0.recv().await {
            Some(bytes) => bytes,
            None => std::future::pending().await,
        }
    }
}

async fn serve(
    run: LocalRun,
    mut typed: Typed,
    stop: impl Future<Output = ()>,
) -> Result<(), Failure> {
    let publish = run.publish.clone();
    let kept = match &run.log {
        Log::Kept(folder) => Some(folder.clone()),
        _ => None,
    };
    let mut machine = LocalMachine::start(run).await.map_err(failure)?;
    for (address, publish) in machine.addresses.iter().zip(&publish) {
        eprintln!("port {} of the guest is {address}", publish.guest_port);
    }
    let served = tokio::select! {
        served = machine.serve(show, async || typed.next().await) => Some(served),
        () = stop => None,
    };
    if machine.longest_deferral >= LONG_DEFERRAL {
        let longest = output::span(machine.longest_deferral);
        eprintln!("what arrived has waited for an exit of the guest up to {longest}");
    }
    let recorded = machine.end(show).await.map_err(failure);
    if let Ok(Some(recorded)) = &recorded {
        let bytes = output::bytes(recorded.bytes);
        eprintln!("recorded {} entries, {bytes}", recorded.end);
    }
    match served {
        // Whatever came of the recording came of this.
        Some(Err(error)) => Err(failure(error)),
        Some(Ok(end)) => {
            eprintln!("the guest has ended: {end}");
            let recorded = recorded?;
            if end.how.is_crash() {
                return Err(crashed(kept.as_deref().zip(recorded)));
            }
            Ok(())
        }
        None => recorded.map(drop),
    }
}

/// A guest that crashed is not a command that has done what it was asked for.
fn crashed(log: Option<(&Path, Recorded)>) -> Failure {
    let next = match log {
        Some((folder, recorded)) => format!(
            "see its last entries with 'understudy log inspect {} --from {}'",
            folder.display(),
            recorded.end.0.saturating_sub(LAST_ENTRIES)
        ),
        None => "run it with --record to see what came before".to_owned(),
    };
    Failure::new(Exit::Failed, format!("the guest has crashed: {next}"))
}

fn show(console: &[u8]) {
    let mut out = std::io::stdout().lock();
    // Nobody reads: the guest goes on all the same.
    let _ = out.write_all(console).and_then(|()| out.flush());
}

fn failure(error: LocalError) -> Failure {
    let exit = match error {
        LocalError::Recording(RecordingError::NotEmpty { .. }) | LocalError::NoNetwork { .. } => {
            Exit::Usage
        }
        _ => Exit::Failed,
    };
    Failure::new(exit, error)
}
