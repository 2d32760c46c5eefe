//! The cluster's certificate authority: made once by `understudy init`, used on one machine only.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::PrivateKeyDer;
use thiserror::Error;

use super::{Credentials, Identity};
use crate::agent::durable;

/// How many years the authority is good for.
const AUTHORITY_YEARS: i16 = 20;
/// How many years a certificate is good for.
const CERTIFICATE_YEARS: i16 = 5;

/// A certificate authority with its key.
pub struct Authority {
    certificate_pem: String,
    certificate: rustls::pki_types::CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new authority, in memory.
    pub fn generate() -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::<String>::new())?;
        let digest = blake3::hash(key.public_key_raw()).to_hex();
        params.distinguished_name = DistinguishedName::new();
        // The fingerprint of the key tells the clusters of one network apart.
        params.distinguished_name.push(
            DnType::CommonName,
            format!("Understudy cluster {}", &digest[..12]),
        );
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        set_validity(&mut params, AUTHORITY_YEARS);
        let certificate = params.self_signed(&key)?;
        Ok(Self {
            certificate_pem: certificate.pem(),
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
        })
    }

    /// Makes the folder `<dir>/ca` with `ca.crt` and `ca.key`; refuses when it is there.
    pub fn create(dir: &Path) -> Result<Self, AuthorityError> {
        let authority = Self::generate()?;
        let folder = dir.join("ca");
        make_folder(&folder)?;
        write(&folder.join("ca.crt"), &authority.certificate_pem, 0o644)?;
        write(
            &folder.join("ca.key"),
            &authority.issuer.key().serialize_pem(),
            0o600,
        )?;
        Ok(authority)
    }

    /// Opens what [`Authority::create`] made.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        let folder = dir.join("ca");
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read_to_string(&path)
                .map_err(|source| AuthorityError::Unreadable { file: path, source })
        };
        let certificate_pem = read("ca.crt")?;
        let key = KeyPair::from_pem(&read("ca.key")?)?;
        let certificate = rustls::pki_types::pem::PemObject::from_pem_slice(
            certificate_pem.as_bytes(),
        )
        .map_err(|_| AuthorityError::Damaged {
            file: folder.join("ca.crt"),
        })?;
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self {
            certificate_pem,
            certificate,
            issuer,
        })
    }

    /// Makes a certificate with its key, in memory.
    pub fn issue(&self, identity: &Identity) -> Result<Credentials, AuthorityError> {
        let (certificate, key) = self.sign(identity)?;
        Ok(Credentials {
            identity: identity.clone(),
            certificate: certificate.der().clone(),
            key: PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            authority: self.certificate.clone(),
        })
    }

    /// Makes a certificate with its key and writes `<role>.crt`, `<role>.key` and `ca.crt` into
    /// `folder`, which it makes; refuses when the folder is there.
    pub fn issue_into(&self, folder: &Path, identity: &Identity) -> Result<(), AuthorityError> {
        let (certificate, key) = self.sign(identity)?;
        make_folder(folder)?;
        let role = identity.role;
        write(&folder.join("ca.crt"), &self.certificate_pem, 0o644)?;
        write(
            &folder.join(format!("{role}.crt")),
            &certificate.pem(),
            0o644,
        )?;
        write(
            &folder.join(format!("{role}.key")),
            &key.serialize_pem(),
            0o600,
        )
    }

    fn sign(&self, identity: &Identity) -> Result<(rcgen::Certificate, KeyPair), AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![identity.dns_name()])?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, identity.to_string());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, CERTIFICATE_YEARS);
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate, key))
    }
}

/// From yesterday (clocks differ) for this many years.
fn set_validity(params: &mut CertificateParams, years: i16) {
    let today = jiff::Zoned::now().date();
    let from = today.yesterday().unwrap_or(today);
    let ymd = |date: jiff::civil::Date, years: i16| {
        // The 28th exists in every month of every year.
        let day = date.day().min(28).unsigned_abs();
        rcgen::date_time_ymd(
            i32::from(date.year()) + i32::from(years),
            date.month().unsigned_abs(),
            day,
        )
    };
    params.not_before = ymd(from, 0);
    params.not_after = ymd(from, years);
}

fn make_folder(folder: &Path) -> Result<(), AuthorityError> {
    let parent = folder.parent().unwrap_or(folder);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(parent)
        .and_then(|()| DirBuilder::new().mode(0o700).create(folder))
        .map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => AuthorityError::Exists {
                folder: folder.to_owned(),
            },
            _ => AuthorityError::Unwritable {
                file: folder.to_owned(),
                source,
            },
        })
}

fn write(file: &Path, contents: &str, mode: u32) -> Result<(), AuthorityError> {
    durable::create_new(file, contents.as_bytes(), mode).map_err(|source| {
        AuthorityError::Unwritable {
            file: file.to_owned(),
            source,
        }
    })
}

/// Why certificates could not be made.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The folder is there already.
    #[error(
        "{folder} is there already and is not overwritten: choose another folder, or remove it if the cluster it belongs to is gone"
    )]
    Exists {
        /// Which folder.
        folder: PathBuf,
    },
    /// A file cannot be written.
    #[error("cannot write {file}: choose a folder on a disk with space that you may write to")]
    Unwritable {
        /// Which file or folder.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error(
        "cannot read {file}: name the folder that 'understudy init' wrote, as the user who owns it"
    )]
    Unreadable {
        /// Which file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is there and is no certificate.
    #[error("{file} is damaged: restore the cluster's folder from a backup")]
    Damaged {
        /// Which file.
        file: PathBuf,
    },
    /// The certificate could not be made.
    #[error(
        "cannot make a certificate: the authority's key may be damaged, restore it from a backup"
    )]
    Certificate(#[from] rcgen::Error),
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::agent::certs::{Name, Role};

    fn identity(role: Role, name: &str) -> Identity {
        Identity {
            role,
            name: name.parse::<Name>().expect("a name"),
        }
    }

    #[test]
    fn what_is_issued_can_be_loaded_and_names_its_owner() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let authority = Authority::create(dir.path()).expect("an authority");
        for role in Role::ALL {
            let folder = dir.path().join("x").join(role.word());
            authority
                .issue_into(&folder, &identity(role, "one"))
                .expect("issued");
            let loaded = Credentials::load(&folder, role).expect("loaded");
            assert_eq!(loaded.identity, identity(role, "one"));
            let mode = fs::metadata(folder.join(format!("{role}.key")))
                .expect("the key")
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        let wrong = Credentials::load(&dir.path().join("x/host"), Role::Witness);
        assert!(matches!(wrong, Err(LoadError::Unreadable { .. })));
    }

    #[test]
    fn nothing_is_overwritten_and_a_later_opening_issues_on() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let first = Authority::create(dir.path()).expect("an authority");
        assert!(matches!(
            Authority::create(dir.path()),
            Err(AuthorityError::Exists { .. })
        ));
        let again = Authority::open(dir.path()).expect("opened");
        assert_eq!(first.certificate, again.certificate);
        let folder = dir.path().join("late");
        again
            .issue_into(&folder, &identity(Role::Host, "late"))
            .expect("issued");
        assert!(matches!(
            again.issue_into(&folder, &identity(Role::Host, "late")),
            Err(AuthorityError::Exists { .. })
        ));
    }

    use crate::agent::certs::LoadCredentialsError as LoadError;
}
