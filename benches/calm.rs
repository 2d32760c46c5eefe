//! Nobody is promoted who is not needed: a cluster under a light, checked load while other processes
//! keep every core busy.
//!
//! `cargo bench --bench calm` prints the terms, suspicions and claims of `MINUTES` (default 10), the
//! longest silence a replica saw and the longest a client waited. `NICE` (default 0) is how nice the
//! other processes are.

mod common;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Figures, VM, can_run, protected, setting};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::runtime::Runtime;
use understudy::agent::journal::What;
use understudy::agent::operator::Client;
use understudy::config::Config;
use understudy::demo::load::{Load, LoadConfig};
use understudy::protocol::{HostName, Span, VmName};

const LOOK_EVERY: Duration = Duration::from_millis(100);

fn main() {
    if !can_run(&["redis-cli"]) {
        return;
    }
    let minutes: f64 = setting("MINUTES", 10.0);
    let length = Duration::from_secs_f64(minutes * 60.0);
    // The cluster's processes end with the thread that started them: this one.
    let (cluster, address) = protected(&["a", "b", "c"]);
    let runtime = Runtime::new().expect("a runtime");
    let _inside = runtime.enter();
    let config = Config::load(&cluster.folder().join("operator")).expect("a configuration");
    let client = Client::new(&config).expect("a client");
    let mut load = LoadConfig::new(address);
    load.connections = 4;
    load.pause = Some(Duration::from_millis(5));
    let load = runtime.block_on(Load::start(load)).expect("a load");

    let before = runtime.block_on(lines(&client));
    let term = runtime.block_on(term(&client));
    let hogs = Hogs::start(length);
    let (busy_before, began) = (processor(), Instant::now());
    let silence = runtime.block_on(watch(&client, length));
    let (busy, until) = (processor(), Instant::now());
    drop(hogs);
    let gap = load.longest_gap_between(began, until);
    let report = runtime.block_on(load.finish());
    let after = runtime.block_on(lines(&client));
    let count = |code: &str| of_code(&after, code) - of_code(&before, code);

    let share = (busy.0 - busy_before.0) / (busy.1 - busy_before.1);
    println!(
        "{minutes} minutes, the cores {:.1} % busy; {} writes, {} suspicions, {} claims; the \
         longest silence that a replica saw: {silence:?}",
        share * 100.0,
        report.acknowledged,
        count("suspected"),
        count("claimed"),
    );
    let longest = gap.map_or(Duration::ZERO, |gap| gap.length());
    println!("the longest time without any answer: {longest:?}");
    let mut figures = Figures::default();
    let terms = runtime.block_on(self::term(&client)) - term;
    let terms = u32::try_from(terms).expect("a few");
    figures.at_most("unwanted promotions", terms.into(), 0.0, "");
    figures.at_least("busy cores", share * 100.0, 97.0, " %");
    assert!(report.acknowledged > 0, "the load did something");
    assert!(report.is_flawless(), "{report:?}");
    figures.end();
}

/// Processes that keep every core busy. They end with this, and in any case a minute after their
/// time.
struct Hogs(Vec<Child>);

impl Hogs {
    fn start(length: Duration) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let seconds = (length.as_secs() + 60).to_string();
        let nice = setting("NICE", 0_u8).to_string();
        let hog = |_| {
            Command::new("timeout")
                .args([
                    &seconds,
                    "nice",
                    "-n",
                    &nice,
                    "sh",
                    "-c",
                    "while :; do :; done",
                ])
                .stdin(Stdio::null())
                .process_group(0)
                .spawn()
                .expect("a process that does nothing, busily")
        };
        Self((0..cores).map(hog).collect())
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            let group = i32::try_from(hog.id()).map(Pid::from_raw);
            // Fails only for those that have ended.
            let _ = group.map(|group| killpg(group, Signal::SIGKILL));
            let _ = hog.wait();
        }
    }
}

/// The longest silence of the primary that any replica tells of.
async fn watch(client: &Client, length: Duration) -> Duration {
    let (began, mut longest) = (Instant::now(), 0);
    while began.elapsed() < length {
        for status in client.status_of_all().await.into_values().flatten() {
            let silences = status.vms.iter().filter_map(|vm| vm.node.primary_silence);
            longest = silences.map(Span::as_nanos).fold(longest, u64::max);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Duration::from_nanos(longest)
}

async fn term(client: &Client) -> u64 {
    let vm = VmName::new(VM).expect("a name");
    client.record(&vm).await.expect("a record").term.0
}

/// How many lines of each code the journals have.
async fn lines(client: &Client) -> BTreeMap<String, u64> {
    let mut codes = BTreeMap::new();
    let hosts: Vec<HostName> = client.hosts().cloned().collect();
    for host in hosts {
        let mut after = 0;
        loop {
            let lines = client.events(&host, after).await.expect("a journal");
            let Some(last) = lines.last() else { break };
            after = last.number;
            for line in lines {
                if let What::Decision(event) = line.what {
                    *codes.entry(event.code().to_owned()).or_default() += 1;
                }
            }
        }
    }
    codes
}

fn of_code(codes: &BTreeMap<String, u64>, code: &str) -> u64 {
    codes.get(code).copied().unwrap_or_default()
}

/// Busy and all time of all cores so far, in ticks.
fn processor() -> (f64, f64) {
    let stat = std::fs::read_to_string("/proc/stat").expect("/proc/stat");
    let ticks: Vec<f64> = stat
        .lines()
        .next()
        .into_iter()
        .flat_map(str::split_whitespace)
        .filter_map(|cell| cell.parse().ok())
        .collect();
    let all: f64 = ticks.iter().take(8).sum();
    // Idle, and waiting for a disk.
    (all - ticks[3] - ticks[4], all)
}
