//! What the commands of an operator have in common: how they find the cluster, and how they name
//! its hosts.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::failure::{Failure, OrExit as _};
use super::standing::{RECOVER, Standing};
use super::waiting::{self, WaitError};
use super::{events, suggest};
use crate::agent::journal::What;
use crate::agent::operator::{Client, OperatorError, Request};
use crate::config::Config;
use crate::protocol::{Event, HostName, Record, VmName};

/// Between two looks at whether an order has been carried out.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a host may need to find out what is known of a VM that it is to start.
const START_PATIENCE: Duration = Duration::from_secs(3);
/// How long a host may need from an order to start a VM until the witness has its record.
const KNOWN_PATIENCE: Duration = Duration::from_mins(1);

/// Which cluster.
#[derive(Debug, clap::Args)]
pub struct ClusterArgs {
    /// The folder that `understudy init` wrote, or its folder operator/
    #[arg(long, value_name = "DIR", env = "UNDERSTUDY_CLUSTER")]
    cluster: PathBuf,
}

impl ClusterArgs {
    /// A client of the cluster's hosts. Call it on a tokio runtime.
    pub fn client(&self) -> Result<Client, Failure> {
        let inside = self.cluster.join("operator");
        let folder = if inside.is_dir() {
            &inside
        } else {
            &self.cluster
        };
        let config = Config::load(folder).or_fail()?;
        Client::new(&config).or_fail()
    }
}

/// The host of this name, if the cluster has one.
pub fn known_host(client: &Client, name: &HostName) -> Result<HostName, Failure> {
    if client.hosts().any(|host| host == name) {
        Ok(name.clone())
    } else {
        Err(suggest::unknown("host", name.as_str(), client.hosts())).or_fail()
    }
}

/// The record of a VM that the cluster knows.
pub async fn known_vm(client: &Client, vm: &VmName) -> Result<Record, Failure> {
    let all = client.witness().or_fail()?.list().await.or_fail()?;
    if let Some(record) = all.get(vm) {
        return Ok(record.clone());
    }
    let look = client.status_of_all().await;
    match Standing::of(&look, vm) {
        Some(_) => Err(forgotten(vm)).or_fail(),
        None => Err(suggest::unknown("VM", vm.as_str(), all.keys())).or_fail(),
    }
}

/// What is said of a VM that hosts know and the witness does not.
fn forgotten(vm: &VmName) -> String {
    format!("the witness knows no VM '{vm}', and hosts do: it has lost its records; {RECOVER}")
}

/// The record of a VM, if the cluster knows it.
pub async fn record(client: &Client, vm: &VmName) -> Result<Option<Record>, Failure> {
    match client.record(vm).await {
        Ok(record) => Ok(Some(record)),
        Err(OperatorError::NoVm { .. }) => Ok(None),
        Err(error) => Err(error).or_fail(),
    }
}

/// Gives the order to start a VM ([`Request::Run`]) and waits until the cluster knows it; the
/// number of the host's last journal line before the order.
///
/// A host that hears of a VM for the first time has to ask the witness what is known of it, and
/// refuses until it knows: it is asked again for a while.
pub async fn start_vm(
    client: &Client,
    host: &HostName,
    vm: &VmName,
    order: &Request,
) -> Result<u64, WaitError> {
    let until = Instant::now() + START_PATIENCE;
    loop {
        let journal = client.order(host, order).await?;
        let mut watch = Watch::new(client, host, vm, journal);
        let known = waiting::until(KNOWN_PATIENCE, LOOK_EVERY, async || {
            match client.record(vm).await {
                Ok(_) => return Ok(Ok(journal)),
                Err(OperatorError::NoVm { .. }) => {}
                Err(error) => return Err(error),
            }
            watch.refused().await?;
            Ok(Err(format!("{host} to start {vm}")))
        });
        match known.await {
            Err(WaitError::Hopeless(OperatorError::Refused { .. })) if Instant::now() < until => {}
            known => return known,
        }
    }
}

/// Reads what a host writes about a VM after an order, each line once.
pub struct Watch<'a> {
    client: &'a Client,
    host: &'a HostName,
    vm: &'a VmName,
    /// The last line that has been read.
    read: u64,
}

impl<'a> Watch<'a> {
    /// Of the lines after this one.
    pub const fn new(client: &'a Client, host: &'a HostName, vm: &'a VmName, after: u64) -> Self {
        Self {
            client,
            host,
            vm,
            read: after,
        }
    }

    /// Fails with the host's own words if it has refused what was ordered, or if the VM failed there.
    pub async fn refused(&mut self) -> Result<(), OperatorError> {
        let lines = events::events_after(self.client, self.host, self.read).await?;
        self.read = lines.last().map_or(self.read, |line| line.number);
        let about_it = lines
            .into_iter()
            .filter(|line| line.vm.as_ref() == Some(self.vm));
        let mut refusals = about_it.filter_map(|line| match line.what {
            What::Decision(Event::OperatorRefused { why }) => Some(why),
            What::Decision(Event::SwitchoverFailed { .. }) => Some(line.text),
            What::Decision(Event::VmFailed { reason }) => {
                Some(format!("the VM failed on {}: {reason}", self.host))
            }
            _ => None,
        });
        match refusals.next() {
            Some(why) => Err(OperatorError::Refused { why }),
            None => Ok(()),
        }
    }
}

/// What a host last said of its attempts at what was ordered after a line of its journal, for an order
/// that has come to nothing yet.
pub async fn last_word(
    client: &Client,
    host: &HostName,
    vm: &VmName,
    journal: u64,
) -> Option<String> {
    let lines = events::events_after(client, host, journal).await.ok()?;
    let about_it = lines
        .into_iter()
        .filter(|line| line.vm.as_ref() == Some(vm));
    let words = about_it.filter(|line| {
        matches!(
            line.what,
            What::Decision(
                Event::ClaimGivenUp { .. }
                    | Event::RecordUnreachable { .. }
                    | Event::Refused { .. }
                    | Event::Waiting { .. }
                    | Event::StoreFull { .. }
                    | Event::KeeperSetBack { .. }
                    | Event::GuestStopsHosts { .. }
            )
        )
    });
    words.last().map(|line| line.text)
}
