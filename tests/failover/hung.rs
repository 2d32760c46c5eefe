//! VMM processes that do not die and do nothing: `SIGSTOP`, which no process can ignore, has them hang
//! as a kernel does that does not let them go on.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use understudy::agent::certs::Name;
use understudy::protocol::{HostName, Rule};

use super::loopback::{host_name, on_kvm};
use super::theatre::{Theatre, flawless, policy};

impl Theatre {
    /// Stops the VMM process on this host.
    fn stop_vmm(&self, host: &HostName) -> Pid {
        let name: Name = host.as_str().parse().expect("a name");
        let agent = understudy::agent::certs::Identity::host(&name);
        let vmms = self.cluster.children(&agent).expect("processes");
        let [vmm] = vmms[..] else {
            panic!("{host} has VMM processes {vmms:?}");
        };
        kill(vmm, Signal::SIGSTOP).expect("a signal");
        vmm
    }
}

/// The primary's VMM process hangs: its agent ends it and abdicates, and a replica goes on.
#[test]
fn a_primary_whose_vmm_hangs_abdicates() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b", "c"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        let old = theatre.primary().await;
        theatre.stop_vmm(&old);
        theatre.successor(&old).await;
        theatre.answers(&load, 100).await;
        assert!(theatre.journal_has(&old, "vm_failed").await);
        assert!(theatre.journal_has(&old, "abdicated").await);
        theatre.copies(3).await;
        flawless(load).await;
    });
}

/// A replica's VMM process hangs: another one replays in its place, and comes as far as the primary.
#[test]
fn a_replica_whose_vmm_hangs_replays_anew() {
    on_kvm(async || {
        let mut theatre = Theatre::open(&["a", "b"], policy(Rule::All)).await;
        let load = theatre.load().await;
        theatre.answers(&load, 100).await;
        let replica = host_name("b");
        let hung = theatre.stop_vmm(&replica);
        theatre
            .until("another VMM process", async |theatre| {
                let (_, vm) = theatre.seen(&replica).await?;
                let pid = vm.guest?.pid?;
                (pid != hung.as_raw().unsigned_abs()).then_some(())
            })
            .await;
        assert!(theatre.journal_has(&replica, "vm_failed").await);
        theatre.answers(&load, 100).await;
        let primary = host_name("a");
        theatre
            .until("the replica's catching up", async |theatre| {
                let (_, vm) = theatre.seen(&primary).await?;
                let follower = vm.node.followers.first()?;
                let behind = vm.node.tip.index.since(follower.executed);
                (follower.member && behind < 500).then_some(())
            })
            .await;
        flawless(load).await;
    });
}
