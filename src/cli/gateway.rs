//! `gateway`: publishes TCP ports of a VM beside its clients.

use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;
use super::process::{ConfigArgs, block_on_until_stopped};
use super::run::publish;
use crate::agent::certs::Role;
use crate::agent::metrics::{self, ServeMetricsError};
use crate::gateway::{Gateway, GatewayConfig, GatewayMetrics, Publish, StackConfig};
use crate::images;
use crate::protocol::VmName;

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
    block_on_until_stopped(&args.config, async |stop| {
        let gateway = Gateway::bind(GatewayConfig::new(publish.clone(), stack))
            .await
            .or_fail()?;
        for (address, publish) in gateway.addresses().iter().zip(&publish) {
            output::line(format_args!(
                "port {} of {} is {address}",
                publish.guest_port, args.vm
            ))?;
        }
        let counted = gateway.metrics();
        tokio::select! {
            failed = serve_metrics(args.metrics, counted) => failed.or_fail(),
            error = gateway.run_in_cluster(&config, args.vm.clone()) => Err(error).or_fail(),
            () = stop => Ok(()),
        }
    })
}

/// Ends only with a failure.
async fn serve_metrics(
    address: Option<SocketAddr>,
    counted: Arc<GatewayMetrics>,
) -> Result<(), ServeMetricsError> {
    let Some(address) = address else {
        return std::future::pending().await;
    };
    let text = move || {
        let counts = counted.read();
        let line = |(name, value)| format!("understudy_gateway_{name} {value}\n");
        std::future::ready(counts.each().map(line).collect::<String>())
    };
    metrics::serve(address, text).await
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
