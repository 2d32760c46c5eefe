//! The lab: hosts with a KVM of their own that boot, record and replay, lose power, lose their links
//! and get them back, and leave nothing behind.

#[path = "common/lab.rs"]
mod common;
#[path = "common/skip.rs"]
mod skip;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{host, lab, program, run};
use skip::skipped;
use understudy::lab::{Config, Delay, End, Host, Lab, LabError, Power, needs};

/// How long what was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(20);
/// A host's memory, in MiB: enough for the ledger.
const MEMORY: u32 = 1500;

fn end(name: &str) -> End {
    name.parse().expect("the name of an end")
}

/// Everything that a lab consists of on this machine.
struct Parts {
    pids: Vec<u32>,
    network: PathBuf,
}

impl Parts {
    fn of(lab: &Lab) -> Self {
        let status = lab.status().expect("its status");
        let hosts = status.hosts.iter().filter_map(|host| host.pid);
        let pids: Vec<u32> = hosts.chain([status.keeper]).collect();
        let network = fs::read_link(format!("/proc/{}/ns/net", status.keeper));
        Self {
            pids,
            network: network.expect("its namespace"),
        }
    }

    /// What is left of them.
    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for entry in fs::read_dir("/proc").expect("processes").flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let corpse = stat.contains(") Z ");
            let known = pid.parse().is_ok_and(|pid| self.pids.contains(&pid));
            let network = fs::read_link(entry.path().join("ns/net"));
            let inside = network.is_ok_and(|network| network == self.network);
            if inside || known && !stat.is_empty() && !corpse {
                left.push(format!("{pid}: {stat}"));
            }
        }
        left
    }

    /// Waits until nothing is left; the kernel ends processes in its own time.
    fn gone(&self) {
        let start = Instant::now();
        while !self.left().is_empty() {
            assert!(start.elapsed() < PATIENCE, "stays: {:?}", self.left());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn hosts_run_guests_and_live_and_die() {
    let Some((lab, folder)) = lab("hosts_run_guests_and_live_and_die", 2, MEMORY) else {
        return;
    };
    kvm_works(&host(&lab, "h1"));
    programs_and_files_come_and_go(&host(&lab, "h2"), folder.path());
    a_guest_is_recorded_and_replayed(&host(&lab, "h1"));
    power_fails_and_comes_back(&lab);
    links_are_cut_and_mended(&lab);
    links_are_long(&lab);

    let parts = Parts::of(&lab);
    let dir = lab.dir().to_owned();
    lab.down().expect("it ends");
    assert_eq!(parts.left(), Vec::<String>::new());
    assert!(!dir.exists(), "its folder is gone");
}

fn kvm_works(host: &Host<'_>) {
    let report = run(host, &["understudy", "doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    let findings = report["findings"].as_array().expect("findings");
    let kvm = findings.iter().find(|finding| finding["what"] == "KVM");
    assert_eq!(kvm.expect("about KVM")["verdict"], "good", "{report:#}");
    let lacking = findings.iter().any(|it| it["verdict"] == "lacking");
    assert!(!lacking, "{report:#}");
}

fn programs_and_files_come_and_go(host: &Host<'_>, folder: &Path) {
    let words = ["sh", "-c", "echo out; echo err >&2; exit 7"];
    let said = host.run(&words).expect("it runs");
    assert_eq!(said.ended.code(), 7);
    assert_eq!(said.stdout, b"out\n");
    assert_eq!(said.stderr, b"err\n");
    let killed = host.run(&["sh", "-c", "kill -9 $$"]).expect("it runs");
    assert_eq!(killed.ended.code(), 137);
    let refused = host.run(&["no-such-program"]);
    let Err(LabError::Host { why, .. }) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        why.starts_with("no-such-program cannot be started"),
        "{why}"
    );

    // A program that goes on keeps no other from running.
    let detached = host.detach(&["sh", "-c", "echo begun; exec sleep 1000"]);
    let detached = detached.expect("it starts");
    let pid = detached.pid.to_string();
    run(host, &["kill", "-0", &pid]);
    let output = detached.output.to_str().expect("UTF-8");
    assert_eq!(run(host, &["cat", output]), "begun\n");
    run(host, &["kill", &pid]);

    // One that has ended leaves no corpse, whatever else ends at the same time.
    for _ in 0..100 {
        let detached = host.detach(&["usleep", "100000"]).expect("it starts");
        let gone = format!("while kill -0 {}; do usleep 20000; done", detached.pid);
        let waited = host.run(&["timeout", "20", "sh", "-c", &gone]);
        assert!(waited.expect("it runs").success(), "a corpse stays");
    }

    // More than is on the way at a time, and not a multiple of anything.
    let (there, back) = (folder.join("there"), folder.join("back"));
    let bytes: Vec<u8> = (0..20_000_001_u32).map(|i| (i ^ (i >> 9)) as u8).collect();
    fs::write(&there, &bytes).expect("written");
    host.put(&there, Path::new("/data/deep/file")).expect("put");
    host.get(Path::new("/data/deep/file"), &back).expect("got");
    assert!(
        fs::read(&back).expect("read") == bytes,
        "the same came back"
    );
    let missing = host.get(Path::new("/data/no-such-file"), &back);
    assert!(missing.is_err());
}

/// The ledger takes a write, and all that happened to it happens again.
const RECORD: &str = r"
: >/tmp/answer
understudy run ledger --record /data/log --publish 6379:6379 >/tmp/console 2>/tmp/said &
guest=$!
until grep -q 'port 6379' /tmp/said; do kill -0 $guest || exit 1; usleep 20000; done
(printf 'INCR visits\r\n'; until grep -q : /tmp/answer; do usleep 20000; done) |
    nc 127.0.0.1 6379 >/tmp/answer
kill -INT $guest
wait $guest || exit 1
cat /tmp/answer
";

fn a_guest_is_recorded_and_replayed(host: &Host<'_>) {
    let words = ["timeout", "60", "sh", "-c", RECORD];
    assert_eq!(run(host, &words), ":1\r\n");
    let replayed = run(host, &["understudy", "replay", "/data/log"]);
    assert!(replayed.contains("digests, all equal"), "{replayed}");
}

fn power_fails_and_comes_back(lab: &Lab) {
    let h2 = host(lab, "h2");
    let state = || lab.status().expect("its status").hosts[1].clone();
    run(
        &h2,
        &[
            "sh",
            "-c",
            "echo kept >/data/kept; sync; echo lost >/tmp/lost",
        ],
    );
    let before = state();
    h2.kill().expect("it dies");
    let dead = state();
    assert_eq!((dead.state, dead.pid), (Power::Off, None));
    assert_eq!(dead.why_off.as_deref(), Some("its power was cut"));
    let refused = h2.run(&["true"]).map(|output| output.ended);
    let Err(LabError::Refused(why)) = refused else {
        panic!("{refused:?}");
    };
    assert!(
        why.contains("start it with 'understudy lab start h2'"),
        "{why}"
    );
    assert!(h2.kill().is_err(), "once is enough");

    h2.start().expect("it boots");
    let after = state();
    assert_eq!(after.state, Power::Up);
    assert_ne!(before.pid, after.pid);
    assert_eq!(run(&h2, &["cat", "/data/kept"]), "kept\n");
    run(&h2, &["sh", "-c", "! test -e /tmp/lost"]);
}

/// The shortest round trip of a few, in milliseconds; none where no answer comes.
fn ping(host: &Host<'_>, to: End) -> Option<f64> {
    let address = to.address().to_string();
    let said = host.run(&["ping", "-c", "3", "-i", "0.3", "-W", "2", &address]);
    let said = said.expect("it runs").text();
    let times = said.split("time=").skip(1).filter_map(|rest| {
        let time = rest.split_whitespace().next()?;
        time.parse::<f64>().ok()
    });
    times.reduce(f64::min)
}

fn links_are_cut_and_mended(lab: &Lab) {
    let (h1, h2) = (host(lab, "h1"), host(lab, "h2"));
    assert!(ping(&h1, end("h2")).is_some());
    lab.partition(end("h2"), end("h1")).expect("cut");
    assert_eq!(lab.status().expect("its status").partitions.len(), 1);
    assert_eq!(ping(&h1, end("h2")), None);
    assert_eq!(ping(&h2, end("h1")), None);
    assert!(ping(&h1, End::Machine).is_some(), "the other links live");
    lab.heal(end("h1"), end("h2")).expect("mended");
    assert!(ping(&h1, end("h2")).is_some());
    lab.partition(End::Machine, end("h1")).expect("cut");
    assert_eq!(ping(&h1, End::Machine), None);
    lab.heal(End::Machine, end("h1")).expect("mended");
    assert!(ping(&h1, End::Machine).is_some());
}

fn links_are_long(lab: &Lab) {
    let (h1, h2) = (host(lab, "h1"), host(lab, "h2"));
    let far = |ms, loss_percent| Delay { ms, loss_percent };
    lab.delay(end("h1"), end("h2"), far(80, 0.0))
        .expect("longer");
    lab.delay(End::Machine, end("h1"), far(60, 0.0))
        .expect("longer");
    let trip = |from, to| ping(from, to).expect("an answer");
    assert!(trip(&h1, end("h2")) >= 160.0, "each way");
    assert!(trip(&h1, End::Machine) >= 120.0, "each way");
    assert!(trip(&h2, End::Machine) < 60.0, "other links are short");
    assert_eq!(lab.status().expect("its status").delays.len(), 2);

    // A host that comes back is as far away as it was.
    h2.kill().expect("it dies");
    h2.start().expect("it boots");
    assert!(trip(&h1, end("h2")) >= 160.0);

    lab.delay(end("h1"), end("h2"), far(0, 100.0))
        .expect("lost");
    assert_eq!(ping(&h1, end("h2")), None);
    lab.delay(end("h1"), end("h2"), Delay::default())
        .expect("short");
    lab.delay(End::Machine, end("h1"), Delay::default())
        .expect("short");
    assert!(trip(&h1, end("h2")) < 80.0);
    assert!(trip(&h1, End::Machine) < 60.0);
    assert!(lab.delay(end("h1"), end("h1"), far(1, 0.0)).is_err());
    assert!(lab.delay(end("h1"), end("h2"), far(1, 101.0)).is_err());
}

#[test]
fn nothing_outlives_the_keeper() {
    let Some((lab, folder)) = lab("nothing_outlives_the_keeper", 1, MEMORY) else {
        return;
    };
    let dir = folder.path().join("lab");
    let second = Lab::up(&config(&dir), &mut |_| {}).err().expect("refused");
    assert!(second.to_string().contains("running in"), "{second}");

    // The machine has an address in the lab, and what runs there ends with it.
    let words = ["sh", "-c", "ip -br addr show machine; exec sleep 1000"];
    let mut client = lab.machine(&words);
    let mut client = client.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut said = String::new();
    let out = client.stdout.take().expect("its output");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut said).expect("a line");
    assert!(said.contains("10.88.0.254/24"), "{said}");
    let code = lab.machine(&["sh", "-c", "exit 9"]).status();
    assert_eq!(code.expect("it starts").code(), Some(9));

    let parts = Parts::of(&lab);
    assert!(
        parts.left().len() >= 3,
        "keeper, host, client: {:?}",
        parts.left()
    );
    kill(lab.status().expect("its status").keeper);
    parts.gone();
    assert!(!client.wait().expect("it ends").success());
    assert!(matches!(Lab::find(&dir), Err(LabError::Ended(_))));
    drop(lab);

    // The folder is taken over by the next one, with a word about it.
    let mut notes = Vec::new();
    let next = Lab::up(&config(&dir), &mut |event| notes.push(format!("{event:?}")));
    let next = next.expect("the next lab");
    assert!(notes[0].contains("cleaned up after a lab"), "{notes:?}");
    let parts = Parts::of(&next);
    // Whoever has started a lab takes it along.
    drop(next);
    parts.gone();
    assert!(!dir.exists());
}

#[test]
fn ctrl_c_while_it_starts_leaves_nothing() {
    let test = "ctrl_c_while_it_starts_leaves_nothing";
    if let Err(missing) = needs::check() {
        return skipped(test, &missing);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let dir = folder.path().join("lab");
    // Whoever runs this in the background may have it ignore the signal.
    let mut up = Command::new("env")
        .arg("--default-signal=INT")
        .arg(program())
        .args(["lab", "up", "--hosts", "1", "--dir"])
        .arg(&dir)
        .stderr(Stdio::inherit())
        .spawn()
        .expect("it starts");
    let start = Instant::now();
    let lab = loop {
        if let Ok(lab) = Lab::find(&dir)
            && lab
                .status()
                .is_ok_and(|status| status.hosts[0].pid.is_some())
        {
            break lab;
        }
        if up.try_wait().expect("a process").is_some() {
            return skipped(
                test,
                &"'understudy lab up' does not work here, as it has just said",
            );
        }
        assert!(start.elapsed() < 3 * PATIENCE, "it does not start");
        std::thread::sleep(Duration::from_millis(20));
    };
    let parts = Parts::of(&lab);
    let interrupt = Command::new("kill")
        .args(["-INT", &up.id().to_string()])
        .status();
    assert!(interrupt.expect("it starts").success());
    if up.wait().expect("it ends").success() {
        lab.down().expect("it ends");
        panic!("it was not interrupted");
    }
    parts.gone();
    let start = Instant::now();
    while dir.exists() {
        assert!(start.elapsed() < PATIENCE, "its folder stays");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn config(dir: &Path) -> Config {
    Config {
        hosts: 1,
        dir: dir.to_owned(),
        ..Config::new(program())
    }
}

fn kill(pid: u32) {
    let killed = Command::new("kill")
        .args(["-KILL", &pid.to_string()])
        .status();
    assert!(killed.expect("it starts").success());
}

#[test]
fn what_makes_no_sense_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().expect("a folder");
    let lab = |words: &[&str]| {
        let output = Command::new(program())
            .args(["lab", "--dir"])
            .arg(folder.path().join("none"))
            .args(words)
            .output()
            .expect("it starts");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    };
    for (words, code, said) in [
        (vec!["status"], 1, "start one with 'understudy lab up'"),
        (vec!["down"], 1, "no lab is running in"),
        (vec!["run", "h0", "--", "true"], 2, "they are called h1, h2"),
        (vec!["partition", "h1", "hq"], 2, "'hq' is no host of a lab"),
        (vec!["kill", "machine"], 2, "'machine' is no host"),
        (vec!["up", "--hosts", "15"], 2, "from 1 to 14 hosts"),
        (vec!["run", "h1"], 2, "COMMAND"),
    ] {
        let (found, err) = lab(&words);
        assert_eq!(found, Some(code), "{words:?}: {err}");
        assert!(err.contains(said), "{words:?}: {err}");
    }
}
