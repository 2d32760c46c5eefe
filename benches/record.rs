//! What recording and protection cost, each as a ratio within one run, in alternating order: of
//! rates that were measured one right after the other, and the median of these, because a shared
//! machine is now faster, now slower.
//!
//! `cargo bench --bench record` prints, with their bounds: throughput recording to a file and
//! protected by one replica on the same machine, against the recorder off; how much of the loss is
//! the replica's own execution; what the commit rule adds to the latency of a single client; the
//! replica's lag; the log under load and idle; the replay of an idle minute; memory. `ROUNDS`
//! (default 9) sets how often.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures for people; none comes near 2^52"
)]

mod common;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{
    Figures, VM, await_answer, can_run, median, pair, program, protected, quantile, setting,
};
use replay_log::{Arrival, Entry, GroupBody, LogIndex, inspect};
use tokio::runtime::Runtime;
use understudy::agent::certs::Identity;
use understudy::agent::operator::{Client, HostStatus};
use understudy::config::Config;
use understudy::demo::cluster::Cluster;
use understudy::protocol::HostName;

const REQUESTS: &str = "30000";
/// How often a round changes between the guests that stand alone, and with how many requests.
const BURSTS: usize = 8;
const BURST: &str = "10000";
/// The guest's own memory, and what agent and VMM may take beside it.
const MEMORY_BOUND: f64 = 64.0 + 48.0;
/// How often the replica's lag is looked at; more often would cost what it measures.
const LOOK_EVERY: Duration = Duration::from_millis(100);
const MEGABYTE: f64 = 1_048_576.0;

fn main() {
    if !can_run(&["redis-cli", "redis-benchmark"]) {
        return;
    }
    let mut figures = Figures::default();
    throughput(setting("ROUNDS", 9), &mut figures);
    output_delay(setting("ROUNDS", 3), &mut figures);
    log_sizes(&mut figures);
    figures.end();
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
        let child = Command::new(program())
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
        let ended = self.child.wait().expect("an end");
        assert!(ended.success(), "the guest did not end well: {ended}");
    }
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

fn identity(host: &str) -> Identity {
    Identity::host(&host.parse().expect("a name"))
}

/// The processor time of processes so far, in seconds.
fn processor_time(pids: impl IntoIterator<Item = nix::unistd::Pid>) -> f64 {
    let ticks = |pid: nix::unistd::Pid| -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a live process");
        let after = stat.rsplit(')').next().unwrap_or_default();
        let cells: Vec<&str> = after.split_whitespace().collect();
        let cell = |at: usize| cells[at].parse::<f64>().expect("ticks");
        (cell(11) + cell(12)) / 100.0
    };
    pids.into_iter().map(ticks).sum()
}

/// The processor time of a host's VMM, and of its agent.
fn host_time(cluster: &Cluster, host: &str) -> (f64, f64) {
    let who = identity(host);
    let vmms = cluster.children(&who).expect("children");
    let agent = cluster.pid(&who).expect("an agent");
    (processor_time(vmms), processor_time([agent]))
}

/// What protected rounds found.
#[derive(Default)]
struct Protected {
    rates: Vec<f64>,
    lags: Vec<f64>,
    memory: Vec<f64>,
    /// Seconds of processor time a request, of: replica's VMM, replica's agent, primary's agent.
    spent: [Vec<f64>; 3],
}

impl Protected {
    fn round(&mut self) {
        let (cluster, address) = protected(&["a", "b"]);
        let (primary, replica) = (host_time(&cluster, "a"), host_time(&cluster, "b"));
        let watch = watch_lag(&cluster);
        self.rates
            .push(redis_benchmark(address, "set,incr", "20", REQUESTS).0);
        self.lags.extend(watch());
        let (primary_after, replica_after) = (host_time(&cluster, "a"), host_time(&cluster, "b"));
        let requests = 2.0 * REQUESTS.parse::<f64>().expect("a number");
        let spent = [
            replica_after.0 - replica.0,
            replica_after.1 - replica.1,
            primary_after.1 - primary.1,
        ];
        for (all, spent) in self.spent.iter_mut().zip(spent) {
            all.push(spent / requests);
        }
        for host in ["a", "b"] {
            let bytes = cluster.resident(&identity(host)).expect("processes");
            self.memory.push(bytes as f64 / MEGABYTE);
        }
    }
}

/// A round's rates of two guests that stand alone, with the recorder off and on, in turns.
fn alone_round(round: usize) -> Vec<(f64, f64)> {
    let folder = tempfile::tempdir().expect("a folder");
    let record = folder.path().join("log").display().to_string();
    let guests = [
        Alone::start(&["--unrecorded"]),
        Alone::start(&["--record", &record]),
    ];
    let rate = |guest: &Alone| redis_benchmark(guest.address, "set,incr", "20", BURST).0;
    let _warm_up = guests.each_ref().map(rate);
    let pair = |burst: usize| {
        // Neither of them always goes first.
        if (round + burst).is_multiple_of(2) {
            let off = rate(&guests[0]);
            (off, rate(&guests[1]))
        } else {
            let on = rate(&guests[1]);
            (rate(&guests[0]), on)
        }
    };
    let rates = (0..BURSTS).map(pair).collect();
    guests.into_iter().for_each(Alone::stop);
    rates
}

fn throughput(rounds: usize, figures: &mut Figures) {
    let (mut alone, mut all) = (Vec::new(), Protected::default());
    let (mut recorded, mut shielded) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        if round % 2 == 1 {
            all.round();
        }
        let rates = alone_round(round);
        if round % 2 == 0 {
            all.round();
        }
        recorded.extend(rates.iter().map(|(off, on)| on / off));
        let off = median(&mut rates.iter().map(|(off, _)| *off).collect::<Vec<_>>());
        shielded.extend(all.rates.last().map(|rate| rate / off));
        alone.extend(rates);
    }
    let (mut off, mut on): (Vec<f64>, Vec<f64>) = alone.into_iter().unzip();
    let (recorded, shielded) = (median(&mut recorded), median(&mut shielded));
    let (off, on, rate) = (median(&mut off), median(&mut on), median(&mut all.rates));
    println!(
        "set,incr -c 20: {off:.0} requests/s with the recorder off, {on:.0} recording to a file, \
         {rate:.0} protected"
    );
    figures.at_least("recording to a file, ratio", recorded, 0.95, "");
    figures.at_least(
        "protected by one replica, rule all, ratio",
        shielded,
        0.6,
        "",
    );
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) as f64;
    // Seconds of all cores that a request costs more than without recorder and cluster.
    let lost = cores * (1.0 / rate - 1.0 / off);
    for (what, spent) in [
        "the replica's own execution",
        "the replica's agent",
        "the primary's agent",
    ]
    .into_iter()
    .zip(&mut all.spent)
    {
        let spent = median(spent);
        println!(
            "  {what}: {:.0} µs of processor a request, {:.0} % of what protection costs",
            spent * 1e6,
            spent / lost * 100.0
        );
    }
    println!(
        "replica's lag under load: median {:.1} ms",
        quantile(&mut all.lags, 0.5)
    );
    let lag = quantile(&mut all.lags, 0.99);
    figures.at_most("replica's lag under load, p99", lag, 50.0, " ms");
    let memory = quantile(&mut all.memory, 1.0);
    figures.at_most(
        "memory of an agent and its VMM after the load, most",
        memory,
        MEMORY_BOUND,
        " MiB",
    );
}

/// The same cluster and the same path, with a replica and without.
fn output_delay(rounds: usize, figures: &mut Figures) {
    let (cluster, address) = protected(&["a", "b"]);
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        pair(&cluster, &["a"]);
        one.push(redis_benchmark(address, "incr", "1", "3000").1);
        pair(&cluster, &["a", "b"]);
        two.push(redis_benchmark(address, "incr", "1", "3000").1);
    }
    let (one, two) = (median(&mut one), median(&mut two));
    println!("median INCR on one connection: {one:.3} ms by one copy, {two:.3} ms by two");
    figures.at_most("what the commit rule adds", two - one, 0.5, " ms");
}

/// The status of a cluster's primary, asked from a thread of its own.
fn status(cluster: &Cluster) -> HostStatus {
    let config = Config::load(&cluster.folder().join("operator")).expect("a configuration");
    let runtime = Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let client = Client::new(&config).expect("a client");
    let primary = HostName::new("a").expect("a name");
    runtime.block_on(client.status(&primary)).expect("a status")
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
        let primary = HostName::new("a").expect("a name");
        let mut lags = Vec::new();
        while stopped
            .recv_timeout(LOOK_EVERY)
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

/// What a cluster's primary has sent and where its log ends.
#[derive(Clone, Copy)]
struct Sent {
    bytes: u64,
    end: LogIndex,
}

impl Sent {
    fn now(cluster: &Cluster) -> Self {
        let status = status(cluster);
        Self {
            bytes: status.link.log_bytes_sent,
            end: status.vms[0].node.tip.index,
        }
    }
}

/// The bytes of the frames and the number of the groups in a part of a log.
fn weigh(folder: &Path, from: LogIndex, through: LogIndex) -> (f64, f64) {
    let (mut frames, mut groups) = (0, 0_u64);
    for located in inspect(folder).expect("a log") {
        let batch = located.expect("a batch").batch;
        if batch.first() < from || batch.end() > through {
            continue;
        }
        for entry in batch.decode().expect("decodes") {
            if let Entry::Group(group) = entry {
                groups += 1;
                if let GroupBody::Arrival(Arrival::Frame { bytes, .. }) = group.body {
                    frames += bytes.len();
                }
            }
        }
    }
    (frames as f64, groups as f64)
}

/// The log as it is sent to a replica, under load and idle; and how long an idle minute replays.
fn log_sizes(figures: &mut Figures) {
    let (mut cluster, address) = protected(&["a", "b"]);
    let before = Sent::now(&cluster);
    redis_benchmark(address, "set,incr", "20", REQUESTS);
    let loaded = Sent::now(&cluster);
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("idle");
    let alone = Alone::start(&["--record", &log.display().to_string()]);
    let (quiet, began) = (Sent::now(&cluster), Instant::now());
    std::thread::sleep(Duration::from_mins(1));
    let (rested, seconds) = (Sent::now(&cluster), began.elapsed().as_secs_f64());
    alone.stop();

    let primary = identity("a");
    cluster.kill(&primary).expect("a kill");
    let kept = cluster.data(&primary).expect("a folder");
    let kept = kept.join("vms").join(VM).join("log");
    let (frames, groups) = weigh(&kept, before.end, loaded.end);
    let sent = (loaded.bytes - before.bytes) as f64;
    println!(
        "log under load: {sent:.0} bytes sent for {frames:.0} bytes of frames and {groups:.0} groups"
    );
    let bound = frames * 1.2 + groups * 4.0;
    figures.at_most("  of what it may be", sent / bound, 1.0, "");
    let idle = (rested.bytes - quiet.bytes) as f64 / seconds / 1e3;
    figures.at_most("log of an idle guest", idle, 2.0, " kB/s");

    let began = Instant::now();
    let replayed = Command::new(program()).arg("replay").arg(&log).output();
    let replayed = replayed.expect("replays");
    assert!(replayed.status.success(), "{replayed:?}");
    let took = began.elapsed().as_secs_f64();
    figures.at_most("offline replay of an idle minute", took, 2.0, " s");
}
