//! `witness`: keeps the records of a cluster. `witness recover`: gives a witness that was set back,
//! lost its disk or was copied what the hosts have seen.

use std::collections::BTreeSet;

use super::failure::{Exit, Failure, OrExit as _};
use super::operator::{ClusterArgs, known_host};
use super::process::{ConfigArgs, block_on_until_stopped};
use super::{block_on, output};
use crate::agent::certs::Role;
use crate::agent::operator::Client;
use crate::agent::witness;
use crate::agent::witness::keeper::Restored;
use crate::agent::witness::recovery::{self, SeenByHosts};
use crate::protocol::{HostName, VmName};

/// What `witness` is told.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(flatten)]
    config: Option<ConfigArgs>,
    #[command(subcommand)]
    order: Option<Order>,
}

#[derive(Debug, clap::Subcommand)]
enum Order {
    /// Give the witness back what the hosts have seen, after it was set back or lost its disk
    Recover(RecoverArgs),
}

/// What `witness recover` is told.
#[derive(Debug, clap::Args)]
struct RecoverArgs {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// A host that does not answer and is gone for good: what it alone has seen is lost
    #[arg(long, value_name = "HOST")]
    without: Vec<HostName>,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(Order::Recover(args)) = &args.order {
        return block_on(recover(args));
    }
    let Some(config) = &args.config else {
        let missing = "name the folder that 'understudy init' wrote for the witness with --config";
        return Err(Failure::new(Exit::Usage, missing));
    };
    let loaded = config.load(Role::Witness)?;
    block_on_until_stopped(config, async |stop| {
        witness::run(&loaded, stop).await.or_fail()
    })
}

async fn recover(args: &RecoverArgs) -> Result<(), Failure> {
    let client = args.cluster.client()?;
    let mut without = BTreeSet::new();
    for host in &args.without {
        without.insert(known_host(&client, host)?);
    }
    let keeper = client.witness().or_fail()?;
    let kept = keeper.list_kept().await.or_fail()?;
    let seen = ask_hosts(&client, &without).await?;
    let newest = recovery::newest(&seen, &kept, &without).or_fail()?;
    let nobody_knows: Vec<_> = kept.keys().filter(|vm| !newest.contains_key(*vm)).collect();
    for vm in nobody_knows {
        output::line(format_args!(
            "{vm}: no host has seen it; the witness's record is left as it is."
        ))?;
    }
    let forced = !without.is_empty();
    let restored = keeper.restore(newest, forced).await.or_fail()?;
    let mut refused = 0;
    for (vm, outcome) in &restored {
        let (text, good) = told(vm, outcome);
        refused += usize::from(!good);
        output::line(format_args!("{text}"))?;
    }
    for host in &without {
        output::line(format_args!(
            "{host} was not asked: if it comes back having seen something newer, what its guests did \
             since is lost; remove its data folder first."
        ))?;
    }
    if refused > 0 {
        let text = format!("{refused} records could not be given back");
        return Err(Failure::new(Exit::Failed, text));
    }
    output::line(format_args!("The witness changes records again."))?;
    Ok(())
}

/// What every host has seen. Who does not answer is told of; whether that matters is judged later.
async fn ask_hosts(client: &Client, without: &BTreeSet<HostName>) -> Result<SeenByHosts, Failure> {
    let mut seen = SeenByHosts::new();
    for (host, answer) in client.seen_by_all().await {
        match answer {
            _ if without.contains(&host) => {}
            Ok(records) => drop(seen.insert(host, records)),
            Err(error) => output::line(format_args!("{host}: {error}."))?,
        }
    }
    Ok(seen)
}

/// One sentence about a VM, and whether it is good news.
fn told(vm: &VmName, outcome: &Restored) -> (String, bool) {
    match outcome {
        Restored::Kept(version) => (
            format!("{vm}: the witness has {version}, the newest."),
            true,
        ),
        Restored::Replaced(None, new) => (
            format!("{vm}: the witness had nothing, and was given {new}."),
            true,
        ),
        Restored::Replaced(Some(old), new) => (
            format!("{vm}: the witness had {old}, and was given {new}."),
            true,
        ),
        Restored::OtherLineage => (
            format!(
                "{vm}: the witness has a record of another VM of this name, and was given nothing."
            ),
            false,
        ),
        Restored::TooOld(fact) => (
            format!(
                "{vm}: a host has seen {}, and none that answered has: start it and repeat this.",
                fact.seen.version
            ),
            false,
        ),
    }
}
