//! A Linux guest with a real Redis outlives the host it runs on: three emulated hosts, 40 ms and one
//! packet in a hundred between any two sites, `kill -9` of the process that is the primary's host, and
//! clients on a fourth machine whose connections and counters are checked.

#[path = "common/lab.rs"]
mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/site.rs"]
mod site;
#[path = "common/skip.rs"]
mod skip;

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use common::{lab, run};
use linux::{Kind, image, soak};
use serde_json::Value;
use site::{HOSTS, LOOK_EVERY, PATIENCE, Site, end, text};
use tokio::runtime::Runtime;
use understudy::demo::load::{Load, LoadConfig};
use understudy::lab::{Delay, End, Lab};

/// A host's memory, in MiB.
const MEMORY: u32 = 1500;
/// Where Redis is published.
const ADDRESS: &str = "10.88.0.254:6379";
/// One way, between any two sites.
const FAR: Delay = Delay {
    ms: 40,
    loss_percent: 1.0,
};
/// How many answers the clients wait for each time: three emulated hosts leave their guest little.
const ANSWERS: u64 = 20;
/// Tells this program that it is the clients, and where Redis is.
const CLIENTS: &str = "UNDERSTUDY_TEST_CLIENTS";
/// What the clients' lines begin with.
const SAYS: &str = "clients: ";

/// What the protocol knows of the VM on a host.
fn of<'a>(status: &'a Value, host: &str) -> &'a Value {
    &site::of(status, host, "shop")["node"]
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
    // A host is a copy when its guest has executed nearly everything, and emulated hosts are slow.
    let slow = ["--replica", "h3", "--image", "linux", "--wait", "400"];
    let words = [&words[..], &slow].concat();
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
    clients.answers(ANSWERS, &site);

    kill(&site.lab, "h1");
    clients.answers(ANSWERS, &site);
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
    clients.answers(ANSWERS, &site);

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
