//! What the commands of an operator have in common: how they find the cluster, and how they name
//! its hosts.

use std::path::PathBuf;

use super::failure::{Failure, OrExit as _};
use super::suggest;
use crate::agent::operator::{Client, OperatorError};
use crate::config::Config;
use crate::protocol::{HostName, Record, VmName};

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
    match all.get(vm) {
        Some(record) => Ok(record.clone()),
        None => Err(suggest::unknown("VM", vm.as_str(), all.keys())).or_fail(),
    }
}

/// The record of a VM, if the cluster knows it.
pub async fn record(client: &Client, vm: &VmName) -> Result<Option<Record>, Failure> {
    match client.record(vm).await {
        Ok(record) => Ok(Some(record)),
        Err(OperatorError::NoVm { .. }) => Ok(None),
        Err(error) => Err(error).or_fail(),
    }
}
