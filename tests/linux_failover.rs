//! A Linux guest with a real Redis outlives the host it runs on: three emulated hosts, 40 ms and one
//! packet in a hundred between any two sites, `kill -9` of the process that is the primary's host, and
//! clients on a fourth machine whose connections and counters are checked.

#[path = "common/lab.rs"]
mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/skip.rs"]
mod skip;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{host, lab, program, run};
use linux::{Kind, image, soak};
use serde_json::Value;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use understudy::demo::load::{Load, LoadConfig};
use understudy::lab::{Delay, End, Lab};

/// A host's memory, in MiB.
const MEMORY: u32 = 1500;
/// How long an emulated host may take for one step. Busy machines take their time.
const PATIENCE: Duration = Duration::from_mins(8);
const LOOK_EVERY: Duration = Duration::from_millis(200);
const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
const MACHINE: &str = "10.88.0.254";
/// Where Redis is published.
const ADDRESS: &str = "10.88.0.254:6379";
/// One way, between any two sites.
const FAR: Delay = Delay {
    ms: 40,
    loss_percent: 1.0,
};
/// Tells this program that it is the clients, and where Redis is.
const CLIENTS: &str = "UNDERSTUDY_TEST_CLIENTS";
/// What the clients' lines begin with.
const SAYS: &str = "clients: ";

/// A cluster in a lab, with one VM.
struct Site {
    lab: Lab,
    folder: TempDir,
    /// The witness and the gateway, which end with the lab.
    processes: Vec<Child>,
}

impl Site {
    /// Three hosts with an image, each with its agent; a witness on the fourth machine.
    fn open(lab: Lab, folder: TempDir, image: &Path) -> Self {
        let mut site = Self {
            lab,
            folder,
            processes: Vec::new(),
        };
        let mut init = Command::new(program());
        init.arg("init").arg(site.cluster());
        for name in HOSTS {
            let address = end(name).address();
            init.args(["--host", &format!("{name}={address}:7400")]);
        }
        init.args(["--witness", &format!("w={MACHINE}:7300")]);
        let made = init.output().expect("it starts");
        assert!(made.status.success(), "{made:?}");
        for name in HOSTS {
            site.start_agent(name, image);
        }
        let witness = site.cluster().join("witnesses/w");
        site.beside(&["witness", "--config", text(&witness)]);
        site.until("all hosts meet", |status| {
            let met = |host: &str| {
                let peers = status["hosts"][host]["peers"].as_object();
                peers.is_some_and(|peers| peers.values().all(|met| met == true))
            };
            HOSTS.iter().all(|host| met(host)).then_some(())
        });
        site
    }

    fn cluster(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    fn start_agent(&self, name: &str, image: &Path) {
        let host = host(&self.lab, name);
        let put = |from: &Path, to: &str| {
            for file in std::fs::read_dir(from).expect("a folder").flatten() {
                let there = Path::new(to).join(file.file_name());
                host.put(&file.path(), &there).expect("put");
            }
        };
        put(&self.cluster().join("hosts").join(name), "/data/config");
        put(image, "/data/config/data/images/linux");
        host.detach(&["understudy", "agent", "--config", "/data/config"])
            .expect("it starts");
    }

    /// Starts a process of this program on the fourth machine.
    fn beside(&mut self, words: &[&str]) {
        let words = [&[text(program())], words].concat();
        let child = self.lab.machine(&words).spawn().expect("it starts");
        self.processes.push(child);
    }

    /// An operator's command; what it prints.
    fn operate(&self, words: &[&str]) -> Result<String, String> {
        let words = [&[text(program())], words].concat();
        let mut command = self.lab.machine(&words);
        let output = command.env("UNDERSTUDY_CLUSTER", self.cluster()).output();
        let output = output.expect("it starts");
        let said = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            Ok(said(&output.stdout))
        } else {
            Err(said(&output.stderr))
        }
    }

    /// All that can be known of it, for a test that fails.
    fn tell(&self) -> String {
        let mut told = String::new();
        for words in [&["status", "--json"][..], &["events"]] {
            let (Ok(said) | Err(said)) = self.operate(words);
            writeln!(told, "{words:?}:\n{said}").expect("memory");
        }
        for name in HOSTS {
            let words = ["sh", "-c", "tail -n 40 /data/config/data/vms/*/console.log"];
            match host(&self.lab, name).run(&words) {
                Ok(console) => writeln!(told, "consoles on {name}:\n{}", console.text()),
                Err(error) => writeln!(told, "{name} tells nothing: {error}"),
            }
            .expect("memory");
        }
        told
    }

    /// Looks at the status until something is there.
    fn until<T>(&self, what: &str, mut look: impl FnMut(&Value) -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            // A host that has died makes the command fail, and the others are shown all the same.
            let words = [text(program()), "status", "--json"];
            let mut command = self.lab.machine(&words);
            let said = command.env("UNDERSTUDY_CLUSTER", self.cluster()).output();
            let said = said.expect("it starts");
            let status = serde_json::from_slice(&said.stdout).unwrap_or_default();
            if let Some(seen) = look(&status) {
                println!("{what}: after {:?}", began.elapsed());
                return seen;
            }
            assert!(began.elapsed() < PATIENCE, "{what}: {status:#} {said:?}");
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn end(name: &str) -> End {
    name.parse().expect("the name of an end")
}

/// What a host says of the VM.
fn of<'a>(status: &'a Value, host: &str) -> &'a Value {
    &status["hosts"][host]["vms"][0]["node"]
}

/// The clients, a process on the fourth machine.
struct Clients {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Clients {
    fn start(lab: &Lab) -> Self {
        let this = std::env::current_exe().expect("a program");
        let words = [text(&this), "--exact", "clients", "--nocapture"];
        let mut process = lab
            .machine(&words)
            .env(CLIENTS, ADDRESS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        Self {
            input: process.stdin.take().expect("its input"),
            output: BufReader::new(process.stdout.take().expect("its output")),
            process,
        }
    }

    /// The next thing that they say.
    fn say(&mut self) -> Value {
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line).expect("a line");
            assert!(read > 0, "the clients have gone");
            if let Some((_, said)) = line.split_once(SAYS) {
                return serde_json::from_str(said).expect("JSON");
            }
        }
    }

    /// Waits until they have got so many more answers, from now on.
    fn answers(&mut self, more: u64, site: &Site) {
        let began = Instant::now();
        let mut goal = None;
        loop {
            let said = self.say();
            assert_eq!(said["broken"], 0, "{said}\n{}", site.tell());
            let now = said["acknowledged"].as_u64().expect("a number");
            if now >= *goal.get_or_insert(now + more) {
                println!("{now} answers, after {:?}", began.elapsed());
                return;
            }
            let patient = began.elapsed() < PATIENCE;
            assert!(patient, "no answers: {said}\n{}", site.tell());
        }
    }

    /// Lets them get what they wait for and read everything back; what they say of it.
    fn finish(self) -> Value {
        let Self {
            mut process,
            input,
            mut output,
        } = self;
        drop(input);
        let mut said = String::new();
        output.read_to_string(&mut said).expect("text");
        assert!(process.wait().expect("it ends").success(), "{said}");
        let verdict = said.lines().rev().find_map(|line| line.split_once(SAYS));
        serde_json::from_str(verdict.expect(&said).1).expect("JSON")
    }
}

/// Is the clients when told so by the environment: a process of its own because a network is entered
/// by processes. Begins when Redis answers, says how far it is, and ends when its input does.
#[test]
fn clients() {
    let Some(address) = std::env::var_os(CLIENTS) else {
        return;
    };
    let address: SocketAddr = address.to_str().expect("text").parse().expect("an address");
    let (ended, mut end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = ended.send(());
    });
    let say = |value: Value| println!("{SAYS}{value}");
    Runtime::new().expect("a runtime").block_on(async {
        let load = load(address).await;
        let mut tick = tokio::time::interval(LOOK_EVERY);
        loop {
            tokio::select! {
                _ = &mut end => break,
                _ = tick.tick() => say(serde_json::json!({
                    "acknowledged": load.acknowledged(),
                    "broken": load.broken(),
                })),
            }
        }
        let report = load.finish().await;
        say(serde_json::json!({
            "acknowledged": report.acknowledged,
            "flawless": report.is_flawless(),
            "longest_wait": report.longest_gap.map(|gap| gap.length().as_secs_f64()),
            "lost": report.lost,
            "undone": report.undone,
            "repeated": report.repeated,
            "broken_because": report.broken,
        }));
    });
}

/// Clients of Redis, once it answers.
async fn load(address: SocketAddr) -> Load {
    let config = LoadConfig {
        connections: 4,
        patience: Duration::from_mins(1),
        ..LoadConfig::new(address)
    };
    let began = Instant::now();
    loop {
        match Load::start(config.clone()).await {
            Ok(load) => return load,
            Err(error) => assert!(began.elapsed() < PATIENCE, "{error}"),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Kills the process that is this host, as a power failure does.
fn kill(lab: &Lab, name: &str) {
    let status = lab.status().expect("its status");
    let host = status
        .hosts
        .iter()
        .find(|host| host.name.to_string() == name);
    let pid = host.and_then(|host| host.pid).expect("it is up");
    let killed = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(killed.expect("it starts").success());
}

#[test]
fn a_linux_guest_outlives_its_host() {
    let test = "a_linux_guest_outlives_its_host";
    let Some(image) = image(test, Kind::Small) else {
        return;
    };
    for _ in 0..if soak() { 10 } else { 1 } {
        let Some((lab, folder)) = lab(test, 3, MEMORY) else {
            return;
        };
        outlives(Site::open(lab, folder, image.path()));
    }
}

fn outlives(mut site: Site) {
    let words = ["pair", "shop", "--primary", "h1", "--replica", "h2"];
    let words = [&words[..], &["--replica", "h3", "--image", "linux"]].concat();
    println!("{}", site.operate(&words).expect("paired"));
    for (number, a) in HOSTS.iter().enumerate() {
        site.lab.delay(End::Machine, end(a), FAR).expect("far");
        for b in &HOSTS[..number] {
            site.lab.delay(end(b), end(a), FAR).expect("far");
        }
    }
    let gateway = site.cluster().join("gateways/gateway");
    let publish = format!("{ADDRESS}:6379");
    let words = ["gateway", "--config", text(&gateway), "--vm", "shop"];
    site.beside(&[&words[..], &["--publish", &publish]].concat());
    let mut clients = Clients::start(&site.lab);
    clients.answers(50, &site);

    kill(&site.lab, "h1");
    clients.answers(50, &site);
    let (primary, replica) = site.until("a replica reigns", |status| {
        let reigns = |host: &str| of(status, host)["role"] == "primary";
        if reigns("h2") {
            Some(("h2", "h3"))
        } else {
            reigns("h3").then_some(("h3", "h2"))
        }
    });
    site.until("the other one is a copy again", |status| {
        let members = of(status, primary)["record"]["members"].as_array()?;
        members
            .iter()
            .any(|member| member["host"] == replica)
            .then_some(())
    });
    clients.answers(50, &site);

    let verdict = clients.finish();
    println!("{verdict}");
    assert_eq!(verdict["flawless"], true, "{verdict}");
    // The dead host makes the command fail.
    let events = site.operate(&["events"]).unwrap_or_else(|said| said);
    println!("{events}");
    for host in [primary, replica] {
        let log = run(
            &common::host(&site.lab, host),
            &["cat", "/data/config/data/journal/journal.jsonl"],
        );
        assert!(!log.contains("diverged"), "{log}");
        assert!(log.contains("suspects"), "the journal tells what happened");
    }
    site.lab.down().expect("it ends");
}
