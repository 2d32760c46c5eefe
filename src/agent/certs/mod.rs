//! Who is who: names, roles, and the certificates that prove them.
//!
//! A cluster has one certificate authority, made by `understudy init` ([`authority`]). Its key stays
//! in the folder of `init`; every process holds a certificate with its name and role
//! ([`Credentials`]). The name and role stand in the certificate's only DNS name,
//! `<name>.<role>.understudy`, so that TLS itself checks that the other side is who was dialled.
//!
//! With its certificate's key the witness also signs the records that it keeps ([`proof`]).
//!
//! Certificates are neither renewed nor revoked yet: whoever adds that finds every load of a
//! certificate in [`Credentials::load`] and every check of one in `link::tls`.

pub mod authority;
pub mod proof;

use std::borrow::Borrow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::durable;
use crate::protocol::HostName;

/// The last label of every name in a certificate.
const DOMAIN: &str = "understudy";
/// The longest name, the limit of a DNS label.
const NAME_MAX: usize = 63;
/// More than any certificate or key of ours.
const FILE_MAX: u64 = 64 * 1024;

/// The name of a host, a witness, a gateway, an operator: 1 to 63 of `a-z`, `0-9` and `-`,
/// neither first nor last a `-`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(Arc<str>);

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let good = (1..=NAME_MAX).contains(&text.len())
            && text.bytes().all(allowed)
            && !text.starts_with('-')
            && !text.ends_with('-');
        if good {
            Ok(Self(text.into()))
        } else {
            Err(BadName {
                found: text.chars().take(80).collect(),
            })
        }
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl From<&Name> for HostName {
    fn from(name: &Name) -> Self {
        // A DNS label is a host name; the tests try every shape of one.
        HostName::new(name.as_str()).expect("every name can be a host's name")
    }
}

impl TryFrom<String> for Name {
    type Error = BadName;

    fn try_from(text: String) -> Result<Self, BadName> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A name that cannot be one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "'{found}' cannot be a name: use 1 to 63 lower-case letters, digits and hyphens, beginning and ending with a letter or digit"
)]
pub struct BadName {
    /// What was given, shortened.
    pub found: String,
}

/// What a process is in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Runs virtual machines, as primary or replica.
    Host,
    /// Keeps records.
    Witness,
    /// Stands between clients and virtual machines.
    Gateway,
    /// Gives orders.
    Operator,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Host, Self::Witness, Self::Gateway, Self::Operator];

    /// The word used in certificates, files and messages.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Witness => "witness",
            Self::Gateway => "gateway",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A name with its role: what a certificate proves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// What it is.
    pub role: Role,
    /// What it is called.
    pub name: Name,
}

impl Identity {
    /// The host of this name.
    pub fn host(name: &Name) -> Self {
        Self {
            role: Role::Host,
            name: name.clone(),
        }
    }

    /// The witness of this name.
    pub fn witness(name: &Name) -> Self {
        Self {
            role: Role::Witness,
            name: name.clone(),
        }
    }

    /// The DNS name that stands in the certificate.
    pub fn dns_name(&self) -> String {
        format!("{}.{}.{DOMAIN}", self.name, self.role)
    }

    /// Reads what [`Identity::dns_name`] wrote.
    fn from_dns_name(text: &str) -> Option<Self> {
        let mut labels = text.split('.');
        let (name, role, domain) = (labels.next()?, labels.next()?, labels.next()?);
        let role = Role::ALL.into_iter().find(|known| known.word() == role)?;
        let name = name.parse().ok()?;
        (domain == DOMAIN && labels.next().is_none()).then_some(Self { role, name })
    }

    /// The identity a certificate carries. The certificate's signature is not checked here: TLS
    /// has done so before anybody sees a peer's certificate.
    pub fn from_certificate(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let names = parsed.subject_alternative_name().ok()??;
        match names.value.general_names.as_slice() {
            [x509_parser::extensions::GeneralName::DNSName(name)] => Self::from_dns_name(name),
            _ => None,
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.role, self.name)
    }
}

/// What a process proves itself with, and what it checks others against.
#[derive(Debug)]
pub struct Credentials {
    /// Who we are.
    pub identity: Identity,
    /// Our certificate.
    pub certificate: CertificateDer<'static>,
    /// Its key.
    pub key: PrivateKeyDer<'static>,
    /// The cluster's certificate authority.
    pub authority: CertificateDer<'static>,
}

impl Credentials {
    /// Loads `<role>.crt`, `<role>.key` and `ca.crt` from a folder that `understudy init` wrote.
    pub fn load(folder: &Path, role: Role) -> Result<Self, LoadCredentialsError> {
        let certificate_file = folder.join(format!("{role}.crt"));
        let certificate = read_certificate(&certificate_file)?;
        let authority = read_certificate(&folder.join("ca.crt"))?;
        let key_file = folder.join(format!("{role}.key"));
        let key = PrivateKeyDer::from_pem_slice(&read(&key_file)?).map_err(|source| {
            LoadCredentialsError::Damaged {
                file: key_file,
                source,
            }
        })?;
        let identity = Identity::from_certificate(&certificate)
            .filter(|identity| identity.role == role)
            .ok_or(LoadCredentialsError::NotOurs {
                file: certificate_file,
                role,
            })?;
        Ok(Self {
            identity,
            certificate,
            key,
            authority,
        })
    }
}

impl Clone for Credentials {
    fn clone(&self) -> Self {
        Self {
            identity: self.identity.clone(),
            certificate: self.certificate.clone(),
            key: self.key.clone_key(),
            authority: self.authority.clone(),
        }
    }
}

fn read(file: &Path) -> Result<Vec<u8>, LoadCredentialsError> {
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    durable::read_bounded(file, FILE_MAX)
        .and_then(|contents| contents.ok_or_else(missing))
        .map_err(|source| LoadCredentialsError::Unreadable {
            file: file.to_owned(),
            source,
        })
}

fn read_certificate(file: &Path) -> Result<CertificateDer<'static>, LoadCredentialsError> {
    CertificateDer::from_pem_slice(&read(file)?).map_err(|source| LoadCredentialsError::Damaged {
        file: file.to_owned(),
        source,
    })
}

/// Why credentials could not be loaded.
#[derive(Debug, Error)]
pub enum LoadCredentialsError {
    /// A file is missing or cannot be read.
    #[error(
        "cannot read {file}: copy this process's folder from the one that 'understudy init' wrote, and run as the user who owns it"
    )]
    Unreadable {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is there and is not PEM of the right kind.
    #[error("{file} is damaged: copy it again from the folder that 'understudy init' wrote")]
    Damaged {
        /// Which file.
        file: PathBuf,
        /// What is wrong.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The certificate is somebody else's.
    #[error(
        "{file} is no {role} certificate of an Understudy cluster: use the folder that 'understudy init' wrote for this {role}"
    )]
    NotOurs {
        /// Which file.
        file: PathBuf,
        /// What was expected.
        role: Role,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "host-1", "0", &"x".repeat(63)] {
            let name = good.parse::<Name>().expect(good);
            assert_eq!(HostName::from(&name).as_str(), good);
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", "ä", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn identities_survive_their_dns_names() {
        for role in Role::ALL {
            let identity = Identity {
                role,
                name: "b-2".parse().expect("a name"),
            };
            assert_eq!(
                Identity::from_dns_name(&identity.dns_name()),
                Some(identity)
            );
        }
        for bad in [
            "",
            "a.host",
            "a.host.understudy.x",
            "a.king.understudy",
            "A.host.understudy",
            "a.host.other",
        ] {
            assert_eq!(Identity::from_dns_name(bad), None, "{bad}");
        }
    }
}
