//! `pair`: decides where the copies of a VM are and what must hold before output; starts the VM
//! when the cluster does not know it yet.
//!
//! It says that a VM holds when the record is as it was ordered, the primary says that it runs the
//! guest, and every copy can be started; and it fails with the host's own words when it refused.

use std::time::Duration;

use clap::ValueEnum;

use super::failure::{Exit, Failure, OrExit as _};
use super::naming::name_host;
use super::operator::{ClusterArgs, Watch, known_host, record, start_vm};
use super::standing::{Look, Standing};
use super::waiting::{self, WaitError};
use super::{block_on, output};
use crate::agent::operator::{Client, OperatorError, Request};
use crate::protocol::{self, HostName, Policy, Record, RoleName, Rule, VmName};

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
    /// What happens when a copy's log has used up its budget; its beginning is never dropped, because
    /// nothing can be started without
    #[arg(long, value_enum)]
    log_full: Option<LogFull>,
    /// With fewer copies than this, the primary included, no output leaves
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    min_copies: Option<u32>,
    /// The image, when the VM is started; the VM's own name when it is left out
    #[arg(long)]
    image: Option<String>,
    /// Start the VM again from its image, when no host has a log or disks of it any more: everything
    /// it had is lost
    #[arg(long)]
    start_over: bool,
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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFull {
    /// It takes no more, and output waits where the rule needs it
    Stall,
    /// The primary's log grows beyond it; copies whose budget is used up are let go
    Unprotected,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    block_on(async {
        let client = args.cluster.client()?;
        let primary = known_host(&client, &args.primary)?;
        for host in &args.replicas {
            known_host(&client, host)?;
        }
        let hosts = hosts(args).or_exit(Exit::Usage)?;
        let known = record(&client, &args.vm).await?;
        if args.start_over {
            return start_over(&client, args, &primary, known).await;
        }
        let policy = policy(args, known.as_ref());
        policy.fits(&hosts, &args.primary).or_exit(Exit::Usage)?;
        let order = order(args, known.as_ref(), &hosts, policy)?;
        let journal = if known.is_some() {
            reigns(&client, args).await?;
            client.order(&primary, &order).await.or_fail()?
        } else {
            let started = start_vm(&client, &primary, &args.vm, &order).await;
            started.or_fail()?
        };
        let survives = capital(&policy.rule.survives(hosts.len()));
        let wanted = Wanted { hosts, policy };
        if args.wait > 0 {
            let holds = wait(&client, args, &wanted, journal).await?;
            return output::line(format_args!("{survives}\n{holds}"));
        }
        let mut watch = Watch::new(&client, &primary, &args.vm, journal);
        watch.refused().await.or_fail()?;
        output::line(survives)
    })
}

/// Starts a VM of which nothing is left again, as its record wants it.
async fn start_over(
    client: &Client,
    args: &Args,
    primary: &HostName,
    known: Option<Record>,
) -> Result<(), Failure> {
    let vm = args.vm.clone();
    if known.is_none() {
        let why = format!("no VM {vm} is known: leave --start-over out, and pair starts it");
        return Err(why).or_exit(Exit::Usage);
    }
    let image = args.image.clone().unwrap_or_else(|| vm.to_string());
    name_host(client, &vm, primary).await?;
    let record = client.record(&vm).await.or_fail()?;
    let order = Request::StartOver { vm, image };
    let journal = client.order(primary, &order).await.or_fail()?;
    let wanted = Wanted {
        hosts: record.hosts,
        policy: record.policy,
    };
    let holds = wait(client, args, &wanted, journal).await?;
    output::line(holds)
}

/// The hosts that shall have a copy, each named once: a host that is named twice is most often a
/// misspelt other one, and the VM would have a copy less than its owner thinks.
fn hosts(args: &Args) -> Result<Vec<HostName>, String> {
    let mut hosts = vec![args.primary.clone()];
    for host in &args.replicas {
        if hosts.contains(host) {
            return Err(format!("{host} is named twice: a host holds one copy"));
        }
        hosts.push(host.clone());
    }
    hosts.sort();
    Ok(hosts)
}

/// Fails when the host that shall be given the order does not reign: it could only refuse, and
/// somebody may have to know why nobody does.
async fn reigns(client: &Client, args: &Args) -> Result<(), Failure> {
    let status = client.status(&args.primary).await.or_fail()?;
    let seen = status.vms.iter().find(|seen| seen.vm == args.vm);
    let role = seen.map(|seen| seen.node.role);
    if matches!(
        role,
        Some(RoleName::Primary | RoleName::GoingLive | RoleName::HandingOver)
    ) {
        return Ok(());
    }
    let look = client.status_of_all().await;
    let how = Standing::of(&look, &args.vm).map_or_else(
        || format!("{} does not know it", args.primary),
        |standing| standing.sentence(),
    );
    Err(format!(
        "the copies of {} cannot be changed: {how}",
        args.vm
    ))
    .or_fail()
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
        log_full: args
            .log_full
            .map_or(own.log_full, |log_full| match log_full {
                LogFull::Stall => protocol::LogFull::Stall,
                LogFull::Unprotected => protocol::LogFull::Unprotected,
            }),
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
        Some(_) if args.image.is_some() => Err(format!(
            "{vm} exists, and keeps the image that it was started from: leave --image out"
        ))
        .or_exit(Exit::Usage),
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

/// What was ordered.
struct Wanted {
    hosts: Vec<HostName>,
    policy: Policy,
}

/// What the record lacks, in words.
fn lacks(record: &Record, wanted: &Wanted) -> Option<String> {
    let missing: Vec<_> = wanted
        .hosts
        .iter()
        .filter(|host| record.copy_on(host).is_none())
        .map(HostName::as_str)
        .collect();
    if !missing.is_empty() {
        return Some(format!("{} to catch up", missing.join(", ")));
    }
    let wanted_only = record
        .all_copies()
        .all(|copy| wanted.hosts.contains(&copy.host));
    let as_wanted = wanted_only && record.policy == wanted.policy;
    (!as_wanted).then(|| "the record to be changed".to_owned())
}

/// How far an order has come that the record shows, by what the hosts say: a sentence that says how the
/// VM stands once it is carried out, or what is still missing.
fn come(look: &Look, vm: &VmName, record: &Record, wanted: &Wanted) -> Result<String, String> {
    let Some(standing) = Standing::of(look, vm) else {
        return Err(format!("{} to say how it does", record.primary.host));
    };
    let Some(runs_on) = standing.runs_on() else {
        return Err(format!(
            "somebody to run it, and now: {}",
            standing.sentence()
        ));
    };
    let cannot = |host: &&HostName| standing.cannot_start(host).is_some();
    if let Some(host) = wanted.hosts.iter().find(cannot) {
        let why = standing.cannot_start(host).unwrap_or_default();
        return Err(format!(
            "the copy on {host}, which cannot be started: {why}"
        ));
    }
    let copies = format!("{} copies", record.copies());
    if let Some(ending) = standing.ended() {
        return Ok(format!(
            "{vm} has {copies}, and nothing runs: its guest has ended ({ending})."
        ));
    }
    let mut text = format!(
        "{vm} holds: {runs_on} runs it in term {}, {copies}",
        record.term
    );
    if !record.members.is_empty() {
        text.push_str(", ");
        text.push_str(&standing.successors().join("; "));
    }
    text.push('.');
    Ok(text)
}

/// Waits until what was ordered holds, or the primary refuses; how the VM stands then, in a sentence.
async fn wait(
    client: &Client,
    args: &Args,
    wanted: &Wanted,
    journal: u64,
) -> Result<String, Failure> {
    let patience = Duration::from_secs(args.wait);
    let mut watch = Watch::new(client, &args.primary, &args.vm, journal);
    let holds = waiting::until(patience, LOOK_EVERY, async || {
        // Asked first: the record may look as wanted, and the order be refused.
        watch.refused().await?;
        let record = match client.record(&args.vm).await {
            Ok(record) => record,
            Err(OperatorError::NoVm { .. }) => {
                return Ok(Err("the witness to know it".to_owned()));
            }
            Err(error) => return Err(error),
        };
        if let Some(what) = lacks(&record, wanted) {
            return Ok(Err(what));
        }
        Ok(come(&look(client, wanted).await, &args.vm, &record, wanted))
    });
    match holds.await {
        Err(WaitError::TooLong { lacks, .. }) => Err(format!(
            "{} has waited {} s for {lacks}; it goes on without this command: see 'understudy status' and 'understudy events'",
            args.vm, args.wait
        ))
        .or_fail(),
        holds => holds.or_fail(),
    }
}

/// What the hosts that shall have a copy say.
async fn look(client: &Client, wanted: &Wanted) -> Look {
    let mut look = Look::new();
    for host in &wanted.hosts {
        look.insert(host.clone(), client.status(host).await);
    }
    look
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|first| first.to_uppercase().to_string());
    format!("{}{}.", first.unwrap_or_default(), chars.as_str())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::standing::tests::{Told, host, node, record, shop};
    use crate::protocol::{Acks, Health, Incarnation};

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn args(words: &[&str]) -> Args {
        let words = ["pair", "shop", "--cluster", "c", "--primary", "a"]
            .iter()
            .chain(words);
        Cli::try_parse_from(words).expect("a command").args
    }

    fn wanted(hosts: &[&str]) -> Wanted {
        Wanted {
            hosts: hosts.iter().map(|name| host(name)).collect(),
            policy: Policy::default(),
        }
    }

    #[test]
    fn a_host_that_is_named_twice_is_a_mistake() {
        for words in [
            &["--replica", "a"][..],
            &["--replica", "b", "--replica", "b"],
        ] {
            let why = hosts(&args(words)).expect_err("twice");
            assert!(why.contains("is named twice"), "{why}");
        }
        let named = hosts(&args(&["--replica", "c", "--replica", "b"]));
        assert_eq!(named, Ok(vec![host("a"), host("b"), host("c")]));
        assert!(
            Cli::try_parse_from([
                "pair",
                "shop",
                "--cluster",
                "c",
                "--primary",
                "a",
                "--min-copies",
                "0"
            ])
            .is_err(),
            "no copy at all is no number of copies"
        );
    }

    #[test]
    fn what_is_not_said_stays_as_it_is() {
        let mut own = record(&["b"]);
        own.policy.acks = Acks::Disk;
        own.policy.log_full = protocol::LogFull::Unprotected;
        let kept = policy(&args(&[]), Some(&own));
        assert_eq!(kept, own.policy);
        let changed = policy(&args(&["--log-full", "stall"]), Some(&own));
        assert_eq!(changed.log_full, protocol::LogFull::Stall);
        assert_eq!(changed.acks, Acks::Disk);
    }

    #[test]
    fn an_image_is_for_a_vm_that_is_started() {
        let refused = order(
            &args(&["--image", "linux"]),
            Some(&record(&["b"])),
            &[host("a")],
            Policy::default(),
        );
        let refused = refused.expect_err("it exists").to_string();
        assert!(refused.contains("leave --image out"), "{refused}");
    }

    #[test]
    fn a_record_that_is_not_as_ordered_holds_nothing() {
        let record = record(&["b"]);
        assert_eq!(lacks(&record, &wanted(&["a", "b"])), None);
        assert_eq!(
            lacks(&record, &wanted(&["a", "b", "c", "d"])),
            Some("c, d to catch up".to_owned())
        );
        assert!(lacks(&record, &wanted(&["a"])).is_some());
        // What was refused changes nothing: the hosts are as wanted all the same.
        let mut other = wanted(&["a", "b"]);
        other.policy.acks = Acks::Disk;
        assert!(lacks(&record, &other).is_some());
    }

    #[test]
    fn a_vm_holds_when_its_primary_runs_it_and_every_copy_can_be_started() {
        let record = record(&["b"]);
        let come = |told: &Told| super::come(&told.0, &shop(), &record, &wanted(&["a", "b"]));
        let told = Told::default()
            .says("a", node(RoleName::Primary, &record))
            .says("b", node(RoleName::Member, &record));
        assert_eq!(
            come(&told),
            Ok("shop holds: a runs it in term 3, 2 copies, b may succeed.".to_owned())
        );
        let told = told.but("b", |vm| vm.node.health = Health::Unable);
        assert_eq!(
            come(&told),
            Err(
                "the copy on b, which cannot be started: its VMM does not come to the end of what it holds"
                    .to_owned()
            )
        );
        // After a power failure the record is as it was, and nobody runs anything.
        let mut learner = node(RoleName::Learner, &record);
        learner.incarnation = Incarnation(2);
        let told = Told::default().says("a", learner).down("b");
        let Err(what) = come(&told) else {
            panic!("nobody runs it");
        };
        assert!(what.contains("NOBODY RUNS IT: a waits for b"), "{what}");
    }
}
