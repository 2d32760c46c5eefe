//! Names of hosts and VMs, and the numbers that tell holdings of a log apart.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// The longest name, in bytes (a DNS label).
pub const MAX_NAME: usize = 63;

/// Why a name was refused.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{name:?} is no name: use 1 to {MAX_NAME} of the characters a-z, 0-9, '-', '_' and '.', \
     beginning with a letter or digit"
)]
pub struct NameError {
    name: String,
}

fn checked(name: &str) -> Result<Arc<str>, NameError> {
    let fits = (1..=MAX_NAME).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    if fits {
        Ok(name.into())
    } else {
        Err(NameError {
            name: name.chars().take(MAX_NAME + 1).collect(),
        })
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks and takes a name.
            pub fn new(name: &str) -> Result<Self, NameError> {
                checked(name).map(Self)
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(name: String) -> Result<Self, NameError> {
                Self::new(&name)
            }
        }

        impl std::str::FromStr for $name {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// The name of a host, unique in its cluster and the same as in its certificate.
    HostName
);
name!(
    /// The name of a virtual machine, unique in its cluster.
    VmName
);

/// The identity of the disk that a VM's folder lies on, as the driver knows it by signs that a copy
/// of the folder does not have. 0: unknown.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct DiskId(pub u64);

/// The identity of one unbroken holding of a log. A host that may have lost log it acknowledged
/// takes another one. Every one is drawn at random, so that nobody who goes on from an old copy of a
/// folder takes one that a record names: two of them are equal or not, and none is the later one.
/// 0 means that there has never been one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Incarnation(pub u64);

impl Incarnation {
    /// Draws one: the `nth` of a start with these random bits. Never 0, and below 2⁵² so that every
    /// reader of JSON keeps it whole.
    #[must_use]
    pub const fn draw(fresh: u64, nth: u64) -> Self {
        let drawn = mix(fresh ^ mix(nth)) >> 12;
        Self(if drawn == 0 { 1 } else { drawn })
    }
}

/// Spreads every bit over all (the finalizer of SplitMix64; Steele, Lea and Flood, 2014).
const fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// How often a VM's record has been changed, counted from 1; it never starts again.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// One start of the VM's VMM on this host, so that what an earlier one still says can be told
/// apart. An agent begins at a random number: no run has the number of one before its restart.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct VmRun(pub u64);

impl VmRun {
    /// Where an agent that has started with these random bits begins.
    #[must_use]
    pub const fn begin(fresh: u64) -> Self {
        Self(mix(!fresh) >> 12)
    }

    /// The run after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Incarnation {
    /// Its last digits, which people can tell apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0 & 0xf_ffff)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_incarnation_that_is_drawn_is_another_one() {
        let mut drawn = std::collections::BTreeSet::new();
        for fresh in 0..100 {
            for nth in 0..100 {
                assert!(drawn.insert(Incarnation::draw(fresh, nth)), "{fresh} {nth}");
            }
        }
        assert!(!drawn.contains(&Incarnation(0)));
        assert!(VmRun::begin(1) != VmRun::begin(2));
    }

    #[test]
    fn names_are_checked_wherever_they_come_from() {
        assert!(HostName::new("host-1.example").is_ok());
        for bad in ["", "-a", "A", "a b", "ü", &"x".repeat(64)] {
            assert!(HostName::new(bad).is_err(), "{bad:?}");
        }
        let encoded = postcard::to_stdvec("../etc").expect("a string encodes");
        assert!(postcard::from_bytes::<VmName>(&encoded).is_err());
    }
}
