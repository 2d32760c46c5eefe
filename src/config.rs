//! The configuration file, `understudy.toml`: who a process is, where the others are, and its limits.
//!
//! `understudy init` writes one for every process, beside its certificates. Paths in it are relative
//! to its folder.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::agent::certs::{Credentials, Identity, LoadCredentialsError, Name, Role};
use crate::agent::durable;
use crate::agent::link::{Address, Peer};

/// The file's name.
pub const FILE_NAME: &str = "understudy.toml";
/// The longest file.
const FILE_MAX: u64 = 1024 * 1024;

/// Everything the file says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// What this process is.
    pub role: Role,
    /// Its name, the same as in its certificate.
    pub name: Name,
    /// The UDP address it listens on; hosts and witnesses need one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// The folder for logs, disks and records.
    #[serde(default = "default_data")]
    pub data: PathBuf,
    /// The TCP address for `/metrics`; none are served without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
    /// The program to start VMM processes from; this program itself without it. For tests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_binary: Option<PathBuf>,
    /// The hosts of the cluster, with their addresses.
    #[serde(default)]
    pub hosts: BTreeMap<Name, Address>,
    /// Who keeps the records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<Witness>,
    /// How logs are kept.
    #[serde(default)]
    pub log: LogOptions,
    /// How much this host takes on.
    #[serde(default)]
    pub limits: Limits,
    /// Where the file is: paths are relative to it, and the certificates are there.
    #[serde(skip)]
    pub folder: PathBuf,
}

/// The keeper of the records.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Witness {
    /// Its name.
    pub name: Name,
    /// Where it listens.
    pub address: Address,
}

/// How logs are kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct LogOptions {
    /// When the log is synced to disk.
    pub sync: SyncWhen,
    /// How much disk one VM's log may take.
    pub retention: ByteSize,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            sync: SyncWhen::Asked,
            retention: ByteSize(8 << 30),
        }
    }
}

/// When the log is synced to disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SyncWhen {
    /// Whenever the protocol wants it: always for VMs whose copies acknowledge from disk.
    #[default]
    Asked,
    /// After everything that is appended, for VMs that acknowledge from memory too.
    Always,
}

/// How much a host takes on. What is beyond is refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Limits {
    /// How many VMs, primaries and replicas together.
    pub vms: u32,
    /// How much memory all their guests may have together.
    pub guest_memory: ByteSize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vms: 16,
            guest_memory: ByteSize(4 << 30),
        }
    }
}

fn default_data() -> PathBuf {
    PathBuf::from("data")
}

/// A number of bytes, written with a unit: `512MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

const UNITS: [(&str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

/// A text that is no size.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("'{0}' is no size: write a whole number with B, KiB, MiB, GiB or TiB, as in 512MiB")]
pub struct BadSize(String);

impl FromStr for ByteSize {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let bad = || BadSize(text.chars().take(40).collect());
        let (number, shift) = UNITS
            .iter()
            .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
            .ok_or_else(bad)?;
        let number: u64 = number.trim_end().parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |(_, shift): &&(&str, u32)| self.0.trailing_zeros() >= *shift;
        // Zero is whole in every unit, and everything is in bytes.
        let (unit, shift) = UNITS.iter().find(whole).unwrap_or(&("B", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl TryFrom<String> for ByteSize {
    type Error = BadSize;

    fn try_from(text: String) -> Result<Self, BadSize> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

impl Config {
    /// A configuration with defaults for everything but the names.
    pub fn new(role: Role, name: Name) -> Self {
        Self {
            role,
            name,
            listen: None,
            data: default_data(),
            metrics: None,
            hosts: BTreeMap::new(),
            witness: None,
            log: LogOptions::default(),
            limits: Limits::default(),
            vmm_binary: None,
            folder: PathBuf::new(),
        }
    }

    /// Reads a file, or `understudy.toml` in a folder.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let file = if path.is_dir() {
            path.join(FILE_NAME)
        } else {
            path.to_owned()
        };
        let unreadable = |source| ConfigError::Unreadable {
            file: file.clone(),
            source,
        };
        let bytes = durable::read_bounded(&file, FILE_MAX)
            .and_then(|bytes| bytes.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(unreadable)?;
        let text = String::from_utf8(bytes)
            .map_err(|error| unreadable(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        let mut config = Self::parse(&text, &file)?;
        file.parent()
            .unwrap_or(Path::new(""))
            .clone_into(&mut config.folder);
        config.data = config.folder.join(&config.data);
        Ok(config)
    }

    /// Reads the text of a file.
    fn parse(text: &str, file: &Path) -> Result<Self, ConfigError> {
        let config: Self =
            toml::from_str(text).map_err(|error| ConfigError::reading(&error, text, file))?;
        let missing = |key, role| ConfigError::Missing {
            file: file.to_owned(),
            key,
            role,
        };
        let (role, hosts) = (config.role, config.hosts.len());
        for (name, address) in config.dialled() {
            if let Some(fault) = address.fault() {
                return Err(ConfigError::Undialable {
                    file: file.to_owned(),
                    name: name.clone(),
                    address: address.clone(),
                    fault,
                });
            }
        }
        match role {
            Role::Host | Role::Witness if config.listen.is_none() => Err(missing("listen", role)),
            Role::Host | Role::Gateway | Role::Operator if hosts == 0 => {
                Err(missing("hosts", role))
            }
            Role::Host | Role::Gateway if config.witness.is_none() => Err(missing("witness", role)),
            _ => Ok(config),
        }
    }

    /// Every address that this process may dial.
    fn dialled(&self) -> impl Iterator<Item = (&Name, &Address)> {
        let witness = self.witness.iter();
        let witness = witness.map(|witness| (&witness.name, &witness.address));
        let ours = move |name: &Name| self.role == Role::Host && *name == self.name;
        let others = self.hosts.iter().filter(move |(name, _)| !ours(name));
        others.chain(witness)
    }

    /// The text of the file, as `init` writes it.
    pub fn to_toml(&self) -> String {
        let body = toml::to_string_pretty(self).expect("a configuration can be written as TOML");
        format!(
            "# Written by 'understudy init'; edit it as you like. See src/agent/README.md.\n\n{body}"
        )
    }

    /// Who this process is.
    pub fn identity(&self) -> Identity {
        Identity {
            role: self.role,
            name: self.name.clone(),
        }
    }

    /// Loads the certificates beside the file, and checks that they are of this name.
    pub fn credentials(&self) -> Result<Credentials, ConfigError> {
        let credentials = Credentials::load(&self.folder, self.role)?;
        if credentials.identity.name == self.name {
            Ok(credentials)
        } else {
            Err(ConfigError::OtherName {
                file: self.folder.join(FILE_NAME),
                configured: self.name.clone(),
                certified: credentials.identity.name,
            })
        }
    }

    /// The host of this name.
    pub fn host(&self, name: &str) -> Option<Peer> {
        let (name, address) = self.hosts.get_key_value(name)?;
        Some(Peer {
            identity: Identity::host(name),
            address: address.clone(),
        })
    }

    /// All hosts but this process itself.
    pub fn other_hosts(&self) -> Vec<Peer> {
        let ours = |identity: &Identity| *identity == self.identity();
        let peer = |(name, address): (&Name, &Address)| Peer {
            identity: Identity::host(name),
            address: address.clone(),
        };
        let peers = self.hosts.iter().map(peer);
        peers.filter(|peer| !ours(&peer.identity)).collect()
    }

    /// The keeper of the records.
    pub fn witness(&self) -> Option<Peer> {
        self.witness.as_ref().map(|witness| Peer {
            identity: Identity::witness(&witness.name),
            address: witness.address.clone(),
        })
    }
}

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read {file}: name the file or folder that 'understudy init' wrote, with --config"
    )]
    Unreadable {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A key that does not exist.
    #[error("{file}, line {line}: there is no key '{key}'; {}", did_you_mean(closest.as_deref(), known))]
    UnknownKey {
        /// Which file.
        file: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What it says.
        key: String,
        /// The most similar key, where one is similar at all.
        closest: Option<String>,
        /// The keys there are.
        known: Vec<String>,
    },
    /// Not TOML, or a value of the wrong kind.
    #[error("{file}, line {line}: {reason}")]
    Wrong {
        /// Which file.
        file: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What is wrong.
        reason: String,
    },
    /// A key that this role needs.
    #[error(
        "{file}: a {role} needs '{key}'; add it, or write the file again with 'understudy init'"
    )]
    Missing {
        /// Which file.
        file: PathBuf,
        /// Which key.
        key: &'static str,
        /// The role.
        role: Role,
    },
    /// An address that cannot be reached from anywhere.
    #[error(
        "{file}: {name} cannot be dialled at {address}: {fault}; write where this process reaches it"
    )]
    Undialable {
        /// The file.
        file: PathBuf,
        /// Whose address it is.
        name: Name,
        /// The address.
        address: Address,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// The certificate is of another name.
    #[error(
        "{file} names this process '{configured}', its certificate '{certified}': put the two of one name into one folder"
    )]
    OtherName {
        /// Which file.
        file: PathBuf,
        /// What it says.
        configured: Name,
        /// What the certificate says.
        certified: Name,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Credentials(#[from] LoadCredentialsError),
}

fn did_you_mean(closest: Option<&str>, known: &[String]) -> String {
    match closest {
        Some(closest) => format!("did you mean '{closest}'?"),
        None => format!("the keys are: {}", known.join(", ")),
    }
}

impl ConfigError {
    fn reading(error: &toml::de::Error, text: &str, file: &Path) -> Self {
        let line = line_of(error.span(), text);
        let file = file.to_owned();
        let reason = error.message().lines().next().unwrap_or_default();
        match unknown_key(error.message()) {
            Some((key, known)) => Self::UnknownKey {
                file,
                line,
                closest: closest(&key, &known),
                key,
                known,
            },
            None => Self::Wrong {
                file,
                line,
                reason: reason.to_owned(),
            },
        }
    }
}

fn line_of(span: Option<Range<usize>>, text: &str) -> usize {
    let start = span.map_or(0, |span| span.start);
    1 + text.get(..start).unwrap_or_default().matches('\n').count()
}

/// Reads the two messages that serde has for unknown names: "unknown field `x`, expected one of
/// `a`, `b`" and "unknown variant …"; the first between backticks is the culprit.
fn unknown_key(message: &str) -> Option<(String, Vec<String>)> {
    if !message.starts_with("unknown field") {
        return None;
    }
    let mut quoted = message.split('`').skip(1).step_by(2).map(str::to_owned);
    Some((quoted.next()?, quoted.collect()))
}

/// The most similar of the known words, if it is similar enough to have been meant.
pub fn closest(word: &str, known: &[String]) -> Option<String> {
    let similar = |candidate: &&String| strsim::damerau_levenshtein(word, candidate);
    let best = known.iter().min_by_key(similar)?;
    let limit = word.chars().count().max(best.chars().count()).div_ceil(3);
    (similar(&best) <= limit).then(|| best.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
role = "host"
name = "a"
listen = "127.0.0.1:7001"

[hosts]
a = "127.0.0.1:7001"
b = "other.example:7001"

[witness]
name = "w"
address = "127.0.0.1:7100"

[log]
retention = "2GiB"
"#;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("x.toml"))
    }

    #[test]
    fn a_file_is_read_and_written_back_the_same() {
        let config = parse(GOOD).expect("good");
        assert_eq!(config.log.retention, ByteSize(2 << 30));
        assert_eq!(config.limits, Limits::default());
        let [other] = &config.other_hosts()[..] else {
            panic!("one other host");
        };
        assert_eq!(other.identity.name.as_str(), "b");
        assert_eq!(parse(&config.to_toml()).expect("good"), config);
    }

    #[test]
    fn misspelt_keys_name_the_closest() {
        for (wrong, meant, line) in [
            ("listen = ", "lisen", 4),
            ("retention", "retension", 15),
            ("address", "adress", 12),
            ("[witness]", "[witnes]", 10),
        ] {
            let misspelt = if meant == "lisen" { "lisen = " } else { meant };
            let error = parse(&GOOD.replace(wrong, misspelt)).expect_err(meant);
            let said = error.to_string();
            let meant = wrong.trim_matches(|c: char| !c.is_ascii_lowercase());
            assert!(said.contains(&format!("did you mean '{meant}'")), "{said}");
            assert!(said.contains(&format!("line {line}")), "{said}");
        }
        let error = parse(&GOOD.replace("[log]", "[log]\nxyzzy = 1")).expect_err("no key");
        assert!(
            error.to_string().contains("the keys are: sync, retention"),
            "{error}"
        );
    }

    #[test]
    fn what_a_role_needs_is_asked_for() {
        for (without, key) in [
            ("listen = \"127.0.0.1:7001\"", "listen"),
            (
                "a = \"127.0.0.1:7001\"\nb = \"other.example:7001\"",
                "hosts",
            ),
            (
                "[witness]\nname = \"w\"\naddress = \"127.0.0.1:7100\"",
                "witness",
            ),
        ] {
            let said = parse(&GOOD.replace(without, ""))
                .expect_err(key)
                .to_string();
            assert!(said.contains(&format!("needs '{key}'")), "{said}");
        }
    }

    #[test]
    fn addresses_that_nobody_can_dial_are_refused_but_in_ones_own_place() {
        for (good, bad) in [
            ("b = \"other.example:7001\"", "b = \"other.example\""),
            ("b = \"other.example:7001\"", "b = \"0.0.0.0:7001\""),
            ("address = \"127.0.0.1:7100\"", "address = \"127.0.0.1:0\""),
        ] {
            let said = parse(&GOOD.replace(good, bad)).expect_err(bad).to_string();
            assert!(said.contains("cannot be dialled"), "{said}");
        }
        let own = GOOD.replace("a = \"127.0.0.1:7001\"", "a = \"0.0.0.0:7001\"");
        assert!(parse(&own).is_ok());
    }

    #[test]
    fn wrong_values_say_where() {
        for bad in ["2", "2 bananas", "-1GiB", "99999999999TiB"] {
            let error = parse(&GOOD.replace("2GiB", bad)).expect_err(bad);
            let said = error.to_string();
            assert!(
                said.contains("line 15") && said.contains("is no size"),
                "{said}"
            );
        }
        assert!(parse(&GOOD.replace("name = \"a\"", "name = \"A\"")).is_err());
        assert!(parse("role = ").is_err());
    }

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for text in ["0TiB", "1B", "1536MiB", "3GiB", "1025KiB"] {
            assert_eq!(text.parse::<ByteSize>().expect(text).to_string(), text);
        }
    }
}
