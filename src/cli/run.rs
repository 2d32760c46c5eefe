//! `run`: a guest on this host alone.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use super::process::until_stopped;
use crate::doctor::offer::{self, Host};
use crate::gateway::Publish;
use crate::images::{self, Mode};
use crate::local::{LocalError, LocalMachine, LocalRun, RecordingError};

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
    offer::check(&Host::here(), &image, Mode::Replayed).or_exit(Exit::Unavailable)?;
    let run = LocalRun {
        image,
        record: args.record.clone(),
        recorder: !args.unrecorded,
        publish: args.publish.clone(),
        vmm_binary: None,
    };
    until_stopped(async |stop| serve(run, stop).await)
}

async fn serve(run: LocalRun, stop: impl Future<Output = ()>) -> Result<(), Failure> {
    let publish = run.publish.clone();
    let mut machine = LocalMachine::start(run).await.map_err(failure)?;
    for (address, publish) in machine.addresses.iter().zip(&publish) {
        eprintln!("port {} of the guest is {address}", publish.guest_port);
    }
    let served = tokio::select! {
        served = machine.serve(show) => Some(served),
        () = stop => None,
    };
    let recorded = machine.end(show).await.map_err(failure);
    if let Ok(Some(recorded)) = &recorded {
        let bytes = output::bytes(recorded.bytes);
        eprintln!("recorded {} entries, {bytes}", recorded.end);
    }
    match served {
        None => {}
        Some(Ok(end)) => eprintln!("the guest has ended: {end:?}"),
        // Whatever came of the recording came of this.
        Some(Err(error)) => return Err(failure(error)),
    }
    recorded.map(drop)
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
