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
    /// A cluster needs a host.
    #[error("a cluster needs at least one host: add --host NAME=ADDRESS")]
    NoHost,
}

/// Makes a cluster in `dir`; refuses to overwrite one.
pub fn init(dir: &Path, plan: &Plan) -> Result<Folders, InitError> {
    if plan.hosts.is_empty() {
        return Err(InitError::NoHost);
    }
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
                .map(|(name, address)| (name.clone(), Address::from(*address)))
                .collect(),
            witness: Some(Witness {
                name: witness.clone(),
                address: (*witness_address).into(),
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
}
