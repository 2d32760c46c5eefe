//! Where peers are.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use tokio::time::timeout;

use super::endpoint::lock;
use crate::agent::certs::Identity;

/// How long the name service may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(3);

/// Where a peer can be reached: `host:port`, looked up each time it is dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Address(pub String);

impl Address {
    /// Why nobody can dial this, if that is to be seen without looking it up.
    pub fn fault(&self) -> Option<&'static str> {
        if let Ok(address) = self.0.parse::<SocketAddr>() {
            let to_all = address.ip().to_canonical().is_unspecified();
            return match address.port() {
                0 => Some("port 0 is none"),
                _ if to_all => Some("this is every address of whoever dials it, and no one's"),
                _ => None,
            };
        }
        let Some((host, port)) = self.0.rsplit_once(':') else {
            return Some("it has no port");
        };
        match port.parse::<u16>() {
            Err(_) => Some("its port is no number"),
            Ok(0) => Some("port 0 is none"),
            Ok(_) if host.is_empty() => Some("it has no host"),
            Ok(_) => None,
        }
    }

    async fn look_up(&self) -> io::Result<Vec<SocketAddr>> {
        if let Ok(address) = self.0.parse() {
            return Ok(vec![address]);
        }
        let looked_up = timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host(self.0.as_str()));
        let found = looked_up
            .await
            .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        Ok(by_turns(found))
    }
}

/// The addresses in the order in which they are tried: the resolver's first choice first, then the two
/// families by turns, each address once.
fn by_turns(found: impl Iterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let (mut first, mut second) = (Vec::new(), Vec::new());
    for address in found {
        let family: &mut Vec<SocketAddr> = match first.first() {
            None => &mut first,
            Some(one) if one.is_ipv4() == address.is_ipv4() => &mut first,
            Some(_) => &mut second,
        };
        if !family.contains(&address) {
            family.push(address);
        }
    }
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut all = Vec::new();
    loop {
        let before = all.len();
        all.extend(first.next());
        all.extend(second.next());
        if all.len() == before {
            return all;
        }
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What was tried to reach an address: what it is called, and what it was found to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// As the configuration says it.
    pub address: Address,
    /// What it stands for; empty if that is not known.
    pub found: Vec<SocketAddr>,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        let said = |found: &SocketAddr| self.address.0 == found.to_string();
        if self.found.is_empty() || self.found.iter().all(said) {
            return Ok(());
        }
        let found: Vec<_> = self.found.iter().map(SocketAddr::to_string).collect();
        write!(f, " ({})", found.join(", "))
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

/// What names were last found to stand for: a name service that is away takes nobody's peers.
#[derive(Debug, Default)]
pub(super) struct AddressBook {
    known: Mutex<HashMap<Address, Vec<SocketAddr>>>,
}

impl AddressBook {
    /// What an address stands for now; what it last did, if that cannot be found out.
    pub(super) async fn find(&self, address: &Address) -> io::Result<Vec<SocketAddr>> {
        match address.look_up().await {
            Ok(found) if !found.is_empty() => {
                lock(&self.known).insert(address.clone(), found.clone());
                Ok(found)
            }
            outcome => {
                if let Some(known) = lock(&self.known).get(address) {
                    return Ok(known.clone());
                }
                let nothing = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                Err(outcome.err().unwrap_or(nothing))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn families_take_turns_and_nothing_is_tried_twice() {
        let found = [
            "[::1]:7",
            "[::2]:7",
            "10.0.0.1:7",
            "[::1]:7",
            "10.0.0.2:7",
            "10.0.0.3:7",
        ];
        let expected = [
            "[::1]:7",
            "10.0.0.1:7",
            "[::2]:7",
            "10.0.0.2:7",
            "10.0.0.3:7",
        ];
        assert_eq!(by_turns(found.into_iter().map(at)), expected.map(at));
        assert!(by_turns(std::iter::empty()).is_empty());
    }

    #[test]
    fn what_nobody_can_dial_is_told_at_once() {
        for good in [
            "192.0.2.1:7400",
            "[2001:db8::1]:1",
            "host-1.example:7400",
            "a:65535",
        ] {
            assert_eq!(Address(good.to_owned()).fault(), None, "{good}");
        }
        for bad in [
            "0.0.0.0:7400",
            "[::]:7400",
            "[::ffff:0.0.0.0]:1",
            "192.0.2.1:0",
            "a:0",
            "a",
            "a:b",
            ":7400",
            "a:65536",
            "",
        ] {
            assert!(Address(bad.to_owned()).fault().is_some(), "{bad}");
        }
    }

    #[test]
    fn what_was_tried_is_said_once() {
        let literal = Tried {
            address: at("192.0.2.1:7").into(),
            found: vec![at("192.0.2.1:7")],
        };
        assert_eq!(literal.to_string(), "192.0.2.1:7");
        let name = Tried {
            address: Address("b.example:7".to_owned()),
            found: vec![at("[2001:db8::1]:7"), at("192.0.2.1:7")],
        };
        assert_eq!(
            name.to_string(),
            "b.example:7 ([2001:db8::1]:7, 192.0.2.1:7)"
        );
    }

    #[tokio::test]
    async fn names_are_remembered_while_nobody_knows_them() {
        let book = AddressBook::default();
        let name = Address("nowhere.invalid:7".to_owned());
        assert!(book.find(&name).await.is_err());
        let known = vec![at("192.0.2.1:7")];
        lock(&book.known).insert(name.clone(), known.clone());
        assert_eq!(book.find(&name).await.expect("remembered"), known);
    }
}
