//! Signed records: what the keeper of the records says can be relayed by anybody and forged by
//! nobody.
//!
//! The keeper signs the VM's name and the record, as they are encoded on the wire, with the key of
//! its certificate. A [`Proof`] carries the certificate and the signature. Whoever knows the
//! cluster's authority can check it ([`Verifier`]): the certificate is of the cluster and of the
//! role `witness`, whatever the witness's name, so that what an earlier witness signed can be
//! given to its successor.
//!
//! The dates of the certificate are not checked: a record stays what was committed after the
//! certificate has run out, and hosts without a clock can check it, too.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, UnparsedPublicKey,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier as _;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Credentials, Identity, Role};
use crate::agent::link::lock;
use crate::protocol::{Committed, Proof, Record, VmName};

/// Nothing else that the key signs begins like this.
const CONTEXT: &[u8] = b"understudy record 1\0";

/// What is in a [`Proof`].
#[derive(Serialize, Deserialize)]
struct Signed {
    certificate: Bytes,
    signature: Bytes,
}

/// Why records cannot be signed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SignError {
    /// The key is not of the kind that `understudy init` makes.
    #[error(
        "the witness's key cannot sign: copy its folder again from the one that 'understudy init' wrote"
    )]
    Key,
    /// The system gave no random numbers.
    #[error("the record cannot be signed: the system gives no random numbers")]
    Random,
}

/// Why a record is not believed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ProofError {
    /// The proof is no certificate and signature.
    #[error("its proof cannot be read")]
    Unreadable,
    /// The certificate is not of this cluster.
    #[error("its proof carries a certificate of another cluster")]
    Foreign,
    /// The certificate is not a witness's.
    #[error("it is signed by {by}, which keeps no records")]
    WrongRole {
        /// Whose certificate it is.
        by: Identity,
    },
    /// The signature is of something else.
    #[error("its signature does not fit: it was changed on its way, or forged")]
    Forged,
}

/// The bytes that are signed.
fn signed_bytes(vm: &VmName, record: &Record) -> Vec<u8> {
    let mut bytes = CONTEXT.to_vec();
    let encoded = postcard::to_stdvec(&(vm, record)).expect("plain data always encodes");
    bytes.extend_from_slice(&encoded);
    bytes
}

/// Signs records: the keeper has one.
pub struct Signer {
    key: EcdsaKeyPair,
    certificate: Bytes,
    random: SystemRandom,
}

impl Signer {
    /// Signs with the key of these credentials.
    pub fn new(credentials: &Credentials) -> Result<Self, SignError> {
        let random = SystemRandom::new();
        let key = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_ASN1_SIGNING,
            credentials.key.secret_der(),
            &random,
        );
        Ok(Self {
            key: key.map_err(|_| SignError::Key)?,
            certificate: Bytes::copy_from_slice(&credentials.certificate),
            random,
        })
    }

    /// Signs that this is the committed record of this VM. Takes some 50 µs of processor time.
    pub fn sign(&self, vm: &VmName, record: Record) -> Result<Committed, SignError> {
        let signature = self.key.sign(&self.random, &signed_bytes(vm, &record));
        let signature = signature.map_err(|_| SignError::Random)?;
        let signed = Signed {
            certificate: self.certificate.clone(),
            signature: Bytes::copy_from_slice(signature.as_ref()),
        };
        let proof = postcard::to_stdvec(&signed).expect("plain data always encodes");
        Ok(Committed {
            record,
            proof: Proof(proof.into()),
        })
    }
}

/// A certificate that has been checked, and its public key.
struct Known {
    certificate: Bytes,
    key: Vec<u8>,
}

/// Checks proofs against the cluster's authority. Cheap to clone; clones share what they know.
#[derive(Clone)]
pub struct Verifier {
    chains: Arc<WebPkiServerVerifier>,
    /// The last good certificate: there is one witness, so most proofs carry the same.
    known: Arc<Mutex<Option<Known>>>,
}

/// The authority cannot be used to check anything.
#[derive(Clone, Debug, Error)]
#[error(
    "the cluster's authority cannot be used: copy ca.crt again from the folder that 'understudy init' wrote"
)]
pub struct VerifierError;

impl Verifier {
    /// Believes what witnesses of this authority's cluster have signed.
    pub fn new(authority: &CertificateDer<'static>) -> Result<Self, VerifierError> {
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone()).map_err(|_| VerifierError)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chains = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build();
        Ok(Self {
            chains: chains.map_err(|_| VerifierError)?,
            known: Arc::default(),
        })
    }

    /// Checks that a witness of this cluster has committed this record of this VM.
    pub fn verify(&self, vm: &VmName, committed: &Committed) -> Result<(), ProofError> {
        let signed: Signed =
            postcard::from_bytes(&committed.proof.0).map_err(|_| ProofError::Unreadable)?;
        let key = self.key_of(&signed.certificate)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
            .verify(&signed_bytes(vm, &committed.record), &signed.signature)
            .map_err(|_| ProofError::Forged)
    }

    /// The public key in this certificate, if it is one of a witness of the cluster.
    fn key_of(&self, certificate: &Bytes) -> Result<Vec<u8>, ProofError> {
        if let Some(known) = lock(&self.known).as_ref()
            && known.certificate == *certificate
        {
            return Ok(known.key.clone());
        }
        let der = CertificateDer::from(certificate.as_ref());
        let identity = Identity::from_certificate(&der).ok_or(ProofError::Unreadable)?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&der).map_err(|_| ProofError::Unreadable)?;
        let name = ServerName::try_from(identity.dns_name()).map_err(|_| ProofError::Unreadable)?;
        // Its own first moment, at which it was good: see the top of this file.
        let begin = parsed.validity().not_before.timestamp();
        let begin = Duration::from_secs(u64::try_from(begin).unwrap_or(0));
        let at = UnixTime::since_unix_epoch(begin);
        self.chains
            .verify_server_cert(&der, &[], &name, &[], at)
            .map_err(|_| ProofError::Foreign)?;
        if identity.role != Role::Witness {
            return Err(ProofError::WrongRole { by: identity });
        }
        let key = parsed.public_key().subject_public_key.data.to_vec();
        *lock(&self.known) = Some(Known {
            certificate: certificate.clone(),
            key: key.clone(),
        });
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use replay_log::{LogIndex, Term};

    use super::*;
    use crate::agent::certs::authority::Authority;
    use crate::protocol::{Epoch, HostName, Incarnation, Lineage, Member, Policy};

    fn record() -> Record {
        Record {
            lineage: Lineage(7),
            term: Term(2),
            epoch: Epoch(5),
            primary: Member {
                host: HostName::new("a").expect("a name"),
                incarnation: Incarnation(1),
            },
            members: vec![],
            hosts: vec![],
            policy: Policy::default(),
            through: LogIndex(3),
            begins: LogIndex::START,
            follows: replay_log::Term(0),
            loss: false,
            failed: None,
        }
    }

    fn vm(name: &str) -> VmName {
        VmName::new(name).expect("a name")
    }

    fn issued(authority: &Authority, role: Role) -> Credentials {
        let name = "w".parse().expect("a name");
        authority
            .issue(&Identity { role, name })
            .expect("a certificate")
    }

    fn signed_by(credentials: &Credentials) -> Committed {
        let signer = Signer::new(credentials).expect("a signer");
        signer.sign(&vm("shop"), record()).expect("signed")
    }

    #[test]
    fn what_a_witness_has_signed_is_believed_and_nothing_else() {
        let authority = Authority::generate().expect("an authority");
        let witness = issued(&authority, Role::Witness);
        let verifier = Verifier::new(&witness.authority).expect("a verifier");
        let good = signed_by(&witness);
        // Twice: the second time with the certificate that is known.
        for _ in 0..2 {
            assert_eq!(verifier.verify(&vm("shop"), &good), Ok(()));
        }
        let of_another_vm = verifier.verify(&vm("shop2"), &good);
        assert_eq!(of_another_vm, Err(ProofError::Forged));
        let mut changed = good.clone();
        changed.record.term = Term(3);
        assert_eq!(
            verifier.verify(&vm("shop"), &changed),
            Err(ProofError::Forged)
        );
        let mut empty = good.clone();
        empty.proof = Proof::default();
        assert_eq!(
            verifier.verify(&vm("shop"), &empty),
            Err(ProofError::Unreadable)
        );
        // Every byte counts, of the certificate and of the signature.
        for at in 0..good.proof.0.len() {
            let mut bytes = good.proof.0.to_vec();
            bytes[at] ^= 1;
            let mut flipped = good.clone();
            flipped.proof = Proof(bytes.into());
            assert!(
                verifier.verify(&vm("shop"), &flipped).is_err(),
                "byte {at} does not count"
            );
        }
    }

    #[test]
    fn other_roles_and_other_clusters_are_not_believed() {
        let authority = Authority::generate().expect("an authority");
        let verifier =
            Verifier::new(&issued(&authority, Role::Witness).authority).expect("a verifier");
        for role in [Role::Host, Role::Gateway, Role::Operator] {
            let forged = signed_by(&issued(&authority, role));
            assert!(matches!(
                verifier.verify(&vm("shop"), &forged),
                Err(ProofError::WrongRole { by }) if by.role == role
            ));
        }
        let other = Authority::generate().expect("an authority");
        let foreign = signed_by(&issued(&other, Role::Witness));
        assert_eq!(
            verifier.verify(&vm("shop"), &foreign),
            Err(ProofError::Foreign)
        );
    }
}
