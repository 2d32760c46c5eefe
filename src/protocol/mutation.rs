//! Deliberate bugs, each the breach of one rule of DESIGN.md section 4. Only the simulator can
//! switch one on; it has to notice.

use std::fmt;

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mutation {
    /// A copy answers a claim without promising anything.
    NoSeal,
    /// The primary stops counting a silent replica before the record says so.
    LocalEviction,
    /// A replica that lost acknowledged log keeps its incarnation.
    Amnesia,
    /// A host believes a keeper of records that has less than it has seen itself.
    KeeperTrusted,
    /// A host does not tell the keeper of records what it has seen.
    SeenUntold,
    /// A host takes a folder that was put back from a backup for the one that it is a copy of.
    PutBackBelieved,
    /// A replica whose disk takes nothing more takes log all the same.
    FullTakesMore,
    /// A claim that is given up is not renounced, and one is given up while its outcome is unknown.
    ClaimAbandoned,
    /// A host believes whoever says that it reigns, and seals for whoever asks.
    StrangersHeard,
    /// A member that answers and stores nothing is not lost.
    SilenceOnly,
    /// A primary removes members although it has not heard the keeper since it lost them.
    DeafPrimary,
    /// A copy gives its log up for good although nobody else is known to hold it.
    Careless,
    /// The primary removes a member although the remaining ones lack released output.
    ShrinkEarly,
    /// A new record names members that do not hold the log.
    MemberWithoutLog,
    /// The primary lets output out as soon as it is recorded.
    ReleaseBeforeCommit,
    /// A replica follows whoever claims to reign, by however old a record.
    AcceptLowerTerm,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 16] = [
        Self::NoSeal,
        Self::LocalEviction,
        Self::Amnesia,
        Self::KeeperTrusted,
        Self::SeenUntold,
        Self::PutBackBelieved,
        Self::FullTakesMore,
        Self::ClaimAbandoned,
        Self::StrangersHeard,
        Self::SilenceOnly,
        Self::DeafPrimary,
        Self::Careless,
        Self::ShrinkEarly,
        Self::MemberWithoutLog,
        Self::ReleaseBeforeCommit,
        Self::AcceptLowerTerm,
    ];

    /// The name by which it is asked for.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NoSeal => "no-seal",
            Self::LocalEviction => "local-eviction",
            Self::Amnesia => "amnesia",
            Self::KeeperTrusted => "keeper-trusted",
            Self::SeenUntold => "seen-untold",
            Self::PutBackBelieved => "put-back-believed",
            Self::FullTakesMore => "full-takes-more",
            Self::ClaimAbandoned => "claim-abandoned",
            Self::StrangersHeard => "strangers-heard",
            Self::SilenceOnly => "silence-only",
            Self::DeafPrimary => "deaf-primary",
            Self::Careless => "careless",
            Self::ShrinkEarly => "shrink-early",
            Self::MemberWithoutLog => "member-without-log",
            Self::ReleaseBeforeCommit => "release-before-commit",
            Self::AcceptLowerTerm => "accept-lower-term",
        }
    }
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Mutation {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|mutation| mutation.name() == name)
            .ok_or_else(|| {
                let known: Vec<_> = Self::ALL.iter().map(|m| m.name()).collect();
                format!("{name:?} is no mutation: use one of {}", known.join(", "))
            })
    }
}
