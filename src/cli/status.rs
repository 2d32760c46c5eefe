//! `status`: how the hosts and the VMs of a cluster do.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::time::Duration;

use serde::Serialize;

use super::failure::{Failure, OrExit as _};
use super::operator::ClusterArgs;
use super::records::{self, WitnessState};
use super::run::LONG_DEFERRAL;
use super::standing::{self, Look, Standing, ago};
use super::{block_on, output};
use crate::agent::operator::{GuestStatus, HostStatus, OperatorError, VmStatus};
use crate::agent::space::Space;
use crate::protocol::{HostName, RoleName, Span, Time, VmName};
use crate::sentence::sentence;

/// A guest that comes past no landmark for so long does nothing but compute: others come past
/// several a second.
const NO_EXIT: Span = Span::from_millis(1_000);
/// A sync that takes so long is worth a word: the disk is busy, or does not come back.
const LONG_SYNC: Span = Span::from_millis(1_000);
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
            let look = client.status_of_all().await;
            let witness = records::compare(&look, &records::ask(&client).await);
            if args.json {
                output::json_line(&Json::of(&look, &witness))?;
            } else {
                let clear = args.watch && std::io::stdout().is_terminal();
                let clear = if clear { CLEAR } else { "" };
                let text = text(&look, &witness);
                output::line(format_args!("{clear}{}", text.trim_end()))?;
            }
            if !args.watch {
                return unreachable_all(&look);
            }
            tokio::time::sleep(WATCH_EVERY).await;
        }
    })
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
    vms: BTreeMap<&'a VmName, VmJson<'a>>,
    witness: &'a WitnessState,
}

/// What all hosts together say of a VM.
#[derive(Serialize)]
struct VmJson<'a> {
    /// The host that runs the guest, if one does.
    runs_on: Option<&'a HostName>,
    /// The sentence of the table.
    standing: String,
}

#[derive(Serialize)]
#[serde(untagged)]
enum HostJson<'a> {
    Up(&'a HostStatus),
    Down { error: String },
}

impl<'a> Json<'a> {
    fn of(look: &'a Look, witness: &'a WitnessState) -> Self {
        let host = |status: &'a Result<HostStatus, OperatorError>| match status {
            Ok(status) => HostJson::Up(status),
            Err(error) => HostJson::Down {
                error: sentence(error),
            },
        };
        Self {
            witness,
            hosts: look
                .iter()
                .map(|(name, status)| (name, host(status)))
                .collect(),
            vms: standing::all(look)
                .iter()
                .map(|standing| {
                    let of = VmJson {
                        runs_on: standing.runs_on(),
                        standing: standing.sentence(),
                    };
                    (standing.vm(), of)
                })
                .collect(),
        }
    }
}

fn text(look: &Look, witness: &WitnessState) -> String {
    let mut text = String::new();
    let vms = standing::all(look);
    for standing in &vms {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "VM {}: {}", standing.vm(), standing.sentence());
        let mut table = output::table(["host", "role", "position", "log", "lag", "log size", ""]);
        for (host, status) in look {
            match status {
                Ok(status) => {
                    if let Some(seen) = standing.on(host) {
                        table.add_row(row(look, standing, host, status.now, seen));
                    }
                }
                Err(_) if standing.record.concerns(host) => {
                    table.add_row([host.as_str(), "unreachable", "", "", "", "", ""]);
                }
                Err(_) => {}
            }
        }
        let _ = writeln!(text, "{table}\n");
    }
    if vms.is_empty() {
        text.push_str(no_vm(look));
    }
    for (host, status) in look {
        match status {
            Ok(status) => {
                let connected = status.peers.values().filter(|up| **up).count();
                let _ = writeln!(
                    text,
                    "host {host}: up, version {}, connected with {connected} of {} others{}",
                    status.version,
                    status.peers.len(),
                    status.space.map_or_else(String::new, room)
                );
                for aside in &status.aside {
                    let _ = writeln!(
                        text,
                        "host {host}: {} takes {}: it was set aside; delete it when the VM has another \
                         whole copy",
                        aside.folder,
                        output::bytes(aside.bytes)
                    );
                }
                for (vm, why) in &status.silent {
                    let _ = writeln!(text, "host {host}: can tell nothing of {vm}: {why}");
                }
                for trouble in &status.troubles {
                    let _ = writeln!(text, "host {host}: {trouble}");
                }
            }
            Err(error) => {
                let _ = writeln!(text, "host {host}: {}", sentence(error));
            }
        }
    }
    for trouble in &witness.trouble {
        let _ = writeln!(text, "witness: {trouble}");
    }
    if witness.trouble.is_empty() {
        text.push_str("witness: up\n");
    }
    text
}

/// The room that a host has left.
fn room(space: Space) -> String {
    let (free, total) = (output::bytes(space.free), output::bytes(space.total));
    let low = if space.low { ", LOW: make room" } else { "" };
    format!(", {free} of {total} free{low}")
}

/// What a log takes, and may take.
fn log_size(seen: &VmStatus) -> String {
    let budget = output::bytes(seen.store.budget);
    let used = seen.log_bytes.map(output::bytes);
    used.map_or_else(String::new, |used| format!("{used} of {budget}"))
}

/// What is to be said of the store of a log.
fn store_state(seen: &VmStatus) -> Option<String> {
    let why = seen.node.full.as_ref().or(seen.store.full.as_ref());
    if let Some(why) = why {
        return Some(format!("its disk takes nothing more: {why}"));
    }
    let oldest = seen.store.oldest_sync?;
    (oldest >= LONG_SYNC).then(|| {
        let oldest = Duration::from_nanos(oldest.as_nanos());
        format!(
            "its disk has not come back from a sync for {}",
            output::span(oldest)
        )
    })
}

/// What is said where no VM is to be seen: nothing is known by whom nobody answers.
fn no_vm(look: &Look) -> &'static str {
    if look.values().all(Result::is_ok) {
        "No VM is known; 'understudy pair' starts one.\n\n"
    } else if look.values().any(Result::is_ok) {
        "No host that answers knows a VM.\n\n"
    } else {
        ""
    }
}

fn row(
    look: &Look,
    standing: &Standing<'_>,
    host: &HostName,
    now: Time,
    seen: &VmStatus,
) -> [String; 7] {
    let node = &seen.node;
    let lag = lag_of(look, &seen.vm, host);
    let mut remarks = Vec::new();
    if node.throttled {
        remarks.push("slowed down".to_owned());
    }
    if let Some(silence) = node.primary_silence
        && silence.as_millis() >= 200
    {
        let silence = Duration::from_nanos(silence.as_nanos());
        remarks.push(format!(
            "has not heard the primary for {}",
            output::span(silence)
        ));
    }
    if seen.waiting_output > 0 {
        remarks.push(format!(
            "{} of output wait",
            output::bytes(seen.waiting_output)
        ));
    }
    match seen.gateways {
        0 => {}
        1 => remarks.push("1 gateway".to_owned()),
        gateways => remarks.push(format!("{gateways} gateways")),
    }
    if let Some(since) = node.stalled_since {
        remarks.push(format!("output stalled for {}", ago(now, since)));
    }
    remarks.extend(seen.guest.as_ref().and_then(guest_state));
    if let Some(fetching) = seen.fetching {
        remarks.push(format!(
            "fetches its disks: {} of {}",
            output::bytes(fetching.bytes),
            output::bytes(fetching.of)
        ));
    }
    remarks.extend(store_state(seen));
    remarks.extend(seen.failure.clone());
    if !standing.record.concerns(host) {
        remarks.push(format!(
            "no copy any more: 'understudy remove {} --host {host}' deletes what it has",
            seen.vm
        ));
    }
    [
        host.to_string(),
        role(node.role).to_owned(),
        node.position.to_string(),
        node.stored.to_string(),
        lag.map_or(String::new(), output::span),
        log_size(seen),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::space::SetAside;
    use crate::cli::standing::tests::{Told, host, node, record};

    const WELL: WitnessState = WitnessState {
        reachable: true,
        set_back: Vec::new(),
        trouble: Vec::new(),
    };

    #[test]
    fn what_nobody_runs_is_not_told_as_if_somebody_did() {
        let record = record(&["b"]);
        let told = Told::default()
            .says("a", node(RoleName::Starting, &record))
            .down("b");
        let text = text(&told.0, &WELL);
        assert!(text.starts_with("VM shop: NOBODY RUNS IT: "), "{text}");
        let json = serde_json::to_value(Json::of(&told.0, &WELL)).expect("plain data");
        assert!(json["vms"]["shop"]["runs_on"].is_null(), "{json}");
        let told = told.says("a", node(RoleName::Primary, &record));
        let json = serde_json::to_value(Json::of(&told.0, &WELL)).expect("plain data");
        assert_eq!(json["vms"]["shop"]["runs_on"], "a");
    }

    #[test]
    fn a_host_that_keeps_what_nobody_wants_says_how_to_delete_it() {
        let record = record(&["b"]);
        let told = Told::default()
            .says("a", node(RoleName::Primary, &record))
            .says("b", node(RoleName::Member, &record))
            .says("c", node(RoleName::Outsider, &record));
        let rows: Vec<String> = text(&told.0, &WELL).lines().map(str::to_owned).collect();
        let offers = |name: &str| {
            let command = format!("'understudy remove shop --host {name}'");
            rows.iter().any(|row| row.contains(&command))
        };
        assert!(offers("c") && !offers("b"), "{rows:?}");
    }

    #[test]
    fn disks_are_told_before_and_when_they_are_full() {
        let record = record(&["b"]);
        let mut told = Told::default()
            .says("a", node(RoleName::Primary, &record))
            .says("b", node(RoleName::Member, &record));
        let a = told.0.get_mut(&host("a")).and_then(|a| a.as_mut().ok());
        let a = a.expect("answers");
        a.space = Some(Space {
            free: 3_000_000,
            total: 100_000_000,
            low: true,
        });
        a.aside = vec![SetAside {
            folder: "vms/shop/log.aside-1".to_owned(),
            bytes: 5_000,
        }];
        a.vms[0].log_bytes = Some(2_000_000);
        a.vms[0].store.budget = 8_000_000;
        a.vms[0].store.full = Some("the log has come to its budget".to_owned());
        let b = told.0.get_mut(&host("b")).and_then(|b| b.as_mut().ok());
        let b = &mut b.expect("answers").vms[0];
        b.store.oldest_sync = Some(Span::from_millis(4_000));
        let all = text(&told.0, &WELL);
        for words in [
            "3.0 MB of 100.0 MB free, LOW: make room",
            "host a: vms/shop/log.aside-1 takes 5.0 kB: it was set aside",
            "2.0 MB of 8.0 MB",
            "its disk takes nothing more: the log has come to its budget",
            "its disk has not come back from a sync for 4000.0 ms",
        ] {
            assert!(all.contains(words), "{words}: {all}");
        }
        let json = serde_json::to_value(Json::of(&told.0, &WELL)).expect("plain data");
        let a = &json["hosts"]["a"];
        assert_eq!(a["space"]["low"], true, "{json}");
        assert_eq!(a["aside"][0]["bytes"], 5_000, "{json}");
        assert_eq!(a["vms"][0]["store"]["budget"], 8_000_000, "{json}");
    }

    #[test]
    fn the_witness_has_a_line_whether_it_is_well_or_not() {
        assert!(text(&Look::new(), &WELL).ends_with("witness: up\n"));
        let ill = WitnessState {
            trouble: vec!["HAS LOST RECORDS".to_owned()],
            ..WELL
        };
        let text = text(&Look::new(), &ill);
        assert!(text.ends_with("witness: HAS LOST RECORDS\n"), "{text}");
    }

    #[test]
    fn a_host_that_does_not_answer_may_know_a_vm() {
        let mut look = Look::new();
        look.insert(host("a"), Err(OperatorError::NoWitness));
        assert_eq!(no_vm(&look), "", "nobody answers");
        let told = Told(look).says("b", node(RoleName::Starting, &record(&[])));
        let mut look = told.0;
        look.get_mut(&host("b"))
            .and_then(|status| status.as_mut().ok())
            .expect("answers")
            .vms
            .clear();
        assert!(no_vm(&look).starts_with("No host that answers knows a VM"));
        look.remove(&host("a"));
        assert!(no_vm(&look).contains("'understudy pair' starts one"));
    }
}
