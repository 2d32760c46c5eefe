//! A cluster of real processes of this program on loopback, in a folder of its own that goes when
//! the cluster goes: what the demo, the failover tests and the benchmarks run on.
//!
//! Every process ends with the one that started the cluster, even when that one is killed (the
//! kernel sees to it), and with the [`Cluster`] when it is dropped.
//!
//! The kernel ends a process with the *thread* that started it: use a cluster from one thread that
//! lives as long as the cluster (the main thread, the thread of a test).

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use thiserror::Error;

use crate::agent::certs::{Identity, Name, Role};
use crate::agent::init::{Folders, InitError, Plan, init};
use crate::protocol::VmName;

/// How much of a process's own words an error quotes.
const QUOTED_LINES: usize = 5;
/// The one gateway and the one witness.
const GATEWAY: &str = "gateway";
const WITNESS: &str = "witness";

/// A cluster on loopback.
pub struct Cluster {
    program: PathBuf,
    // Dropped before the folder that they work in.
    processes: BTreeMap<Identity, Process>,
    folders: Folders,
    hosts: Vec<Name>,
    published: Option<Published>,
    metrics: BTreeMap<Name, SocketAddr>,
    /// What processes that are started find in their environment beside ours.
    environment: BTreeMap<OsString, OsString>,
    folder: TempDir,
}

/// What the gateway is told.
#[derive(Clone, Debug)]
struct Published {
    vm: VmName,
    at: SocketAddr,
    guest_port: u16,
    metrics: SocketAddr,
}

/// A running process; dropping it kills it.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Why something could not be done with a cluster.
#[derive(Debug, Error)]
pub enum ClusterError {
    /// No folder for it.
    #[error("no temporary folder can be made: set TMPDIR to a folder that you may write to")]
    Folder(#[source] io::Error),
    /// No port.
    #[error("no free port can be had on 127.0.0.1")]
    Port(#[source] io::Error),
    /// No certificates.
    #[error(transparent)]
    Init(#[from] InitError),
    /// A process does not start.
    #[error("{who} cannot be started from {}", program.display())]
    Start {
        /// Which.
        who: Identity,
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A process has ended by itself.
    #[error("{who} has ended by itself ({status}); it said: {said}")]
    Ended {
        /// Which.
        who: Identity,
        /// How.
        status: ExitStatus,
        /// Its last words.
        said: String,
    },
    /// It is not running.
    #[error("{0} is not running")]
    NotRunning(Identity),
    /// A signal could not be sent.
    #[error("a signal cannot be sent to {who}")]
    Signal {
        /// To whom.
        who: Identity,
        /// Why not.
        #[source]
        source: nix::Error,
    },
    /// Something about a process cannot be found out.
    #[error("{who} cannot be looked at")]
    Look {
        /// Which.
        who: Identity,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl Cluster {
    /// Makes a cluster of these hosts and starts its witness and its agents. `program` is the
    /// `understudy` to run.
    pub fn start(program: &Path, hosts: &[Name]) -> Result<Self, ClusterError> {
        let folder = TempDir::with_prefix("understudy-").map_err(ClusterError::Folder)?;
        let mut ports = Ports::default();
        let mut with_udp = |name: &Name| Ok((name.clone(), ports.udp()?));
        let addresses: Result<BTreeMap<_, _>, io::Error> =
            hosts.iter().map(&mut with_udp).collect();
        let witness = with_udp(&name(WITNESS)).map_err(ClusterError::Port)?;
        let addresses = addresses.map_err(ClusterError::Port)?;
        let metrics: Result<BTreeMap<_, _>, io::Error> = hosts
            .iter()
            .map(|name| Ok((name.clone(), ports.tcp()?)))
            .collect();
        let plan = Plan {
            hosts: addresses,
            metrics: metrics.map_err(ClusterError::Port)?,
            witness,
            advertise: BTreeMap::new(),
            gateways: vec![name(GATEWAY)],
            operator: name("operator"),
        };
        // Held until here, so that no two are the same.
        drop(ports);
        let folders = init(&folder.path().join("cluster"), &plan)?;
        let mut cluster = Self {
            program: program.to_owned(),
            processes: BTreeMap::new(),
            folders,
            hosts: hosts.to_vec(),
            published: None,
            metrics: plan.metrics,
            environment: BTreeMap::new(),
            folder,
        };
        cluster.start_process(&witness_identity())?;
        for host in hosts {
            cluster.start_process(&Identity::host(host))?;
        }
        Ok(cluster)
    }

    /// Leaves the folder where it is when the cluster goes, for those who look for a fault.
    pub fn keep_folder(&mut self) -> &Path {
        self.folder.disable_cleanup(true);
        self.folder.path()
    }

    /// The folder that `init` wrote: what `--cluster` takes.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().join("cluster")
    }

    /// The hosts.
    pub fn hosts(&self) -> &[Name] {
        &self.hosts
    }

    /// Where a host serves its metrics.
    pub fn metrics(&self, host: &Name) -> Option<SocketAddr> {
        self.metrics.get(host).copied()
    }

    /// Where the gateway serves its metrics.
    pub fn gateway_metrics(&self) -> Option<SocketAddr> {
        self.published.as_ref().map(|published| published.metrics)
    }

    /// The witness.
    pub fn witness(&self) -> Identity {
        witness_identity()
    }

    /// The gateway, whether it runs or not.
    pub fn gateway(&self) -> Identity {
        Identity {
            role: Role::Gateway,
            name: name(GATEWAY),
        }
    }

    /// Starts the gateway: it publishes one port of a VM. Where, is returned.
    pub fn publish(&mut self, vm: &VmName, guest_port: u16) -> Result<SocketAddr, ClusterError> {
        let mut ports = Ports::default();
        let at = ports.tcp().map_err(ClusterError::Port)?;
        let metrics = ports.tcp().map_err(ClusterError::Port)?;
        drop(ports);
        self.published = Some(Published {
            vm: vm.clone(),
            at,
            guest_port,
            metrics,
        });
        self.start_process(&self.gateway())?;
        Ok(at)
    }

    /// Starts a process that is not running.
    pub fn start_process(&mut self, who: &Identity) -> Result<(), ClusterError> {
        let failed = |source| ClusterError::Start {
            who: who.clone(),
            program: self.program.clone(),
            source,
        };
        let folder = self
            .folders
            .get(who)
            .ok_or_else(|| ClusterError::NotRunning(who.clone()))?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_file(who));
        let log = log.map_err(failed)?;
        let mut command = Command::new(&self.program);
        command
            .arg(match who.role {
                Role::Host => "agent",
                Role::Witness => "witness",
                Role::Gateway => "gateway",
                Role::Operator => "status",
            })
            .arg("--config")
            .arg(folder)
            .args(["--die-with", &std::process::id().to_string()])
            .envs(&self.environment)
            .stdin(Stdio::null())
            .stdout(log.try_clone().map_err(failed)?)
            .stderr(log)
            // Ctrl-C is for us alone; we end them.
            .process_group(0);
        if let (Role::Gateway, Some(published)) = (who.role, &self.published) {
            command.args(["--vm", published.vm.as_str()]);
            let Published {
                at,
                guest_port,
                metrics,
                ..
            } = published;
            command.args(["--publish", &format!("{at}:{guest_port}")]);
            command.args(["--metrics", &metrics.to_string()]);
        }
        let child = command.spawn().map_err(failed)?;
        self.processes.insert(who.clone(), Process(child));
        Ok(())
    }

    /// Processes that are started from now on find this in their environment.
    pub fn set_environment(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.environment.insert(name.into(), value.into());
    }

    /// What a process has said on stdout and stderr.
    pub fn said(&self, who: &Identity) -> String {
        fs::read(self.log_file(who)).map_or(String::new(), |said| {
            String::from_utf8_lossy(&said).into_owned()
        })
    }

    fn log_file(&self, who: &Identity) -> PathBuf {
        self.folder
            .path()
            .join(format!("{}-{}.log", who.role, who.name))
    }

    /// Fails if any process has ended by itself.
    pub fn check(&mut self) -> Result<(), ClusterError> {
        let mut ended = None;
        for (who, process) in &mut self.processes {
            let look = |source| ClusterError::Look {
                who: who.clone(),
                source,
            };
            if let Some(status) = process.0.try_wait().map_err(look)? {
                ended = Some((who.clone(), status));
                break;
            }
        }
        let Some((who, status)) = ended else {
            return Ok(());
        };
        self.processes.remove(&who);
        let said = self.said(&who);
        let lines: Vec<&str> = said.lines().collect();
        let quoted = &lines[lines.len().saturating_sub(QUOTED_LINES)..];
        Err(ClusterError::Ended {
            who,
            status,
            said: quoted.join("; "),
        })
    }

    /// Kills a process with SIGKILL and waits until it is gone. The VMM processes of an agent die
    /// with it.
    pub fn kill(&mut self, who: &Identity) -> Result<(), ClusterError> {
        match self.processes.remove(who) {
            Some(process) => drop(process),
            None => return Err(ClusterError::NotRunning(who.clone())),
        }
        Ok(())
    }

    /// Whether it was started and not killed.
    pub fn runs(&self, who: &Identity) -> bool {
        self.processes.contains_key(who)
    }

    /// Forgets everything that a process keeps, as if its disk had been replaced. It must not run.
    pub fn forget(&mut self, who: &Identity) -> Result<(), ClusterError> {
        assert!(!self.runs(who), "only what does not run can forget");
        let data = self
            .folders
            .get(who)
            .map(|folder| folder.join("data"))
            .ok_or_else(|| ClusterError::NotRunning(who.clone()))?;
        match fs::remove_dir_all(data) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(ClusterError::Look {
                who: who.clone(),
                source: error,
            }),
            _ => Ok(()),
        }
    }

    /// Where a process keeps what it keeps.
    pub fn data(&self, who: &Identity) -> Option<PathBuf> {
        self.folders.get(who).map(|folder| folder.join("data"))
    }

    /// Stops a process and its VMM processes where they are, without their noticing (SIGSTOP).
    pub fn freeze(&self, who: &Identity) -> Result<(), ClusterError> {
        self.signal(who, Signal::SIGSTOP)
    }

    /// Lets frozen processes go on.
    pub fn thaw(&self, who: &Identity) -> Result<(), ClusterError> {
        self.signal(who, Signal::SIGCONT)
    }

    fn signal(&self, who: &Identity, signal: Signal) -> Result<(), ClusterError> {
        let own = self.pid(who)?;
        let children = self.children(who)?;
        for pid in children.into_iter().chain([own]) {
            kill(pid, signal).map_err(|source| ClusterError::Signal {
                who: who.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Kills the VMM processes of a host, and leaves its agent; how many there were.
    pub fn kill_vmms(&self, host: &Name) -> Result<usize, ClusterError> {
        let who = Identity::host(host);
        let vmms = self.children(&who)?;
        for pid in &vmms {
            kill(*pid, Signal::SIGKILL).map_err(|source| ClusterError::Signal {
                who: who.clone(),
                source,
            })?;
        }
        Ok(vmms.len())
    }

    /// The process's number.
    pub fn pid(&self, who: &Identity) -> Result<Pid, ClusterError> {
        let process = self.processes.get(who);
        process
            .and_then(|process| i32::try_from(process.0.id()).ok())
            .map(Pid::from_raw)
            .ok_or_else(|| ClusterError::NotRunning(who.clone()))
    }

    /// The processes that a process has started: an agent's VMMs.
    pub fn children(&self, who: &Identity) -> Result<Vec<Pid>, ClusterError> {
        children_of(self.pid(who)?).map_err(|source| ClusterError::Look {
            who: who.clone(),
            source,
        })
    }

    /// How much memory a process and its children have in RAM, in bytes.
    pub fn resident(&self, who: &Identity) -> Result<u64, ClusterError> {
        let own = self.pid(who)?;
        let all = self.children(who)?.into_iter().chain([own]);
        Ok(all.filter_map(resident).sum())
    }
}

fn witness_identity() -> Identity {
    Identity::witness(&name(WITNESS))
}

fn name(text: &str) -> Name {
    text.parse().expect("the demo's own names are names")
}

fn children_of(parent: Pid) -> io::Result<Vec<Pid>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let file = entry?.file_name();
        let Some(pid) = file.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process may have ended since the folder was listed.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may hold anything; the state and the parent follow it.
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        let of = fields
            .split_whitespace()
            .nth(1)
            .and_then(|ppid| ppid.parse().ok());
        if of == Some(parent.as_raw()) {
            children.push(Pid::from_raw(pid));
        }
    }
    Ok(children)
}

fn resident(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}

/// Ports that nobody uses, held until all are chosen.
#[derive(Default)]
struct Ports {
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
}

impl Ports {
    fn udp(&mut self) -> io::Result<SocketAddr> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let address = socket.local_addr()?;
        self.udp.push(socket);
        Ok(address)
    }

    fn tcp(&mut self) -> io::Result<SocketAddr> {
        let socket = TcpListener::bind("127.0.0.1:0")?;
        let address = socket.local_addr()?;
        self.tcp.push(socket);
        Ok(address)
    }
}
