//! What recording and protection cost, each as a ratio within one run, alternating.
//!
//! `cargo bench --bench record` prints: throughput with the recorder off, recording to a file, and
//! protected by one replica on the same machine; the commit rule's share of the latency of a
//! single client; the replica's lag; the size of the log under load and idle; the memory of an
//! agent with its VMM. Needs /dev/kvm and redis-benchmark. `ROUNDS` (default 3) sets how often.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "figures for people; none comes near 2^52"
)]

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use replay_log::{Arrival, Entry, GroupBody, StreamEncoder, inspect};
use tokio::runtime::Runtime;
use understudy::agent::certs::{Identity, Name};
use understudy::agent::operator::Client;
use understudy::config::Config;
use understudy::demo::cluster::Cluster;
use understudy::protocol::VmName;

const PROGRAM: &str = env!("CARGO_BIN_EXE_understudy");
const REQUESTS: &str = "30000";

fn main() {
    let benchmark = Command::new("redis-benchmark")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if !Path::new("/dev/kvm").exists() || benchmark.is_err() {
        println!("SKIPPED: this bench needs /dev/kvm and redis-benchmark");
        return;
    }
    let rounds: usize = std::env::var("ROUNDS")
        .ok()
        .and_then(|r| r.parse().ok())
        .unwrap_or(3);
    throughput(rounds);
    log_sizes();
}

/// A standalone guest.
struct Alone {
    child: Child,
    address: SocketAddr,
}

impl Alone {
    fn start(more: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        drop(listener);
        let child = Command::new(PROGRAM)
            .args(["run", "ledger", "--publish", &format!("{address}:6379")])
            .args(more)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("a guest");
        let alone = Self { child, address };
        await_answer(alone.address);
        alone
    }

    fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("a signal");
        self.child.wait().expect("an end");
    }
}

fn await_answer(address: SocketAddr) {
    let port = address.port().to_string();
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        let said = Command::new("redis-cli")
            .args(["-p", &port, "ping"])
            .output()
            .expect("runs");
        if said.stdout.starts_with(b"PONG") {
            return;
        }
    }
    panic!("the guest does not answer");
}

/// Requests per second (SET and INCR together) and the median latency in milliseconds.
fn redis_benchmark(address: SocketAddr, tests: &str, clients: &str, requests: &str) -> (f64, f64) {
    let port = address.port().to_string();
    let said = Command::new("redis-benchmark")
        .args([
            "-p", &port, "-t", tests, "-c", clients, "-n", requests, "--csv",
        ])
        .output()
        .expect("redis-benchmark");
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let rows: Vec<Vec<f64>> = text
        .lines()
        .skip(1)
        .map(|line| {
            let cells = line.split(',').skip(1);
            cells
                .filter_map(|cell| cell.trim_matches('"').parse().ok())
                .collect()
        })
        .collect();
    assert!(!rows.is_empty(), "redis-benchmark said {text}");
    let rps = rows.len() as f64 / rows.iter().map(|row| 1.0 / row[0]).sum::<f64>();
    let p50 = rows.iter().map(|row| row[3]).sum::<f64>() / rows.len() as f64;
    (rps, p50)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A cluster with the ledger and one replica.
fn protected() -> (Cluster, SocketAddr) {
    let names: Vec<Name> = ["a", "b"]
        .iter()
        .map(|n| n.parse().expect("a name"))
        .collect();
    let mut cluster = Cluster::start(Path::new(PROGRAM), &names).expect("a cluster");
    let folder = cluster.folder().join("operator");
    let paired = Command::new(PROGRAM)
        .args([
            "pair",
            "ledger",
            "--primary",
            "a",
            "--replica",
            "b",
            "--cluster",
        ])
        .arg(&folder)
        .output()
        .expect("understudy pair");
    assert!(paired.status.success(), "{paired:?}");
    let vm = VmName::new("ledger").expect("a name");
    let address = cluster.publish(&vm, 6379).expect("a gateway");
    await_answer(address);
    (cluster, address)
}

/// The processor time of a process and its children so far, in seconds.
fn processor_time(cluster: &Cluster, host: &str) -> f64 {
    let who = Identity::host(&host.parse().expect("a name"));
    let ticks = |pid: nix::unistd::Pid| -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit(')').next().unwrap_or_default();
        let cells: Vec<&str> = after.split_whitespace().collect();
        let cell = |at: usize| {
            cells
                .get(at)
                .and_then(|c| c.parse::<f64>().ok())
                .unwrap_or(0.0)
        };
        (cell(11) + cell(12)) / 100.0
    };
    cluster
        .children(&who)
        .expect("children")
        .into_iter()
        .map(ticks)
        .sum()
}

fn throughput(rounds: usize) {
    let (mut off, mut on, mut all) = (Vec::new(), Vec::new(), Vec::new());
    let (mut single, mut single_protected) = (Vec::new(), Vec::new());
    let (mut shares, mut lags) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let alone = Alone::start(&["--unrecorded"]);
        off.push(redis_benchmark(alone.address, "set,incr", "20", REQUESTS).0);
        alone.stop();
        let folder = tempfile::tempdir().expect("a folder");
        let record = folder.path().join("log").display().to_string();
        let alone = Alone::start(&["--record", &record]);
        on.push(redis_benchmark(alone.address, "set,incr", "20", REQUESTS).0);
        single.push(redis_benchmark(alone.address, "incr", "1", "3000").1);
        alone.stop();
        let (cluster, address) = protected();
        let (before, began) = (processor_time(&cluster, "b"), Instant::now());
        let watch = watch_lag(&cluster);
        all.push(redis_benchmark(address, "set,incr", "20", REQUESTS).0);
        lags.extend(watch());
        let spent = processor_time(&cluster, "b") - before;
        shares.push(spent / began.elapsed().as_secs_f64() / 2.0);
        single_protected.push(redis_benchmark(address, "incr", "1", "3000").1);
        if round == 0 {
            for host in ["a", "b"] {
                let who = Identity::host(&host.parse().expect("a name"));
                let bytes = cluster.resident(&who).expect("a process");
                println!(
                    "memory of agent {host} and its VMM: {:.1} MB",
                    bytes as f64 / 1e6
                );
            }
        }
    }
    let (off, on, all) = (median(&mut off), median(&mut on), median(&mut all));
    println!("set,incr -c 20, recorder off:     {off:.0} requests/s");
    println!(
        "recording to a file:              {on:.0} requests/s, ratio {:.3}",
        on / off
    );
    println!(
        "protected by one replica, rule all: {all:.0} requests/s, ratio {:.3}",
        all / off
    );
    let share = median(&mut shares);
    println!(
        "  the replica's VMM used {:.0} % of both cores meanwhile",
        share * 100.0
    );
    let (one, two) = (median(&mut single), median(&mut single_protected));
    println!("median INCR on one connection: {one:.3} ms alone, {two:.3} ms protected");
    println!(
        "  the commit rule and the cluster's path add {:.3} ms",
        two - one
    );
    lags.sort_by(f64::total_cmp);
    let at = |share: f64| {
        lags.get((lags.len() as f64 * share) as usize)
            .copied()
            .unwrap_or(0.0)
    };
    println!(
        "replica's lag under load: median {:.1} ms, p99 {:.1} ms",
        at(0.5),
        at(0.99)
    );
}

/// Looks at the replica's lag until the returned function is called, which gives it in
/// milliseconds.
fn watch_lag(cluster: &Cluster) -> impl FnOnce() -> Vec<f64> + use<> {
    let config = Config::load(&cluster.folder().join("operator")).expect("a configuration");
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let watcher = std::thread::spawn(move || {
        let runtime = Runtime::new().expect("a runtime");
        let _inside = runtime.enter();
        let client = Client::new(&config).expect("a client");
        let primary = client.hosts().next().expect("a host").clone();
        let mut lags = Vec::new();
        while stopped
            .recv_timeout(Duration::from_millis(20))
            .is_err_and(|error| error == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            let Ok(status) = runtime.block_on(client.status(&primary)) else {
                continue;
            };
            let followers = status.vms.iter().flat_map(|vm| &vm.node.followers);
            lags.extend(followers.map(|f| f.lag.as_nanos() as f64 / 1e6));
        }
        lags
    });
    move || {
        drop(stop);
        watcher.join().expect("the watcher ends")
    }
}

/// The bytes of a recording: on a stream, of the frames in it, and its landmark groups.
fn weigh(folder: &Path) -> (f64, f64, f64) {
    let (mut frames, mut groups) = (0, 0_u64);
    let mut stream = StreamEncoder::new();
    for located in inspect(folder).expect("a log") {
        let batch = located.expect("a batch").batch;
        for entry in batch.decode().expect("decodes") {
            if let Entry::Group(group) = entry {
                groups += 1;
                if let GroupBody::Arrival(Arrival::Frame { bytes, .. }) = group.body {
                    frames += bytes.len();
                }
            }
        }
        drop(stream.push(&batch));
    }
    (
        stream.bytes().compressed as f64,
        frames as f64,
        groups as f64,
    )
}

fn log_sizes() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("load");
    let alone = Alone::start(&["--record", &log.display().to_string()]);
    redis_benchmark(alone.address, "set,incr", "20", REQUESTS);
    alone.stop();
    let (stream, frames, groups) = weigh(&log);
    let bound = frames * 1.2 + groups * 4.0;
    println!(
        "log under load: {stream:.0} bytes on a stream for {frames:.0} bytes of frames and {groups:.0} groups: {:.2} of the bound",
        stream / bound
    );
    let log = folder.path().join("idle");
    let alone = Alone::start(&["--record", &log.display().to_string()]);
    let began = Instant::now();
    std::thread::sleep(Duration::from_mins(1));
    let seconds = began.elapsed().as_secs_f64();
    alone.stop();
    let (stream, ..) = weigh(&log);
    println!("log of an idle guest: {:.0} bytes/s", stream / seconds);
    let began = Instant::now();
    let replayed = Command::new(PROGRAM)
        .arg("replay")
        .arg(&log)
        .output()
        .expect("replays");
    assert!(replayed.status.success(), "{replayed:?}");
    println!(
        "offline replay of that idle minute: {:.2} s",
        began.elapsed().as_secs_f64()
    );
}
