//! Failover with real processes on loopback: a witness, agents with their VMM processes and a
//! gateway, a checked load and real Redis clients; and one process after the other dies.
//!
//! Each test has the machine to itself: patience is measured in real time here.

#[path = "../common/loopback.rs"]
mod loopback;
#[path = "../common/skip.rs"]
mod skip;

mod hung;
mod theatre;

use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Instant;

use tokio::net::TcpStream;
use tokio::time::sleep;
use understudy::agent::certs::Name;
use understudy::agent::operator::Request;
use understudy::protocol::{Acks, OnLoss, Policy, RoleName, Rule};

use loopback::{LOOK_EVERY, host_name, identity, on_kvm};
use theatre::{Theatre, flawless, policy, soak};

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
            theatre.start_host(&old);
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
        let address = theatre.address;
        for _ in 0..kills {
            let before = ticket(address);
            theatre
                .until("more tickets", async |_| {
                    (ticket(address) > before + 20).then_some(())
                })
                .await;
            let old = theatre.primary().await;
            theatre.kill(&old);
            theatre.successor(&old).await;
            theatre.answers(&load, 50).await;
            theatre.start_host(&old);
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
        assert_eq!(ticket(address), u64::from(tickets));
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
fn ticket(at: SocketAddr) -> u64 {
    redis(at, &["get", "tickets"])
        .trim()
        .parse()
        .unwrap_or_default()
}

fn contains(text: &[u8], part: &str) -> bool {
    String::from_utf8_lossy(text).contains(part)
}

fn redis(at: SocketAddr, words: &[&str]) -> String {
    let port = at.port().to_string();
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
        theatre.start_host(&replica);
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
            theatre.start_host(&host_name(replica));
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
            theatre.start_host(&old);
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
            theatre.start_host(&replica);
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
                theatre.start_host(&host_name(host));
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
