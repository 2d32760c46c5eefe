//! The same failover over real QUIC, with a real witness that names the primary; and what a request
//! costs the gateway.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::{RecvStream, SendStream};
use replay_log::LogIndex;
use tokio::io::Join;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

use super::failover::{COPIES, Cluster, Order, count, vm};
use super::guest::{COUNT, stack_config};
use crate::agent::certs::authority::Authority;
use crate::agent::certs::proof::{Signer, Verifier};
use crate::agent::certs::{Credentials, Identity, Name, Role};
use crate::agent::link::{Endpoint, StreamKind};
use crate::agent::witness::file_keeper::FileKeeper;
use crate::agent::witness::keeper::{Change, RecordKeeper, Swap};
use crate::agent::witness::reporter::{Reports, relay};
use crate::agent::witness::serve;
use crate::config::{Config, Witness};
use crate::gateway::{Gateway, GatewayConfig, Publish, Reign, StackConfig};
use crate::protocol::{Epoch, HostName, Incarnation, Lineage, Member, Policy, Record, Span};

type HostStream = Join<RecvStream, SendStream>;

const ANYWHERE: ([u8; 4], u16) = ([127, 0, 0, 1], 0);

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn credentials(authority: &Authority, identity: &Identity) -> Credentials {
    authority.issue(identity).expect("a certificate")
}

fn host_name(index: usize) -> String {
    format!("host-{index}")
}

fn record(reign: &Reign<usize>, copies: usize) -> Record {
    let member = |index| Member {
        host: HostName::new(&host_name(index)).expect("a name"),
        incarnation: Incarnation(1),
    };
    Record {
        lineage: Lineage(1),
        through: LogIndex::START,
        begins: LogIndex::START,
        follows: replay_log::Term(0),
        loss: false,
        failed: None,
        term: reign.term,
        epoch: Epoch(reign.term.0),
        primary: member(reign.primary),
        members: (0..copies)
            .filter(|index| *index != reign.primary)
            .map(member)
            .collect(),
        hosts: vec![],
        policy: Policy::default(),
    }
}

/// A witness, hosts with copies of the guest, and the configuration of a gateway that finds them.
struct Hosts {
    config: Config,
    orders: mpsc::Sender<Order>,
    witness: WitnessProcess,
    _folder: tempfile::TempDir,
}

struct WitnessProcess {
    credentials: Credentials,
    keeper: Arc<FileKeeper>,
    address: SocketAddr,
    running: Option<(Endpoint, AbortHandle)>,
}

impl WitnessProcess {
    fn start(&mut self) {
        let endpoint = Endpoint::bind(&self.credentials, self.address).expect("an endpoint");
        self.address = endpoint.local_address().expect("bound");
        let (serving, keeper) = (endpoint.clone(), Arc::clone(&self.keeper));
        let verifier = Verifier::new(&self.credentials.authority).expect("a verifier");
        let task = tokio::spawn(async move { serve(&serving, keeper, verifier).await });
        self.running = Some((endpoint, task.abort_handle()));
    }

    async fn stop(&mut self) {
        if let Some((endpoint, task)) = self.running.take() {
            endpoint.close().await;
            task.abort();
        }
    }
}

fn start_hosts(copies: usize, at_once: bool) -> Hosts {
    let folder = tempfile::tempdir().expect("a folder");
    let authority = Authority::generate().expect("an authority");
    let mut config = Config::new(Role::Gateway, name("gateway"));
    config.folder = folder.path().join("gateway");
    authority
        .issue_into(&config.folder, &config.identity())
        .expect("certificates");

    let witness = credentials(&authority, &Identity::witness(&name("witness")));
    let signer = Signer::new(&witness).expect("a signer");
    let keeper = FileKeeper::open(&folder.path().join("records"), signer).expect("records");
    let mut witness = WitnessProcess {
        credentials: witness,
        keeper: Arc::new(keeper),
        address: ANYWHERE.into(),
        running: None,
    };
    witness.start();
    config.witness = Some(Witness {
        name: name("witness"),
        address: witness.address.into(),
    });

    let verifier = Verifier::new(&witness.credentials.authority).expect("a verifier");
    let reports = Arc::new(Reports::new(verifier));
    let (opened, streams) = mpsc::channel::<(usize, HostStream)>(4);
    for index in 0..copies {
        let name = name(&host_name(index));
        let identity = Identity::host(&name);
        let endpoint = Endpoint::bind(&credentials(&authority, &identity), ANYWHERE.into())
            .expect("an endpoint");
        let address = endpoint.local_address().expect("bound");
        config.hosts.insert(name, address.into());
        let mut incoming = endpoint.serve(StreamKind::Frames, 4);
        let (relaying, seen) = (endpoint.clone(), Arc::clone(&reports));
        tokio::spawn(async move { relay(&relaying, seen).await });
        let opened = opened.clone();
        tokio::spawn(async move {
            // The endpoint lives as long as its streams are taken.
            let _endpoint = endpoint;
            while let Some(stream) = incoming.recv().await {
                let stream = tokio::io::join(stream.recv, stream.send);
                if opened.send((index, stream)).await.is_err() {
                    return;
                }
            }
        });
    }

    let (reigns, mut news) = mpsc::channel::<Reign<usize>>(4);
    let keeper = Arc::clone(&witness.keeper);
    tokio::spawn(async move {
        while let Some(reign) = news.recv().await {
            let known = keeper.read(&vm()).await.expect("records");
            let change = Change {
                vm: vm(),
                expect: known.committed.map(|known| known.record.version()),
                new: record(&reign, copies),
                seen: None,
                by: Identity::host(&"a".parse().expect("a name")),
            };
            match keeper.swap(change).await.expect("records") {
                Swap::Done(committed) => reports.saw(&vm(), &committed),
                other => panic!("the record does not change: {other:?}"),
            }
        }
    });
    let (orders, received) = mpsc::channel(4);
    tokio::spawn(Cluster::new(copies, at_once, reigns).run(streams, received));
    Hosts {
        config,
        orders,
        witness,
        _folder: folder,
    }
}

async fn gateway(stack: StackConfig) -> Gateway {
    let publish = vec![Publish {
        host: ANYWHERE.into(),
        guest_port: COUNT,
    }];
    Gateway::bind(GatewayConfig::new(publish, stack))
        .await
        .expect("a port")
}

async fn all_counted(address: SocketAddr, clients: usize, questions: usize) -> u64 {
    let mut counting = JoinSet::new();
    for _ in 0..clients {
        counting.spawn(count(address, questions));
    }
    let all = tokio::time::timeout(Duration::from_mins(1), counting.join_all());
    let highest = all.await.expect("it does not hang").into_iter().max();
    highest.expect("a client")
}

async fn kill(hosts: &Hosts) {
    let (done, killed) = oneshot::channel();
    hosts.orders.send(Order::Kill(done)).await.expect("sent");
    killed.await.expect("killed");
}

#[tokio::test]
async fn primaries_die_and_the_witness_rests_while_clients_count() {
    let mut hosts = start_hosts(COPIES, false);
    let gateway = gateway(stack_config()).await;
    let (address, metrics) = (gateway.addresses()[0], gateway.metrics());
    let config = hosts.config.clone();
    tokio::spawn(async move { gateway.run_in_cluster(&config, vm()).await });

    let counting = tokio::spawn(all_counted(address, 10, 300));
    for kills in 1..=4 {
        let due = kills * 500;
        while metrics.read().frames_from_guest < due {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        kill(&hosts).await;
    }
    assert_eq!(counting.await.expect("clients"), 3_000);
    assert_eq!(metrics.read().term, 5);

    // The present primary is served while nobody keeps the record.
    hosts.witness.stop().await;
    assert_eq!(all_counted(address, 5, 100).await, 3_500);
    assert_eq!(metrics.read().term, 5);
    hosts.witness.start();
    kill(&hosts).await;
    assert_eq!(all_counted(address, 5, 100).await, 4_000);
    let counts = metrics.read();
    assert_eq!((counts.term, counts.welcomes), (6, 6));
    assert_eq!((counts.clients_reset, counts.fresh_starts), (0, 0));
}

#[tokio::test]
async fn a_gateway_that_is_cut_off_from_the_witness_finds_the_new_primary_by_the_hosts() {
    let mut hosts = start_hosts(COPIES, false);
    let gateway = gateway(stack_config()).await;
    let (address, metrics) = (gateway.addresses()[0], gateway.metrics());
    let config = hosts.config.clone();
    tokio::spawn(async move { gateway.run_in_cluster(&config, vm()).await });
    assert_eq!(all_counted(address, 5, 100).await, 500);
    hosts.witness.stop().await;
    kill(&hosts).await;
    assert_eq!(all_counted(address, 5, 100).await, 1_000);
    let counts = metrics.read();
    assert_eq!((counts.term, counts.welcomes), (2, 2));
    assert_eq!((counts.clients_reset, counts.fresh_starts), (0, 0));
    // One that has never heard of the witness finds it, too.
    let newcomer = self::gateway(stack_config()).await;
    let address = newcomer.addresses()[0];
    let config = hosts.config.clone();
    tokio::spawn(async move { newcomer.run_in_cluster(&config, vm()).await });
    assert_eq!(all_counted(address, 1, 100).await, 1_100);
}

/// The processor time of this thread.
fn thread_time() -> Duration {
    let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
    nix::time::clock_gettime(clock)
        .expect("a thread has a clock")
        .into()
}

/// A thread with a runtime of its own, so that its processor time can be told apart.
fn runtime_thread() -> (tokio::runtime::Handle, std::sync::mpsc::Sender<()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    let handle = runtime.handle().clone();
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        runtime.block_on(async {
            loop {
                match stopped.try_recv() {
                    Err(std::sync::mpsc::TryRecvError::Empty) => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    _ => return,
                }
            }
        });
    });
    (handle, stop)
}

/// Runs something on a runtime's thread and waits for it.
fn on<T: Send + 'static>(
    runtime: &tokio::runtime::Handle,
    work: impl Future<Output = T> + Send + 'static,
) -> T {
    let (done, result) = std::sync::mpsc::channel();
    runtime.spawn(async move {
        let _ = done.send(work.await);
    });
    result.recv().expect("the runtime lives")
}

fn measure(clients: usize, ack_delay: Option<u64>) {
    let (hosts_runtime, _hosts_stop) = runtime_thread();
    let (runtime, _stop) = runtime_thread();
    let (clients_runtime, _clients_stop) = runtime_thread();
    let hosts = on(&hosts_runtime, async { start_hosts(1, true) });
    let mut stack = stack_config();
    stack.ack_delay = ack_delay.map(Span::from_millis);
    let gateway = on(&runtime, gateway(stack));
    let (address, metrics) = (gateway.addresses()[0], gateway.metrics());
    let config = hosts.config.clone();
    runtime.spawn(async move { gateway.run_in_cluster(&config, vm()).await });

    let questions = 20_000 / clients;
    on(&clients_runtime, all_counted(address, clients, 20));
    let before = metrics.read();
    let processor_before = on(&runtime, async { thread_time() });
    let started = Instant::now();
    on(&clients_runtime, all_counted(address, clients, questions));
    let took = started.elapsed();
    let processor = on(&runtime, async { thread_time() }).saturating_sub(processor_before);
    let after = metrics.read();
    #[allow(clippy::cast_precision_loss, reason = "small numbers, printed")]
    let each = |total: u64| total as f64 / (questions * clients) as f64;
    println!(
        "{clients:>3} clients, acknowledgements {}: {:>5.1} us of processor time a request, {:.2} \
         frames to the guest, {:.2} back, {:.0} us a request",
        ack_delay.map_or("at once".into(), |ms| format!("within {ms} ms")),
        each(processor.as_nanos() as u64) / 1e3,
        each(after.frames_to_guest - before.frames_to_guest),
        each(after.frames_from_guest - before.frames_from_guest),
        each(took.as_nanos() as u64) / 1e3,
    );
}

#[test]
#[ignore = "prints what a request costs; run it in release, alone"]
fn what_a_request_costs() {
    for clients in [1, 20, 50] {
        measure(clients, Some(10));
        measure(clients, None);
    }
}
