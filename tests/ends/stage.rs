//! A cluster of three hosts with a small guest on it, and ways to look at how they do.

use std::collections::BTreeMap;
use std::fs;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use replay_log::Position;
use tokio::net::TcpStream;
use understudy::demo::cluster::Cluster;
use understudy::protocol::{HostName, Policy, Span};
use vmm::boot::BootImage;
use vmm::tape::Ending;

use super::loopback::{Loopback, host_name, identity, understudy};

/// All of them hold a copy; the first is the primary at first.
pub const HOSTS: [&str; 3] = ["a", "b", "c"];

/// What the hosts call the guest's image.
const IMAGE: &str = "end";

/// A primary that is silent for so long by its hosts' clocks would have been replaced by now.
const LONG_ENOUGH: Span = Span::from_millis(2_000);

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

/// Puts the image of a guest where a host looks for it.
fn give_image(cluster: &Cluster, host: &HostName, guest: &BootImage, disks: &[&str]) {
    let data = cluster.data(&identity(host)).expect("a folder");
    put_image(&data.join("images").join(IMAGE), guest, disks);
}

/// What a host lacks.
#[derive(Clone, Copy)]
pub enum Lack<'a> {
    /// A disk with more room than this.
    Disk(&'a HostName, &'a str),
    /// The guest's image.
    Image(&'a HostName),
}

/// A cluster with a guest on it.
pub struct Stage {
    // Dropped before the cluster's folder.
    _small_disk: Option<SmallDisk>,
    site: Loopback,
}

impl Deref for Stage {
    type Target = Loopback;

    fn deref(&self) -> &Loopback {
        &self.site
    }
}

impl DerefMut for Stage {
    fn deref_mut(&mut self) -> &mut Loopback {
        &mut self.site
    }
}

impl Stage {
    /// Starts a cluster and this guest, with disks of these sizes.
    pub async fn open(guest: &BootImage, disks: &[&str]) -> Self {
        Self::open_with(guest, disks, None).await
    }

    /// The same; one host lacks something.
    pub async fn open_with(guest: &BootImage, disks: &[&str], lack: Option<Lack<'_>>) -> Self {
        let mut site = Loopback::start(&HOSTS);
        let cluster = &mut site.cluster;
        let small_disk = lack.and_then(|lack| {
            let Lack::Disk(host, size) = lack else {
                return None;
            };
            let who = identity(host);
            cluster.kill(&who).expect("a kill");
            cluster.forget(&who).expect("forgets");
            let data = cluster.data(&who).expect("a folder");
            let disk = SmallDisk::mount(&data, size);
            // What the journal says is to be read here, whatever it could have kept.
            disk.spare("journal", &data.with_file_name("spared"));
            cluster.start_process(&who).expect("a start");
            Some(disk)
        });
        for host in HOSTS.map(host_name) {
            if !matches!(lack, Some(Lack::Image(without)) if *without == host) {
                give_image(cluster, &host, guest, disks);
            }
        }
        site.run(IMAGE, Policy::default()).await;
        Self {
            _small_disk: small_disk,
            site,
        }
    }

    // ---- looking ----

    /// What `status --json` prints.
    pub fn status_json(&self) -> serde_json::Value {
        let cluster = self.cluster.folder().display().to_string();
        let printed = understudy(&["status", "--json", "--cluster", &cluster]);
        serde_json::from_slice(&printed.stdout).expect("JSON")
    }

    /// Where a host writes down what the guest says on its console.
    pub fn console_file(&self, host: &HostName) -> PathBuf {
        let data = self.cluster.data(&identity(host)).expect("a folder");
        data.join("vms").join(self.vm.as_str()).join("console.log")
    }

    // ---- waiting ----

    /// Waits until the guest has ended on all of these hosts, and in the same way.
    pub async fn all_end(&mut self, hosts: &[&str]) -> Ending {
        let endings = self
            .until("the guest's end on all hosts", async |site| {
                let mut endings = BTreeMap::new();
                for host in hosts {
                    let (_, seen) = site.seen(&host_name(host)).await?;
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
        self.until("a long silence of the guest", async |site| {
            let (_, seen) = site.seen(&host).await?;
            let guest = seen.guest.filter(|guest| guest.recording)?;
            (guest.silence >= LONG_ENOUGH).then_some(())
        })
        .await;
    }

    /// Waits until the guest is at one position on all of these hosts.
    pub async fn same_position(&mut self, hosts: &[&str]) {
        self.until("one position on all hosts", async |site| {
            let mut positions: Vec<Position> = Vec::new();
            for host in hosts {
                positions.push(site.seen(&host_name(host)).await?.1.node.position);
            }
            let moved = positions[0] > Position::START;
            let same = positions.iter().all(|at| *at == positions[0]);
            (moved && same).then_some(())
        })
        .await;
    }

    /// Waits until a host's row has these words.
    pub async fn says(&mut self, host: &str, words: &str) {
        self.until(words, async |site| {
            site.row(host).contains(words).then_some(())
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
        self.until("the passing of time", async |site| {
            let (now, _) = site.seen(&primary).await?;
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

    pub fn give_image(&self, host: &HostName, guest: &BootImage) {
        give_image(&self.cluster, host, guest, &[]);
    }

    /// A client comes, and with it the guest's first frame: its gateway asks who has the address.
    pub async fn knock(&mut self) -> TcpStream {
        let vm = self.vm.clone();
        let address = self.cluster.publish(&vm, 6379).expect("a gateway");
        self.until("the gateway's opening", async |_| {
            TcpStream::connect(address).await.ok()
        })
        .await
    }
}
