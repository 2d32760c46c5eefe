//! What a lab is made of and how it does: names and addresses, its folder, its status.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The most hosts of a lab: as many as a link's shaping has room for.
pub const MAX_HOSTS: u8 = 14;
/// The length of the network's prefix in bits.
pub const PREFIX: u8 = 24;
/// What the machine that the lab runs on is called in the lab.
const MACHINE: &str = "machine";

/// A host of the lab: h1, h2, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct HostId(u8);

impl HostId {
    /// The first hosts.
    pub fn first(count: u8) -> impl Iterator<Item = Self> {
        (1..=count.min(MAX_HOSTS)).map(Self)
    }

    /// Its number: 1, 2, …
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Its address in the lab.
    pub const fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 88, 0, self.0)
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "h{}", self.0)
    }
}

/// Text that names no end of a link.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is no host of a lab: they are called h1, h2, … up to h{MAX_HOSTS}")]
pub struct NoSuchName(String);

impl FromStr for HostId {
    type Err = NoSuchName;

    fn from_str(text: &str) -> Result<Self, NoSuchName> {
        let number = text
            .strip_prefix('h')
            .and_then(|number| number.parse().ok());
        number
            .filter(|number| (1..=MAX_HOSTS).contains(number))
            .map(Self)
            // Not "h01", not "h+1".
            .filter(|id| id.to_string() == text)
            .ok_or_else(|| NoSuchName(text.to_owned()))
    }
}

impl From<HostId> for String {
    fn from(id: HostId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for HostId {
    type Error = NoSuchName;

    fn try_from(text: String) -> Result<Self, NoSuchName> {
        text.parse()
    }
}

/// An end of a link: a host, or the machine that the lab runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum End {
    /// A host.
    Host(HostId),
    /// The machine that the lab runs on, where clients are.
    Machine,
}

impl End {
    /// Its address in the lab.
    pub const fn address(self) -> Ipv4Addr {
        match self {
            Self::Host(id) => id.address(),
            Self::Machine => Ipv4Addr::new(10, 88, 0, 254),
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(id) => id.fmt(f),
            Self::Machine => f.write_str(MACHINE),
        }
    }
}

impl FromStr for End {
    type Err = NoSuchName;

    fn from_str(text: &str) -> Result<Self, NoSuchName> {
        if text == MACHINE {
            return Ok(Self::Machine);
        }
        text.parse().map(Self::Host)
    }
}

impl From<End> for String {
    fn from(end: End) -> Self {
        end.to_string()
    }
}

impl TryFrom<String> for End {
    type Error = NoSuchName;

    fn try_from(text: String) -> Result<Self, NoSuchName> {
        text.parse()
    }
}

/// The link between two ends; the order in which they are named does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LinkName(pub End, pub End);

impl LinkName {
    /// The link between these two.
    pub fn between(a: End, b: End) -> Self {
        Self(a.min(b), a.max(b))
    }

    /// The end that is not this one, if this one is an end of it.
    pub fn other(self, end: End) -> Option<End> {
        match self {
            Self(a, b) if a == end => Some(b),
            Self(a, b) if b == end => Some(a),
            Self(..) => None,
        }
    }
}

/// How long and how bad a link is, each way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delay {
    /// How long a frame travels, in milliseconds.
    pub ms: u32,
    /// How many of a hundred frames are lost.
    pub loss_percent: f64,
}

impl Delay {
    /// Whether the link is as if nothing had been asked for.
    pub fn is_none(&self) -> bool {
        self.ms == 0 && self.loss_percent <= 0.0
    }
}

impl fmt::Display for Delay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ms each way", self.ms)?;
        if self.loss_percent > 0.0 {
            write!(f, ", {} % lost", self.loss_percent)?;
        }
        Ok(())
    }
}

/// What a lab is to be; all paths are absolute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Setup {
    /// Its folder.
    pub dir: PathBuf,
    /// How many hosts.
    pub hosts: u8,
    /// The memory of each, in MiB.
    pub memory_mib: u32,
    /// The disk of each, in GiB.
    pub disk_gib: u32,
    /// The folder with the hosts' kernel and initramfs.
    pub image: PathBuf,
    /// The program that the hosts run.
    pub binary: PathBuf,
}

/// How a lab does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LabStatus {
    /// Its folder.
    pub dir: PathBuf,
    /// The process that owns everything.
    pub keeper: u32,
    /// The machine's address among the hosts.
    pub machine: Ipv4Addr,
    /// The hosts.
    pub hosts: Vec<HostStatus>,
    /// The links that are cut.
    pub partitions: Vec<LinkName>,
    /// The links that are long.
    pub delays: Vec<LinkDelay>,
}

/// How a host does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostStatus {
    /// Which.
    pub name: HostId,
    /// Its address.
    pub address: Ipv4Addr,
    /// How it is.
    pub state: Power,
    /// How long it took to boot, in milliseconds; of one that is up.
    pub boot_ms: Option<u64>,
    /// Why it has no power; of one that is off.
    pub why_off: Option<String>,
    /// Its QEMU process.
    pub pid: Option<u32>,
    /// What it says on its console, a file of this machine.
    pub console: PathBuf,
}

/// Whether a host lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Power {
    /// It has power and does not answer yet.
    Booting,
    /// It answers.
    Up,
    /// It has no power.
    Off,
}

impl fmt::Display for Power {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Booting => "booting",
            Self::Up => "up",
            Self::Off => "off",
        })
    }
}

/// A link that is long.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkDelay {
    /// Which.
    pub link: LinkName,
    /// How long.
    pub delay: Delay,
}

/// Who keeps a lab, as its folder tells: how those who come later find what an earlier keeper left.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Kept {
    /// The keeper.
    pub keeper: Option<ProcessId>,
    /// The hosts' QEMU processes.
    pub hosts: BTreeMap<String, ProcessId>,
}

/// A process that no other one is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it started, in the kernel's ticks since power-on.
    pub started: u64,
}

impl ProcessId {
    /// The process that has this number now.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything; the state is the first field after it, the
        // time of the start the twentieth.
        let fields = stat.rsplit_once(')')?.1;
        let mut fields = fields.split_whitespace();
        let state = fields.next()?;
        let started = fields.nth(18)?.parse().ok()?;
        (state != "Z").then_some(Self { pid, started })
    }

    /// Whether it is still there, and no corpse.
    pub fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// The files of a lab's folder.
#[derive(Clone, Debug)]
pub struct LabFolder(PathBuf);

impl LabFolder {
    /// The folder of this lab.
    pub fn new(dir: &Path) -> Self {
        Self(dir.to_owned())
    }

    /// The folder where a lab is when none is named: one a user.
    pub fn default_dir() -> PathBuf {
        match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
            Some(dir) => PathBuf::from(dir).join("understudy-lab"),
            None => std::env::temp_dir().join(format!("understudy-lab-{}", nix::unistd::getuid())),
        }
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Locked by the keeper as long as it lives.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// Where the keeper listens.
    pub fn socket(&self) -> PathBuf {
        self.0.join("socket")
    }

    /// Who keeps the lab ([`Kept`]).
    pub fn kept(&self) -> PathBuf {
        self.0.join("processes.json")
    }

    /// What the keeper says.
    pub fn keeper_log(&self) -> PathBuf {
        self.0.join("keeper.log")
    }

    /// What a host says on its console.
    pub fn console(&self, host: HostId) -> PathBuf {
        self.0.join(format!("{host}.console"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_have_one_name_each() {
        for text in ["h1", "h14", "machine"] {
            let end: End = text.parse().expect("an end");
            assert_eq!(end.to_string(), text);
        }
        for text in ["h0", "h15", "h01", "h+1", "1", "", "machines", "h1 "] {
            assert!(text.parse::<End>().is_err(), "{text}");
        }
        assert!("machine".parse::<HostId>().is_err());
    }

    #[test]
    fn a_link_has_no_direction() {
        let end = |text: &str| text.parse::<End>().expect("an end");
        let link = LinkName::between(end("machine"), end("h2"));
        assert_eq!(link, LinkName::between(end("h2"), end("machine")));
        assert_eq!(link.other(end("h2")), Some(End::Machine));
        assert_eq!(link.other(end("h1")), None);
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let own = ProcessId::of(std::process::id()).expect("this process");
        assert!(own.lives());
        let earlier = ProcessId {
            started: own.started + 1,
            ..own
        };
        assert!(!earlier.lives());
    }
}
