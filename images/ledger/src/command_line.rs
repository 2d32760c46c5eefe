//! The kernel command line: `ip=10.77.0.2/16 gw=10.77.0.1`.

use alloc::string::{String, ToString};
use core::fmt;

/// What the ledger is told at boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its own IPv4 address.
    pub address: [u8; 4],
    /// How many leading bits name the network, 8 to 30.
    pub prefix: u8,
    /// The gateway for other networks, if there is one.
    pub gateway: Option<[u8; 4]>,
}

/// The command line cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandLineError {
    /// No `ip=`.
    NoAddress,
    /// A word with a value that is not what it must be.
    Invalid {
        /// The whole word.
        word: String,
        /// What it must look like.
        wanted: &'static str,
    },
    /// A word that means nothing here.
    Unknown(String),
}

impl fmt::Display for CommandLineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAddress => f.write_str("give the address on the command line: ip=10.77.0.2/16"),
            Self::Invalid { word, wanted } => write!(f, "write {wanted} instead of {word}"),
            Self::Unknown(word) => write!(f, "{word} means nothing here: ip= and gw= do"),
        }
    }
}

/// Reads the command line.
pub fn parse(text: &str) -> Result<Network, CommandLineError> {
    let mut address = None;
    let mut gateway = None;
    for word in text.split_ascii_whitespace() {
        let invalid = |wanted| CommandLineError::Invalid {
            word: word.to_string(),
            wanted,
        };
        match word.split_once('=') {
            Some(("ip", value)) => {
                address = Some(network(value).ok_or_else(|| {
                    invalid("an address and a prefix length of 8 to 30, ip=10.77.0.2/16,")
                })?);
            }
            Some(("gw", value)) => {
                gateway = Some(ipv4(value).ok_or_else(|| invalid("an address, gw=10.77.0.1,"))?);
            }
            _ => return Err(CommandLineError::Unknown(word.to_string())),
        }
    }
    let (address, prefix) = address.ok_or(CommandLineError::NoAddress)?;
    Ok(Network {
        address,
        prefix,
        gateway,
    })
}

fn network(text: &str) -> Option<([u8; 4], u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|bits| (8..=30).contains(bits))?;
    Some((ipv4(address)?, prefix))
}

/// A unicast address in dotted decimal.
fn ipv4(text: &str) -> Option<[u8; 4]> {
    let address: core::net::Ipv4Addr = text.parse().ok()?;
    let usable = !address.is_unspecified() && !address.is_multicast() && !address.is_broadcast();
    usable.then(|| address.octets())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        let network = parse(" ip=10.77.0.2/8  gw=10.0.0.1 ").unwrap();
        assert_eq!(network.address, [10, 77, 0, 2]);
        assert_eq!((network.prefix, network.gateway), (8, Some([10, 0, 0, 1])));
        assert_eq!(parse("ip=10.77.0.2/16").unwrap().gateway, None);
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(parse(""), Err(CommandLineError::NoAddress));
        assert!(
            matches!(parse("ip=1.2.3.4/16 quiet"), Err(CommandLineError::Unknown(word)) if word == "quiet")
        );
        for bad in [
            "ip=1.2.3.4",
            "ip=1.2.3.4/7",
            "ip=1.2.3.4/31",
            "ip=1.2.3/8",
            "ip=224.0.0.1/8",
            "gw=0.0.0.0",
        ] {
            assert!(
                matches!(parse(bad), Err(CommandLineError::Invalid { word, .. }) if word == bad)
            );
        }
    }
}
