//! An operator after a disaster.

use std::time::Instant;

use understudy::protocol::{RoleName, Rule};

use crate::loopback::{host_name, identity, on_kvm, understudy};
use crate::theatre::{Theatre, flawless, policy, soak};
use crate::{add, count, text};

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
