//! The journal: what a host decided and why, with codes that tools can match.

use std::fmt;

use replay_log::{LogIndex, Position, Term};
use serde::{Deserialize, Serialize};

use super::message::Refusal;
use super::name::{HostName, Incarnation};
use super::record::{Member, Version};

/// One line of the journal. Serialized with its `code` in snake case, and its fields beside those of
/// the line: none may be called `number`, `at`, `clock`, `host`, `vm` or `text`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "code", rename_all = "snake_case")]
pub enum Event {
    /// This host knows the VM again after a restart.
    Restarted {
        /// The holding it goes on with.
        incarnation: Incarnation,
        /// Whether it keeps the holding it had.
        kept: bool,
        /// The log it has.
        index: LogIndex,
    },
    /// The primary has not been heard for too long.
    Suspected {
        /// Which.
        primary: HostName,
        /// For how long, in milliseconds.
        silence_ms: u64,
    },
    /// Somebody else hears the primary, or it answered: no claim.
    SuspicionLifted {
        /// Which.
        primary: HostName,
        /// Who vouched.
        by: HostName,
    },
    /// This host claims a term.
    Claimed {
        /// Which.
        term: Term,
        /// By which state of the record.
        base: Version,
        /// How many copies must be sealed.
        seals: usize,
    },
    /// This host has promised to hear no older term.
    Sealed {
        /// The claimed term.
        term: Term,
        /// For whom.
        claimant: HostName,
        /// Where its log ends.
        index: LogIndex,
    },
    /// This host refused another.
    Refused {
        /// Whom.
        peer: HostName,
        /// Under which term it asked.
        term: Term,
        /// Why.
        why: Refusal,
    },
    /// This host's claim has enough seals.
    SealsWon {
        /// The claimed term.
        term: Term,
        /// Who is sealed.
        by: Vec<HostName>,
        /// The end of the longest log.
        index: LogIndex,
        /// Who holds it.
        holder: HostName,
    },
    /// This host gave its claim up.
    ClaimGivenUp {
        /// The claimed term.
        term: Term,
        /// Why, in words.
        why: String,
    },
    /// A change of the record was proposed to its keeper.
    RecordProposed {
        /// What it would be.
        version: Version,
        /// The copies it would name.
        copies: Vec<Member>,
        /// Why, in words.
        why: String,
    },
    /// A record is committed (proposed here or elsewhere).
    RecordCommitted {
        /// Which.
        version: Version,
        /// Who reigns.
        primary: Member,
        /// Who may succeed.
        members: Vec<Member>,
    },
    /// The keeper of records does not answer.
    RecordUnreachable {
        /// Why.
        reason: String,
    },
    /// The keeper of records has less than this host has seen: it was set back, or lost its disk.
    KeeperSetBack {
        /// What it has; `None`: it does not know the VM.
        kept: Option<Version>,
        /// What this host has seen.
        seen: Version,
    },
    /// Reign after reign fails at the same place: nobody claims any more.
    GuestStopsHosts {
        /// The last landmark before it.
        at: Position,
        /// How many reigns in a row have ended there.
        reigns: u32,
        /// What the last of them said.
        reason: String,
    },
    /// This host is the primary of a term.
    Promoted {
        /// Which.
        term: Term,
        /// Where it begins.
        index: LogIndex,
    },
    /// The guest runs here for the world.
    WentLive {
        /// The term.
        term: Term,
    },
    /// The guest was started from power-on.
    Booted {
        /// The term.
        term: Term,
        /// From the disks as the last run left them: what was only in memory is gone.
        cold: bool,
    },
    /// A claim interrupts this primary; it asks the keeper to confirm it.
    Challenged {
        /// Who refuses it.
        by: HostName,
        /// The claimed term.
        term: Term,
        /// The claimant.
        claimant: HostName,
    },
    /// Another host reigns: this one releases nothing any more.
    Deposed {
        /// The term it reigned by.
        term: Term,
        /// The state of the record that ended it.
        by: Version,
        /// Who reigns.
        primary: HostName,
    },
    /// This primary cannot go on and asks the others to claim.
    Abdicated {
        /// The term it reigned by.
        term: Term,
        /// Why.
        reason: String,
    },
    /// A replica has not acknowledged for too long.
    ReplicaLost {
        /// Which.
        replica: HostName,
        /// For how long, in milliseconds.
        silence_ms: u64,
    },
    /// A replica holds all the log and can become a member.
    ReplicaCaughtUp {
        /// Which.
        replica: HostName,
        /// Through where it holds the log.
        index: LogIndex,
    },
    /// The primary is the only copy.
    Unprotected {
        /// The term.
        term: Term,
    },
    /// Output waits because too few copies hold the log.
    OutputStalled {
        /// How many hold it.
        held_by: usize,
        /// How many must.
        needed: usize,
    },
    /// Output flows again.
    OutputResumed {
        /// How long it waited, in milliseconds.
        after_ms: u64,
    },
    /// The guest is slowed down, or not any more.
    Throttled {
        /// Whether it is.
        on: bool,
        /// Why, in words.
        why: String,
    },
    /// This host drops its log and takes it again from the beginning.
    Resynchronising {
        /// The new holding.
        incarnation: Incarnation,
        /// Why, in words.
        why: String,
    },
    /// This replica follows a primary.
    Following {
        /// Which.
        primary: HostName,
        /// Its term.
        term: Term,
        /// From where on it takes the log.
        index: LogIndex,
    },
    /// A planned switchover began.
    SwitchoverBegan {
        /// To whom.
        to: HostName,
    },
    /// The guest is stopped and the target holds everything.
    HandedOver {
        /// To whom.
        to: HostName,
        /// The term it shall claim.
        term: Term,
    },
    /// A planned switchover was given up; the guest goes on here.
    SwitchoverFailed {
        /// To whom it was to be.
        to: HostName,
        /// Why, in words.
        why: String,
    },
    /// An operator's wish was refused.
    OperatorRefused {
        /// Why, as a sentence that says what to do.
        why: String,
    },
    /// Nothing can be promoted: why, and what it waits for.
    Waiting {
        /// A sentence.
        why: String,
    },
    /// Acknowledged log may have been given up, by an operator's order.
    LossAccepted {
        /// Entries that the last primary is known to have committed and that are missing here.
        entries: u64,
        /// For how long it had not been heard, in milliseconds.
        silence_ms: u64,
    },
    /// The VMM on this host failed.
    VmFailed {
        /// Why.
        reason: String,
    },
    /// The guest ended by its own doing.
    VmEnded {
        /// How.
        how: String,
    },
    /// What the local store holds has become doubtful.
    StoreFailed {
        /// Why.
        reason: String,
    },
    /// The local store takes nothing more: this host acknowledges and promises nothing more.
    StoreFull {
        /// Why.
        reason: String,
    },
    /// The local store takes more again.
    StoreRoom,
    /// What is here is not the holding that the record names.
    HoldingLost {
        /// How that is known.
        why: String,
    },
    /// A peer sent what it may not send.
    PeerMisbehaved {
        /// Who.
        peer: HostName,
        /// What.
        what: String,
    },
}

impl Event {
    /// Its reason code: the variant's name in snake case.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Restarted { .. } => "restarted",
            Self::Suspected { .. } => "suspected",
            Self::SuspicionLifted { .. } => "suspicion_lifted",
            Self::Claimed { .. } => "claimed",
            Self::Sealed { .. } => "sealed",
            Self::Refused { .. } => "refused",
            Self::SealsWon { .. } => "seals_won",
            Self::ClaimGivenUp { .. } => "claim_given_up",
            Self::RecordProposed { .. } => "record_proposed",
            Self::RecordCommitted { .. } => "record_committed",
            Self::RecordUnreachable { .. } => "record_unreachable",
            Self::KeeperSetBack { .. } => "keeper_set_back",
            Self::GuestStopsHosts { .. } => "guest_stops_hosts",
            Self::Promoted { .. } => "promoted",
            Self::WentLive { .. } => "went_live",
            Self::Booted { .. } => "booted",
            Self::Challenged { .. } => "challenged",
            Self::Deposed { .. } => "deposed",
            Self::Abdicated { .. } => "abdicated",
            Self::ReplicaLost { .. } => "replica_lost",
            Self::ReplicaCaughtUp { .. } => "replica_caught_up",
            Self::Unprotected { .. } => "unprotected",
            Self::OutputStalled { .. } => "output_stalled",
            Self::OutputResumed { .. } => "output_resumed",
            Self::Throttled { .. } => "throttled",
            Self::Resynchronising { .. } => "resynchronising",
            Self::Following { .. } => "following",
            Self::SwitchoverBegan { .. } => "switchover_began",
            Self::HandedOver { .. } => "handed_over",
            Self::SwitchoverFailed { .. } => "switchover_failed",
            Self::OperatorRefused { .. } => "operator_refused",
            Self::Waiting { .. } => "waiting",
            Self::LossAccepted { .. } => "loss_accepted",
            Self::VmFailed { .. } => "vm_failed",
            Self::VmEnded { .. } => "vm_ended",
            Self::StoreFailed { .. } => "store_failed",
            Self::StoreFull { .. } => "store_full",
            Self::StoreRoom => "store_room",
            Self::HoldingLost { .. } => "holding_lost",
            Self::PeerMisbehaved { .. } => "peer_misbehaved",
        }
    }
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    if items.is_empty() {
        return "nobody".to_owned();
    }
    let items: Vec<_> = items.iter().map(ToString::to_string).collect();
    items.join(", ")
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Restarted {
                incarnation,
                kept,
                index,
            } => {
                let how = if *kept { "keeps" } else { "begins" };
                write!(
                    f,
                    "restarted with log through {index}, {how} incarnation {incarnation}"
                )
            }
            Self::Suspected {
                primary,
                silence_ms,
            } => {
                write!(f, "suspects {primary}: silent for {silence_ms} ms")
            }
            Self::SuspicionLifted { primary, by } => {
                write!(f, "does not claim: {by} says that {primary} is alive")
            }
            Self::Claimed { term, base, seals } => {
                write!(f, "claims term {term} on {base}, needs {seals} seals")
            }
            Self::Sealed {
                term,
                claimant,
                index,
            } => {
                write!(
                    f,
                    "sealed for {claimant}, term {term}, with log through {index}"
                )
            }
            Self::Refused { peer, term, why } => {
                write!(f, "refuses {peer} under term {term}: {why}")
            }
            Self::SealsWon {
                term,
                by,
                index,
                holder,
            } => write!(
                f,
                "term {term} is sealed by {}; the longest log ends at {index}, on {holder}",
                list(by)
            ),
            Self::ClaimGivenUp { term, why } => {
                write!(f, "gives up the claim to term {term}: {why}")
            }
            Self::RecordProposed {
                version,
                copies,
                why,
            } => {
                write!(f, "proposes {version} with {}: {why}", list(copies))
            }
            Self::RecordCommitted {
                version,
                primary,
                members,
            } => write!(
                f,
                "{version} is committed: {primary} reigns, {} may succeed",
                list(members)
            ),
            Self::RecordUnreachable { reason } => {
                write!(f, "the keeper of records cannot be reached: {reason}")
            }
            Self::KeeperSetBack { kept, seen } => {
                let has = kept.map_or_else(
                    || "does not know this VM".to_owned(),
                    |kept| format!("has {kept}"),
                );
                write!(
                    f,
                    "the witness {has}, and this host has seen {seen}: it was set back or lost its \
                     disk, and no record changes until 'understudy witness recover' has given it \
                     the newest"
                )
            }
            Self::GuestStopsHosts { at, reigns, reason } => write!(
                f,
                "the guest stops every host at landmark {at}, {reigns} in a row ({reason}): nobody \
                 claims it any more until 'understudy switchover --to HOST --accept-loss' says so"
            ),
            Self::Promoted { term, index } => write!(f, "reigns by term {term} from {index} on"),
            Self::WentLive { term } => write!(f, "runs the guest live under term {term}"),
            Self::Booted { term, cold: false } => write!(f, "boots the guest under term {term}"),
            Self::Booted { term, cold: true } => write!(
                f,
                "boots the guest from its synced disks under term {term}: what was only in \
                 memory is gone"
            ),
            Self::Challenged { by, term, claimant } => write!(
                f,
                "{by} is sealed for {claimant}, who claims term {term}: asks the keeper to confirm"
            ),
            Self::Deposed { term, by, primary } => write!(
                f,
                "deposed from term {term}: by {by} {primary} reigns; releases nothing any more"
            ),
            Self::Abdicated { term, reason } => write!(f, "abdicates from term {term}: {reason}"),
            Self::ReplicaLost {
                replica,
                silence_ms,
            } => {
                write!(f, "{replica} has not acknowledged for {silence_ms} ms")
            }
            Self::ReplicaCaughtUp { replica, index } => {
                write!(f, "{replica} has caught up, log through {index}")
            }
            Self::Unprotected { term } => write!(f, "UNPROTECTED in term {term}: no replica"),
            Self::OutputStalled { held_by, needed } => {
                write!(
                    f,
                    "output waits: {held_by} of {needed} needed copies hold the log"
                )
            }
            Self::OutputResumed { after_ms } => write!(f, "output flows again after {after_ms} ms"),
            Self::Throttled { on: true, why } => write!(f, "slows the guest: {why}"),
            Self::Throttled { on: false, why } => write!(f, "lets the guest run: {why}"),
            Self::Resynchronising { incarnation, why } => {
                write!(f, "takes the log anew as incarnation {incarnation}: {why}")
            }
            Self::Following {
                primary,
                term,
                index,
            } => {
                write!(f, "follows {primary} in term {term} from {index} on")
            }
            Self::SwitchoverBegan { to } => write!(f, "hands over to {to}: stops the guest"),
            Self::HandedOver { to, term } => {
                write!(f, "{to} holds everything and shall claim term {term}")
            }
            Self::SwitchoverFailed { to, why } => {
                write!(
                    f,
                    "does not hand over to {to}: {why}; the guest goes on here"
                )
            }
            Self::OperatorRefused { why } | Self::Waiting { why } => f.write_str(why),
            Self::LossAccepted {
                entries,
                silence_ms,
            } => write!(
                f,
                "goes live by an operator's order: {entries} committed entries are known to be \
                 missing, and whatever happened in the last {silence_ms} ms"
            ),
            Self::VmFailed { reason } => write!(f, "the VMM failed: {reason}"),
            Self::VmEnded { how } => write!(f, "the guest ended: {how}"),
            Self::StoreFailed { reason } => {
                write!(f, "what the local store holds is doubtful: {reason}")
            }
            Self::StoreFull { reason } => write!(
                f,
                "the local store takes nothing more, and this host acknowledges nothing more: {reason}"
            ),
            Self::StoreRoom => f.write_str("the local store takes more again"),
            Self::HoldingLost { why } => {
                write!(f, "is not the holding that the record may name: {why}")
            }
            Self::PeerMisbehaved { peer, what } => write!(f, "{peer} {what}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What people read names things as people do, and not as this program's source does.
    #[test]
    fn refusals_are_told_in_words() {
        for why in [
            Refusal::RecordMovedOn,
            Refusal::Sealed,
            Refusal::Promised,
            Refusal::PrimaryAlive,
            Refusal::NotACopy,
            Refusal::Starting,
            Refusal::Forgotten,
            Refusal::Full,
        ] {
            let refused = Event::Refused {
                peer: HostName::new("b").expect("a name"),
                term: Term(3),
                why,
            };
            let told = refused.to_string();
            assert!(told.starts_with("refuses b under term 3: "), "{told}");
            let source = format!("{why:?}");
            assert!(!told.contains(&source), "{told}");
            assert!(why.to_string().split(' ').count() > 3, "{told}");
        }
    }
}
