//! Failover with real processes on loopback: a witness, agents with their VMM processes and a
//! gateway, a checked load and real Redis clients; and one process after the other dies.
//!
//! Each test has the machine to itself: patience is measured in real time here.

#[path = "common/skip.rs"]
mod skip;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::sleep;
use understudy::agent::certs::{Identity, Name};
use understudy::agent::operator::{Client, HostStatus, Request};
use understudy::cli::operator::start_vm;
use understudy::config::Config;
use understudy::demo::cluster::Cluster;
use understudy::demo::load::{Load, LoadConfig};
use understudy::protocol::{Acks, HostName, OnLoss, Policy, Record, RoleName, Rule, VmName};

const PATIENCE: Duration = Duration::from_secs(40);
const LOOK_EVERY: Duration = Duration::from_millis(20);

static ALONE: Mutex<()> = Mutex::new(());

/// A cluster with the ledger on it.
struct Theatre {
    cluster: Cluster,
    client: Client,
    vm: VmName,
    address: std::net::SocketAddr,
    _alone: MutexGuard<'static, ()>,
}

/// Runs a test where there is a KVM, on this thread.
#[track_caller]
fn on_kvm(test: impl AsyncFnOnce()) {
    if let Some(why) = understudy::doctor::missing_kvm() {
        let caller = std::panic::Location::caller();
        return skip::skipped(&caller.to_string(), &why);
    }
    Runtime::new().expect("a runtime").block_on(test());
}

fn host_name(text: &str) -> HostName {
    HostName::new(text).expect("a name")
}

fn identity(host: &HostName) -> Identity {
    Identity::host(&host.as_str().parse::<Name>().expect("a name"))
}

fn policy(rule: Rule) -> Policy {
    Policy {
        rule,
        ..Policy::default()
    }
}

impl Theatre {
    /// A cluster of these hosts, all of which hold a copy; the first is the primary.
    async fn open(hosts: &[&str], policy: Policy) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<Name> = hosts
            .iter()
            .map(|host| host.parse().expect("a name"))
            .collect();
        let program = Path::new(env!("CARGO_BIN_EXE_understudy"));
        let cluster = Cluster::start(program, &names).expect("a cluster");
        let config = Config::load(&cluster.folder().join("operator")).expect("a configuration");
        let mut theatre = Self {
            client: Client::new(&config).expect("a client"),
            cluster,
            vm: VmName::new("shop").expect("a name"),
            address: "127.0.0.1:0".parse().expect("an address"),
            _alone: alone,
        };
        theatre.all_meet().await;
        let copies: Vec<HostName> = hosts.iter().map(|host| host_name(host)).collect();
        let order = Request::Run {
            vm: theatre.vm.clone(),
            image: "ledger".to_owned(),
            hosts: copies.clone(),
            policy,
        };
        start_vm(&theatre.client, &copies[0], &theatre.vm, &order)
            .await
            .expect("starts");
        theatre.copies(hosts.len()).await;
        let vm = theatre.vm.clone();
        theatre.address = theatre.cluster.publish(&vm, 6379).expect("a gateway");
        theatre.gateway_opens().await;
        theatre
    }

    /// Looks until something is there.
    async fn until<T>(
        &mut self,
        what: &str,
        mut look: impl AsyncFnMut(&mut Self) -> Option<T>,
    ) -> T {
        let began = Instant::now();
        loop {
            if let Some(seen) = look(self).await {
                return seen;
            }
            if began.elapsed() > PATIENCE {
                let statuses = self.client.status_of_all().await;
                panic!("{what} has not happened; {statuses:#?}");
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn all_meet(&mut self) {
        self.until("the hosts' meeting", async |theatre| {
            let all = theatre.client.status_of_all().await;
            let met = |status: &HostStatus| status.peers.values().all(|up| *up);
            all.values()
                .all(|host| host.as_ref().is_ok_and(met))
                .then_some(())
        })
        .await;
    }

    async fn gateway_opens(&mut self) {
        self.until("the gateway's opening", async |theatre| {
            TcpStream::connect(theatre.address).await.ok().map(drop)
        })
        .await;
    }

    async fn record(&self) -> Option<Record> {
        self.client.record(&self.vm).await.ok()
    }

    /// Waits for a record with so many copies.
    async fn copies(&mut self, copies: usize) -> Record {
        self.until("the record of all copies", async |theatre| {
            theatre
                .record()
                .await
                .filter(|record| record.copies() == copies)
        })
        .await
    }

    async fn primary(&self) -> HostName {
        self.record().await.expect("a record").primary.host
    }

    /// What the gateway has counted, as its metrics tell.
    async fn gateway_counter(&self, name: &str) -> u64 {
        let at = self.cluster.gateway_metrics().expect("a gateway");
        let mut http = TcpStream::connect(at).await.expect("connects");
        http.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")
            .await
            .expect("asks");
        let mut text = String::new();
        http.read_to_string(&mut text).await.expect("an answer");
        let wanted = format!("understudy_gateway_{name} ");
        let value = text.lines().find_map(|line| line.strip_prefix(&wanted));
        value
            .and_then(|value| value.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    async fn role(&self, host: &HostName) -> Option<RoleName> {
        let status = self.client.status(host).await.ok()?;
        status
            .vms
            .iter()
            .find(|vm| vm.vm == self.vm)
            .map(|vm| vm.node.role)
    }

    /// The host that says of itself that it reigns.
    async fn primary_by_its_word(&self) -> Option<HostName> {
        for host in self.client.hosts() {
            if self.role(host).await == Some(RoleName::Primary) {
                return Some(host.clone());
            }
        }
        None
    }

    /// Waits until another than `old` runs the guest.
    async fn successor(&mut self, old: &HostName) -> HostName {
        let old = old.clone();
        self.until("a promotion", async |theatre| {
            let record = theatre.record().await?;
            let new = record.primary.host;
            let live = new != old && theatre.role(&new).await == Some(RoleName::Primary);
            live.then_some(new)
        })
        .await
    }

    async fn load(&self) -> Load {
        let mut config = LoadConfig::new(self.address);
        config.connections = 5;
        Load::start(config).await.expect("a load")
    }

    /// Waits until clients have got so many more answers.
    async fn answers(&mut self, load: &Load, more: u64) {
        let goal = load.acknowledged() + more;
        self.until("more answers", async |_| {
            (load.acknowledged() >= goal).then_some(())
        })
        .await;
    }

    /// The sum of the counters of [`Theatre::load`].
    async fn sum(&self) -> u64 {
        let mut stream = TcpStream::connect(self.address).await.expect("connects");
        let (mut sum, mut reply) = (0, BytesMut::new());
        for key in (0..5).flat_map(|client| (0..10).map(move |key| format!("load:{client}:{key}")))
        {
            stream
                .write_all(format!("INCRBY {key} 0\r\n").as_bytes())
                .await
                .expect("writes");
            while !reply.ends_with(b"\r\n") {
                assert!(
                    stream.read_buf(&mut reply).await.expect("reads") > 0,
                    "closed"
                );
            }
            let text = String::from_utf8_lossy(&reply.split()).into_owned();
            sum += text
                .trim()
                .trim_start_matches(':')
                .parse::<u64>()
                .expect("a number");
        }
        sum
    }

    fn kill(&mut self, host: &HostName) {
        self.cluster.kill(&identity(host)).expect("a kill");
    }

    fn start(&mut self, host: &HostName) {
        self.cluster
            .start_process(&identity(host))
            .expect("a start");
    }

    /// Whether a host's journal has a line with this reason code about the VM.
    async fn journal_has(&self, host: &HostName, code: &str) -> bool {
        let marked = format!("\"code\":\"{code}\"");
        let mut after = 0;
        loop {
            let lines = self.client.events(host, after).await.expect("a journal");
            let Some(last) = lines.last() else {
                return false;
            };
            after = last.number;
            let has = |line| {
                let line = serde_json::to_string(line).expect("a line is JSON");
                line.contains(&marked)
            };
            if lines.iter().any(has) {
                return true;
            }
        }
    }
}

async fn flawless(load: Load) {
    let report = load.finish().await;
    assert!(report.acknowledged > 0, "the load did something");
    assert!(report.is_flawless(), "{report:?}");
}

fn soak(few: u32, many: u32) -> u32 {
    if std::env::var_os("UNDERSTUDY_SOAK").is_some() {
        many
    } else {
        few
    }
}

/// The primary's agent is killed again and again; each time a fresh replica joins. Nobody loses
/// anything.
#[test]
fn primaries_die_in_a_row() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        for kill in 0..soak(3, 20) {
            theatre.answers(&load, 200).await;
            let old = theatre.primary().await;
            theatre.kill(&old);
            theatre.successor(&old).await;
            theatre.answers(&load, 100).await;
            if kill % 2 == 0 {
                theatre.cluster.forget(&identity(&old)).expect("forgets");
            }
            theatre.start(&old);
            theatre.copies(3).await;
        }
        flawless(load).await;
    });
}

/// Real Redis clients, and beside them the load that keeps every acknowledged value, see pauses and
/// nothing else: one kill, or twenty in a row.
#[test]
fn redis_clients_live_through_a_kill() {
    let there = |tool: &str| {
        Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .is_ok()
    };
    if !there("redis-cli") || !there("redis-benchmark") {
        let why = "redis-cli and redis-benchmark are not installed (package redis-tools)";
        return skip::skipped("redis_clients_live_through_a_kill", &why);
    }
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let kills = soak(1, 20);
        let (tickets, requests) = (300 * kills, 6_000 * kills);
        let cli = client(
            &theatre,
            "redis-cli",
            &format!("-r {tickets} -i 0.01 incr tickets"),
        );
        let benchmark = client(
            &theatre,
            "redis-benchmark",
            &format!("-t set,incr -c 10 -n {requests} --csv"),
        );
        let load = theatre.load().await;
        for _ in 0..kills {
            let before = ticket(&theatre);
            theatre
                .until("more tickets", async |theatre| {
                    (ticket(theatre) > before + 20).then_some(())
                })
                .await;
            let old = theatre.primary().await;
            theatre.kill(&old);
            theatre.successor(&old).await;
            theatre.answers(&load, 50).await;
            theatre.start(&old);
            theatre.copies(3).await;
        }
        let said = ended(benchmark).await;
        assert!(said.status.success(), "{said:?}");
        assert!(!contains(&said.stderr, "Error"), "{said:?}");
        let said = ended(cli).await;
        let values: Vec<u64> = String::from_utf8_lossy(&said.stdout)
            .lines()
            .map(|line| {
                line.parse()
                    .unwrap_or_else(|_| panic!("not a number: {line}"))
            })
            .collect();
        let expected: Vec<u64> = (1..=u64::from(tickets)).collect();
        assert_eq!(values, expected, "each INCR counts once");
        assert_eq!(ticket(&theatre), u64::from(tickets));
        flawless(load).await;
    });
}

/// Starts a Redis client at the gateway.
fn client(theatre: &Theatre, program: &str, words: &str) -> std::process::Child {
    Command::new(program)
        .args(["-p", &theatre.address.port().to_string()])
        .args(words.split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a client")
}

async fn ended(client: std::process::Child) -> std::process::Output {
    let ended = tokio::task::spawn_blocking(move || client.wait_with_output());
    ended.await.expect("no panic").expect("an end")
}

/// How many tickets there are.
fn ticket(theatre: &Theatre) -> u64 {
    redis(theatre, &["get", "tickets"])
        .trim()
        .parse()
        .unwrap_or_default()
}

fn contains(text: &[u8], part: &str) -> bool {
    String::from_utf8_lossy(text).contains(part)
}

fn redis(theatre: &Theatre, words: &[&str]) -> String {
    let port = theatre.address.port().to_string();
    let said = Command::new("redis-cli")
        .args(["-p", &port])
        .args(words)
        .output();
    String::from_utf8_lossy(&said.expect("redis-cli").stdout).into_owned()
}

/// The VMM process alone dies: its agent sees that at once, abdicates, and a replica goes on.
#[test]
fn the_vmm_dies_and_its_agent_abdicates() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        let old = theatre.primary().await;
        let host: Name = old.as_str().parse().expect("a name");
        assert_eq!(theatre.cluster.kill_vmms(&host).expect("a kill"), 1);
        theatre.successor(&old).await;
        theatre.answers(&load, 100).await;
        assert!(theatre.journal_has(&old, "abdicated").await);
        theatre.copies(3).await;
        flawless(load).await;
    });
}

/// The same while the witness is away: nobody can be promoted yet, so the gateway goes on sending
/// to an agent that has no guest. That agent lives on, and says what happened.
#[test]
fn the_vmm_dies_while_the_witness_is_away() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        let (old, witness) = (theatre.primary().await, theatre.cluster.witness());
        let host: Name = old.as_str().parse().expect("a name");
        theatre.cluster.kill(&witness).expect("a kill");
        assert_eq!(theatre.cluster.kill_vmms(&host).expect("a kill"), 1);
        theatre
            .until("the abdication", async |theatre| {
                theatre.journal_has(&old, "abdicated").await.then_some(())
            })
            .await;
        // The first frame of each of these comes to a host without a guest.
        let mut visitors = Vec::new();
        for _ in 0..50 {
            let visitor = TcpStream::connect(theatre.address).await;
            visitors.push(visitor.expect("the gateway accepts"));
            let status = theatre.client.status(&old).await;
            status.expect("an agent without its guest answers");
            sleep(LOOK_EVERY).await;
        }
        assert_eq!(theatre.primary_by_its_word().await, None);
        theatre.cluster.start_process(&witness).expect("a start");
        theatre.successor(&old).await;
        theatre.answers(&load, 100).await;
        theatre.copies(3).await;
        flawless(load).await;
    });
}

/// Without its witness a cluster serves; it only cannot change its record. A replica that dies
/// meanwhile makes output wait until the witness is back.
#[test]
fn a_cluster_serves_without_its_witness() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let load = theatre.load().await;
        let witness = theatre.cluster.witness();
        theatre.cluster.kill(&witness).expect("a kill");
        theatre.answers(&load, 300).await;
        let replica = host_name("b");
        theatre.kill(&replica);
        let primary = host_name("a");
        theatre
            .until("the stall's line in the journal", async |theatre| {
                theatre
                    .journal_has(&primary, "output_stalled")
                    .await
                    .then_some(())
            })
            .await;
        theatre.cluster.start_process(&witness).expect("a start");
        theatre.copies(1).await;
        theatre.answers(&load, 100).await;
        assert!(theatre.journal_has(&primary, "unprotected").await);
        theatre.start(&replica);
        theatre.copies(2).await;
        theatre.answers(&load, 100).await;
        flawless(load).await;
    });
}

/// The gateway's death breaks its clients' connections; another gateway finds everything.
#[test]
fn another_gateway_finds_everything() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        flawless(load).await;
        let counted = theatre.sum().await;
        let gateway = theatre.cluster.gateway();
        theatre.cluster.kill(&gateway).expect("a kill");
        theatre.cluster.start_process(&gateway).expect("a start");
        theatre.gateway_opens().await;
        assert_eq!(theatre.sum().await, counted);
        // The load reads what its counters hold before it goes on with them.
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        flawless(load).await;
    });
}

/// Frozen until after the promotion, then thawed: the old primary is refused everywhere, says so,
/// and comes back as a replica.
#[test]
fn a_frozen_primary_comes_back_as_a_replica() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        let old = theatre.primary().await;
        theatre.cluster.freeze(&identity(&old)).expect("freezes");
        theatre.successor(&old).await;
        theatre.answers(&load, 200).await;
        theatre.cluster.thaw(&identity(&old)).expect("thaws");
        theatre
            .until("the return of the old primary", async |theatre| {
                (theatre.role(&old).await? == RoleName::Member).then_some(())
            })
            .await;
        assert!(theatre.journal_has(&old, "deposed").await);
        // It was refused by those it spoke to; and whatever it had to say to the gateway was of a
        // term that is over.
        let new = theatre.primary().await;
        assert!(theatre.journal_has(&new, "refused").await);
        theatre.answers(&load, 100).await;
        flawless(load).await;
        let gateway = theatre.gateway_counter("term").await;
        assert_eq!(gateway, theatre.record().await.expect("a record").term.0);
        assert_eq!(theatre.gateway_counter("clients_reset").await, 0);
        // Told whether any came or not: what did was dropped and counted, never passed.
        let dropped = theatre.gateway_counter("dropped_old_term").await;
        println!("{dropped} outputs of the old term were dropped");
    });
}

/// A replica dies while the witness is there: after a second the primary goes on without it, says
/// so, at last even alone; and has them back when they return.
#[test]
fn replicas_die_and_return() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        let primary = host_name("a");
        for (replica, left) in [("b", 2), ("c", 1)] {
            theatre.kill(&host_name(replica));
            theatre.copies(left).await;
            theatre.answers(&load, 100).await;
        }
        assert!(theatre.journal_has(&primary, "replica_lost").await);
        assert!(theatre.journal_has(&primary, "unprotected").await);
        for (replica, copies) in [("b", 2), ("c", 3)] {
            theatre.start(&host_name(replica));
            theatre.copies(copies).await;
            theatre.answers(&load, 100).await;
        }
        flawless(load).await;
    });
}

/// A replica's VMM dies: its log goes on being held, the guest is not held back for it, and it is
/// as fit to succeed as before when it has executed its log once more.
#[test]
fn a_replicas_vmm_dies() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 1_000).await;
        let (primary, replica) = (host_name("a"), host_name("b"));
        let host: Name = "b".parse().expect("a name");
        assert_eq!(theatre.cluster.kill_vmms(&host).expect("a kill"), 1);
        theatre.answers(&load, 500).await;
        assert!(theatre.journal_has(&replica, "vm_failed").await);
        theatre
            .until("the replica's catching up", async |theatre| {
                let status = theatre.client.status(&primary).await.ok()?;
                let follower = status.vms.first()?.node.followers.first()?.clone();
                let tip = status.vms.first()?.node.tip.index;
                (follower.member && tip.since(follower.executed) < 500).then_some(())
            })
            .await;
        assert_eq!(theatre.record().await.expect("a record").copies(), 2);
        theatre.kill(&primary);
        theatre.successor(&primary).await;
        theatre.answers(&load, 100).await;
        flawless(load).await;
    });
}

/// Rules with three replicas: the primary is killed, one of them goes on.
#[test]
fn rules_with_three_replicas() {
    on_kvm(async || {
        for rule in [Rule::All, Rule::Quorum, Rule::Any(1)] {
            let mut theatre = Theatre::open(&["a", "b", "c", "d"], policy(rule)).await;
            let load = theatre.load().await;
            theatre.answers(&load, 100).await;
            let old = theatre.primary().await;
            theatre.kill(&old);
            theatre.successor(&old).await;
            theatre.answers(&load, 100).await;
            theatre.start(&old);
            theatre.copies(4).await;
            flawless(load).await;
        }
    });
}

/// With every core kept busy by other processes nobody is suspected for long, and nobody promoted.
/// (`cargo bench --bench calm` does it for ten minutes.)
#[test]
fn busy_cores_promote_nobody() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        let before = theatre.record().await.expect("a record").term;
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let busy_before = busy_ticks();
        let began = Instant::now();
        let mut hogs: Vec<_> = (0..cores)
            .map(|_| {
                Command::new("timeout")
                    .args(["15", "sh", "-c", "while :; do :; done"])
                    .spawn()
                    .expect("a busy process")
            })
            .collect();
        theatre
            .until("the end of the busy processes", async |_| {
                let over =
                    |hog: &mut std::process::Child| hog.try_wait().is_ok_and(|e| e.is_some());
                hogs.iter_mut().all(over).then_some(())
            })
            .await;
        let busy = u128::from(busy_ticks() - busy_before) * 10 / cores as u128;
        let share = busy * 100 / began.elapsed().as_millis();
        assert!(share > 90, "the cores were {share} % busy only");
        theatre.answers(&load, 100).await;
        assert_eq!(theatre.record().await.expect("a record").term, before);
        flawless(load).await;
    });
}

/// The rules that need fewer than all copies go on without a replica, and promote safely.
#[test]
fn rules_that_need_fewer_copies() {
    on_kvm(async || {
        for rule in [Rule::Quorum, Rule::Any(1)] {
            let stall = Policy {
                on_loss: OnLoss::Stall,
                ..policy(rule)
            };
            let mut theatre = Theatre::open(&["a", "b", "c"], stall).await;
            let load = theatre.load().await;
            // One replica is gone: nothing waits for it.
            let replica = host_name("c");
            theatre.kill(&replica);
            theatre.answers(&load, 200).await;
            theatre.start(&replica);
            theatre
                .until("the replica's return", async |theatre| {
                    (theatre.role(&replica).await? == RoleName::Member).then_some(())
                })
                .await;
            let old = theatre.primary().await;
            theatre.kill(&old);
            theatre.successor(&old).await;
            theatre.answers(&load, 100).await;
            flawless(load).await;
        }
    });
}

/// A planned switchover loses nothing and breaks nothing.
#[test]
fn a_planned_switchover() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let load = theatre.load().await;
        for (from, to) in [("a", "b"), ("b", "a")] {
            theatre.answers(&load, 100).await;
            let order = Request::Switchover {
                vm: theatre.vm.clone(),
                to: Some(host_name(to)),
            };
            theatre
                .client
                .order(&host_name(from), &order)
                .await
                .expect("is taken");
            assert_eq!(theatre.successor(&host_name(from)).await, host_name(to));
            theatre.copies(2).await;
        }
        theatre.answers(&load, 100).await;
        flawless(load).await;
    });
}

/// Everything is killed at once. What was acknowledged is there again afterwards: by the synced
/// log, or by the synced disk of the last primary.
#[test]
fn a_cold_start_keeps_what_was_acknowledged() {
    on_kvm(async || {
        for acks in [Acks::Disk, Acks::Memory] {
            let mut theatre = Theatre::open(
                &["a", "b"],
                Policy {
                    acks,
                    ..policy(Rule::All)
                },
            )
            .await;
            let load = theatre.load().await;
            theatre.answers(&load, 100).await;
            flawless(load).await;
            let counted = theatre.sum().await;
            let gateway = theatre.cluster.gateway();
            let witness = theatre.cluster.witness();
            for who in [
                gateway.clone(),
                identity(&host_name("a")),
                identity(&host_name("b")),
            ] {
                theatre.cluster.kill(&who).expect("a kill");
            }
            theatre.cluster.kill(&witness).expect("a kill");
            theatre.cluster.start_process(&witness).expect("a start");
            for host in ["a", "b"] {
                theatre.start(&host_name(host));
            }
            theatre
                .until("a primary", async |theatre| {
                    let primary = theatre.record().await?.primary.host;
                    (theatre.role(&primary).await? == RoleName::Primary).then_some(())
                })
                .await;
            theatre.copies(2).await;
            theatre.cluster.start_process(&gateway).expect("a start");
            theatre.gateway_opens().await;
            assert_eq!(theatre.sum().await, counted, "{acks:?}");
            let load = theatre.load().await;
            theatre.answers(&load, 50).await;
            flawless(load).await;
        }
    });
}

/// What all cores have done so far, in hundredths of a second.
fn busy_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/stat").expect("/proc/stat");
    let line = stat.lines().next().expect("a line of all cores");
    let ticks = line.split_whitespace().skip(1).take(8);
    let ticks: Vec<u64> = ticks.map(|t| t.parse().expect("ticks")).collect();
    // All but idle and waiting for a disk.
    ticks.iter().sum::<u64>() - ticks[3] - ticks[4]
}
