//! TLS for the link: both sides show a certificate of the same authority, and no other is taken.

use std::sync::Arc;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use thiserror::Error;

use crate::agent::certs::{Credentials, Identity};

/// What a connection is for, agreed upon in the handshake (ALPN).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The lanes between two hosts; at most one connection for each pair.
    Lanes,
    /// Streams opened by one side and served by the other: requests, frames, bulk.
    Services,
}

impl Purpose {
    const ALL: [Self; 2] = [Self::Lanes, Self::Services];

    /// The name in the handshake; carries the version of the wire format.
    const fn alpn(self) -> &'static [u8] {
        match self {
            Self::Lanes => b"understudy-lanes/1",
            Self::Services => b"understudy-services/1",
        }
    }

    /// What the handshake of this connection agreed upon.
    pub(super) fn of(connection: &quinn::Connection) -> Option<Self> {
        let data = connection
            .handshake_data()?
            .downcast::<HandshakeData>()
            .ok()?;
        let agreed = data.protocol.as_deref()?;
        Self::ALL
            .into_iter()
            .find(|purpose| purpose.alpn() == agreed)
    }
}

/// The identity that the other side's certificate proves.
pub(super) fn peer_of(connection: &quinn::Connection) -> Option<Identity> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    Identity::from_certificate(chain.first()?)
}

/// Why our own certificates cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// TLS takes the certificate, key or authority for bad.
    #[error(
        "the certificates cannot be used: copy this process's folder again from the one that 'understudy init' wrote"
    )]
    Certificates(#[from] rustls::Error),
    /// The verifier of clients' certificates cannot be made.
    #[error(
        "the cluster's authority cannot be used: copy ca.crt again from the folder that 'understudy init' wrote"
    )]
    Authority(#[from] rustls::server::VerifierBuilderError),
    /// The TLS library lacks what QUIC needs.
    #[error("the TLS library cannot do QUIC: build Understudy with the ring provider")]
    NoQuic(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

fn roots(credentials: &Credentials) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(credentials.authority.clone())?;
    Ok(roots)
}

/// How we accept.
pub(super) fn server(credentials: &Credentials) -> Result<QuicServerConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(credentials)?),
        Arc::clone(&provider),
    )
    .build()?;
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![credentials.certificate.clone()],
            credentials.key.clone_key(),
        )?;
    config.alpn_protocols = Purpose::ALL.map(|purpose| purpose.alpn().to_vec()).to_vec();
    // Every connection shows its certificate anew, so that nothing outlives it.
    config.send_tls13_tickets = 0;
    Ok(config.try_into()?)
}

/// How we dial.
pub(super) fn client(
    credentials: &Credentials,
    purpose: Purpose,
) -> Result<QuicClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(credentials)?)
        .with_client_auth_cert(
            vec![credentials.certificate.clone()],
            credentials.key.clone_key(),
        )?;
    config.alpn_protocols = vec![purpose.alpn().to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config.try_into()?)
}
