//! `understudy init`: the folders of a new cluster, one for each process.
//!
//! ```text
//! DIR/ca/                ca.crt ca.key          stays here
//! DIR/hosts/<name>/      host.crt host.key ca.crt understudy.toml
//! DIR/witnesses/<name>/  witness.crt …
//! DIR/gateways/<name>/   gateway.crt …
//! DIR/operator/          operator.crt …
//! ```

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::certs::authority::{Authority, AuthorityError};
use super::certs::{Identity, Name, Role};
use super::durable;
use super::link::Address;
use crate::config::{Config, FILE_NAME, Witness};

/// What the new cluster consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The hosts with the addresses they listen on.
    pub hosts: BTreeMap<Name, SocketAddr>,
    /// Where hosts serve `/metrics`, for those that shall.
    pub metrics: BTreeMap<Name, SocketAddr>,
    /// The witness with the address it listens on.
    pub witness: (Name, SocketAddr),
    /// What others dial to reach a host or the witness, where that is another address than it listens
    /// on: a name, the outside of a NAT, one address of a machine that listens on all of its own.
    pub advertise: BTreeMap<Name, Address>,
    /// The gateways.
    pub gateways: Vec<Name>,
    /// The operator.
    pub operator: Name,
}

/// What was written: the folder of each process.
pub type Folders = BTreeMap<Identity, PathBuf>;

/// Why the folders could not be written.
#[derive(Debug, Error)]
pub enum InitError {
    /// The certificates could not be made.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A configuration could not be written.
    #[error("cannot write {file}: choose a folder on a disk with space that you may write to")]
    Unwritable {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others could not reach it.
    #[error(
        "nobody can dial {name} at {address}: {fault}; give it another address, or say with --advertise {name}=HOST:PORT where others reach it"
    )]
    Undialable {
        /// Who.
        name: Name,
        /// What others would dial.
        address: Address,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// A cluster needs a host.
    #[error("a cluster needs at least one host: add --host NAME=ADDRESS")]
    NoHost,
}

/// Makes a cluster in `dir`; refuses to overwrite one.
pub fn init(dir: &Path, plan: &Plan) -> Result<Folders, InitError> {
    if plan.hosts.is_empty() {
        return Err(InitError::NoHost);
    }
    plan.check()?;
    let authority = Authority::create(dir)?;
    let mut folders = Folders::new();
    let mut write = |role: Role, name: &Name, folder: PathBuf| -> Result<(), InitError> {
        let identity = Identity {
            role,
            name: name.clone(),
        };
        authority.issue_into(&folder, &identity)?;
        let file = folder.join(FILE_NAME);
        let text = plan.config(&identity).to_toml();
        durable::create_new(&file, text.as_bytes(), 0o644)
            .map_err(|source| InitError::Unwritable { file, source })?;
        folders.insert(identity, folder);
        Ok(())
    };
    for name in plan.hosts.keys() {
        write(Role::Host, name, dir.join("hosts").join(name.as_str()))?;
    }
    let witness = &plan.witness.0;
    write(
        Role::Witness,
        witness,
        dir.join("witnesses").join(witness.as_str()),
    )?;
    for name in &plan.gateways {
        write(
            Role::Gateway,
            name,
            dir.join("gateways").join(name.as_str()),
        )?;
    }
    write(Role::Operator, &plan.operator, dir.join("operator"))?;
    Ok(folders)
}

impl Plan {
    /// What others dial to reach a host or the witness.
    pub fn dialled(&self, name: &Name, listen: SocketAddr) -> Address {
        let advertised = self.advertise.get(name).cloned();
        advertised.unwrap_or_else(|| listen.into())
    }

    /// Refuses addresses that nobody can dial.
    fn check(&self) -> Result<(), InitError> {
        let (witness, witness_address) = &self.witness;
        for (name, listen) in self.hosts.iter().chain([(witness, witness_address)]) {
            let listens = Address::from(SocketAddr::new([127, 0, 0, 1].into(), listen.port()));
            let address = self.dialled(name, *listen);
            if let Some(fault) = address.fault().or_else(|| listens.fault()) {
                let name = name.clone();
                return Err(InitError::Undialable {
                    name,
                    address,
                    fault,
                });
            }
        }
        Ok(())
    }

    fn config(&self, identity: &Identity) -> Config {
        let (witness, witness_address) = &self.witness;
        let addresses = self.hosts.iter();
        let (listen, metrics) = match identity.role {
            Role::Host => (
                self.hosts.get(&identity.name),
                self.metrics.get(&identity.name),
            ),
            Role::Witness => (Some(witness_address), None),
            Role::Gateway | Role::Operator => (None, None),
        };
        Config {
            listen: listen.copied(),
            metrics: metrics.copied(),
            hosts: addresses
                .map(|(name, listen)| (name.clone(), self.dialled(name, *listen)))
                .collect(),
            witness: Some(Witness {
                name: witness.clone(),
                address: self.dialled(witness, *witness_address),
            }),
            ..Config::new(identity.role, identity.name.clone())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_process_gets_a_folder_that_it_can_start_from_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let name = |text: &str| text.parse::<Name>().expect("a name");
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let plan = Plan {
            hosts: [(name("a"), at(7001)), (name("b"), at(7002))].into(),
            metrics: [(name("b"), at(9002))].into(),
            witness: (name("w"), at(7100)),
            advertise: BTreeMap::new(),
            gateways: vec![name("g")],
            operator: name("operator"),
        };
        let folders = init(dir.path(), &plan).expect("written");
        assert_eq!(folders.len(), 5);
        for (identity, folder) in &folders {
            let config = Config::load(folder).expect("readable");
            assert_eq!(config.identity(), *identity);
            let credentials = config.credentials().expect("certified");
            assert_eq!(credentials.identity, *identity);
            assert!(!folder.join("ca.key").exists());
        }
        let b = Config::load(&dir.path().join("hosts/b")).expect("readable");
        assert_eq!((b.listen, b.metrics), (Some(at(7002)), Some(at(9002))));
        assert_eq!(b.data, dir.path().join("hosts/b/data"));
        assert!(matches!(
            init(dir.path(), &plan),
            Err(InitError::Authority(AuthorityError::Exists { .. }))
        ));
    }

    #[test]
    fn what_others_dial_need_not_be_where_a_process_listens_but_must_be_dialable() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let name = |text: &str| text.parse::<Name>().expect("a name");
        let all = |port| SocketAddr::from(([0, 0, 0, 0], port));
        let mut plan = Plan {
            hosts: [(name("a"), all(7001)), (name("b"), all(7001))].into(),
            metrics: BTreeMap::new(),
            witness: (name("w"), all(7100)),
            advertise: [
                (name("a"), Address("a.example:7001".to_owned())),
                (name("b"), Address("203.0.113.7:17001".to_owned())),
            ]
            .into(),
            gateways: Vec::new(),
            operator: name("operator"),
        };
        let folder = dir.path().join("cluster");
        let error = init(&folder, &plan).expect_err("nobody can dial the witness");
        let said = error.to_string();
        assert!(said.contains("nobody can dial w at 0.0.0.0:7100"), "{said}");
        assert!(!folder.exists(), "and nothing is written");
        let witness = Address("[2001:db8::7]:7100".to_owned());
        plan.advertise.insert(name("w"), witness.clone());
        let no_port = Plan {
            hosts: [(name("a"), all(0))].into(),
            ..plan.clone()
        };
        assert!(matches!(
            init(&folder, &no_port),
            Err(InitError::Undialable { .. })
        ));
        init(&folder, &plan).expect("written");
        let a = Config::load(&folder.join("hosts/a")).expect("readable");
        assert_eq!(a.listen, Some(all(7001)));
        let dialled = |name: &str| a.hosts.get(name).expect("a host").0.clone();
        assert_eq!(dialled("a"), "a.example:7001");
        assert_eq!(dialled("b"), "203.0.113.7:17001");
        assert_eq!(a.witness().expect("a witness").address, witness);
    }
}
