//! `init`: makes a cluster, that is its certificates and a folder for each of its processes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::failure::{Failure, OrExit as _};
use super::output;
use crate::agent::certs::{Identity, Name, Role};
use crate::agent::init::{Plan, init};

/// What `init` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder to make; `understudy` commands find the cluster by it
    dir: PathBuf,
    /// A host with the UDP address its agent listens on
    #[arg(long = "host", value_name = "NAME=ADDRESS:PORT", required = true)]
    hosts: Vec<Named>,
    /// The witness with the UDP address it listens on
    #[arg(long, value_name = "NAME=ADDRESS:PORT")]
    witness: Named,
    /// A gateway, which runs beside the clients
    #[arg(long = "gateway", value_name = "NAME", default_value = "gateway")]
    gateways: Vec<Name>,
    /// Serve Prometheus metrics of this host on a TCP address
    #[arg(long, value_name = "HOST=ADDRESS:PORT")]
    metrics: Vec<Named>,
}

/// `NAME=ADDRESS:PORT`.
#[derive(Clone, Debug)]
pub struct Named {
    name: Name,
    address: SocketAddr,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, address) = text
            .split_once('=')
            .ok_or("write a name, '=', and an IP address with a port, as in a=192.0.2.1:7400")?;
        let address = address.parse().map_err(|_| {
            format!("'{address}' is no IP address with a port, as in 192.0.2.1:7400")
        })?;
        let name = name.parse::<Name>().map_err(|error| error.to_string())?;
        Ok(Self { name, address })
    }
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let pairs = |named: &[Named]| -> BTreeMap<Name, SocketAddr> {
        named.iter().map(|n| (n.name.clone(), n.address)).collect()
    };
    let plan = Plan {
        hosts: pairs(&args.hosts),
        metrics: pairs(&args.metrics),
        witness: (args.witness.name.clone(), args.witness.address),
        gateways: args.gateways.clone(),
        operator: "operator".parse().or_fail()?,
    };
    if let Some(host) = plan
        .metrics
        .keys()
        .find(|host| !plan.hosts.contains_key(*host))
    {
        return Err(super::suggest::unknown(
            "host",
            host.as_str(),
            plan.hosts.keys(),
        ))
        .or_fail();
    }
    let folders = init(&args.dir, &plan).or_fail()?;
    output::line(format_args!(
        "The cluster's folders are in {}.",
        args.dir.display()
    ))?;
    output::line(format_args!(
        "Keep ca/ where it is and let nobody read it. Copy every other folder to its machine"
    ))?;
    output::line(format_args!("and start there:\n"))?;
    for (Identity { role, name }, folder) in &folders {
        let folder = folder.display();
        match role {
            Role::Host => output::line(format_args!(
                "  host {name}:     understudy agent --config {folder}"
            ))?,
            Role::Witness => output::line(format_args!(
                "  witness {name}:  understudy witness --config {folder}"
            ))?,
            Role::Gateway => output::line(format_args!(
                "  gateway {name}:  understudy gateway --config {folder} --vm VM --publish [ADDRESS:]HOST:GUEST"
            ))?,
            Role::Operator => {}
        }
    }
    output::line(format_args!(
        "\nThen: export UNDERSTUDY_CLUSTER={}",
        args.dir.display()
    ))?;
    Ok(())
}
