//! What the benches share: a cluster with the ledger on it, real Redis clients, and figures that are
//! printed with their bound and make the bench fail when they miss it.

#![allow(
    dead_code,
    clippy::cast_precision_loss,
    reason = "no bench uses all of it; figures for people, none comes near 2^52"
)]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use understudy::agent::certs::Name;
use understudy::demo::cluster::Cluster;
use understudy::protocol::VmName;

/// The VM of every bench.
pub const VM: &str = "ledger";

/// The `understudy` to run: the one that was built with the bench, or `UNDERSTUDY_PROGRAM`.
pub fn program() -> PathBuf {
    std::env::var_os("UNDERSTUDY_PROGRAM")
        .map_or_else(|| env!("CARGO_BIN_EXE_understudy").into(), PathBuf::from)
}

/// A number from the environment.
pub fn setting<T: std::str::FromStr>(name: &str, otherwise: T) -> T {
    let given = std::env::var(name).ok();
    given.map_or(otherwise, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is no number that this bench can use"))
    })
}

/// Whether a guest can run here and these tools are there; says aloud what is missing.
pub fn can_run(tools: &[&str]) -> bool {
    if let Some(missing) = understudy::doctor::missing_kvm() {
        println!("SKIPPED: {missing}");
        return unless_wanted();
    }
    has_tools(tools)
}

/// Whether these Redis clients are there; says aloud what is missing.
pub fn has_tools(tools: &[&str]) -> bool {
    for tool in tools {
        let there = Command::new(tool)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
        if there.is_err() {
            println!("SKIPPED: this bench needs {tool} (package redis-tools)");
            return unless_wanted();
        }
    }
    true
}

/// In the soak a bench that cannot run has not passed.
fn unless_wanted() -> bool {
    if std::env::var_os("UNDERSTUDY_SOAK").is_some() {
        std::process::exit(1);
    }
    false
}

/// Figures with bounds.
#[derive(Default)]
pub struct Figures {
    missed: u32,
}

impl Figures {
    /// A figure that must not be above its bound.
    pub fn at_most(&mut self, what: &str, figure: f64, bound: f64, unit: &str) {
        self.judge(what, figure, "at most", bound, unit, figure <= bound);
    }

    /// A figure that must not be below its bound.
    pub fn at_least(&mut self, what: &str, figure: f64, bound: f64, unit: &str) {
        self.judge(what, figure, "at least", bound, unit, figure >= bound);
    }

    /// A ratio that must be below 1.
    pub fn below_one(&mut self, what: &str, figure: f64) {
        self.judge(what, figure, "less than", 1.0, "", figure < 1.0);
    }

    fn judge(&mut self, what: &str, figure: f64, than: &str, bound: f64, unit: &str, ok: bool) {
        let verdict = if ok { "ok" } else { "MISSED" };
        self.missed += u32::from(!ok);
        println!("{what}: {figure:.3}{unit} ({than} {bound}{unit}) {verdict}");
    }

    /// Ends the bench: with an error when a figure was missed.
    pub fn end(self) {
        if self.missed > 0 {
            println!("{} figures were MISSED", self.missed);
            std::process::exit(1);
        }
    }
}

/// The middle one. A bench without samples has measured nothing.
pub fn median(values: &mut [f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which this share of them lies.
pub fn quantile(values: &mut [f64], share: f64) -> f64 {
    assert!(!values.is_empty(), "nothing was measured");
    values.sort_by(f64::total_cmp);
    let last = values.len() - 1;
    #[allow(clippy::cast_sign_loss, reason = "shares are between 0 and 1")]
    let at = (values.len() as f64 * share) as usize;
    values[at.min(last)]
}

/// A cluster of these hosts with the ledger on all of them; the first is its primary.
pub fn protected(hosts: &[&str]) -> (Cluster, SocketAddr) {
    let names: Vec<Name> = hosts.iter().map(|n| n.parse().expect("a name")).collect();
    let mut cluster = Cluster::start(&program(), &names).expect("a cluster");
    pair(&cluster, hosts);
    let vm = VmName::new(VM).expect("a name");
    let address = cluster.publish(&vm, 6379).expect("a gateway");
    await_answer(address);
    (cluster, address)
}

/// Lets exactly these hosts have copies, and waits until they do.
pub fn pair(cluster: &Cluster, hosts: &[&str]) {
    let mut command = Command::new(program());
    command.args(["pair", VM, "--primary", hosts[0]]);
    for replica in &hosts[1..] {
        command.args(["--replica", replica]);
    }
    command.arg("--cluster");
    let paired = command.arg(cluster.folder().join("operator")).output();
    let paired = paired.expect("understudy pair");
    assert!(paired.status.success(), "{paired:?}");
}

/// Waits until the ledger answers.
pub fn await_answer(address: SocketAddr) {
    let port = address.port().to_string();
    let until = Instant::now() + Duration::from_secs(20);
    while Instant::now() < until {
        let said = Command::new("redis-cli")
            .args(["-p", &port, "ping"])
            .output()
            .expect("redis-cli");
        if said.stdout.starts_with(b"PONG") {
            return;
        }
    }
    panic!("the guest does not answer");
}
