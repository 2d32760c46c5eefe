//! Linux guests in the lab: what they do under load, and what no two runs have in common, comes out
//! the same in the replay. A few of each; with `UNDERSTUDY_SOAK=1` 100 boots and 50 minutes of Redis.
//! Runs are side by side, on one host of the lab for each processor.

#[path = "common/lab.rs"]
mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/skip.rs"]
mod skip;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use common::{lab, run};
use linux::{Kind, image, soak, told};
use skip::skipped;
use tempfile::TempDir;
use understudy::lab::{Host, HostId, Lab};

/// A host's memory, in MiB: the guest's, twice while it is loaded, and the host's own files.
const MEMORY: u32 = 2500;
/// How many hosts there are at most.
const HOSTS_MOST: u8 = 3;
/// How long an emulated host may take for one step of a guest. Busy machines take their time.
const PATIENCE: Duration = Duration::from_mins(5);
const IMAGE: &str = "/data/image";
const LOG: &str = "/data/log";

/// The lab, and the image in each of its hosts.
struct Stage {
    /// How often it is all done.
    times: u8,
    lab: Lab,
    hosts: Vec<HostId>,
    folder: TempDir,
    manifest: String,
}

impl Stage {
    /// For so many runs, or for the number of the soak.
    fn new(test: &str, kind: Kind, few: u8, soaked: u8) -> Option<Self> {
        let image = image(test, kind)?;
        let times = if soak() { soaked } else { few };
        let cores =
            available_parallelism().map_or(1, |cores| cores.get().try_into().unwrap_or(u8::MAX));
        let hosts = cores.min(HOSTS_MOST).min(times);
        let (lab, folder) = lab(test, hosts, MEMORY)?;
        let manifest = fs::read_to_string(image.path().join("manifest.toml")).expect("a manifest");
        let stage = Self {
            times,
            lab,
            hosts: HostId::first(hosts).collect(),
            folder,
            manifest,
        };
        for site in stage.sites() {
            for file in ["vmlinux", "initrd.img"] {
                site.put(&image.path().join(file), file);
            }
        }
        Some(stage)
    }

    fn sites(&self) -> impl Iterator<Item = Site<'_>> {
        self.hosts.iter().map(|&id| Site { stage: self, id })
    }

    /// Does all runs of this, on the hosts side by side; it is told which one it is.
    fn repeat(&self, done: impl Fn(&Site<'_>, u32) + Sync) {
        let times = u32::from(self.times);
        let (next, done) = (&AtomicU32::new(0), &done);
        std::thread::scope(|scope| {
            for site in self.sites() {
                scope.spawn(move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= times {
                            return;
                        }
                        done(&site, number);
                        println!("{} of {times} is done", number + 1);
                    }
                });
            }
        });
    }
}

/// One of the hosts.
struct Site<'a> {
    stage: &'a Stage,
    id: HostId,
}

impl Site<'_> {
    fn host(&self) -> Host<'_> {
        self.stage.lab.host(self.id).expect("a host")
    }

    fn put(&self, file: &Path, name: &str) {
        let path = Path::new(IMAGE).join(name);
        self.host().put(file, &path).expect("put");
    }

    /// Starts a recording of a guest that runs this command; none: what the manifest says.
    fn record(&self, command: Option<&str>, more: &[&str]) -> Guest<'_> {
        let manifest = self.stage.folder.path().join(format!("{}.toml", self.id));
        let text = command.map_or(self.stage.manifest.clone(), |command| {
            told(&self.stage.manifest, command)
        });
        fs::write(&manifest, text).expect("written");
        self.put(&manifest, "manifest.toml");
        let host = self.host();
        run(&host, &["rm", "-rf", LOG]);
        let mut words = vec!["understudy", "run", IMAGE, "--record", LOG];
        words.extend(more);
        let detached = host.detach(&words).expect("it starts");
        Guest {
            host,
            pid: detached.pid.to_string(),
            output: detached.output,
        }
    }

    /// Replays what was recorded last, every digest checked; what the guest says on its console.
    fn replay(&self) -> String {
        let began = Instant::now();
        let words = ["understudy", "replay", LOG, "--image", IMAGE, "--console"];
        let said = run(&self.host(), &words);
        let told = said
            .lines()
            .find(|line| line.contains("digests, all equal"));
        println!("{}, {:?} in all", told.expect(&said), began.elapsed());
        said
    }
}

/// A guest that is being recorded.
struct Guest<'a> {
    host: Host<'a>,
    pid: String,
    output: PathBuf,
}

impl Guest<'_> {
    /// All it has said on its console, and its VMM on standard error.
    fn said(&self) -> String {
        let output = self.output.to_str().expect("UTF-8");
        run(&self.host, &["cat", output])
    }

    /// Waits until it has said this.
    fn says(&self, what: &str) {
        let output = self.output.to_str().expect("UTF-8");
        let script = format!(
            "until grep -q '{what}' {output}; do kill -0 {} || exit 1; usleep 100000; done",
            self.pid
        );
        let seconds = PATIENCE.as_secs().to_string();
        let words = ["timeout", &seconds, "sh", "-c", &script];
        let waited = self.host.run(&words).expect("it runs");
        assert!(waited.success(), "no '{what}' in: {}", self.said());
    }

    /// Waits for its end by its own doing, or anyone's; what was said.
    fn ended(self) -> String {
        let script = format!(
            "while kill -0 {} 2>/dev/null; do usleep 50000; done",
            self.pid
        );
        let seconds = PATIENCE.as_secs().to_string();
        let words = ["timeout", &seconds, "sh", "-c", &script];
        let waited = self.host.run(&words).expect("it runs");
        let said = self.said();
        let state = self
            .host
            .run(&["cat", &format!("/proc/{}/status", self.pid)]);
        assert!(
            waited.success(),
            "it does not end: {said}, {waited:?}, {state:?}"
        );
        // A prompt may stand before it.
        let recorded = said.split_once("recorded ").map(|(_, rest)| rest);
        let recorded = recorded.unwrap_or_else(|| panic!("not recorded: {said}"));
        println!("recorded {}", recorded.lines().next().unwrap_or_default());
        said
    }

    /// Ends it as Ctrl-C does.
    fn stop(self) -> String {
        run(&self.host, &["kill", "-INT", &self.pid]);
        self.ended()
    }
}

#[test]
fn a_boot_to_the_shell_is_replayed() {
    let Some(stage) = Stage::new("a_boot_to_the_shell_is_replayed", Kind::Small, 2, 100) else {
        return;
    };
    stage.repeat(|site, _| {
        let began = Instant::now();
        let guest = site.record(Some(""), &[]);
        guest.says("# ");
        println!("a shell after {:?}", began.elapsed());
        guest.stop();
        assert!(site.replay().contains("# "));
    });
}

#[test]
fn redis_under_load_is_replayed() {
    let Some(stage) = Stage::new("redis_under_load_is_replayed", Kind::Small, 1, 50) else {
        return;
    };
    if Command::new("redis-benchmark")
        .arg("--version")
        .output()
        .is_err()
    {
        let missing = "redis-benchmark is missing: install the package redis-tools";
        return skipped("redis_under_load_is_replayed", &missing);
    }
    stage.repeat(|site, number| {
        // In every other run its data go to the disk, too.
        let command = "redis-server --port 6379 --bind 0.0.0.0 --protected-mode no --save ''";
        let command = match number % 2 {
            0 => format!("{command} --dir /data --appendonly yes"),
            _ => command.to_owned(),
        };
        let publish = ["--publish", "0.0.0.0:6379:6379"];
        let guest = site.record(Some(&command), &publish);
        guest.says("Ready to accept connections");
        load(site);
        guest.stop();
        site.replay();
    });
}

/// Clients of Redis on this machine: for a minute, or until some requests are answered.
fn load(site: &Site<'_>) {
    let (lab, address) = (&site.stage.lab, &site.id.address().to_string());
    let seconds = if soak() { "60" } else { "300" };
    let words = [
        "timeout",
        seconds,
        "redis-benchmark",
        "-q",
        "-h",
        address,
        "-c",
        "8",
        "-n",
        "400",
        "-d",
        "100",
        "-r",
        "1000",
        "-t",
        "set,get,incr,lpush,lrange_100",
    ];
    let mut words = words.to_vec();
    if soak() {
        words.push("-l");
    }
    let loaded = lab.machine(&words).output().expect("it starts");
    let said = String::from_utf8_lossy(&loaded.stderr);
    let code = if soak() { 124 } else { 0 };
    assert_eq!(loaded.status.code(), Some(code), "{said}");
    let words = ["timeout", "30", "redis-cli", "-h", address, "info", "stats"];
    let stats = lab.machine(&words).output().expect("it starts").stdout;
    let stats = String::from_utf8_lossy(&stats);
    let commands = stats
        .lines()
        .find_map(|line| line.strip_prefix("total_commands_processed:"));
    let commands: u32 = commands.expect(&stats).trim().parse().expect("a number");
    println!("{commands} commands");
    assert!(commands > 500, "that is no load");
}

/// What `repeat` says at the end: a hash over everything.
fn hash_of(said: &str) -> String {
    let line = said.lines().find(|line| line.starts_with("repeat: "));
    line.expect(said).trim().to_owned()
}

#[test]
fn what_no_two_runs_have_in_common_is_replayed() {
    let test = "what_no_two_runs_have_in_common_is_replayed";
    let Some(stage) = Stage::new(test, Kind::Full, 2, 20) else {
        return;
    };
    let hashes = Mutex::new(Vec::new());
    stage.repeat(|site, _| {
        let said = site.record(Some("repeat 2"), &[]).ended();
        let hash = hash_of(&said);
        println!("{hash}");
        assert_eq!(hash_of(&site.replay()), hash);
        let mut hashes = hashes.lock().expect("no other run has failed");
        assert!(!hashes.contains(&hash), "two runs have something in common");
        hashes.push(hash);
    });
}

#[test]
fn manifests_are_told_what_to_run() {
    let manifest = "command-line = \"a understudy.run=b+c\"\nmemory";
    assert_eq!(
        told(manifest, "d e"),
        "command-line = \"a understudy.run=d+e\"\nmemory"
    );
}
