//! A cluster on loopback: a witness, agents with their VMM processes, a gateway, each of them a real
//! process, and one VM; ways to look at how they do, and to wait until they do it.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::time::sleep;
use understudy::agent::certs::{Identity, Name};
use understudy::agent::operator::{Client, HostStatus, Request, VmStatus};
use understudy::cli::operator::start_vm;
use understudy::config::Config;
use understudy::demo::cluster::Cluster;
use understudy::protocol::{HostName, Policy, Record, RoleName, Time, VmName};

use super::skip;

const PATIENCE: Duration = Duration::from_secs(40);
pub const LOOK_EVERY: Duration = Duration::from_millis(20);

static ALONE: Mutex<()> = Mutex::new(());

/// Runs a test where there is a KVM, on this thread.
#[track_caller]
pub fn on_kvm(test: impl AsyncFnOnce()) {
    if let Some(why) = understudy::doctor::missing_kvm() {
        let caller = std::panic::Location::caller();
        return skip::skipped(&caller.to_string(), &why);
    }
    Runtime::new().expect("a runtime").block_on(test());
}

pub fn host_name(text: &str) -> HostName {
    HostName::new(text).expect("a name")
}

pub fn identity(host: &HostName) -> Identity {
    Identity::host(&host.as_str().parse::<Name>().expect("a name"))
}

/// Runs the program to its end.
pub fn understudy(args: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_understudy"));
    program.args(args).output().expect("the program starts")
}

/// A cluster, and the name of its VM. Patience is measured in real time here, so it has the machine
/// to itself.
pub struct Loopback {
    pub cluster: Cluster,
    pub client: Client,
    pub vm: VmName,
    hosts: Vec<HostName>,
    _alone: MutexGuard<'static, ()>,
}

impl Loopback {
    /// Starts a witness and the agents of these hosts.
    pub fn start(hosts: &[&str]) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let names: Vec<Name> = hosts
            .iter()
            .map(|host| host.parse().expect("a name"))
            .collect();
        let program = Path::new(env!("CARGO_BIN_EXE_understudy"));
        let cluster = Cluster::start(program, &names).expect("a cluster");
        let config = Config::load(&cluster.folder().join("operator")).expect("a configuration");
        Self {
            client: Client::new(&config).expect("a client"),
            cluster,
            vm: VmName::new("shop").expect("a name"),
            hosts: hosts.iter().map(|host| host_name(host)).collect(),
            _alone: alone,
        }
    }

    /// Starts the VM, with a copy on every host; the first one is its primary.
    pub async fn run(&mut self, image: &str, policy: Policy) {
        self.until("the hosts' meeting", async |site| {
            let all = site.client.status_of_all().await;
            let met = |status: &HostStatus| status.peers.values().all(|up| *up);
            all.values()
                .all(|host| host.as_ref().is_ok_and(met))
                .then_some(())
        })
        .await;
        let order = Request::Run {
            vm: self.vm.clone(),
            image: image.to_owned(),
            hosts: self.hosts.clone(),
            policy,
        };
        start_vm(&self.client, &self.hosts[0], &self.vm, &order)
            .await
            .expect("starts");
    }

    // ---- looking ----

    pub async fn record(&self) -> Option<Record> {
        self.client.record(&self.vm).await.ok()
    }

    pub async fn primary(&self) -> HostName {
        self.record().await.expect("a record").primary.host
    }

    /// The first copy that is not the primary.
    #[allow(dead_code, reason = "not every test has a use for it")]
    pub async fn replica(&self) -> HostName {
        let record = self.record().await.expect("a record");
        record.members.first().expect("a replica").host.clone()
    }

    /// What a host says of the VM, and when by its clock.
    pub async fn seen(&self, host: &HostName) -> Option<(Time, VmStatus)> {
        let status = self.client.status(host).await.ok()?;
        let vm = status.vms.into_iter().find(|vm| vm.vm == self.vm)?;
        Some((status.now, vm))
    }

    pub async fn role(&self, host: &HostName) -> Option<RoleName> {
        Some(self.seen(host).await?.1.node.role)
    }

    /// What `status` prints about the VM on a host.
    #[allow(dead_code, reason = "not every test has a use for it")]
    pub fn row(&self, host: &str) -> String {
        let cluster = self.cluster.folder().display().to_string();
        let printed = understudy(&["status", "--cluster", &cluster]);
        let table = String::from_utf8_lossy(&printed.stdout);
        let mut rows = table.lines();
        let row = rows.find(|row| row.split_whitespace().next() == Some(host));
        row.unwrap_or_else(|| panic!("no row of {host} in\n{table}"))
            .to_owned()
    }

    /// Whether a host's journal has a line with this reason code.
    pub async fn journal_has(&self, host: &HostName, code: &str) -> bool {
        let marked = format!("\"code\":\"{code}\"");
        let mut after = 0;
        loop {
            let lines = self.client.events(host, after).await.expect("a journal");
            let Some(last) = lines.last() else {
                return false;
            };
            after = last.number;
            let text = serde_json::to_string(&lines).expect("lines are JSON");
            if text.contains(&marked) {
                return true;
            }
        }
    }

    /// What all hosts have written down, for whoever looks why a test failed.
    async fn journals(&self) -> String {
        let mut all = Vec::new();
        for host in &self.hosts {
            let mut after = 0;
            while let Ok(lines) = self.client.events(host, after).await
                && let Some(last) = lines.last()
            {
                after = last.number;
                let told = lines
                    .iter()
                    .map(|line| format!("{host} {:?} {}", line.at, line.text));
                all.extend(told);
            }
        }
        all.join("\n")
    }

    // ---- waiting ----

    /// Looks until something is there.
    pub async fn until<T>(
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
                let journals = self.journals().await;
                panic!("{what} has not happened; {statuses:#?}\n{journals}");
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Waits for a record with so many copies.
    pub async fn copies(&mut self, copies: usize) -> Record {
        self.until("the record of all copies", async |site| {
            let record = site.record().await;
            record.filter(|record| record.copies() == copies)
        })
        .await
    }

    /// Waits until another than `old` runs the guest.
    pub async fn successor(&mut self, old: &HostName) -> HostName {
        let old = old.clone();
        self.until("a promotion", async |site| {
            let new = site.record().await?.primary.host;
            let live = new != old && site.role(&new).await == Some(RoleName::Primary);
            live.then_some(new)
        })
        .await
    }

    // ---- doing ----

    pub fn kill(&mut self, host: &HostName) {
        self.cluster.kill(&identity(host)).expect("a kill");
    }

    pub fn start_host(&mut self, host: &HostName) {
        self.cluster
            .start_process(&identity(host))
            .expect("a start");
    }
}
