//! Disks that are full, hang, fail, lie, or were put back from a backup.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use understudy::demo::load::Load;
use understudy::protocol::{Acks, Policy, RoleName};

use crate::disks::{Fault, FaultyDisks, SmallDisks, copy_folder, put_back};
use crate::loopback::{host_name, identity, on_kvm};
use crate::theatre::{Theatre, flawless};
use crate::{DISK, add, count, text};

/// Three copies that acknowledge from disks that can be broken, and clients that have got answers.
async fn faulty() -> (FaultyDisks, Theatre, Load) {
    let disks = FaultyDisks::new();
    let mut theatre = Theatre::open(&["a", "b", "c"], DISK).await;
    theatre.with(&disks).await;
    let load = theatre.load().await;
    theatre.answers(&load, 200).await;
    (disks, theatre, load)
}

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
        let (disks, mut theatre, load) = faulty().await;
        let b = theatre.replica().await;
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
        let (disks, mut theatre, load) = faulty().await;
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
        let (disks, mut theatre, load) = faulty().await;
        let b = theatre.replica().await;
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
        let (disks, mut theatre, load) = faulty().await;
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
        let (disks, mut theatre, load) = faulty().await;
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
