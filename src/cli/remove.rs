//! `remove`: lets a host forget a VM of which it is no copy any more, and frees its disk.

use super::failure::{Failure, OrExit as _};
use super::operator::{ClusterArgs, known_host};
use super::{block_on, output};
use crate::protocol::{HostName, VmName};

/// What `remove` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The VM
    vm: VmName,
    /// The host that shall forget it; refused while the VM's record names it
    #[arg(long, value_name = "HOST")]
    host: HostName,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        let host = known_host(&client, &args.host)?;
        client.remove(&host, args.vm.clone()).await.or_fail()?;
        output::line(format_args!(
            "{host} has deleted its log and its disks of {}.",
            args.vm
        ))
    })
}
