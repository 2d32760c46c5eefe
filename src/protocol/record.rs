//! The record: the small fact, changed only by compare-and-set, that says who reigns over a VM and
//! who may succeed (DESIGN.md section 4, "The record").

use std::fmt;

use bytes::Bytes;
use replay_log::{LogIndex, Position, Term};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

use super::name::{Epoch, HostName, Incarnation};

/// So far beyond the highest known term a claim may be: one for every attempt that its judge has
/// not heard of.
pub const TERM_LEAP: u64 = 1 << 20;
/// The most copies one VM can have.
pub const MAX_COPIES: usize = 16;

/// Which state of the record: both numbers only rise, and every change raises the epoch.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Version {
    /// The reign.
    pub term: Term,
    /// The change.
    pub epoch: Epoch,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "term {} epoch {}", self.term, self.epoch)
    }
}

/// The identity of a VM among all that have had its name: drawn at random when it is created, and
/// never changed. A keeper of records that has another one is not the keeper that was asked before.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Lineage(pub u64);

impl fmt::Display for Lineage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

/// The newest state of the record that a host has seen: what no keeper of records may be below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Of which VM of this name.
    pub lineage: Lineage,
    /// Which state.
    pub version: Version,
}

/// Where the VMMs of the last reigns failed: the guest may do what no host survives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stumble {
    /// The last landmark before the failure.
    pub at: Position,
    /// How many reigns in a row have ended there.
    pub reigns: u32,
    /// What the last of them said, at most [`Stumble::REASON_MAX`] bytes.
    pub reason: String,
}

impl Stumble {
    /// The longest reason that a record carries, in bytes.
    pub const REASON_MAX: usize = 256;
    /// After so many reigns in a row that failed at one place nobody claims any more.
    pub const LIMIT: u32 = 2;
}

/// A copy of the VM: a host, in the incarnation in which it holds the log.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Where.
    pub host: HostName,
    /// Which unbroken holding there.
    pub incarnation: Incarnation,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.host, self.incarnation)
    }
}

/// How many copies must hold the log before an output may leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// All copies.
    #[default]
    All,
    /// More than half of all copies, the primary included.
    Quorum,
    /// The primary and this many replicas (all of them when there are fewer).
    Any(u32),
}

impl Rule {
    /// `q`: how many of `copies` (the primary included) must hold an entry before output.
    pub fn needed(self, copies: usize) -> usize {
        match self {
            Self::All => copies,
            Self::Quorum => copies / 2 + 1,
            Self::Any(replicas) => copies.min(replicas as usize + 1),
        }
        .max(1)
    }

    /// How many of `copies` must be sealed before another may reign: enough that no `q` copies
    /// are left which could still commit output, and that one of them holds whatever was.
    pub fn seals(self, copies: usize) -> usize {
        (copies + 1).saturating_sub(self.needed(copies)).max(1)
    }

    /// Says in sentences which losses this rule survives with so many copies: what `pair` prints.
    pub fn survives(self, copies: usize) -> String {
        let (needed, seals) = (self.needed(copies), self.seals(copies));
        if copies <= 1 {
            return "unprotected: the primary is the only copy, and losing it loses the machine"
                .to_owned();
        }
        let replicas = copies - 1;
        let first = if needed == 1 {
            "survives no loss: output waits for no replica".to_owned()
        } else {
            format!(
                "survives the loss of any {} of {copies} copies without losing anything \
                 acknowledged",
                needed - 1
            )
        };
        let second = if seals > replicas {
            "after losing the primary nobody can be promoted".to_owned()
        } else if seals == replicas && replicas > 1 {
            "after losing the primary, every replica must be reachable to promote one".to_owned()
        } else {
            format!("after losing the primary, {seals} of {replicas} replicas must be reachable")
        };
        let third = if needed > replicas {
            "output pauses when any replica is lost, until it is back or removed".to_owned()
        } else {
            format!(
                "output goes on while {} of {replicas} replicas hold the log",
                needed - 1
            )
        };
        format!("{first}; {second}; {third}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Quorum => f.write_str("quorum"),
            Self::Any(replicas) => write!(f, "any({replicas})"),
        }
    }
}

/// Why a text is no rule.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{text:?} is no rule: use all, quorum or any(K) with K at least 1")]
pub struct RuleError {
    text: String,
}

impl std::str::FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let any = || {
            let inner = text.strip_prefix("any(")?.strip_suffix(')')?;
            inner
                .parse()
                .ok()
                .filter(|k| (1..=MAX_COPIES as u32).contains(k))
        };
        match text {
            "all" => Ok(Self::All),
            "quorum" => Ok(Self::Quorum),
            _ => any().map(Self::Any).ok_or_else(|| RuleError {
                text: text.to_owned(),
            }),
        }
    }
}

/// What a copy must have done before it counts as holding the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Acks {
    /// It has it in memory. A restart loses membership.
    #[default]
    Memory,
    /// It has it durably. A restart keeps membership.
    Disk,
}

/// What the primary does about replicas that stop acknowledging.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// Removes them from the record after a second and goes on with the others, or alone.
    #[default]
    Shrink,
    /// Waits for them.
    Stall,
}

/// What a copy does whose log has used up its budget. The log's beginning is the only way back, so
/// it is never dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFull {
    /// It takes no more: output waits where the rule needs it.
    #[default]
    Stall,
    /// The primary's log grows beyond the budget, for as long as its disk has room. Copies whose budget
    /// is used up are let go: the VM may be unprotected.
    Unprotected,
}

/// What the owner of a VM chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Who must hold the log before output.
    pub rule: Rule,
    /// What holding means. Fixed for the life of the VM.
    pub acks: Acks,
    /// What happens without a replica.
    pub on_loss: OnLoss,
    /// With fewer copies than this (the primary included) no output leaves.
    pub min_copies: u32,
    /// What happens when a copy's log has used up its budget.
    #[serde(default)]
    pub log_full: LogFull,
}

impl Policy {
    /// Whether so many hosts can ever satisfy it; if not, a sentence that says so. `me` is a copy
    /// whether it is named or not.
    pub fn fits(&self, hosts: &[HostName], me: &HostName) -> Result<(), String> {
        let copies: std::collections::BTreeSet<_> = hosts.iter().chain([me]).collect();
        let copies = copies.len();
        if self.min_copies as usize > copies {
            return Err(format!(
                "min-copies {0} needs {0} hosts, and {copies} are named: name more, or ask for fewer",
                self.min_copies
            ));
        }
        match self.rule {
            Rule::Any(replicas) if copies > 1 && replicas as usize >= copies => Err(format!(
                "any({replicas}) needs {replicas} replicas, and {} are named: name more, or ask for \
                 fewer",
                copies - 1
            )),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let acks = match self.acks {
            Acks::Memory => "memory",
            Acks::Disk => "disk",
        };
        let on_loss = match self.on_loss {
            OnLoss::Shrink => "lost replicas are let go",
            OnLoss::Stall => "lost replicas are waited for",
        };
        let log_full = match self.log_full {
            LogFull::Stall => "a log at its budget takes no more",
            LogFull::Unprotected => "the primary's log may grow beyond its budget",
        };
        write!(
            f,
            "rule {}, acknowledged from {acks}, {on_loss}, output with {} copies at least, {log_full}",
            self.rule, self.min_copies
        )
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            rule: Rule::All,
            acks: Acks::Memory,
            on_loss: OnLoss::Shrink,
            min_copies: 1,
            log_full: LogFull::Stall,
        }
    }
}

/// The record of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RecordParts")]
pub struct Record {
    /// Of which VM of this name.
    pub lineage: Lineage,
    /// The reign.
    pub term: Term,
    /// How often the record has been changed.
    pub epoch: Epoch,
    /// Who reigns.
    pub primary: Member,
    /// The replicas that hold the log: ordered by host, a host at most once, never the primary.
    pub members: Vec<Member>,
    /// The hosts on which the owner wants copies, the primary's included, ordered.
    pub hosts: Vec<HostName>,
    /// What the owner chose.
    pub policy: Policy,
    /// Every copy that is named here held the log through here when the record was proposed. One
    /// that has less has lost what it held.
    pub through: LogIndex,
    /// Where this reign's own part of the log begins.
    pub begins: LogIndex,
    /// The term by which the end of the log was recorded that this reign goes on with. A log of
    /// another term that is no beginning of this one's parted from it in an earlier reign.
    pub follows: Term,
    /// This reign began with less than was acknowledged, for all that is known: by an operator's
    /// order, or from disks. What other hosts have may be more.
    pub loss: bool,
    /// Where the last reigns' VMMs failed, if they did.
    pub failed: Option<Stumble>,
}

#[derive(Deserialize)]
struct RecordParts {
    #[serde(default)]
    lineage: Lineage,
    term: Term,
    epoch: Epoch,
    primary: Member,
    members: Vec<Member>,
    hosts: Vec<HostName>,
    policy: Policy,
    #[serde(default)]
    through: LogIndex,
    #[serde(default)]
    begins: LogIndex,
    #[serde(default)]
    follows: Term,
    #[serde(default)]
    loss: bool,
    #[serde(default)]
    failed: Option<Stumble>,
}

impl TryFrom<RecordParts> for Record {
    type Error = RecordError;

    fn try_from(parts: RecordParts) -> Result<Self, RecordError> {
        let record = Self {
            lineage: parts.lineage,
            term: parts.term,
            epoch: parts.epoch,
            primary: parts.primary,
            members: parts.members,
            hosts: parts.hosts,
            policy: parts.policy,
            through: parts.through,
            begins: parts.begins,
            follows: parts.follows,
            loss: parts.loss,
            failed: parts.failed,
        };
        record.check()?;
        Ok(record)
    }
}

/// Why something is no record, or may not replace one.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum RecordError {
    /// Too many, unordered or doubled copies.
    #[error("a record lists at most {MAX_COPIES} copies, in order, each host once")]
    Copies,
    /// A reason that is too long.
    #[error("a record tells a failure in at most {} bytes", Stumble::REASON_MAX)]
    Reason,
    /// A VM keeps its identity.
    #[error("a record of {new} may not follow one of {old}: it is another VM of the same name")]
    Lineage {
        /// What is there.
        old: Lineage,
        /// What was to replace it.
        new: Lineage,
    },
    /// Terms rise one by one; a wild one would leave none for those who come after.
    #[error("term {new} is far beyond term {old}: claims rise one by one")]
    Leap {
        /// What is there.
        old: Term,
        /// What was to replace it.
        new: Term,
    },
    /// The numbers must rise.
    #[error("{new} may not follow {old}: the term must not fall and the epoch rises by one")]
    Order {
        /// What is there.
        old: Version,
        /// What was to replace it.
        new: Version,
    },
    /// Only a new term can have another primary.
    #[error("another primary needs another term, and {version} has had one")]
    Primary {
        /// The version in question.
        version: Version,
    },
}

/// What the keeper of records signed, as bytes that only drivers understand: with it a record can
/// be relayed by anybody and forged by nobody.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proof(pub Bytes);

impl Serialize for Proof {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() {
            let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble)]);
            let hex = self
                .0
                .iter()
                .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]);
            to.serialize_str(&hex.collect::<String>())
        } else {
            self.0.serialize(to)
        }
    }
}

impl<'de> Deserialize<'de> for Proof {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        if !from.is_human_readable() {
            return Bytes::deserialize(from).map(Self);
        }
        let hex = String::deserialize(from)?;
        let digits: Option<Vec<_>> = hex.chars().map(|digit| digit.to_digit(16)).collect();
        let digits = digits.filter(|digits| digits.len() % 2 == 0);
        let digits =
            digits.ok_or_else(|| D::Error::custom("a proof is an even row of hex digits"))?;
        let bytes: Vec<u8> = digits
            .chunks(2)
            .map(|pair| (pair[0] << 4 | pair[1]) as u8)
            .collect();
        Ok(Self(bytes.into()))
    }
}

/// A record as its keeper committed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// What is committed.
    pub record: Record,
    /// That its keeper says so.
    pub proof: Proof,
}

impl Committed {
    /// What a host that has seen it remembers.
    pub fn seen(&self) -> Seen {
        self.record.seen()
    }
}

impl Record {
    /// What a host that has seen it remembers.
    pub fn seen(&self) -> Seen {
        Seen {
            lineage: self.lineage,
            version: self.version(),
        }
    }

    /// Which state of the record this is.
    pub fn version(&self) -> Version {
        Version {
            term: self.term,
            epoch: self.epoch,
        }
    }

    /// How many copies it names, the primary included.
    pub fn copies(&self) -> usize {
        1 + self.members.len()
    }

    /// `q`: how many copies, the primary included, must hold an entry before output.
    pub fn needed(&self) -> usize {
        self.policy.rule.needed(self.copies())
    }

    /// How many of its copies must be sealed before another may reign.
    pub fn seals(&self) -> usize {
        self.policy.rule.seals(self.copies())
    }

    /// Whether there are as many copies as the owner wants at least.
    pub fn enough_copies(&self) -> bool {
        self.copies() >= self.policy.min_copies as usize
    }

    /// Its copies: the replicas in order, then the primary. This is the order in which they claim.
    pub fn all_copies(&self) -> impl Iterator<Item = &Member> {
        self.members.iter().chain(std::iter::once(&self.primary))
    }

    /// The copy on a host.
    pub fn copy_on(&self, host: &HostName) -> Option<&Member> {
        self.all_copies().find(|copy| copy.host == *host)
    }

    /// The replica on a host.
    pub fn member_on(&self, host: &HostName) -> Option<&Member> {
        self.members.iter().find(|member| member.host == *host)
    }

    /// Whether the owner wants a copy there, or there is one.
    pub fn concerns(&self, host: &HostName) -> bool {
        self.hosts.contains(host) || self.copy_on(host).is_some()
    }

    /// The next state of this record, with one more host on which a copy is wanted: what an operator
    /// may put in its place, whoever reigns.
    #[must_use]
    pub fn wanted_on(&self, host: &HostName) -> Self {
        let mut next = self.clone();
        next.epoch = self.epoch.next();
        next.hosts.push(host.clone());
        next.hosts.sort();
        next.hosts.dedup();
        next
    }

    /// The place of a host in the order of claiming.
    pub fn rank(&self, host: &HostName) -> Option<usize> {
        self.all_copies().position(|copy| copy.host == *host)
    }

    /// Whether this record may replace `old`. The keeper of records refuses what may not.
    pub fn may_follow(&self, old: Option<&Self>) -> Result<(), RecordError> {
        self.check()?;
        let before = old.map(Self::version).unwrap_or_default();
        let new = self.version();
        if new.term < before.term || new.epoch != before.epoch.next() || new.term == Term(0) {
            return Err(RecordError::Order { old: before, new });
        }
        if new.term.0 > before.term.0.saturating_add(TERM_LEAP) {
            return Err(RecordError::Leap {
                old: before.term,
                new: new.term,
            });
        }
        match old {
            Some(old) if old.lineage != self.lineage => Err(RecordError::Lineage {
                old: old.lineage,
                new: self.lineage,
            }),
            Some(old) if old.term == self.term && old.primary != self.primary => {
                Err(RecordError::Primary { version: new })
            }
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<(), RecordError> {
        let ordered = self.members.is_sorted_by(|a, b| a.host < b.host)
            && self.hosts.is_sorted_by(|a, b| a < b);
        let fits = self.copies() <= MAX_COPIES && self.hosts.len() <= MAX_COPIES;
        let single = self.member_on(&self.primary.host).is_none();
        let reason = self.failed.as_ref().map_or("", |failed| &failed.reason);
        if reason.len() > Stumble::REASON_MAX {
            Err(RecordError::Reason)
        } else if ordered && fits && single {
            Ok(())
        } else {
            Err(RecordError::Copies)
        }
    }
}

#[cfg(test)]
mod tests;
