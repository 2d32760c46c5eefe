//! What a node is told and what it wants done: the whole seam between the protocol and the world.
//!
//! # The driver's duties
//!
//! - After every call of `handle` and `handle_timeout`, carry out all actions of `poll_action`, in
//!   their order, and call `handle_timeout` no later than `poll_timeout` says.
//! - Hand in whatever has arrived before calling `handle_timeout`: a late driver must not make the
//!   node believe in a silence that is only its own.
//! - Actions on the store happen in order. `Append` makes a batch readable for `StreamLog` at once.
//! - `Stored` and `Synced` name the incarnation of the last `Persist` that was carried out before
//!   the `Append` or `Sync` they answer.
//! - The disks of this host's last recording run are kept, as they were last flushed, until
//!   another run records here: `Boot` with `cold` starts from them.
//! - What an earlier holding or an earlier run of the VM still reports may be handed in; the
//!   [`Incarnation`] and [`VmRun`] it carries let the node ignore it.

use std::fmt;

use replay_log::{Batch, FrameNumber, LogIndex, LogTip, Position, Term};
use serde::{Deserialize, Serialize};

use super::config::Durable;
use super::event::Event;
use super::message::Message;
use super::name::{HostName, Incarnation, VmRun};
use super::record::{Committed, Policy, Record, Seen, Version};
use super::time::Span;

/// Something that happened outside.
#[derive(Clone, Debug)]
pub enum Input {
    /// There is a connection with this host; one that there was before is gone.
    PeerUp(HostName),
    /// There is no connection any more.
    PeerDown(HostName),
    /// How far a connected host is.
    Distance {
        /// Which.
        host: HostName,
        /// A round trip to it, as measured lately.
        rtt: Span,
    },
    /// A message came.
    Message {
        /// From whom, by the certificate.
        from: HostName,
        /// What.
        message: Message,
    },

    /// The local store holds the log through here in memory (a crash of the host may lose it).
    Stored {
        /// Which holding.
        incarnation: Incarnation,
        /// Where the log ends.
        tip: LogTip,
    },
    /// The local store holds the log through here on disk.
    Synced {
        /// Which holding.
        incarnation: Incarnation,
        /// Where the log ends.
        tip: LogTip,
    },
    /// What the local store holds has become doubtful (a failed fsync: nobody knows what of it is on
    /// the disk). A full disk is [`Input::StoreFull`].
    StoreFailed {
        /// A sentence that says what failed.
        reason: String,
    },
    /// The local store, or the durable state, takes nothing more at the moment: the disk is full,
    /// read-only, or does not come back. What is held stays held; what is appended meanwhile waits.
    StoreFull {
        /// A sentence that says what failed.
        reason: String,
    },
    /// More was appended than a store that is full keeps waiting: what came after `tip` was not taken
    /// and is not read by anybody. The log ends there.
    StoreShort {
        /// Which holding.
        incarnation: Incarnation,
        /// Where the log ends.
        tip: LogTip,
    },
    /// It takes more again, and has stored what waited.
    StoreRoom,
    /// [`Action::Persist`] is done.
    Persisted(Durable),
    /// The answer to [`Action::LookUp`]: the log's tip at that index, if a batch ends there.
    TipAt {
        /// For whom it was asked.
        peer: HostName,
        /// The index asked about.
        index: LogIndex,
        /// The term and chain there; `None` where no batch ends.
        tip: Option<LogTip>,
    },

    /// What the keeper of records has: `None` if it has never heard of the VM.
    RecordRead(Option<Committed>),
    /// The keeper did not answer [`Action::ReadRecord`].
    ReadFailed {
        /// A sentence that says why.
        reason: String,
    },
    /// The answer to [`Action::SwapRecord`].
    RecordSwapped(Swapped),

    /// The VMM of this run closed a batch of the log.
    Recorded {
        /// Which run.
        run: VmRun,
        /// The batch.
        batch: Batch,
    },
    /// The VMM of this run now records: it has replayed to the end of the log and gone on.
    WentLive {
        /// Which run.
        run: VmRun,
    },
    /// [`Action::PauseVm`] is done, and every batch has been handed in as [`Input::Recorded`].
    Paused {
        /// Which run.
        run: VmRun,
    },
    /// The VMM has executed the log through here.
    Executed {
        /// Which run.
        run: VmRun,
        /// Through which entry.
        through: LogIndex,
        /// Where the guest is.
        position: Position,
    },
    /// The guest ended by its own doing (it switched itself off).
    VmEnded {
        /// Which run.
        run: VmRun,
        /// How, in words.
        how: String,
    },
    /// The VMM of this run failed: a crash, a disk error, a divergence.
    VmFailed {
        /// Which run.
        run: VmRun,
        /// A sentence that says what failed.
        reason: String,
        /// The last landmark that is known of it.
        at: Position,
    },
    /// The outputs up to this number have reached their gateways.
    GatewayReceived {
        /// The last of them.
        through: FrameNumber,
    },
    /// How much output waits in the outbox for its commit, in bytes.
    OutputWaits {
        /// Bytes.
        bytes: u64,
    },

    /// Somebody with the right to asks for something.
    Operator(Operator),
}

/// What came of a compare-and-set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// The new record is committed.
    Done(Committed),
    /// The record was not as expected: this is what it is.
    Conflict(Option<Committed>),
    /// Nobody knows: the keeper did not answer, and may have done it.
    Unknown {
        /// A sentence that says why.
        reason: String,
    },
}

/// What an operator can ask of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operator {
    /// Start the VM for the first time, with this host as its primary.
    Create {
        /// Where copies are wanted; this host is added.
        hosts: Vec<HostName>,
        /// The policy.
        policy: Policy,
    },
    /// Of the primary: have copies on exactly these hosts, by this policy.
    Pair {
        /// Where copies are wanted; this host is added.
        hosts: Vec<HostName>,
        /// The policy; its kind of acknowledgement cannot be changed.
        policy: Policy,
    },
    /// Of the primary: let this replica reign; nothing is lost.
    Switchover {
        /// Which; the first member that can when none is named.
        to: Option<HostName>,
    },
    /// Boot the guest from its image, though the VM has run before: everything it had is lost. Only
    /// where no reachable host has a log or disks of it.
    StartOver,
    /// Go live with what this host holds, though it may not be all that was acknowledged. The
    /// exposure goes into the journal. Everything else must have failed.
    AcceptLoss,
}

impl fmt::Display for Operator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create { hosts, policy } => {
                write!(
                    f,
                    "start the VM, with copies on {} ({policy})",
                    names(hosts)
                )
            }
            Self::Pair { hosts, policy } => {
                write!(f, "have copies on {} ({policy})", names(hosts))
            }
            Self::Switchover { to: Some(to) } => write!(f, "let {to} reign"),
            Self::Switchover { to: None } => f.write_str("let a replica reign"),
            Self::StartOver => f.write_str("boot the guest anew from its image"),
            Self::AcceptLoss => f.write_str("go on with what is here, whatever is lost"),
        }
    }
}

fn names(hosts: &[HostName]) -> String {
    let names: Vec<_> = hosts.iter().map(HostName::as_str).collect();
    if names.is_empty() {
        "this host alone".to_owned()
    } else {
        names.join(", ")
    }
}

/// Something to be done outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send a message on its lane.
    Send {
        /// To whom.
        to: HostName,
        /// What.
        message: Message,
    },
    /// Append to the local store; on a replica also hand to the VMM. Answered by
    /// [`Input::Stored`]; several may be answered by one.
    Append {
        /// The batch.
        batch: Batch,
    },
    /// Make the log durable that has been appended. Answered by [`Input::Synced`].
    Sync,
    /// Replace the durable state. Answered by [`Input::Persisted`].
    Persist(Durable),
    /// Look up where a batch ends in the local store. Answered by [`Input::TipAt`].
    LookUp {
        /// For whom; comes back with the answer.
        peer: HostName,
        /// The index.
        index: LogIndex,
    },
    /// Send the stored batches from `from` (where one begins) up to `through` (where one ends) as
    /// [`Message::Log`] on the log lane, behind what was sent there before.
    StreamLog {
        /// To whom.
        to: HostName,
        /// The term that the messages name.
        term: Term,
        /// From here.
        from: LogIndex,
        /// Up to here.
        through: LogIndex,
    },
    /// Send no more of what [`Action::StreamLog`] asked for.
    StopStream {
        /// To whom.
        to: HostName,
    },

    /// Ask the keeper for the record. Answered by [`Input::RecordRead`] or [`Input::ReadFailed`].
    ReadRecord {
        /// What the keeper cannot be below, if it is the one that was asked before.
        seen: Option<Seen>,
    },
    /// Compare-and-set the record. Answered by [`Input::RecordSwapped`].
    SwapRecord {
        /// What it must be now; `None` if the VM must be unknown.
        expect: Option<Version>,
        /// What it shall be.
        new: Record,
        /// What the keeper cannot be below, if it is the one that was asked before.
        seen: Option<Seen>,
    },

    /// Give up the local log. Later actions and inputs are about a new, empty holding.
    DropLog {
        /// The new holding.
        incarnation: Incarnation,
        /// Set the old log aside as evidence: nobody else is known to hold all of it that counts.
        /// Otherwise it is deleted.
        aside: bool,
    },
    /// End any VMM of this VM, and start one that replays the stored log from its beginning on
    /// fresh disks, then what is appended.
    Replay {
        /// The new run.
        run: VmRun,
    },
    /// End any VMM of this VM, and start one that records, from power-on. The log begins anew.
    Boot {
        /// The new run.
        run: VmRun,
        /// The term it writes.
        term: Term,
        /// From the disks as this host's last run left them, not from the image's.
        cold: bool,
    },
    /// Replay to the end of the stored log, then go on recording. Answered by [`Input::WentLive`].
    GoLive {
        /// The run, which replays.
        run: VmRun,
        /// The term it writes from there on.
        term: Term,
        /// Where its log ends.
        at: LogTip,
    },
    /// Stop the guest at a landmark and hand in what is recorded. Answered by [`Input::Paused`].
    PauseVm {
        /// The run.
        run: VmRun,
    },
    /// Let the paused guest go on.
    ResumeVm {
        /// The run.
        run: VmRun,
    },
    /// End the VMM at once; nothing more of it is wanted.
    StopVm {
        /// The run.
        run: VmRun,
        /// Why.
        why: StopReason,
    },
    /// The outputs whose group ends at or before this index may leave. This host reigns by `term`.
    Release {
        /// The term to tell the gateways.
        term: Term,
        /// Up to here.
        through: LogIndex,
    },
    /// The outputs up to this number need not be kept.
    ForgetOutputs {
        /// The last of them.
        through: FrameNumber,
    },
    /// Slow the guest down, or let it run.
    Throttle {
        /// Whether to slow it.
        on: bool,
    },
    /// Write down what was decided and why.
    Journal(Event),
}

/// Why a VMM was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopReason {
    /// Another host reigns.
    Deposed,
    /// The planned switchover succeeded.
    HandedOver,
    /// It failed.
    Failed,
    /// Its log has to be taken again from the beginning.
    Resynchronised,
}
