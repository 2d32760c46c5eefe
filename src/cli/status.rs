//! `status`: how the hosts and the VMs of a cluster do.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::Duration;

use serde::Serialize;

use super::failure::{Failure, OrExit as _};
use super::operator::ClusterArgs;
use super::run::LONG_DEFERRAL;
use super::{block_on, output};
use crate::agent::operator::{Client, GuestStatus, HostStatus, OperatorError, VmStatus};
use crate::protocol::{HostName, Record, RoleName, Span, Time, VmName};
use crate::sentence::sentence;

/// A guest that comes past no landmark for so long does nothing but compute: others come past
/// several a second.
const NO_EXIT: Span = Span::from_millis(1_000);
/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Clears the screen and goes to its first line.
const CLEAR: &str = "\x1b[2J\x1b[H";

/// What `status` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Look again every second until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// Print JSON, one line a look
    #[arg(long)]
    json: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        loop {
            let look = look(&client).await;
            if args.json {
                output::json_line(&Json::from(&look))?;
            } else {
                let clear = args.watch && std::io::stdout().is_terminal();
                let clear = if clear { CLEAR } else { "" };
                output::line(format_args!("{clear}{}", text(&look).trim_end()))?;
            }
            if !args.watch {
                return unreachable_all(&look);
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    })
}

/// What every host says.
type Look = BTreeMap<HostName, Result<HostStatus, OperatorError>>;

async fn look(client: &Client) -> Look {
    client.status_of_all().await
}

/// A cluster of which nobody answers is a failure.
fn unreachable_all(look: &Look) -> Result<(), Failure> {
    if look.values().any(Result::is_ok) {
        Ok(())
    } else {
        Err("no host of the cluster answers: see whether their agents run").or_fail()
    }
}

#[derive(Serialize)]
struct Json<'a> {
    hosts: BTreeMap<&'a HostName, HostJson<'a>>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum HostJson<'a> {
    Up(&'a HostStatus),
    Down { error: String },
}

impl<'a> From<&'a Look> for Json<'a> {
    fn from(look: &'a Look) -> Self {
        let host = |status: &'a Result<HostStatus, OperatorError>| match status {
            Ok(status) => HostJson::Up(status),
            Err(error) => HostJson::Down {
                error: sentence(error),
            },
        };
        Self {
            hosts: look
                .iter()
                .map(|(name, status)| (name, host(status)))
                .collect(),
        }
    }
}

fn text(look: &Look) -> String {
    let mut text = String::new();
    let latest = latest_records(look);
    for (vm, record) in &latest {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "VM {vm}: {}", standing(look, vm, record));
        let mut table = output::table(["host", "role", "position", "log", "lag", "log bytes", ""]);
        for (host, status) in look {
            match status {
                Ok(status) => {
                    if let Some(seen) = status.vms.iter().find(|seen| seen.vm == *vm) {
                        table.add_row(row(look, host, status.now, seen));
                    }
                }
                Err(_) if record.concerns(host) => {
                    table.add_row([host.as_str(), "unreachable", "", "", "", "", ""]);
                }
                Err(_) => {}
            }
        }
        let _ = writeln!(text, "{table}\n");
    }
    if latest.is_empty() {
        text.push_str("No VM is known; 'understudy pair' starts one.\n\n");
    }
    for (host, status) in look {
        match status {
            Ok(status) => {
                let connected = status.peers.values().filter(|up| **up).count();
                let _ = writeln!(
                    text,
                    "host {host}: up, version {}, connected with {connected} of {} others",
                    status.version,
                    status.peers.len()
                );
            }
            Err(error) => {
                let _ = writeln!(text, "host {host}: {}", sentence(error));
            }
        }
    }
    text
}

/// The newest record that any host knows of each VM.
fn latest_records(look: &Look) -> BTreeMap<VmName, Record> {
    let mut latest: BTreeMap<VmName, Record> = BTreeMap::new();
    for seen in look.values().flatten().flat_map(|status| &status.vms) {
        let Some(record) = &seen.node.record else {
            continue;
        };
        let known = latest
            .entry(seen.vm.clone())
            .or_insert_with(|| record.clone());
        if record.version() > known.version() {
            *known = record.clone();
        }
    }
    latest
}

/// One sentence about a VM.
fn standing(look: &Look, vm: &VmName, record: &Record) -> String {
    let members: Vec<_> = record.members.iter().map(|m| m.host.as_str()).collect();
    let mut text = format!(
        "{} reigns in term {}, rule {}",
        record.primary.host, record.term, record.policy.rule
    );
    if members.is_empty() {
        text.push_str(", UNPROTECTED");
        let since = primary_view(look, vm, record)
            .and_then(|(status, seen)| Some((status.now, seen.node.unprotected_since?)));
        if let Some((now, since)) = since {
            let _ = write!(text, " since {} ago", ago(now, since));
        }
    } else {
        let _ = write!(text, ", {} may succeed", members.join(", "));
    }
    let stalled = primary_view(look, vm, record)
        .and_then(|(status, seen)| Some((status.now, seen.node.stalled_since?)));
    if let Some((now, since)) = stalled {
        let _ = write!(
            text,
            "; OUTPUT WAITS for copies since {} ago",
            ago(now, since)
        );
    }
    text
}

fn ago(now: Time, since: Time) -> String {
    output::span(Duration::from_nanos(now.since(since).as_nanos()))
}

fn primary_view<'a>(
    look: &'a Look,
    vm: &VmName,
    record: &Record,
) -> Option<(&'a HostStatus, &'a VmStatus)> {
    let status = look.get(&record.primary.host)?.as_ref().ok()?;
    let seen = status.vms.iter().find(|seen| seen.vm == *vm)?;
    Some((status, seen))
}

fn row(look: &Look, host: &HostName, now: Time, seen: &VmStatus) -> [String; 7] {
    let node = &seen.node;
    let lag = lag_of(look, &seen.vm, host);
    let mut remarks = Vec::new();
    if node.throttled {
        remarks.push("slowed down".to_owned());
    }
    if let Some(silence) = node.primary_silence
        && silence.as_millis() >= 200
    {
        remarks.push(format!("has not heard the primary for {silence}"));
    }
    if seen.waiting_output > 0 {
        remarks.push(format!(
            "{} of output wait",
            output::bytes(seen.waiting_output)
        ));
    }
    if seen.gateways > 0 {
        remarks.push(format!("{} gateways", seen.gateways));
    }
    if let Some(since) = node.stalled_since {
        remarks.push(format!("output stalled for {}", ago(now, since)));
    }
    remarks.extend(seen.guest.as_ref().and_then(guest_state));
    remarks.extend(seen.failure.clone());
    [
        host.to_string(),
        role(node.role).to_owned(),
        node.position.to_string(),
        node.stored.to_string(),
        lag.map_or(String::new(), output::span),
        seen.log_bytes.map_or(String::new(), output::bytes),
        remarks.join(", "),
    ]
}

/// What is to be said of a guest: that it has ended, on every copy; or, where it is recorded, that it
/// keeps what arrives waiting.
fn guest_state(guest: &GuestStatus) -> Option<String> {
    if let Some(ending) = guest.ended {
        return Some(format!("the guest has ended: {ending}"));
    }
    if !guest.recording {
        return None;
    }
    if guest.silence >= NO_EXIT {
        let silence = Duration::from_nanos(guest.silence.as_nanos());
        return Some(format!(
            "computes without an exit for {}",
            output::span(silence)
        ));
    }
    let longest = Duration::from_nanos(guest.longest_deferral.as_nanos());
    (longest >= LONG_DEFERRAL).then(|| format!("an arrival has waited {}", output::span(longest)))
}

/// How far a replica's execution is behind, as its primary sees it.
pub fn lag_of(
    look: &BTreeMap<HostName, Result<HostStatus, OperatorError>>,
    vm: &VmName,
    host: &HostName,
) -> Option<Duration> {
    look.values()
        .flatten()
        .flat_map(|status| &status.vms)
        .filter(|seen| seen.vm == *vm && seen.node.role == RoleName::Primary)
        .flat_map(|seen| &seen.node.followers)
        .find(|follower| follower.host == *host)
        .map(|follower| Duration::from_nanos(follower.lag.as_nanos()))
}

/// A role in words.
pub const fn role(role: RoleName) -> &'static str {
    match role {
        RoleName::Starting => "starting",
        RoleName::Outsider => "outsider",
        RoleName::Learner => "learner",
        RoleName::Member => "replica",
        RoleName::Claimant => "claimant",
        RoleName::GoingLive => "going live",
        RoleName::Primary => "PRIMARY",
        RoleName::HandingOver => "handing over",
    }
}
