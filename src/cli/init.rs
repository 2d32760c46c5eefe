//! `init`: makes a cluster, that is its certificates and a folder for each of its processes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use crate::agent::certs::{Identity, Name, Role};
use crate::agent::init::{Plan, init};
use crate::agent::link::Address;

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
    /// Where others reach this host or the witness, if that is not where it listens: a host name, the
    /// outside of a NAT, or one address of a machine where it listens on all (0.0.0.0 or [::])
    #[arg(long, value_name = "NAME=HOST:PORT", value_parser = advertised)]
    advertise: Vec<(Name, Address)>,
    /// A gateway, which runs beside the clients
    #[arg(long = "gateway", value_name = "NAME", default_value = "gateway")]
    gateways: Vec<Name>,
    /// Serve Prometheus metrics of this host on this TCP address; without, on its own machine at
    /// 127.0.0.1, 1,000 ports above its own
    #[arg(long, value_name = "HOST=ADDRESS:PORT")]
    metrics: Vec<Named>,
    /// Serve no metrics, but of the hosts that --metrics names
    #[arg(long)]
    no_metrics: bool,
}

/// Where a host serves its metrics when nothing is said. Two hosts on one machine have two ports of
/// their own, and so of these.
fn metrics_beside(listen: SocketAddr) -> SocketAddr {
    let port = listen.port();
    let beside = port
        .checked_add(1_000)
        .unwrap_or(port.saturating_sub(1_000));
    SocketAddr::from(([127, 0, 0, 1], beside))
}

/// `NAME=HOST:PORT`.
fn advertised(text: &str) -> Result<(Name, Address), String> {
    let (name, address) = text
        .split_once('=')
        .ok_or("write a name, '=', and a host with a port, as in a=a.example:7400")?;
    let name = name.parse::<Name>().map_err(|error| error.to_string())?;
    Ok((name, Address(address.to_owned())))
}

/// Names with addresses, each named once.
fn once(what: &str, named: &[Named]) -> Result<BTreeMap<Name, SocketAddr>, Failure> {
    let mut all = BTreeMap::new();
    for Named { name, address } in named {
        if let Some(other) = all.insert(name.clone(), *address) {
            let twice = format!("--{what} {name} is given twice, as {other} and as {address}");
            return Err(format!("{twice}: name it once")).or_exit(Exit::Usage);
        }
    }
    Ok(all)
}

/// Refuses what cannot all listen.
fn check_addresses(plan: &Plan) -> Result<(), Failure> {
    let mut taken: BTreeMap<String, &Name> = BTreeMap::new();
    let witness = (&plan.witness.0, &plan.witness.1);
    for (name, address) in plan.hosts.iter().chain([witness]) {
        let dialled = plan.dialled(name, *address).0;
        if let Some(other) = taken.insert(dialled.clone(), name) {
            let both = if plan.advertise.contains_key(name) {
                format!("{other} and {name} are both to be reached at {dialled}")
            } else {
                format!("{other} and {name} are both to listen on {address}")
            };
            return Err(format!("{both}: give each an address of its own")).or_exit(Exit::Usage);
        }
    }
    Ok(())
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
    let hosts = once("host", &args.hosts)?;
    let mut metrics = once("metrics", &args.metrics)?;
    if !args.no_metrics {
        for (host, listen) in &hosts {
            metrics
                .entry(host.clone())
                .or_insert_with(|| metrics_beside(*listen));
        }
    }
    let plan = Plan {
        hosts,
        metrics,
        witness: (args.witness.name.clone(), args.witness.address),
        advertise: args.advertise.iter().cloned().collect(),
        gateways: args.gateways.clone(),
        operator: "operator".parse().or_fail()?,
    };
    check_addresses(&plan)?;
    let known = |name: &Name| plan.hosts.contains_key(name) || *name == plan.witness.0;
    if let Some(name) = plan.advertise.keys().find(|name| !known(name)) {
        return Err(super::suggest::unknown(
            "host",
            name.as_str(),
            plan.hosts.keys(),
        ))
        .or_fail();
    }
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
