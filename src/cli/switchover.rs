//! `switchover`: lets a replica reign. Planned, with nothing lost and no connection broken; or, when
//! more is gone than the rule survives, with what it holds, and the loss is told.
//!
//! Whoever is asked says what it *is*. The record names who was to run the VM when it was last
//! changed: after a power failure that host is there, is named, and runs nothing.

use std::time::{Duration, Instant};

use super::events::events_after;
use super::failure::{Exit, Failure, OrExit as _};
use super::naming::name_host;
use super::operator::{ClusterArgs, Watch, known_host, known_vm, last_word};
use super::standing::Standing;
use super::waiting::{self, WaitError};
use super::{block_on, output, records};
use crate::agent::journal::What;
use crate::agent::operator::{Client, HostStatus, Request, VmStatus};
use crate::protocol::{Event, HostName, Record, RoleName, VmName};

/// How often it is looked whether the order has been carried out.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// After this long something is wrong; the primary itself gives up earlier.
const PATIENCE: Duration = Duration::from_secs(15);

/// What `switchover` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The VM
    vm: VmName,
    /// The replica that shall reign; the first that can when it is left out
    #[arg(long, value_name = "HOST")]
    to: Option<HostName>,
    /// Go on with what that host holds, though acknowledged writes may be missing: only when the
    /// primary and too many copies are gone for good
    #[arg(long, requires = "to")]
    accept_loss: bool,
    /// Only say what that may cost
    #[arg(long, requires = "accept_loss")]
    dry_run: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        let to = match &args.to {
            Some(host) => Some(known_host(&client, host)?),
            None => None,
        };
        match to {
            Some(to) if args.accept_loss => accept_loss(&client, args, &to).await,
            to => planned(&client, &args.vm, to).await,
        }
    })
}

/// Hands over, with nothing lost.
async fn planned(client: &Client, vm: &VmName, to: Option<HostName>) -> Result<(), Failure> {
    let before = known_vm(client, vm).await?;
    let began = Instant::now();
    let old = runs_on(client, vm, &before).await?;
    if to.as_ref() == Some(&old) {
        return output::line(format_args!("{old} runs it already."));
    }
    let order = Request::Switchover { vm: vm.clone(), to };
    let journal = client.order(&old, &order).await.or_fail()?;
    let after = wait_for(client, vm, &old, journal, |now| now.primary.host != old).await?;
    output::line(format_args!(
        "{} reigns in term {}, after {} ms.",
        after.primary.host,
        after.term,
        began.elapsed().as_millis()
    ))
}

/// The host that runs the guest; whom the record names is asked first.
async fn runs_on(client: &Client, vm: &VmName, record: &Record) -> Result<HostName, Failure> {
    let named = &record.primary.host;
    let status = client.status(named).await;
    let runs = |seen: &VmStatus| seen.node.role == RoleName::Primary && !has_ended(seen);
    if status.is_ok_and(|status| on(&status, vm).is_some_and(runs)) {
        return Ok(named.clone());
    }
    let look = client.status_of_all().await;
    let Some(standing) = Standing::of(&look, vm) else {
        return Err(format!(
            "{vm} cannot be handed over: no host that answers knows it"
        ))
        .or_fail();
    };
    match standing.runs_on() {
        Some(host) if standing.ended().is_none() => Ok(host.clone()),
        _ => Err(format!(
            "{vm} cannot be handed over: {}",
            standing.sentence()
        ))
        .or_fail(),
    }
}

fn on<'a>(status: &'a HostStatus, vm: &VmName) -> Option<&'a VmStatus> {
    status.vms.iter().find(|seen| seen.vm == *vm)
}

fn has_ended(seen: &VmStatus) -> bool {
    let guest = seen.guest.as_ref();
    guest.is_some_and(|guest| guest.ended.is_some())
}

/// Waits until the record is as wanted, or the host that was given the order says why it is not.
async fn wait_for(
    client: &Client,
    vm: &VmName,
    ordered: &HostName,
    journal: u64,
    wanted: impl Fn(&Record) -> bool,
) -> Result<Record, Failure> {
    let mut watch = Watch::new(client, ordered, vm, journal);
    let now = waiting::until(PATIENCE, LOOK_EVERY, async || {
        // Asked first: a refusal is one whatever the record says. Who handed over may die of it, and
        // then only the record tells.
        match watch.refused().await {
            Err(error) if error.may_pass() => {}
            told => told?,
        }
        let now = client.record(vm).await?;
        Ok(if wanted(&now) {
            Ok(now)
        } else {
            Err(ordered.to_string())
        })
    });
    match now.await {
        Err(WaitError::TooLong { .. }) => Err(too_long(client, ordered, vm, journal).await),
        now => now.or_fail(),
    }
}

/// What is said of an order that was neither carried out nor refused.
async fn too_long(client: &Client, ordered: &HostName, vm: &VmName, journal: u64) -> Failure {
    let said = last_word(client, ordered, vm, journal).await;
    let said = said.map_or(String::new(), |said| format!("; its last word: {said}"));
    Failure::new(
        Exit::Failed,
        format!(
            "{ordered} has not come to it within {} s{said}; see 'understudy events --vm {vm}'",
            PATIENCE.as_secs()
        ),
    )
}

/// Lets a host reign with what it holds, and says what that costs: beforehand as far as it is known,
/// and afterwards what the host itself found.
async fn accept_loss(client: &Client, args: &Args, to: &HostName) -> Result<(), Failure> {
    let vm = &args.vm;
    let look = client.status_of_all().await;
    if let Some(Err(error)) = look.get(to) {
        return Err(crate::sentence::sentence(error)).or_fail();
    }
    let Some(standing) = Standing::of(&look, vm) else {
        let hosts = look.values().flatten().flat_map(|status| &status.vms);
        return Err(super::suggest::unknown(
            "VM",
            vm.as_str(),
            hosts.map(|seen| &seen.vm),
        ))
        .or_fail();
    };
    if standing.runs_on() == Some(to) {
        return output::line(format_args!("{to} runs it already."));
    }
    output::line(format_args!("{}.", standing.cost(to)))?;
    if let Some(why) = standing.runs_elsewhere(to) {
        return Err(why).or_fail();
    }
    let witness = records::compare(&look, &records::ask(client).await);
    if let Some(why) = witness.in_the_way(vm) {
        return Err(why).or_fail();
    }
    if args.dry_run {
        return output::line("Nothing has been ordered.");
    }
    name_host(client, vm, to).await?;
    let order = Request::AcceptLoss { vm: vm.clone() };
    let journal = client.order(to, &order).await.or_fail()?;
    let reigns = wait_until_it_reigns(client, vm, to, journal).await?;
    let lines = events_after(client, to, journal).await.or_fail()?;
    for line in lines.iter().filter(|line| line.vm.as_ref() == Some(vm)) {
        if let What::Decision(Event::LossAccepted { .. }) = line.what {
            output::line(format_args!("{}", line.text))?;
        }
    }
    output::line(format_args!("{reigns}."))
}

/// Waits until a host runs the guest, or is about to and has only its log to execute: what it says.
async fn wait_until_it_reigns(
    client: &Client,
    vm: &VmName,
    to: &HostName,
    journal: u64,
) -> Result<String, Failure> {
    let mut watch = Watch::new(client, to, vm, journal);
    let mut last = None;
    let reigns = waiting::until(PATIENCE, LOOK_EVERY, async || {
        watch.refused().await?;
        let status = client.status(to).await?;
        let seen = on(&status, vm);
        let role = seen.map(|seen| seen.node.role);
        let term = seen.and_then(|seen| Some(seen.node.record.as_ref()?.term));
        let term = term.map_or(String::new(), |term| format!(" in term {term}"));
        let reigns = format!("{to} reigns{term}");
        if role == Some(RoleName::Primary) {
            return Ok(Ok(reigns));
        }
        last = (role == Some(RoleName::GoingLive)).then_some(reigns);
        Ok(Err(to.to_string()))
    });
    match (reigns.await, last) {
        (Err(WaitError::TooLong { .. }), Some(reigns)) => Ok(format!(
            "{reigns} and executes the log that it holds before it runs the guest: 'understudy status' shows how far it is"
        )),
        (Err(WaitError::TooLong { .. }), None) => Err(too_long(client, to, vm, journal).await),
        (reigns, _) => reigns.or_fail(),
    }
}
