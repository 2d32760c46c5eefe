//! `switchover`: lets a replica reign, planned, with nothing lost and no connection broken.

use std::time::{Duration, Instant};

use super::failure::{Failure, OrExit as _};
use super::operator::{ClusterArgs, known_host, known_vm, refusal};
use super::{block_on, output};
use crate::agent::operator::{Client, Request};
use crate::protocol::{HostName, Record, VmName};

/// How often the record is looked at while it is waited for.
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
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        let before = known_vm(&client, &args.vm).await?;
        let to = match &args.to {
            Some(host) => Some(known_host(&client, host)?),
            None => None,
        };
        if to.as_ref() == Some(&before.primary.host) {
            output::line(format_args!("{} reigns already.", before.primary.host))?;
            return Ok(());
        }
        let began = Instant::now();
        let vm = args.vm.clone();
        let order = Request::Switchover { vm, to };
        let journal = client.order(&before.primary.host, &order).await.or_fail()?;
        let after = wait(&client, &args.vm, &before, journal).await?;
        output::line(format_args!(
            "{} reigns in term {}, after {} ms.",
            after.primary.host,
            after.term,
            began.elapsed().as_millis()
        ))?;
        Ok(())
    })
}

async fn wait(
    client: &Client,
    vm: &VmName,
    before: &Record,
    journal: u64,
) -> Result<Record, Failure> {
    let until = Instant::now() + PATIENCE;
    let old = &before.primary.host;
    loop {
        let now = client.record(vm).await.or_fail()?;
        if now.primary.host != *old {
            return Ok(now);
        }
        if let Some(why) = refusal(client, old, vm, journal).await.or_fail()? {
            return Err(why).or_fail();
        }
        if Instant::now() >= until {
            return Err(format!(
                "{old} has not handed over within {} s: see 'understudy events'",
                PATIENCE.as_secs()
            ))
            .or_fail();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
