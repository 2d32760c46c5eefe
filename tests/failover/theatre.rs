//! A cluster with the ledger on it, its gateway, and a load that checks every acknowledgement.

use std::net::SocketAddr;
use std::ops::{Deref, DerefMut};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use understudy::demo::load::{Load, LoadConfig};
use understudy::protocol::{HostName, Policy, RoleName, Rule};

use super::loopback::Loopback;

/// A cluster with the ledger on it.
pub struct Theatre {
    site: Loopback,
    /// Where its clients come.
    pub address: SocketAddr,
}

impl Deref for Theatre {
    type Target = Loopback;

    fn deref(&self) -> &Loopback {
        &self.site
    }
}

impl DerefMut for Theatre {
    fn deref_mut(&mut self) -> &mut Loopback {
        &mut self.site
    }
}

pub fn policy(rule: Rule) -> Policy {
    Policy {
        rule,
        ..Policy::default()
    }
}

impl Theatre {
    /// A cluster of these hosts, all of which hold a copy; the first is the primary.
    pub async fn open(hosts: &[&str], policy: Policy) -> Self {
        let mut site = Loopback::start(hosts);
        site.run("ledger", policy).await;
        site.copies(hosts.len()).await;
        let vm = site.vm.clone();
        let address = site.cluster.publish(&vm, 6379).expect("a gateway");
        let mut theatre = Self { site, address };
        theatre.gateway_opens().await;
        theatre
    }

    pub async fn gateway_opens(&mut self) {
        let address = self.address;
        self.until("the gateway's opening", async |_| {
            TcpStream::connect(address).await.ok().map(drop)
        })
        .await;
    }

    #[allow(dead_code, reason = "not every test has a use for it")]
    /// What the gateway has counted, as its metrics tell.
    pub async fn gateway_counter(&self, name: &str) -> u64 {
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

    #[allow(dead_code, reason = "not every test has a use for it")]
    /// The host that says of itself that it reigns.
    pub async fn primary_by_its_word(&self) -> Option<HostName> {
        for host in self.client.hosts() {
            if self.role(host).await == Some(RoleName::Primary) {
                return Some(host.clone());
            }
        }
        None
    }

    pub async fn load(&self) -> Load {
        let mut config = LoadConfig::new(self.address);
        config.connections = 5;
        Load::start(config).await.expect("a load")
    }

    /// Waits until clients have got so many more answers.
    pub async fn answers(&mut self, load: &Load, more: u64) {
        let goal = load.acknowledged() + more;
        self.until("more answers", async |_| {
            (load.acknowledged() >= goal).then_some(())
        })
        .await;
    }

    #[allow(dead_code, reason = "not every test has a use for it")]
    /// The sum of the counters of [`Theatre::load`].
    pub async fn sum(&self) -> u64 {
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
}

pub async fn flawless(load: Load) {
    let report = load.finish().await;
    assert!(report.acknowledged > 0, "the load did something");
    assert!(report.is_flawless(), "{report:?}");
}

pub fn soak(few: u32, many: u32) -> u32 {
    if std::env::var_os("UNDERSTUDY_SOAK").is_some() {
        many
    } else {
        few
    }
}
