//! What is not believed without proof, shown with real processes: disks that are full, hang, lie or
//! were put back from a backup, a witness that was set back or emptied, an operator after a disaster.
//!
//! Each test has the machine to itself: patience is measured in real time here.

#[path = "../common/loopback.rs"]
mod loopback;
#[path = "../common/skip.rs"]
mod skip;
#[path = "../failover/theatre.rs"]
mod theatre;

mod disks;

use std::net::SocketAddr;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use replay_log::Term;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use understudy::agent::certs::Identity;
use understudy::protocol::{Acks, HostName, Incarnation, OnLoss, Policy, RoleName, Rule};

use disks::{Fault, FaultyDisks, SmallDisks, copy_folder, put_back};
use loopback::{host_name, identity, on_kvm, understudy};
use theatre::{Theatre, flawless, policy, soak};

const DISK: Policy = Policy {
    rule: Rule::All,
    acks: Acks::Disk,
    on_loss: OnLoss::Shrink,
    min_copies: 1,
    log_full: understudy::protocol::LogFull::Stall,
};

fn text(output: &Output) -> String {
    let (out, err) = (&output.stdout, &output.stderr);
    format!(
        "{}{}",
        String::from_utf8_lossy(out),
        String::from_utf8_lossy(err)
    )
}

impl Theatre {
    /// Runs a command of an operator to its end.
    fn order(&self, args: &[&str]) -> Output {
        let cluster = self.cluster.folder().display().to_string();
        let args: Vec<_> = args
            .iter()
            .copied()
            .chain(["--cluster", &cluster])
            .collect();
        understudy(&args)
    }

    /// Whether `status` says something.
    async fn status_says(&mut self, what: &str, words: &str) {
        self.until(what, async |site| {
            let cluster = site.cluster.folder().display().to_string();
            let printed = text(&understudy(&["status", "--cluster", &cluster]));
            printed.contains(words).then_some(())
        })
        .await;
    }

    /// The holding that a host has now.
    async fn incarnation(&mut self, host: &HostName) -> Incarnation {
        self.until("the host's answer", async |site| {
            Some(site.seen(host).await?.1.node.incarnation)
        })
        .await
    }

    fn stop(&mut self, who: &Identity) {
        self.cluster.kill(who).expect("a kill");
    }

    fn start(&mut self, who: &Identity) {
        self.cluster.start_process(who).expect("a start");
    }

    fn data(&self, who: &Identity) -> std::path::PathBuf {
        self.cluster.data(who).expect("a folder")
    }

    /// Starts every process of the cluster again with disks that can be broken.
    async fn with(&mut self, disks: &FaultyDisks) {
        for (name, value) in disks.environment() {
            self.cluster.set_environment(name, value);
        }
        let witness = self.cluster.witness();
        self.stop(&witness);
        self.start(&witness);
        // One after the other: somebody always has the log.
        for host in ["b", "c", "a"] {
            let host = host_name(host);
            self.kill(&host);
            self.start_host(&host);
            // As what it is now: the record may still name what it was.
            self.until("the host's return", async |site| {
                let now = site.seen(&host).await?.1.node.incarnation;
                let record = site.record().await?;
                let named = record.copy_on(&host)?.incarnation;
                (named == now && record.copies() == 3).then_some(())
            })
            .await;
        }
    }
}

/// Adds to a counter; what the guest says it is now. `None`: no answer in time.
async fn add_at(address: SocketAddr, more: u64) -> Option<u64> {
    let ask = async {
        let mut stream = TcpStream::connect(address).await.ok()?;
        let command = format!(
            "INCRBY n {more}
"
        );
        stream.write_all(command.as_bytes()).await.ok()?;
        let mut reply = BytesMut::new();
        while !reply.ends_with(
            b"
",
        ) {
            if stream.read_buf(&mut reply).await.ok()? == 0 {
                return None;
            }
        }
        let text = String::from_utf8_lossy(&reply).into_owned();
        text.trim().strip_prefix(':')?.parse().ok()
    };
    timeout(Duration::from_secs(2), ask).await.ok().flatten()
}

/// The same for a guest that answers.
async fn add(theatre: &Theatre, more: u64) -> Option<u64> {
    add_at(theatre.address, more).await
}

/// What the counter is, as soon as the guest answers.
async fn count(theatre: &mut Theatre) -> u64 {
    let address = theatre.address;
    theatre
        .until("an answer of the guest", async |_| add_at(address, 0).await)
        .await
}

// ---- disks ----

/// A backup of a replica's folder is put back after everybody has died: what it lacks was acknowledged.
#[test]
fn a_folder_from_a_backup_is_not_promoted_by_itself() {
    on_kvm(async || {
        for acks in [Acks::Memory, Acks::Disk] {
            let policy = Policy { acks, ..DISK };
            let mut theatre = Theatre::open(&["a", "b", "c"], policy).await;
            let c = host_name("c");
            theatre.kill(&c);
            let data = theatre.data(&identity(&c));
            let backup = tempfile::tempdir().expect("a folder");
            let backup = backup.path().join("data");
            copy_folder(&data, &backup);
            theatre.start_host(&c);
            theatre.copies(3).await;
            for n in 1..=100 {
                assert_eq!(add(&theatre, 1).await, Some(n));
            }
            for host in ["a", "b", "c"] {
                theatre.kill(&host_name(host));
            }
            put_back(&backup, &data);
            theatre.start_host(&c);
            theatre
                .until("a word of what is lost", async |site| {
                    let lost = site.journal_has(&c, "holding_lost").await
                        || site.journal_has(&c, "waiting").await;
                    lost.then_some(())
                })
                .await;
            assert_ne!(theatre.role(&c).await, Some(RoleName::Primary), "{acks:?}");
            assert_eq!(theatre.primary().await, host_name("a"), "{acks:?}");
            // Whoever has the log is back: nothing is lost.
            for host in ["a", "b"] {
                theatre.start_host(&host_name(host));
            }
            if acks == Acks::Disk {
                assert_eq!(count(&mut theatre).await, 100);
            }
        }
    });
}

/// Equal disks fill in the same second. Nothing is dropped, and with room everything goes on.
#[test]
fn full_disks_everywhere_cost_nothing_but_time() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
        let hosts = ["a", "b", "c"].map(host_name);
        let load = theatre.load().await;
        theatre.answers(&load, 200).await;
        for host in &hosts {
            theatre.kill(host);
        }
        // The same folders, on disks that have hardly more room than what is on them.
        let folders = hosts.clone().map(|host| theatre.data(&identity(&host)));
        let aside = tempfile::tempdir().expect("a folder");
        for (host, folder) in hosts.iter().zip(&folders) {
            std::fs::rename(folder, aside.path().join(host.as_str())).expect("moves");
        }
        let disks = SmallDisks::mount(&folders, "24m");
        drop(load);
        for host in &hosts {
            theatre.start_host(host);
        }
        let vm = understudy::protocol::VmName::new("full").expect("a name");
        let ran = theatre.order(&[
            "pair",
            "full",
            "--image",
            "ledger",
            "--primary",
            "a",
            "--replica",
            "b",
            "--replica",
            "c",
            "--acks",
            "disk",
        ]);
        assert!(ran.status.success(), "{}", text(&ran));
        theatre.vm = vm.clone();
        let gateway = theatre.cluster.gateway();
        theatre.stop(&gateway);
        theatre.address = theatre.cluster.publish(&vm, 6379).expect("a gateway");
        theatre.gateway_opens().await;
        let written = fill(&theatre).await;
        theatre
            .until("a full disk", async |site| {
                let full = site.journal_has(&host_name("a"), "store_full").await
                    || site.journal_has(&host_name("b"), "store_full").await;
                full.then_some(())
            })
            .await;
        disks.grow("256m");
        count(&mut theatre).await;
        for host in &hosts {
            assert!(
                !theatre.journal_has(host, "resynchronising").await,
                "{host} gave up its log"
            );
        }
        assert!(written > 0);
    });
}

/// Writes what does not compress until there are no answers any more; how many there were.
async fn fill(theatre: &Theatre) -> u32 {
    let mut answers = 0;
    let mut noise = 0x9e37_79b9_7f4a_7c15_u64;
    let Ok(mut stream) = TcpStream::connect(theatre.address).await else {
        return 0;
    };
    loop {
        let value: Vec<u8> = (0..64 << 10)
            .map(|_| {
                noise ^= noise << 13;
                noise ^= noise >> 7;
                noise ^= noise << 17;
                b'a' + (noise >> 33) as u8 % 26
            })
            .collect();
        let head = format!("*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${}\r\n", value.len());
        let set = async {
            stream.write_all(head.as_bytes()).await.ok()?;
            stream.write_all(&value).await.ok()?;
            stream.write_all(b"\r\n").await.ok()?;
            let mut reply = [0; 5];
            stream.read_exact(&mut reply).await.ok()
        };
        match timeout(Duration::from_secs(4), set).await {
            Ok(Some(_)) => answers += 1,
            _ => return answers,
        }
    }
}

/// A disk that does not come back: its host answers, and stores nothing.
#[test]
fn a_replica_whose_disk_hangs_is_lost_and_one_that_comes_back_joins_again() {
    on_kvm(async || {
        let disks = FaultyDisks::new();
        let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
        theatre.with(&disks).await;
        let load = theatre.load().await;
        theatre.answers(&load, 200).await;
        let b = host_name("b");
        disks.break_disk(&theatre.data(&identity(&b)), Fault::Hangs);
        theatre.copies(2).await;
        theatre.answers(&load, 200).await;
        disks.repair();
        theatre.copies(3).await;
        flawless(load).await;
    });
}

#[test]
fn a_primary_whose_disk_hangs_lets_another_go_on() {
    on_kvm(async || {
        let disks = FaultyDisks::new();
        let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
        theatre.with(&disks).await;
        let load = theatre.load().await;
        theatre.answers(&load, 200).await;
        let old = theatre.primary().await;
        disks.break_disk(&theatre.data(&identity(&old)), Fault::Hangs);
        theatre.successor(&old).await;
        theatre.answers(&load, 200).await;
        disks.repair();
        theatre.copies(3).await;
        flawless(load).await;
    });
}

/// What a failed sync leaves on a disk nobody knows. The log is set aside, and taken anew.
#[test]
fn a_failed_sync_makes_a_log_doubtful_and_deletes_nothing() {
    on_kvm(async || {
        let disks = FaultyDisks::new();
        let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
        theatre.with(&disks).await;
        let load = theatre.load().await;
        theatre.answers(&load, 200).await;
        let b = host_name("b");
        let folder = theatre.data(&identity(&b));
        disks.break_disk(&folder.join("vms/shop/log"), Fault::Fails);
        theatre
            .until("a doubtful log", async |site| {
                site.journal_has(&b, "store_failed").await.then_some(())
            })
            .await;
        disks.repair();
        theatre
            .until("what was there, kept aside", async |_| {
                let mut entries = std::fs::read_dir(folder.join("vms/shop")).ok()?.flatten();
                entries
                    .any(|entry| entry.file_name().to_string_lossy().contains("aside"))
                    .then_some(())
            })
            .await;
        theatre
            .until("b as a copy again", async |site| {
                let now = site.seen(&b).await?.1.node.incarnation;
                let named = site.record().await?.copy_on(&b)?.incarnation;
                (named == now).then_some(())
            })
            .await;
        flawless(load).await;
    });
}

/// The process ends after the failed sync, and before anything else of it is durable. The next one
/// reads a whole log in the page cache.
#[test]
fn a_doubtful_log_is_no_better_in_the_next_process() {
    on_kvm(async || {
        let disks = FaultyDisks::new();
        let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
        theatre.with(&disks).await;
        let load = theatre.load().await;
        theatre.answers(&load, 200).await;
        let b = theatre.replica().await;
        let held = theatre.incarnation(&b).await;
        let vm = theatre.data(&identity(&b)).join("vms/shop");
        disks.break_disks(&[
            (&vm.join("log"), Fault::Fails),
            (&vm.join("state"), Fault::Hangs),
        ]);
        theatre
            .until("a doubtful log", async |site| {
                site.journal_has(&b, "store_failed").await.then_some(())
            })
            .await;
        theatre.kill(&b);
        disks.repair();
        theatre.start_host(&b);
        theatre
            .until("what was there, kept aside", async |site| {
                let aside = vm.join("log.aside-1").exists();
                (aside && site.journal_has(&b, "log_set_aside").await).then_some(())
            })
            .await;
        theatre.copies(3).await;
        assert_ne!(theatre.incarnation(&b).await, held);
        flawless(load).await;
    });
}

/// The same where not even a mark could be left beside the log: what is believed is what the disk has.
#[test]
fn what_only_the_page_cache_has_is_not_believed() {
    on_kvm(async || {
        let disks = FaultyDisks::new();
        let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
        theatre.with(&disks).await;
        let load = theatre.load().await;
        theatre.answers(&load, 200).await;
        let b = theatre.replica().await;
        let held = theatre.incarnation(&b).await;
        let log = theatre.data(&identity(&b)).join("vms/shop/log");
        theatre.kill(&b);
        disks.break_disk(&log, Fault::Lost);
        theatre.start_host(&b);
        theatre
            .until("another holding", async |site| {
                let now = site.seen(&b).await?.1.node.incarnation;
                (now != held).then_some(())
            })
            .await;
        assert!(theatre.journal_has(&b, "holding_lost").await);
        disks.repair();
        theatre.copies(3).await;
        flawless(load).await;
    });
}

// ---- the witness ----

/// A swap that takes longer than hosts used to wait is done all the same.
#[test]
fn a_slow_witness_delays_a_promotion_and_does_not_prevent_it() {
    on_kvm(async || {
        let disks = FaultyDisks::new();
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        theatre.with(&disks).await;
        let old = theatre.primary().await;
        let before = theatre.record().await.expect("a record").term;
        let witness = theatre.cluster.witness();
        disks.break_disk(&theatre.data(&witness), Fault::Slow(1_200));
        theatre.kill(&old);
        theatre.successor(&old).await;
        let after = theatre.record().await.expect("a record").term;
        assert!(
            after <= Term(before.0 + 2),
            "{before} to {after}: terms are not wasted"
        );
        count(&mut theatre).await;
    });
}

/// The witness's folder is put back from a backup while everything runs; then the primary dies.
#[test]
fn a_witness_that_was_set_back_is_named_and_recovers_by_an_order() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let witness = theatre.cluster.witness();
        let data = theatre.data(&witness);
        let backup = tempfile::tempdir().expect("a folder");
        let backup = backup.path().join("data");
        theatre.stop(&witness);
        copy_folder(&data, &backup);
        theatre.start(&witness);
        let first = theatre.primary().await;
        theatre.kill(&first);
        let second = theatre.successor(&first).await;
        theatre.start_host(&first);
        theatre.copies(3).await;
        theatre.stop(&witness);
        put_back(&backup, &data);
        theatre.start(&witness);
        theatre
            .status_says("a word about the witness", "witness recover")
            .await;
        assert_eq!(add(&theatre, 1).await, Some(1), "serving goes on");
        theatre.kill(&second);
        let recovered = recover(&mut theatre, Some(&second)).await;
        assert!(recovered.contains("shop"), "{recovered}");
        theatre.successor(&second).await;
        assert_eq!(count(&mut theatre).await, 1, "nothing is lost");
    });
}

/// Gives the witness the newest record that hosts have; what the order says.
async fn recover(theatre: &mut Theatre, without: Option<&HostName>) -> String {
    theatre
        .until("the witness's recovery", async |site| {
            let cluster = site.cluster.folder().display().to_string();
            let mut args = vec!["witness", "recover", "--cluster", &cluster];
            if let Some(host) = without {
                args.extend(["--without", host.as_str()]);
            }
            let done = understudy(&args);
            done.status.success().then(|| text(&done))
        })
        .await
}

#[test]
fn a_witness_that_lost_its_disk_gets_its_records_back() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        assert_eq!(add(&theatre, 1).await, Some(1));
        let witness = theatre.cluster.witness();
        theatre.stop(&witness);
        theatre.cluster.forget(&witness).expect("forgets");
        theatre.start(&witness);
        theatre
            .status_says("a word about the witness", "witness recover")
            .await;
        // A VM of this name is not begun anew: three hosts have its log.
        let again = theatre.order(&[
            "pair",
            "shop",
            "--image",
            "ledger",
            "--primary",
            "a",
            "--replica",
            "b",
        ]);
        assert_eq!(again.status.code(), Some(1), "{}", text(&again));
        recover(&mut theatre, None).await;
        let old = theatre.primary().await;
        theatre.kill(&old);
        theatre.successor(&old).await;
        assert_eq!(count(&mut theatre).await, 1);
    });
}

#[test]
fn a_second_process_on_a_folder_is_refused() {
    on_kvm(async || {
        let theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        for (who, command) in [
            (theatre.cluster.witness(), "witness"),
            (identity(&host_name("a")), "agent"),
        ] {
            let folder = theatre.data(&who);
            let folder = folder.parent().expect("the process's folder");
            let second = Command::new(env!("CARGO_BIN_EXE_understudy"))
                .args([command, "--config"])
                .arg(folder)
                .output()
                .expect("it starts");
            assert!(!second.status.success(), "{command}");
            assert!(
                text(&second).contains("is used by process"),
                "{}",
                text(&second)
            );
        }
    });
}

// ---- after disasters ----

/// Everybody loses power, and one host does not come back.
#[test]
fn after_a_power_failure_an_order_goes_on_without_the_host_that_is_gone() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let (a, b) = (host_name("a"), host_name("b"));
        theatre.kill(&a);
        theatre.kill(&b);
        theatre.start_host(&a);
        theatre
            .until("what it waits for", async |site| {
                site.journal_has(&a, "waiting").await.then_some(())
            })
            .await;
        theatre
            .status_says("the order that helps", "--accept-loss")
            .await;
        let went = theatre.order(&["switchover", "shop", "--to", "a", "--accept-loss"]);
        assert!(went.status.success(), "{}", text(&went));
        theatre
            .until("a primary", async |site| {
                (site.role(&a).await == Some(RoleName::Primary)).then_some(())
            })
            .await;
        count(&mut theatre).await;
    });
}

/// The hosts that the record names are gone for good. Another one has an old log, and nobody else may
/// say that it shall reign than an operator.
#[test]
fn a_host_that_the_record_does_not_name_goes_on_by_an_order() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        assert_eq!(add(&theatre, 1).await, Some(1));
        let first = theatre.primary().await;
        let mut others = ["a", "b", "c"].map(host_name).into_iter();
        let kept = others.find(|host| *host != first).expect("three hosts");
        let left = others.find(|host| *host != first).expect("three hosts");
        let pair = [
            "pair",
            "shop",
            "--primary",
            first.as_str(),
            "--replica",
            kept.as_str(),
        ];
        let paired = theatre.order(&pair);
        assert!(paired.status.success(), "{}", text(&paired));
        assert_eq!(add(&theatre, 1).await, Some(2));
        theatre.kill(&first);
        theatre.kill(&kept);
        let order = ["switchover", "shop", "--to", left.as_str(), "--accept-loss"];
        let went = theatre.order(&order);
        assert!(went.status.success(), "{}", text(&went));
        assert!(text(&went).contains("names"), "{}", text(&went));
        assert_eq!(theatre.primary().await, left);
        assert_eq!(
            count(&mut theatre).await,
            1,
            "what it had when it was left out"
        );
    });
}

/// All disks are lost. The VM's name is not, and an order boots it anew.
#[test]
fn a_vm_of_which_nothing_is_left_starts_over_by_an_order() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let hosts = ["a", "b"].map(host_name);
        for host in &hosts {
            theatre.kill(host);
            theatre.cluster.forget(&identity(host)).expect("forgets");
        }
        for host in &hosts {
            theatre.start_host(host);
        }
        let order = [
            "pair",
            "shop",
            "--image",
            "ledger",
            "--primary",
            "a",
            "--start-over",
        ];
        theatre
            .until("a start from the image", async |site| {
                let cluster = site.cluster.folder().display().to_string();
                let args = order.iter().copied().chain(["--cluster", &cluster]);
                let done = understudy(&args.collect::<Vec<_>>());
                done.status.success().then_some(())
            })
            .await;
        theatre.copies(2).await;
        assert_eq!(count(&mut theatre).await, 0, "everything it had is lost");
    });
}

/// The primary dies, and its successor as soon as the record names it; both are healthy hosts' deaths,
/// and the third has everything.
#[test]
fn a_successor_that_dies_at_once_has_left_nobody_out() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        for _ in 0..soak(2, 10) {
            theatre.answers(&load, 100).await;
            let first = theatre.primary().await;
            theatre.kill(&first);
            let second = theatre
                .until("a new record", async |site| {
                    let new = site.record().await?.primary.host;
                    (new != first).then_some(new)
                })
                .await;
            theatre.kill(&second);
            let began = Instant::now();
            let third = theatre.successor(&second).await;
            println!(
                "{third} runs the guest {:?} after {second} died",
                began.elapsed()
            );
            theatre.answers(&load, 50).await;
            for host in [&first, &second] {
                theatre.start_host(host);
            }
            theatre.copies(3).await;
        }
        flawless(load).await;
    });
}
