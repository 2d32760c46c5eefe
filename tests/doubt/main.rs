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
mod faults;
mod orders;
mod records;

use std::net::SocketAddr;
use std::process::Output;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use understudy::agent::certs::Identity;
use understudy::protocol::{Acks, HostName, Incarnation, OnLoss, Policy, Rule};

use disks::FaultyDisks;
use loopback::{host_name, understudy};
use theatre::Theatre;

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
