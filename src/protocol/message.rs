//! What hosts say to one another about a VM.
//!
//! The transport keeps the order of messages within a lane and knows nothing else of them.

use std::fmt;

use replay_log::{Batch, FrameNumber, LogIndex, LogTip, Position, Term};
use serde::{Deserialize, Serialize};

use super::name::{HostName, Incarnation, VmRun};
use super::record::{Committed, Stumble, Version};

/// The version of these messages. Hosts with different ones do not pair.
pub const PROTOCOL_VERSION: u16 = 3;

/// How a message travels. Order holds within a lane of one connection only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Lane {
    /// Reliable and ordered; small messages.
    Control,
    /// Reliable and ordered; the log. May be long behind.
    Log,
    /// May be lost, doubled and overtaken; repeated by the sender.
    Datagram,
}

/// A claim to a new term.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Claim {
    /// The term that is claimed.
    pub term: Term,
    /// Who claims it.
    pub claimant: HostName,
    /// The state of the record it rests on: the claim is void once the record has moved on.
    pub base: Version,
}

/// By what right a host sends log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Authority {
    /// It reigns by this state of the record.
    Reign(Version),
    /// It claims, and the receiver is sealed for it.
    Claim(Claim),
    /// The receiver claims this term and asked for it.
    Loan(Term),
}

impl Authority {
    /// The term the log is sent under; acknowledgements name it.
    pub fn term(&self) -> Term {
        match self {
            Self::Reign(version) => version.term,
            Self::Claim(claim) => claim.term,
            Self::Loan(term) => *term,
        }
    }
}

/// What a copy holds and has done. What it holds only rises within one (term, incarnation), what it
/// has executed within one run of its VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Under whose authority the log was taken.
    pub term: Term,
    /// Which holding this is about.
    pub incarnation: Incarnation,
    /// Through where it holds the log, in the sense of the VM's [`super::record::Acks`].
    pub held: LogIndex,
    /// Which run of its VMM the next two are about.
    pub run: VmRun,
    /// Through where its VMM has executed the log.
    pub executed: LogIndex,
    /// Where its guest is.
    pub position: Position,
    /// The state of the record it knows.
    pub known: Version,
    /// How its disk and its VMM are.
    pub health: Health,
}

/// What keeps a copy from being one that can be counted on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// Nothing.
    #[default]
    Well,
    /// Its disk takes nothing more: it acknowledges and promises nothing more.
    Full,
    /// Its VMM has failed twice before it had executed what it holds: it could not go on from it.
    Unable,
}

/// Why a host does not do what another's authority asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// It knows a later state of the record.
    RecordMovedOn,
    /// It is sealed: it hears nobody who reigns by the state of the record that a claim rests on.
    Sealed,
    /// It has promised itself to this or a higher term.
    Promised,
    /// It hears the primary, or is the primary.
    PrimaryAlive,
    /// It is not, or no longer, a copy of this VM.
    NotACopy,
    /// It has restarted and does not know yet what it is, or not the record that is claimed on.
    Starting,
    /// The one that is refused has held more than it has now: it must take another incarnation.
    Forgotten,
    /// Its disk takes nothing more.
    Full,
}

impl Refusal {
    /// What it means for a claim that needed the promise.
    pub(super) const fn as_words(self) -> &'static str {
        match self {
            Self::RecordMovedOn => "the record has moved on",
            Self::Sealed | Self::Promised => "another host claims too",
            Self::PrimaryAlive => "the primary is alive",
            Self::NotACopy => "too few copies are left",
            Self::Starting | Self::Forgotten => "too few copies are ready",
            Self::Full => "too few copies have room on their disks",
        }
    }
}

/// What the one who refuses says of itself.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RecordMovedOn => "it knows a later state of the record",
            Self::Sealed => "it is sealed, and hears nobody who reigns by this state of the record",
            Self::Promised => "it has promised itself to another claim",
            Self::PrimaryAlive => "it hears the primary, or is the primary",
            Self::NotACopy => "it is no copy of this VM by the record",
            Self::Starting => "it has restarted, and does not know yet what it is",
            Self::Forgotten => {
                "the other has less log than it had acknowledged, and must take another incarnation"
            }
            Self::Full => "its disk takes nothing more",
        })
    }
}

/// A message about one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The first on every connection, and again whenever its sender wants its log streamed from
    /// another place than it is.
    Hello {
        /// [`PROTOCOL_VERSION`].
        protocol: u16,
        /// The sender's holding.
        incarnation: Incarnation,
        /// Where its log ends.
        tip: LogTip,
        /// The state of the record it knows.
        known: Version,
    },
    /// A state of the record that the sender knows to be committed, with its keeper's proof.
    Record(Committed),
    /// "I do not hear the primary of this record. Do you?"
    Inquire {
        /// The state of the record asked about.
        base: Version,
    },
    /// The answer to [`Message::Inquire`].
    Heard {
        /// The state of the record asked about.
        base: Version,
        /// Whether its sender is that primary, alive, or has heard it lately.
        alive: bool,
        /// The sender's holding, now that it has heard of that state of the record.
        incarnation: Incarnation,
    },
    /// "Promise to hear no older term, and tell me your log."
    Seal {
        /// The claim.
        claim: Claim,
        /// The primary itself has asked for it: no need to wonder that it is alive.
        consent: bool,
    },
    /// The promise, durable by now.
    Sealed {
        /// The claimed term.
        term: Term,
        /// The holding this is about.
        incarnation: Incarnation,
        /// Where the log ends. Nothing was ever acknowledged beyond it.
        tip: LogTip,
        /// Through where it is held, in the sense of the VM's [`super::record::Acks`].
        held: LogIndex,
    },
    /// "I will not."
    Refused {
        /// Under which authority it was asked: the claimed term, or the term of the reign.
        term: Term,
        /// Why.
        why: Refusal,
        /// The sender's promise, if it has made one.
        promise: Option<Claim>,
        /// The record, where the sender knows a later state than was claimed by.
        record: Option<Committed>,
    },
    /// A claimant asks a sealed copy for the log it lacks.
    Fetch {
        /// The claimed term.
        term: Term,
        /// Where the claimant's log ends.
        after: LogTip,
    },
    /// "Your log is not the beginning of mine."
    Diverged {
        /// By what right this is said.
        authority: Authority,
        /// The log it is said of.
        tip: LogTip,
    },
    /// The primary of a planned switchover has stopped its guest, sealed itself for the receiver,
    /// and asks it to claim.
    Handover {
        /// The claim to make.
        claim: Claim,
        /// The end of the log, which the receiver holds.
        tip: LogTip,
    },
    /// The primary consents to a claim that it has asked another host for: its copies need not
    /// wonder that it is alive.
    Consent {
        /// The claim.
        claim: Claim,
    },
    /// The sender has given its claim up before it asked the keeper for anything, and never will:
    /// the claim binds nobody any more.
    Renounced {
        /// The claim.
        claim: Claim,
    },
    /// The primary that asked for this claim wants to go on itself: renounce it, if the keeper has not
    /// been asked for it.
    TakeBack {
        /// The claim.
        claim: Claim,
    },
    /// The primary cannot go on (its VMM or disk failed): claim without waiting.
    Abdicated {
        /// The state of the record it reigned by.
        version: Version,
        /// Where and why its VMM failed, if that is the reason.
        failed: Option<Stumble>,
    },
    /// What the sender holds, at once when it changes.
    Ack(Ack),
    /// The log lane: what follows on it continues after `after`.
    Stream {
        /// By what right.
        authority: Authority,
        /// The place in the sender's log.
        after: LogTip,
    },
    /// The log lane: the next batch of the stream.
    Log {
        /// [`Authority::term`] of the stream.
        term: Term,
        /// The batch.
        #[serde(with = "super::wire::batch")]
        batch: Batch,
    },
    /// Datagram: the primary lives.
    Heartbeat {
        /// The state of the record it reigns by.
        version: Version,
        /// Where its log ends.
        tail: LogIndex,
        /// Through where it is committed.
        committed: LogIndex,
        /// The outputs up to this number have reached their gateway: nobody need keep them.
        forget: FrameNumber,
    },
    /// Datagram: the replica lives. Repeats its last [`Message::Ack`].
    Report(Ack),
}

impl Message {
    /// How this message travels.
    pub fn lane(&self) -> Lane {
        match self {
            Self::Stream { .. } | Self::Log { .. } => Lane::Log,
            Self::Heartbeat { .. } | Self::Report(_) => Lane::Datagram,
            _ => Lane::Control,
        }
    }
}
