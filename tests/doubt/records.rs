//! A witness that is slow, was set back or has lost its disk; a folder that two processes want.

use std::process::Command;

use replay_log::Term;
use understudy::protocol::{HostName, Rule};

use crate::disks::{Fault, FaultyDisks, copy_folder, put_back};
use crate::loopback::{host_name, identity, on_kvm, understudy};
use crate::theatre::{Theatre, policy};
use crate::{add, count, text};

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
