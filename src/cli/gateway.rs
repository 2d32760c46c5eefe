//! `gateway`: publishes TCP ports of a VM beside its clients.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use super::process::{ConfigArgs, block_on_until_stopped};
use super::run::publish;
use crate::agent::certs::Role;
use crate::agent::metrics::{self, ServeMetricsError};
use crate::gateway::{Gateway, GatewayConfig, GatewayMetrics, MOST_CLIENTS, Publish, StackConfig};
use crate::images;
use crate::protocol::VmName;
use crate::sentence::sentence;

/// How many files a gateway has open beside its clients' sockets, at most.
const OTHER_DESCRIPTORS: u64 = 256;

/// What `gateway` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// The VM that clients want
    #[arg(long)]
    vm: VmName,
    /// A TCP port of the guest and where clients reach it (on 127.0.0.1 without an address); every
    /// port of the image, with the same number, when it is left out
    #[arg(long, value_name = "[ADDRESS:]HOST:GUEST", value_parser = publish)]
    publish: Vec<Publish>,
    /// The VM's image, which says what address the guest gives itself
    #[arg(long, default_value = "ledger")]
    image: String,
    /// The guest's address, where no image says it
    #[arg(long, value_name = "ADDRESS/PREFIX")]
    guest: Option<Subnet>,
    /// How many clients are served at the same time; others wait to be accepted
    #[arg(long, value_name = "NUMBER", default_value_t = MOST_CLIENTS)]
    most_clients: usize,
    /// How many of them may come from one address; more are reset. Every one of --most-clients when
    /// it is left out
    #[arg(long, value_name = "NUMBER")]
    most_clients_per_address: Option<usize>,
    /// Serve Prometheus metrics on this TCP address
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
}

/// An address with the length of its subnet's prefix.
#[derive(Clone, Copy, Debug)]
struct Subnet {
    address: Ipv4Addr,
    prefix: u8,
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no address with a prefix: write it as in 10.77.0.2/8");
        let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
        let address = address.parse().map_err(|_| wrong())?;
        let prefix = prefix
            .parse()
            .ok()
            .filter(|prefix| (8..=24).contains(prefix));
        let prefix = prefix
            .ok_or("the prefix must be from 8 to 24 bits long, to leave room for gateways")?;
        Ok(Self { address, prefix })
    }
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    let config = args.config.load(Role::Gateway)?;
    let (subnet, ports) = guest(args)?;
    let publish = if args.publish.is_empty() {
        let same = |port| Publish {
            host: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            guest_port: port,
        };
        ports.into_iter().map(same).collect()
    } else {
        args.publish.clone()
    };
    if publish.is_empty() {
        return Err("nothing is published: name ports with --publish HOST:GUEST")
            .or_exit(Exit::Usage);
    }
    let stack = StackConfig::new(subnet.address, subnet.prefix);
    allow_descriptors(args.most_clients);
    block_on_until_stopped(&args.config, async |stop| {
        let mut wanted = GatewayConfig::new(publish.clone(), stack);
        wanted.most_clients = args.most_clients;
        wanted.most_clients_each = args.most_clients_per_address.unwrap_or(args.most_clients);
        let gateway = Gateway::bind(wanted).await.or_fail()?;
        for (address, publish) in gateway.addresses().iter().zip(&publish) {
            output::line(format_args!(
                "port {} of {} is {address}",
                publish.guest_port, args.vm
            ))?;
        }
        let counted = gateway.metrics();
        tokio::select! {
            never = serve_metrics(args.metrics, counted) => match never {},
            error = gateway.run_in_cluster(&config, args.vm.clone()) => Err(error).or_fail(),
            () = stop => Ok(()),
        }
    })
}

/// Every client has a file descriptor. Says so when this process may not have as many; those who
/// find none wait to be accepted.
fn allow_descriptors(clients: usize) {
    let wanted = clients as u64 + OTHER_DESCRIPTORS;
    let allowed = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(now, most)| {
        if now >= wanted {
            return Ok(now);
        }
        let allowed = wanted.min(most);
        setrlimit(Resource::RLIMIT_NOFILE, allowed, most)?;
        Ok(allowed)
    });
    match allowed {
        Ok(allowed) if allowed >= wanted => {}
        Ok(allowed) => tracing::warn!(
            clients,
            allowed,
            "this process may not open as many files as clients are to be served: raise its limit \
             (ulimit -Hn), or lower --most-clients"
        ),
        Err(error) => tracing::warn!(%error, "the limit of open files cannot be read or raised"),
    }
}

async fn serve_metrics(address: Option<SocketAddr>, counted: Arc<GatewayMetrics>) -> Infallible {
    let Some(address) = address else {
        return std::future::pending().await;
    };
    let text = move || {
        let counts = counted.read();
        let line = |(name, value)| format!("understudy_gateway_{name} {value}\n");
        std::future::ready(counts.each().map(line).collect::<String>())
    };
    let tell = |trouble: Option<&ServeMetricsError>| {
        if let Some(error) = trouble {
            tracing::warn!("{}", sentence(error));
        }
    };
    metrics::serve(address, metrics::TRY_AGAIN, tell, text).await
}

/// Where the guest is, and its ports as far as they are known.
fn guest(args: &Args) -> Result<(Subnet, Vec<u16>), Failure> {
    if let Some(subnet) = args.guest {
        return Ok((subnet, Vec::new()));
    }
    let image = images::find(&args.image).or_exit(Exit::Usage)?;
    let Some(network) = image.network else {
        return Err(format!("the image {} has no network device", image.name)).or_exit(Exit::Usage);
    };
    let subnet = Subnet {
        address: network.address,
        prefix: network.prefix,
    };
    Ok((subnet, network.ports))
}
