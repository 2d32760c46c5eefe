//! The ledger on KVM: it serves clients over its own TCP, keeps what it has acknowledged over a
//! power failure, refuses a damaged disk, and a recording of it replays.
//!
//! Time is the test's: the host's clock moves only when it is looked at, and when the guest waits.

mod client;
#[path = "../common/skip.rs"]
mod skip;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use client::{Client, Clients};
use replay_log::{Batch, Header, Term};
use smoltcp::time::Instant;
use understudy::images::{self, Image};
use vmm::config::MachineConfig;
use vmm::host::{Host, OutputKind};
use vmm::kvm::{Kicker, KvmError, KvmMachine};
use vmm::recorder::{Policy, Recorder};
use vmm::replayer::Replayer;
use vmm::runner::{Runner, Turn};
use vmm::tape::GuestEnd;
use vmm::testing::MemoryHost;

/// How far the host's clock moves with each look at it, in nanoseconds.
const STEP: u64 = 2_000;
/// How far it moves at most when the guest waits.
const PATIENCE: u64 = 1_000_000;
/// The test fails when so much guest time brings no answer: minutes.
const FOREVER: u64 = 600_000_000_000;

/// A disk as small as the ledger accepts, so that its log is compacted within a test.
const DISK: u64 = 32 << 20;

/// A running ledger with clients.
struct Ledger {
    runner: Runner<KvmMachine>,
    tape: Recorder<MemoryHost>,
    network: Clients,
    clients: Vec<Client>,
    console: String,
    /// Outputs that were looked at already.
    seen: usize,
    ended: Option<GuestEnd>,
}

fn image() -> Image {
    images::find("ledger").expect("the ledger is embedded")
}

fn config() -> MachineConfig {
    MachineConfig {
        disks: vec![DISK],
        acpi: false,
        ..image().machine()
    }
}

fn header() -> Header {
    Header {
        machine_model: vmm::MACHINE_MODEL,
        image: image().digest(),
        config: Bytes::new(),
        disks: Vec::new(),
        term: Term(1),
        boot: [3; 16],
    }
}

fn host(disk: &[u8], seed: u64) -> MemoryHost {
    let mut host = MemoryHost::new(STEP, &[DISK], seed);
    host.disk(0).copy_from_slice(disk);
    host
}

fn blank() -> Vec<u8> {
    vec![0; DISK as usize]
}

/// A machine about to boot, or `None`, said aloud, where there is no KVM.
fn machine(test: &str, config: &MachineConfig) -> Option<KvmMachine> {
    match KvmMachine::new(config, &image().boot()) {
        Ok(machine) => Some(machine),
        Err(e @ (KvmError::NoDevice { .. } | KvmError::NoPermission { .. })) => {
            skip::skipped(test, &e);
            None
        }
        Err(e) => panic!("KVM is there, but no machine can be made: {e:?}"),
    }
}

impl Ledger {
    fn boot(test: &str, config: &MachineConfig, disk: &[u8]) -> Option<Self> {
        let machine = machine(test, config)?;
        let policy = Policy {
            mark_landmarks: 20,
            ..policy()
        };
        let mut tape =
            Recorder::start(host(disk, 11), policy, header()).expect("the recorder starts");
        let now = instant(tape.host());
        Some(Self {
            runner: Runner::new(machine),
            tape,
            network: Clients::new(now),
            clients: Vec::new(),
            console: String::new(),
            seen: 0,
            ended: None,
        })
    }

    fn connect(&mut self) -> usize {
        self.clients.push(self.network.connect());
        self.clients.len() - 1
    }

    /// Runs until `done`.
    fn run_until(&mut self, done: impl Fn(&Self) -> bool) {
        let start = self.tape.host().now();
        while !done(self) {
            self.turn();
            let now = self.tape.host().now();
            assert!(
                now.since(start) < FOREVER,
                "nothing comes any more: {:?} {:?}",
                self.console,
                self.clients.iter().map(Client::text).collect::<Vec<_>>()
            );
        }
    }

    fn turn(&mut self) {
        assert_eq!(self.ended, None, "the guest has ended: {}", self.console);
        let turn = self.runner.turn(&mut self.tape, 256).expect("it runs");
        self.tape.flush().expect("everything is shipped");
        for output in &self.tape.host().outputs[self.seen..] {
            match output.kind {
                OutputKind::Frame => self.network.frame(output.bytes.clone()),
                OutputKind::Console => self.console += &String::from_utf8_lossy(&output.bytes),
            }
        }
        self.seen = self.tape.host().outputs.len();
        let now = instant(self.tape.host());
        for frame in self.network.work(now, &mut self.clients) {
            self.tape.host().send_frame(frame);
        }
        match turn {
            Turn::Ran | Turn::Paused => {}
            Turn::Waiting if !self.tape.host().quiet() => {}
            Turn::Waiting => {
                let now = self.tape.host().now();
                let wake = self.tape.wake_at();
                let patience = wake.map_or(PATIENCE, |wake| wake.since(now).min(PATIENCE));
                self.tape.host().advance(patience);
            }
            Turn::Ended(end) => self.ended = Some(end),
        }
    }

    /// Asks one request on one client and returns the answer, which is `lines` long.
    fn ask(&mut self, client: usize, request: &str, lines: usize) -> String {
        self.clients[client].answers.clear();
        self.clients[client].ask(request);
        self.run_until(|it| it.clients[client].text().matches("\r\n").count() >= lines);
        self.clients[client].text()
    }

    /// Pulls the plug: what the disk holds.
    fn pull_the_plug(mut self) -> Vec<u8> {
        self.tape.host().disk(0).clone()
    }
}

fn instant(host: &mut MemoryHost) -> Instant {
    Instant::from_micros((host.now().0 / 1000).cast_signed())
}

#[test]
fn it_serves_and_keeps_what_it_acknowledged() {
    let test = "the ledger serves";
    let Some(mut ledger) = Ledger::boot(test, &config(), &blank()) else {
        return;
    };
    let client = ledger.connect();
    assert_eq!(ledger.ask(client, "PING", 1), "+PONG\r\n");
    assert_eq!(ledger.ask(client, "SET name value", 1), "+OK\r\n");
    assert_eq!(ledger.ask(client, "GET name", 2), "$5\r\nvalue\r\n");
    assert_eq!(ledger.ask(client, "INCR n", 1), ":1\r\n");
    assert_eq!(
        ledger.ask(client, "what is this", 1),
        "-ERR unknown command 'what', with args beginning with: 'is' 'this' \r\n"
    );
    assert_eq!(ledger.console, "ledger: ready\n");

    let mut ledger = Ledger::boot(test, &config(), &ledger.pull_the_plug()).expect("KVM was there");
    let client = ledger.connect();
    let both = "*2\r\n$5\r\nvalue\r\n$1\r\n1\r\n";
    assert_eq!(ledger.ask(client, "MGET name n", 5), both);
    assert_eq!(ledger.ask(client, "QUIT", 1), "+OK\r\n");
    ledger.run_until(|it| it.network.closed_by_guest(&it.clients[client]));
}

/// More clients than fit one turn, pipelined, until the log was compacted several times. Every
/// acknowledged value must be there after the plug was pulled.
#[test]
fn many_clients_and_compactions_lose_nothing() {
    let Some(mut ledger) = Ledger::boot("many clients", &config(), &blank()) else {
        return;
    };
    let clients: Vec<usize> = (0..60).map(|_| ledger.connect()).collect();
    let rounds = 90;
    let filler = "x".repeat(2000);
    for round in 0..rounds {
        for &client in &clients {
            ledger.clients[client].answers.clear();
            ledger.clients[client].ask(&format!("INCR count{client}"));
            ledger.clients[client].ask(&format!("SET text{} {round}{filler}", client % 7));
            ledger.clients[client].ask(&format!("SET more{client} {filler}{round}"));
        }
        let answer = format!(":{}\r\n+OK\r\n+OK\r\n", round + 1);
        ledger.run_until(|it| {
            clients
                .iter()
                .all(|&c| it.clients[c].answers.len() >= answer.len())
        });
        for &client in &clients {
            assert_eq!(ledger.clients[client].text(), answer);
        }
    }
    let info = ledger.ask(0, "INFO persistence", 9);
    let compactions = info.split("log_compactions:").nth(1).expect("it tells");
    assert!(!compactions.starts_with('0'), "{info}");

    let mut ledger =
        Ledger::boot("many clients", &config(), &ledger.pull_the_plug()).expect("KVM was there");
    let client = ledger.connect();
    for key in 0..clients.len() {
        let count = ledger.ask(client, &format!("GET count{key}"), 2);
        assert_eq!(count, format!("$2\r\n{rounds}\r\n"));
    }
    assert_eq!(ledger.ask(client, "STRLEN more59", 1), ":2002\r\n");
}

/// Far more clients than sockets, one hundred at a time; some never close their side.
#[test]
fn sockets_are_used_again() {
    let Some(mut ledger) = Ledger::boot("sockets", &config(), &blank()) else {
        return;
    };
    for round in 0..5 {
        let clients: Vec<usize> = (0..100).map(|_| ledger.connect()).collect();
        for &client in &clients {
            ledger.clients[client].ask("PING\r\nQUIT");
        }
        ledger.run_until(|it| {
            let mut clients = clients.iter().map(|&client| &it.clients[client]);
            clients.all(|client| it.network.closed_by_guest(client))
        });
        for &client in &clients {
            assert_eq!(ledger.clients[client].text(), "+PONG\r\n+OK\r\n", "{round}");
            if round % 2 == 0 {
                ledger.network.close(&ledger.clients[client]);
            }
        }
        ledger.tape.host().advance(11_000_000_000);
    }
}

#[test]
fn what_it_cannot_start_with_is_named() {
    let with = |config: &MachineConfig, disk: &[u8]| {
        let mut ledger = Ledger::boot("bad starts", config, disk)?;
        ledger.run_until(|it| it.ended.is_some());
        assert_eq!(ledger.ended, Some(GuestEnd::PowerOff));
        Some(ledger.console)
    };
    let mut damaged = blank();
    damaged[0] = 1;
    let Some(foreign) = with(&config(), &damaged) else {
        return;
    };
    assert!(
        foreign.contains("the disk holds something else"),
        "{foreign}"
    );
    let lost = MachineConfig {
        command_line: "quiet".into(),
        ..config()
    };
    let told = with(&lost, &blank()).expect("KVM was there");
    assert!(told.contains("quiet means nothing here"), "{told}");
    let alone = MachineConfig {
        mac: None,
        ..config()
    };
    let told = with(&alone, &blank()).expect("KVM was there");
    assert!(told.contains("there is no network device"), "{told}");
}

#[test]
fn a_damaged_log_is_refused_and_a_torn_one_is_not() {
    let Some(mut ledger) = Ledger::boot("damage", &config(), &blank()) else {
        return;
    };
    let client = ledger.connect();
    for key in 1..=3 {
        ledger.ask(client, &format!("SET key{key} value"), 1);
    }
    let disk = ledger.pull_the_plug();
    let damage = |sector: usize| {
        let mut damaged = disk.clone();
        damaged[sector * 512 + 50] ^= 1;
        Ledger::boot("damage", &config(), &damaged).expect("KVM was there")
    };
    let mut middle = damage(2);
    middle.run_until(|it| it.ended.is_some());
    assert!(
        middle
            .console
            .contains("batch 2 at sector 2 is not whole, but batch 3 is")
    );
    let mut tail = damage(3);
    let client = tail.connect();
    assert_eq!(tail.ask(client, "EXISTS key1 key2 key3", 1), ":2\r\n");
    assert_eq!(
        tail.console,
        "ledger: dropped a torn batch\nledger: ready\n"
    );
}

#[test]
fn a_recording_replays_under_kicks() {
    let test = "the ledger replays";
    let Some(mut ledger) = Ledger::boot(test, &config(), &blank()) else {
        return;
    };
    let storm = Storm::start(ledger.runner.machine().kicker());
    let clients: Vec<usize> = (0..8).map(|_| ledger.connect()).collect();
    for round in 1..=10 {
        for &client in &clients {
            ledger.clients[client].answers.clear();
            ledger.clients[client].ask("INCR shared\r\nECHO done");
        }
        let done = |it: &Ledger, c: usize| it.clients[c].text().ends_with("done\r\n");
        ledger.run_until(|it| clients.iter().all(|&client| done(it, client)));
        let total = ledger.ask(0, "GET shared", 2);
        assert!(total.ends_with(&format!("\r\n{}\r\n", round * clients.len())));
    }
    storm.stop();
    let batches: Vec<Batch> = std::mem::take(&mut ledger.tape.host().batches);

    let machine = machine(test, &config()).expect("KVM was there");
    let storm = Storm::start(machine.kicker());
    let mut replay = Replayer::new(host(&blank(), 99), header());
    for batch in &batches {
        replay.feed(batch).expect("the log is whole");
    }
    let mut runner = Runner::new(machine);
    while !replay.drained() || runner.at() < ledger.runner.at() {
        let before = runner.at();
        let turn = runner
            .turn(&mut replay, 256)
            .expect("the replay does not diverge");
        if replay.drained() && runner.at() == before {
            assert_eq!(turn, Turn::Waiting);
            break;
        }
    }
    storm.stop();
    assert!(replay.marks() > 20, "{} marks", replay.marks());
    assert_eq!(replay.host().outputs, ledger.tape.host().outputs);
    assert_eq!(replay.host().disk(0), ledger.tape.host().disk(0));
}

/// Marks whenever the guest has waited for a moment: there is more to compare.
fn policy() -> Policy {
    Policy {
        wait_mark: 200_000,
        ..Policy::default()
    }
}

/// Kicks a vCPU as fast as it can.
struct Storm {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Storm {
    fn start(kicker: Kicker) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    kicker.kick();
                    // The pace of the storm, not a wait for anything.
                    thread::sleep(std::time::Duration::from_micros(150));
                }
            }
        });
        Self { stop, thread }
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the storm does not panic");
    }
}
