//! Agents, a witness and a gateway together in one process, over real QUIC, with real VMM
//! processes: a VM is created, copied, handed over and lost, and its clients go on.

#[path = "common/skip.rs"]
mod skip;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use understudy::agent::certs::{Name, Role};
use understudy::agent::init::{Folders, Plan, init};
use understudy::agent::introduction::Introduction;
use understudy::agent::operator::{Client, HostStatus, Request};
use understudy::agent::{host, witness};
use understudy::config::Config;
use understudy::gateway::{Gateway, GatewayConfig, Publish, StackConfig};
use understudy::protocol::{HostName, Policy, RoleName, VmName};

/// Only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(30);

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn host_name(text: &str) -> HostName {
    HostName::new(text).expect("a name")
}

fn vm() -> VmName {
    VmName::new("books").expect("a name")
}

fn free_udp() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("bound")
}

fn free_tcp() -> SocketAddr {
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    socket.local_addr().expect("bound")
}

/// A part of the cluster that runs on a task until it is told to stop.
struct Running {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Running {
    async fn stop(mut self) {
        self.stop = None;
        timeout(PATIENCE, self.task)
            .await
            .expect("it ends")
            .expect("it ends well");
    }
}

struct Cluster {
    folders: BTreeMap<String, PathBuf>,
    hosts: BTreeMap<String, Running>,
    metrics: SocketAddr,
    _witness: Running,
    _folder: tempfile::TempDir,
}

fn stoppable() -> (oneshot::Sender<()>, impl Future<Output = ()>) {
    let (stop, stopped) = oneshot::channel::<()>();
    (stop, async move {
        // To be dropped is to be told, too.
        let _ = stopped.await;
    })
}

impl Cluster {
    fn start(hosts: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let metrics = free_tcp();
        let plan = Plan {
            hosts: hosts.iter().map(|host| (name(host), free_udp())).collect(),
            metrics: [(name(hosts[0]), metrics)].into(),
            witness: (name("w"), free_udp()),
            advertise: BTreeMap::new(),
            gateways: vec![name("g")],
            operator: name("ann"),
        };
        let folders: Folders = init(&folder.path().join("cluster"), &plan).expect("a cluster");
        let folders: BTreeMap<String, PathBuf> = folders
            .into_iter()
            .map(|(identity, folder)| (identity.name.to_string(), folder))
            .collect();
        let (stop, stopped) = stoppable();
        let config = Config::load(&folders["w"]).expect("a configuration");
        let task = tokio::spawn(async move {
            witness::run(&config, stopped).await.expect("a witness");
        });
        let mut cluster = Self {
            folders,
            hosts: BTreeMap::new(),
            metrics,
            _witness: Running {
                stop: Some(stop),
                task,
            },
            _folder: folder,
        };
        for host in hosts {
            cluster.start_host(host);
        }
        cluster
    }

    fn config(&self, who: &str) -> Config {
        Config::load(&self.folders[who]).expect("a configuration")
    }

    fn start_host(&mut self, name: &str) {
        self.start_host_as(name, Introduction::of_this_host());
    }

    fn start_host_as(&mut self, name: &str, introduction: Introduction) {
        let config = self.config(name);
        assert_eq!(config.role, Role::Host);
        let (stop, stopped) = stoppable();
        let binary = Path::new(env!("CARGO_BIN_EXE_understudy")).to_owned();
        let task = tokio::spawn(async move {
            host::run_as(config, Some(binary), introduction, stopped)
                .await
                .expect("an agent");
        });
        let running = Running {
            stop: Some(stop),
            task,
        };
        self.hosts.insert(name.to_owned(), running);
    }

    /// Stops all hosts at once: nobody is left to take over from anybody.
    async fn stop_hosts(&mut self) {
        let mut hosts = std::mem::take(&mut self.hosts);
        for host in hosts.values_mut() {
            host.stop = None;
        }
        for host in hosts.into_values() {
            host.stop().await;
        }
    }

    async fn stop_host(&mut self, name: &str) {
        self.hosts.remove(name).expect("it runs").stop().await;
    }

    fn client(&self) -> Client {
        Client::new(&self.config("ann")).expect("an operator")
    }

    async fn publish(&self) -> SocketAddr {
        let image = understudy::images::find("ledger").expect("the ledger");
        let network = image.network.expect("a network");
        let publish = Publish {
            host: SocketAddr::from(([127, 0, 0, 1], 0)),
            guest_port: 6379,
        };
        let stack = StackConfig::new(network.address, network.prefix);
        let gateway = Gateway::bind(GatewayConfig::new(vec![publish], stack))
            .await
            .expect("a gateway");
        let address = gateway.addresses()[0];
        let config = self.config("g");
        tokio::spawn(async move {
            let error = gateway.run_in_cluster(&config, vm()).await;
            panic!("the gateway ended: {error}");
        });
        address
    }
}

/// Waits until a host's status is as wanted.
async fn until(client: &Client, host: &str, wanted: impl Fn(&HostStatus) -> bool) -> HostStatus {
    let mut last = None;
    let waiting = async {
        loop {
            match client.status(&host_name(host)).await {
                Ok(status) if wanted(&status) => return status,
                other => last = Some(other),
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    if let Ok(status) = timeout(PATIENCE, waiting).await {
        return status;
    }
    for host in client.hosts() {
        match client.events(host, 0).await {
            Ok(lines) => lines.iter().for_each(|line| {
                eprintln!("{} {:>10} {}", line.host, line.clock / 1_000, line.text);
            }),
            Err(error) => eprintln!("{host}: {error}"),
        }
    }
    panic!("{host} does not become as wanted; it is {last:?}");
}

fn primary_with(members: usize) -> impl Fn(&HostStatus) -> bool {
    move |status| {
        status.vms.iter().any(|vm| {
            let record = vm.node.record.as_ref();
            vm.node.role == RoleName::Primary
                && vm.guest.as_ref().is_some_and(|guest| guest.recording)
                && record.is_some_and(|record| record.members.len() == members)
        })
    }
}

async fn incr(stream: &mut TcpStream) -> i64 {
    let talk = async {
        stream
            .write_all(b"*2\r\n$4\r\nINCR\r\n$1\r\nk\r\n")
            .await
            .expect("sent");
        let mut reply = Vec::new();
        while !reply.ends_with(b"\r\n") {
            let read = stream.read_buf(&mut reply).await.expect("answered");
            assert_ne!(read, 0, "the connection was closed");
        }
        let text = String::from_utf8(reply).expect("text");
        text.trim_start_matches(':').trim().parse().expect(&text)
    };
    timeout(PATIENCE, talk).await.expect("an answer")
}

#[test]
fn a_vm_is_created_copied_handed_over_and_lost_and_its_client_goes_on() {
    if let Some(why) = understudy::doctor::missing_kvm() {
        return skip::skipped(
            "a_vm_is_created_copied_handed_over_and_lost_and_its_client_goes_on",
            &why,
        );
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(life());
}

async fn life() {
    let mut cluster = Cluster::start(&["a", "b", "c"]);
    let client = cluster.client();
    until(&client, "a", |status| status.peers.values().all(|up| *up)).await;
    let run = Request::Run {
        vm: vm(),
        image: "ledger".to_owned(),
        hosts: vec![host_name("b"), host_name("c")],
        policy: Policy::default(),
    };
    client.order(&host_name("a"), &run).await.expect("taken");
    until(&client, "a", primary_with(2)).await;
    let address = cluster.publish().await;
    let mut stream = connect(address).await;
    let mut times = Vec::new();
    for expected in 1..=200 {
        let began = std::time::Instant::now();
        assert_eq!(incr(&mut stream).await, expected);
        times.push(began.elapsed());
    }
    times.sort();
    println!(
        "INCR, protected by two: median {:?}, p99 {:?}",
        times[100], times[198]
    );

    // Handed over: nothing is lost and nobody is removed.
    let over = Request::Switchover {
        vm: vm(),
        to: Some(host_name("b")),
    };
    client.order(&host_name("a"), &over).await.expect("taken");
    assert_eq!(incr(&mut stream).await, 201);
    until(&client, "b", primary_with(2)).await;

    // Lost: a replica goes on.
    cluster.stop_host("b").await;
    assert_eq!(incr(&mut stream).await, 202);
    let survivors = ["a", "c"];
    let mut reigns = None;
    for host in survivors {
        let status = client.status(&host_name(host)).await.expect("a status");
        if status
            .vms
            .iter()
            .any(|vm| vm.node.role == RoleName::Primary)
        {
            reigns = Some(host);
        }
    }
    let reigns = reigns.expect("a survivor reigns");
    // It comes back, and becomes a copy again.
    cluster.start_host("b");
    until(&client, reigns, primary_with(2)).await;
    assert_eq!(incr(&mut stream).await, 203);

    let mut http = TcpStream::connect(cluster.metrics)
        .await
        .expect("connected");
    http.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")
        .await
        .expect("sent");
    let mut text = String::new();
    http.read_to_string(&mut text).await.expect("answered");
    for metric in [
        "understudy_term{vm=\"books\"}",
        "understudy_log_bytes_sent_total",
        "understudy_peer_connected{peer=\"b\"} 1",
    ] {
        assert!(text.contains(metric), "{metric} is not in {text}");
    }
    cluster.stop_hosts().await;

    // All of them were lost; whoever holds a disk boots from it, and what the guest flushed is kept.
    for host in ["a", "b", "c"] {
        cluster.start_host(host);
    }
    until(&client, reigns, primary_with(2)).await;
    let mut stream = connect(address).await;
    assert_eq!(incr(&mut stream).await, 204);
}

/// A host whose CPU differs is no copy: the order is refused with the reason, which stands in the
/// journals of both, and nothing else is disturbed.
#[test]
fn a_host_with_another_cpu_is_refused() {
    if let Some(why) = understudy::doctor::missing_kvm() {
        return skip::skipped("a_host_with_another_cpu_is_refused", &why);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let mut cluster = Cluster::start(&["a", "b", "c"]);
        cluster.stop_host("c").await;
        let mut other = Introduction::of_this_host();
        let fingerprint = other.fingerprint.as_mut().expect("a KVM");
        fingerprint.vendor = "CentaurHauls".to_owned();
        cluster.start_host_as("c", other);
        let client = cluster.client();
        until(&client, "a", |status| status.peers[&host_name("b")]).await;
        let run = |host: &str| Request::Run {
            vm: vm(),
            image: "ledger".to_owned(),
            hosts: vec![host_name(host)],
            policy: Policy::default(),
        };
        for host in ["a", "c"] {
            let wanted = async {
                while !journal_has(&client, host, "host_incompatible").await {
                    sleep(Duration::from_millis(10)).await;
                }
            };
            timeout(PATIENCE, wanted).await.expect("a journal line");
        }
        let refused = client.order(&host_name("a"), &run("c")).await;
        let why = refused.expect_err("refused").to_string();
        assert!(why.contains("c cannot hold a copy"), "{why}");
        assert!(why.contains("CentaurHauls"), "{why}");
        let status = client.status(&host_name("a")).await.expect("a status");
        assert!(!status.peers[&host_name("c")], "{status:?}");
        client
            .order(&host_name("a"), &run("b"))
            .await
            .expect("taken");
        until(&client, "a", primary_with(1)).await;
    });
}

async fn journal_has(client: &Client, host: &str, code: &str) -> bool {
    let lines = client.events(&host_name(host), 0).await;
    let marked = format!("\"code\":\"{code}\"");
    lines.unwrap_or_default().iter().any(|line| {
        let line = serde_json::to_string(line).expect("a line is JSON");
        line.contains(&marked)
    })
}

/// Connects a client.
async fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.expect("connected");
    stream.set_nodelay(true).expect("set");
    stream
}
