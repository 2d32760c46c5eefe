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
            Err(error) => output::line(format_args!("{error}."))?,
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::SocketAddr;
    use std::sync::Arc;

    use clap::Parser;
    use replay_log::{LogIndex, Term};
    use tokio::sync::oneshot;

    use super::*;
    use crate::agent::certs::proof::{Signer, Verifier};
    use crate::agent::certs::{Identity, Name};
    use crate::agent::init::{Plan, init};
    use crate::agent::link::Endpoint;
    use crate::agent::witness::reporter::{Reports, relay};
    use crate::config::Config;
    use crate::protocol::{Epoch, Incarnation, Lineage, Member, Policy, Record};

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        let line = std::iter::once(&"witness").chain(line);
        Line::try_parse_from(line).map(|line| line.args)
    }

    #[test]
    fn it_is_told_a_folder_or_an_order() {
        let runs = parse(&["--config", "here"]).expect("parsed");
        assert!(runs.config.is_some() && runs.order.is_none());
        let order = ["recover", "--cluster", "there", "--without", "b"];
        let recovers = parse(&order).expect("parsed");
        assert!(matches!(
            recovers.order,
            Some(Order::Recover(args)) if args.without.len() == 1
        ));
        assert!(parse(&["--config", "here", "recover", "--cluster", "there"]).is_err());
        assert!(parse(&[]).is_err());
    }

    fn name(text: &str) -> Name {
        text.parse().expect("a name")
    }

    fn free_port() -> SocketAddr {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.local_addr().expect("bound")
    }

    #[tokio::test]
    async fn an_emptied_witness_is_given_what_hosts_have_seen_and_all_of_them_are_asked() {
        let folder = tempfile::tempdir().expect("a folder");
        let plan = Plan {
            hosts: [(name("a"), free_port()), (name("b"), free_port())].into(),
            metrics: BTreeMap::new(),
            witness: (name("w"), free_port()),
            advertise: BTreeMap::new(),
            gateways: vec![],
            operator: name("ann"),
        };
        let cluster = folder.path().join("cluster");
        let folders = init(&cluster, &plan).expect("a cluster");
        let load = |identity: Identity| Config::load(&folders[&identity]).expect("a configuration");
        let keeper = load(Identity::witness(&name("w")));
        let signer = Signer::new(&keeper.credentials().expect("certified")).expect("a signer");
        let member = |host: &str| Member {
            host: HostName::new(host).expect("a name"),
            incarnation: Incarnation(1),
        };
        let newest = Record {
            lineage: Lineage(1),
            term: Term(3),
            epoch: Epoch(7),
            primary: member("a"),
            members: vec![member("b")],
            hosts: vec![],
            policy: Policy::default(),
            through: LogIndex::START,
            begins: LogIndex::START,
            follows: replay_log::Term(0),
            loss: false,
            failed: None,
        };
        let shop = VmName::new("shop").expect("a name");
        let newest = signer.sign(&shop, newest).expect("signed");
        let (_stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let stopped = async move { drop(stopped.await) };
            witness::run(&keeper, stopped).await.expect("a witness");
        });
        let relays = |host: &str| {
            let config = load(Identity::host(&name(host)));
            let credentials = config.credentials().expect("certified");
            let at = config.listen.expect("an address");
            let endpoint = Endpoint::bind(&credentials, at).expect("an endpoint");
            let verifier = Verifier::new(&credentials.authority).expect("a verifier");
            let reports = Arc::new(Reports::new(verifier));
            reports.saw(&shop, &newest);
            tokio::spawn(async move { relay(&endpoint, reports).await });
        };
        relays("a");
        let args = |without: &[&str]| {
            let mut line = vec!["recover", "--cluster", cluster.to_str().expect("UTF-8")];
            line.extend(without.iter().flat_map(|host| ["--without", host]));
            match parse(&line).expect("parsed").order {
                Some(Order::Recover(args)) => args,
                None => panic!("no order"),
            }
        };
        let failure = recover(&args(&[])).await.expect_err("b has not answered");
        let text = failure.to_string();
        assert!(text.contains("b did not answer"), "{text}");
        assert!(text.contains("--without b"), "{text}");
        relays("b");
        recover(&args(&[])).await.expect("all have answered");
        let client = args(&[]).cluster.client().expect("a client");
        let record = client.record(&shop).await.expect("a record");
        assert_eq!(record, newest.record);
        let failure = recover(&args(&["x"])).await.expect_err("there is no x");
        assert!(failure.to_string().contains('x'));
    }
}
