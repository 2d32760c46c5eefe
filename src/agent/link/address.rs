//! Where peers are.

use std::io;
use std::net::SocketAddr;

use crate::agent::certs::Identity;

/// Where a peer can be reached: `host:port`, looked up each time it is dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Address(pub String);

impl Address {
    pub(super) async fn resolve(&self) -> io::Result<SocketAddr> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        tokio::net::lookup_host(self.0.as_str())
            .await?
            .next()
            .ok_or_else(missing)
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A peer with its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who must answer there.
    pub identity: Identity,
    /// Where.
    pub address: Address,
}
