//! `pair`: decides where the copies of a VM are and what must hold before output; starts the VM
//! when the cluster does not know it yet.

use std::time::{Duration, Instant};

use clap::ValueEnum;

use super::failure::{Exit, Failure, OrExit as _};
use super::operator::{ClusterArgs, known_host, record, refusal, start_vm};
use super::{block_on, output};
use crate::agent::operator::{Client, Request};
use crate::protocol::{self, HostName, Policy, Record, Rule, VmName};

/// How often the record is looked at while it is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What `pair` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The VM; it is started if the cluster does not know it
    vm: VmName,
    /// The host that runs it
    #[arg(long, value_name = "HOST")]
    primary: HostName,
    /// A host that shall hold a replica; repeat it for more
    #[arg(long = "replica", value_name = "HOST")]
    replicas: Vec<HostName>,
    /// How many copies must hold the log before output leaves: all, quorum or any(K) replicas
    #[arg(long, value_name = "RULE")]
    rule: Option<Rule>,
    /// What the primary does when replicas are lost
    #[arg(long, value_enum)]
    on_loss: Option<OnLoss>,
    /// What a replica must have done before it counts; fixed once the VM is started
    #[arg(long, value_enum)]
    acks: Option<Acks>,
    /// With fewer copies than this, the primary included, no output leaves
    #[arg(long, value_name = "N")]
    min_copies: Option<u32>,
    /// The image, when the VM is started; the VM's own name when it is left out
    #[arg(long)]
    image: Option<String>,
    /// How many seconds to wait until every replica has caught up; 0 does not wait
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OnLoss {
    /// Go on without them after a second, at worst alone
    Shrink,
    /// Let output wait for them
    Stall,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Acks {
    /// Has it in memory
    Memory,
    /// Has it on disk, synced
    Disk,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        let primary = known_host(&client, &args.primary)?;
        let mut hosts = vec![primary.clone()];
        for host in &args.replicas {
            hosts.push(known_host(&client, host)?);
        }
        hosts.sort();
        hosts.dedup();
        let known = record(&client, &args.vm).await?;
        let policy = policy(args, known.as_ref());
        policy.fits(&hosts, &args.primary).or_exit(Exit::Usage)?;
        let order = order(args, known.as_ref(), &hosts, policy)?;
        let journal = if known.is_some() {
            client.order(&primary, &order).await
        } else {
            start_vm(&client, &primary, &args.vm, &order).await
        };
        let journal = journal.or_fail()?;
        output::line(format_args!(
            "{}",
            capital(&policy.rule.survives(hosts.len()))
        ))?;
        if args.wait > 0 {
            wait(&client, args, &hosts, journal).await?;
        }
        Ok(())
    })
}

/// What was said, and for what was not said the VM's own, or the default.
fn policy(args: &Args, known: Option<&Record>) -> Policy {
    let own = known.map_or_else(Policy::default, |record| record.policy);
    Policy {
        rule: args.rule.unwrap_or(own.rule),
        acks: args.acks.map_or(own.acks, |acks| match acks {
            Acks::Memory => protocol::Acks::Memory,
            Acks::Disk => protocol::Acks::Disk,
        }),
        on_loss: args.on_loss.map_or(own.on_loss, |on_loss| match on_loss {
            OnLoss::Shrink => protocol::OnLoss::Shrink,
            OnLoss::Stall => protocol::OnLoss::Stall,
        }),
        min_copies: args.min_copies.unwrap_or(own.min_copies),
        log_full: own.log_full,
    }
}

fn order(
    args: &Args,
    known: Option<&Record>,
    hosts: &[HostName],
    policy: Policy,
) -> Result<Request, Failure> {
    let vm = args.vm.clone();
    let hosts = hosts.to_vec();
    match known {
        Some(record) if record.primary.host != args.primary => Err(format!(
            "{} reigns over {vm}, not {}: name it as --primary, or use 'understudy switchover {vm} --to {}' first",
            record.primary.host, args.primary, args.primary
        ))
        .or_fail(),
        Some(_) => Ok(Request::Pair { vm, hosts, policy }),
        None => {
            let image = args.image.clone().unwrap_or_else(|| vm.to_string());
            Ok(Request::Run {
                vm,
                image,
                hosts,
                policy,
            })
        }
    }
}

/// Waits until the record names every replica, or the primary refuses.
async fn wait(
    client: &Client,
    args: &Args,
    hosts: &[HostName],
    journal: u64,
) -> Result<(), Failure> {
    let until = Instant::now() + Duration::from_secs(args.wait);
    let bar = output::spinner();
    loop {
        if let Some(record) = record(client, &args.vm).await? {
            let missing: Vec<_> = hosts
                .iter()
                .filter(|host| record.copy_on(host).is_none())
                .map(HostName::as_str)
                .collect();
            let wanted_only = record.all_copies().all(|copy| hosts.contains(&copy.host));
            if missing.is_empty() && wanted_only {
                bar.finish_and_clear();
                output::line(format_args!(
                    "{} holds: {} reigns in term {}, {} copies.",
                    args.vm,
                    record.primary.host,
                    record.term,
                    record.copies()
                ))?;
                return Ok(());
            }
            bar.set_message(format!("waiting for {}", missing.join(", ")));
        }
        bar.tick();
        let refused = refusal(client, &args.primary, &args.vm, journal)
            .await
            .or_fail()?;
        if let Some(why) = refused {
            return Err(why).or_fail();
        }
        if Instant::now() >= until {
            bar.finish_and_clear();
            return Err(format!(
                "not every replica has caught up within {} s: it goes on; see 'understudy status' and 'understudy events'",
                args.wait
            ))
            .or_fail();
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|first| first.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), chars.as_str())
}
