//! The numbers that order everything: where the guest is, where the log is, who reigns.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many landmarks the guest has passed since it was powered on.
///
/// Landmark *n* brings the machine to position *n*; a machine that has not run is at position 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Position(pub u64);

impl Position {
    /// Where a machine is before its first landmark.
    pub const START: Self = Self(0);

    /// The position one landmark on.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The number of a reign. Term 0 is before anybody reigned.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Term(pub u64);

impl Term {
    /// The term a claimant asks for when it has heard of this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A place between two log entries: how many entries stand before it.
///
/// Entry *i* stands between `LogIndex(i)` and `LogIndex(i + 1)`; holding a log *through* index *n*
/// is holding its first *n* entries.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct LogIndex(pub u64);

impl LogIndex {
    /// The beginning of every log.
    pub const START: Self = Self(0);

    /// The place `entries` further on.
    #[must_use]
    pub const fn plus(self, entries: u64) -> Self {
        Self(self.0 + entries)
    }

    /// How many entries stand between an earlier place and this one; 0 when it is not earlier.
    #[must_use]
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// The hash chain after a batch: BLAKE3 over the chain before it and the batch's payload.
///
/// Two copies with equal chains at equal indices hold the same log up to there.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Chain(pub [u8; 32]);

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Chain({self})")
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6]
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The end of a log: what a copy holds, in the order by which logs are compared.
///
/// Of two logs of one machine the one with the greater `(term, index)` holds everything that can
/// have been committed by the other (DESIGN.md section 4, "Promotion").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogTip {
    /// The term under which the last batch was written.
    pub term: Term,
    /// How many entries the log holds.
    pub index: LogIndex,
    /// The hash chain after the last batch.
    pub chain: Chain,
}

macro_rules! display_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    )*};
}
display_number!(Position, Term, LogIndex);
