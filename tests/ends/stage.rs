//! A cluster of three hosts with a small guest on it, and ways to look at how they do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use replay_log::Position;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::time::sleep;
use understudy::agent::certs::{Identity, Name};
use understudy::agent::operator::{Client, HostStatus, Request, VmStatus};
use understudy::cli::operator::start_vm;
use understudy::config::Config;
use understudy::demo::cluster::Cluster;
use understudy::protocol::{HostName, Policy, Record, RoleName, Span, Time, VmName};
use vmm::boot::BootImage;
use vmm::tape::Ending;

use super::skip;

/// All of them hold a copy; the first is the primary at first.
pub const HOSTS: [&str; 3] = ["a", "b", "c"];

/// What the hosts call the guest's image.
const IMAGE: &str = "end";

const PATIENCE: Duration = Duration::from_secs(40);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// A primary that is silent for so long by its hosts' clocks would have been replaced by now.
const LONG_ENOUGH: Span = Span::from_millis(2_000);

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

fn identity(host: &HostName) -> Identity {
    Identity::host(&host.as_str().parse::<Name>().expect("a name"))
}

/// Runs the program to its end.
pub fn understudy(args: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_understudy"));
    program.args(args).output().expect("the program starts")
}

/// Makes a folder the image of a guest.
pub fn put_image(folder: &Path, guest: &BootImage, disks: &[&str]) {
    let manifest = format!(
        r#"
            name = "{IMAGE}"
            kernel = "guest"
            memory = "4 MiB"
            disks = {disks:?}
            modes = ["replayed"]
            [network]
            mac = "02:75:64:00:00:02"
            address = "10.77.0.2/8"
        "#
    );
    fs::create_dir_all(folder).expect("a folder");
    fs::write(folder.join("manifest.toml"), manifest).expect("a manifest");
    fs::write(folder.join("guest"), &guest.kernel).expect("a kernel");
}

/// A small file system in a mount namespace of this thread and the processes it starts: the kernel
/// takes it away with the last of them, whatever happens to the test.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let none = None::<&str>;
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(none, "/", none, private, none).expect("mounts of our own");
        fs::create_dir_all(at).expect("a folder");
        let size = format!("size={size}");
        mount(
            Some("none"),
            at,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        )
        .expect("a small file system");
        Self(at.to_owned())
    }

    /// Keeps a folder of it where there is room.
    fn spare(&self, folder: &str, room: &Path) {
        let there = room.join(folder);
        fs::create_dir_all(&there).expect("a folder");
        symlink(there, self.0.join(folder)).expect("a link");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // So that the cluster's folder can be removed, although its processes still live.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A cluster with a guest on it.
pub struct Stage {
    // Dropped before the cluster's folder.
    _small_disk: Option<SmallDisk>,
    cluster: Cluster,
    client: Client,
    vm: VmName,
    _alone: MutexGuard<'static, ()>,
}

impl Stage {
    /// Starts a cluster and this guest, with disks of these sizes.
    pub async fn open(guest: &BootImage, disks: &[&str]) -> Self {
        Self::open_with(guest, disks, None).await
    }

    /// The same; one host keeps what it keeps on a disk of this size.
    pub async fn open_with(
        guest: &BootImage,
        disks: &[&str],
        small: Option<(&HostName, &str)>,
    ) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let names = HOSTS.map(|host| host.parse().expect("a name"));
        let program = Path::new(env!("CARGO_BIN_EXE_understudy"));
        let mut cluster = Cluster::start(program, &names).expect("a cluster");
        let small_disk = small.map(|(host, size)| {
            let who = identity(host);
            cluster.kill(&who).expect("a kill");
            cluster.forget(&who).expect("forgets");
            let data = cluster.data(&who).expect("a folder");
            let disk = SmallDisk::mount(&data, size);
            // What the journal says is to be read here, whatever it could have kept.
            disk.spare("journal", &data.with_file_name("spared"));
            cluster.start_process(&who).expect("a start");
            disk
        });
        for host in HOSTS.map(host_name) {
            let data = cluster.data(&identity(&host)).expect("a folder");
            put_image(&data.join("images").join(IMAGE), guest, disks);
        }
        let config = Config::load(&cluster.folder().join("operator")).expect("a configuration");
        let mut stage = Self {
            _small_disk: small_disk,
            client: Client::new(&config).expect("a client"),
            cluster,
            vm: VmName::new("shop").expect("a name"),
            _alone: alone,
        };
        stage.all_meet().await;
        let order = Request::Run {
            vm: stage.vm.clone(),
            image: IMAGE.to_owned(),
            hosts: HOSTS.map(host_name).to_vec(),
            policy: Policy::default(),
        };
        start_vm(&stage.client, &host_name(HOSTS[0]), &stage.vm, &order)
            .await
            .expect("starts");
        stage
    }

    /// Looks until something is there.
    async fn until<T>(
        &mut self,
        what: &str,
        mut look: impl AsyncFnMut(&mut Self) -> Option<T>,
    ) -> T {
        let began = Instant::now();
        loop {
            if let Some(seen) = look(self).await {
                return seen;
            }
            let patient = began.elapsed() < PATIENCE;
            assert!(patient, "{what} has not happened;\n{}", self.table());
            sleep(LOOK_EVERY).await;
        }
    }

    async fn all_meet(&mut self) {
        self.until("the hosts' meeting", async |stage| {
            let all = stage.client.status_of_all().await;
            let met = |status: &HostStatus| status.peers.values().all(|up| *up);
            all.values()
                .all(|host| host.as_ref().is_ok_and(met))
                .then_some(())
        })
        .await;
    }

    // ---- looking ----

    async fn record(&self) -> Option<Record> {
        self.client.record(&self.vm).await.ok()
    }

    pub async fn primary(&self) -> HostName {
        self.record().await.expect("a record").primary.host
    }

    async fn seen(&self, host: &HostName) -> Option<(Time, VmStatus)> {
        let status = self.client.status(host).await.ok()?;
        let vm = status.vms.into_iter().find(|vm| vm.vm == self.vm)?;
        Some((status.now, vm))
    }

    pub async fn role(&self, host: &HostName) -> Option<RoleName> {
        Some(self.seen(host).await?.1.node.role)
    }

    /// What `status` prints.
    fn table(&self) -> String {
        let cluster = self.cluster.folder().display().to_string();
        let printed = understudy(&["status", "--cluster", &cluster]);
        String::from_utf8_lossy(&printed.stdout).into_owned()
    }

    /// What `status` prints about the VM on a host.
    pub fn row(&self, host: &str) -> String {
        let table = self.table();
        let mut rows = table.lines();
        let row = rows.find(|row| row.split_whitespace().next() == Some(host));
        row.unwrap_or_else(|| panic!("no row of {host} in\n{table}"))
            .to_owned()
    }

    /// What `status --json` prints.
    pub fn status_json(&self) -> serde_json::Value {
        let cluster = self.cluster.folder().display().to_string();
        let printed = understudy(&["status", "--json", "--cluster", &cluster]);
        serde_json::from_slice(&printed.stdout).expect("JSON")
    }

    /// What the guest has said on its console while a host was its primary.
    pub fn console(&self, host: &HostName) -> String {
        let data = self.cluster.data(&identity(host)).expect("a folder");
        let log = data.join("vms").join(self.vm.as_str()).join("console.log");
        fs::read_to_string(log).unwrap_or_default()
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

    // ---- waiting ----

    /// Waits for a record with so many copies.
    pub async fn copies(&mut self, copies: usize) {
        self.until("the record of all copies", async |stage| {
            let record = stage.record().await?;
            (record.copies() == copies).then_some(())
        })
        .await;
    }

    /// Waits until another than `old` runs the guest.
    pub async fn successor(&mut self, old: &HostName) -> HostName {
        let old = old.clone();
        self.until("a promotion", async |stage| {
            let new = stage.record().await?.primary.host;
            let live = new != old && stage.role(&new).await == Some(RoleName::Primary);
            live.then_some(new)
        })
        .await
    }

    /// Waits until the guest has ended on all of these hosts, and in the same way.
    pub async fn all_end(&mut self, hosts: &[&str]) -> Ending {
        let endings = self
            .until("the guest's end on all hosts", async |stage| {
                let mut endings = BTreeMap::new();
                for host in hosts {
                    let (_, seen) = stage.seen(&host_name(host)).await?;
                    endings.insert(*host, seen.guest?.ended?);
                }
                Some(endings)
            })
            .await;
        let first = endings[hosts[0]];
        assert!(endings.values().all(|one| *one == first), "{endings:?}");
        first
    }

    /// Waits until the guest on this host has shown no landmark for long.
    pub async fn computes(&mut self, host: &HostName) {
        let host = host.clone();
        self.until("a long silence of the guest", async |stage| {
            let (_, seen) = stage.seen(&host).await?;
            let guest = seen.guest.filter(|guest| guest.recording)?;
            (guest.silence >= LONG_ENOUGH).then_some(())
        })
        .await;
    }

    /// Waits until the guest is at one position on all of these hosts.
    pub async fn same_position(&mut self, hosts: &[&str]) {
        self.until("one position on all hosts", async |stage| {
            let mut positions: Vec<Position> = Vec::new();
            for host in hosts {
                positions.push(stage.seen(&host_name(host)).await?.1.node.position);
            }
            let moved = positions[0] > Position::START;
            let same = positions.iter().all(|at| *at == positions[0]);
            (moved && same).then_some(())
        })
        .await;
    }

    /// Waits until a host's row has these words.
    pub async fn says(&mut self, host: &str, words: &str) {
        self.until(words, async |stage| {
            stage.row(host).contains(words).then_some(())
        })
        .await;
    }

    /// Waits for as long as a dead primary would have been replaced in: nobody has claimed anything.
    pub async fn nobody_claims(&mut self) {
        let (term, primary) = {
            let record = self.record().await.expect("a record");
            (record.term, record.primary.host)
        };
        let (began, _) = self.seen(&primary).await.expect("the primary's status");
        self.until("the passing of time", async |stage| {
            let (now, _) = stage.seen(&primary).await?;
            (now.since(began) >= LONG_ENOUGH).then_some(())
        })
        .await;
        // The primary has claimed the first term.
        for host in HOSTS.map(host_name).iter().filter(|host| **host != primary) {
            let claimed = self.journal_has(host, "claimed").await;
            assert!(!claimed, "{host} has claimed");
        }
        let record = self.record().await.expect("a record");
        assert_eq!((record.term, record.primary.host), (term, primary));
    }

    // ---- doing ----

    /// A client comes, and with it the guest's first frame: its gateway asks who has the address.
    pub async fn knock(&mut self) -> TcpStream {
        let address = self.cluster.publish(&self.vm, 6379).expect("a gateway");
        self.until("the gateway's opening", async |_| {
            TcpStream::connect(address).await.ok()
        })
        .await
    }

    pub fn kill(&mut self, host: &HostName) {
        self.cluster.kill(&identity(host)).expect("a kill");
    }

    pub fn start(&mut self, host: &HostName) {
        self.cluster
            .start_process(&identity(host))
            .expect("a start");
    }
}
