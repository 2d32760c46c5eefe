//! `switchover`: lets a replica reign. Planned, with nothing lost and no connection broken; or, when
//! more is gone than the rule survives, with what it holds, and the loss is told.

use std::time::{Duration, Instant};

use super::events::events_after;
use super::failure::{Failure, OrExit as _};
use super::operator::{ClusterArgs, known_host, known_vm, refusal};
use super::{block_on, output};
use crate::agent::journal::What;
use crate::agent::operator::{Client, Request};
use crate::protocol::{Event, HostName, Record, VmName};

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
    /// Go on with what that host holds, though acknowledged writes may be missing: only when the
    /// primary and too many copies are gone for good
    #[arg(long, requires = "to")]
    accept_loss: bool,
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
        if let Some(to) = to.as_ref().filter(|_| args.accept_loss) {
            return accept_loss(&client, &args.vm, to, &before).await;
        }
        let vm = args.vm.clone();
        let order = Request::Switchover { vm, to };
        let journal = client.order(&before.primary.host, &order).await.or_fail()?;
        let old = &before.primary.host;
        let after = wait_for(&client, &args.vm, old, journal, |now| {
            now.primary.host != *old
        })
        .await?;
        output::line(format_args!(
            "{} reigns in term {}, after {} ms.",
            after.primary.host,
            after.term,
            began.elapsed().as_millis()
        ))?;
        Ok(())
    })
}

/// Waits until the record is as wanted, or the host that was given the order says why it is not.
async fn wait_for(
    client: &Client,
    vm: &VmName,
    ordered: &HostName,
    journal: u64,
    wanted: impl Fn(&Record) -> bool,
) -> Result<Record, Failure> {
    let until = Instant::now() + PATIENCE;
    let bar = output::spinner();
    loop {
        let now = client.record(vm).await.or_fail()?;
        if wanted(&now) {
            bar.finish_and_clear();
            return Ok(now);
        }
        if let Some(why) = refusal(client, ordered, vm, journal).await.or_fail()? {
            return Err(why).or_fail();
        }
        if Instant::now() >= until {
            return Err(format!(
                "{ordered} has not come to it within {} s: see 'understudy events'",
                PATIENCE.as_secs()
            ))
            .or_fail();
        }
        bar.set_message(format!("waiting for {ordered}"));
        bar.tick();
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Lets a host reign with what it holds, and says what that costs.
async fn accept_loss(
    client: &Client,
    vm: &VmName,
    to: &HostName,
    before: &Record,
) -> Result<(), Failure> {
    let order = Request::AcceptLoss { vm: vm.clone() };
    let journal = client.order(to, &order).await.or_fail()?;
    let after = wait_for(client, vm, to, journal, |now| {
        now.term > before.term && now.primary.host == *to
    })
    .await?;
    let lines = events_after(client, to, journal).await.or_fail()?;
    for line in lines.iter().filter(|line| line.vm.as_ref() == Some(vm)) {
        if let What::Decision(Event::LossAccepted { .. }) = line.what {
            output::line(format_args!("{}", line.text))?;
        }
    }
    output::line(format_args!("{to} reigns in term {}.", after.term))?;
    Ok(())
}
