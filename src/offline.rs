//! Offline replay: a recorded log is executed again from power-on, with nobody waiting, and every
//! digest in it is compared.

use std::collections::VecDeque;

use bytes::Bytes;
use replay_log::{Batch, Entry, Header, LogIndex, Position, RequestNumber};
use thiserror::Error;
use vmm::boot::BootImage;
use vmm::config::{ConfigError, MachineConfig};
use vmm::disk::Overlay;
use vmm::host::{
    Came, DiskData, DiskReply, FromOutside, Host, HostTime, Output, OutputKind, Shipment,
};
use vmm::kvm::{KvmError, KvmMachine};
use vmm::machine::MachineError;
use vmm::replayer::{FeedError, Replayer};
use vmm::runner::{Runner, Turn};
use vmm::tape::{DiskOp, DiskRequest, Ending, Sources, TapeError};

/// Why a log could not be replayed to its end.
#[derive(Debug, Error)]
pub enum OfflineError {
    /// The log is empty or begins in the middle.
    #[error("the log does not begin with a header: only a log from power-on can be replayed")]
    NoHeader,
    /// The log was recorded by another machine model.
    #[error(
        "the log was recorded by machine model {found}, this program has model {}: use the version that recorded it",
        vmm::MACHINE_MODEL
    )]
    Model {
        /// The model it names.
        found: u32,
    },
    /// The header's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The machine cannot be made on this host.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The log cannot be read on.
    #[error(transparent)]
    Read(LogError),
    /// The log does not fit the machine.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// The replay stopped: a divergence, or a failure of this host.
    #[error("after {marks} equal marks, at position {at}: {source}")]
    Stopped {
        /// The last landmark.
        at: Position,
        /// How many digests had been equal.
        marks: u64,
        /// What happened.
        source: MachineError,
    },
}

impl OfflineError {
    /// Whether the replay differs from the log, rather than that it could not be made.
    pub const fn is_divergence(&self) -> bool {
        matches!(
            self,
            Self::Feed(_)
                | Self::Stopped {
                    source: MachineError::Tape(
                        TapeError::Diverged { .. } | TapeError::DiskDiffers { .. }
                    ),
                    ..
                }
        )
    }
}

/// How a replay ended well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// The last landmark.
    pub at: Position,
    /// How many entries of the log were executed.
    pub entries: LogIndex,
    /// How many digests were compared and found equal.
    pub marks: u64,
    /// How many outputs the guest made.
    pub outputs: u64,
    /// How the guest ended, if it did.
    pub ended: Option<Ending>,
}

/// A source of batches in order; `None` at the end.
pub type NextBatch<'a> = dyn FnMut() -> Result<Option<Batch>, LogError> + 'a;

/// Why a log cannot be read on, in the words of whatever keeps it.
pub type LogError = Box<dyn std::error::Error + Send + Sync>;

/// What a replay needs beside the log.
pub struct Setup {
    /// What the guest was started from.
    pub image: BootImage,
    /// The disks, at the log's base.
    pub disks: Vec<Overlay>,
}

/// Called now and then with how far the replay is; and with what the guest says on its console.
pub trait Watch {
    /// How many entries are executed.
    fn progress(&mut self, entries: LogIndex, at: Position);
    /// Console output.
    fn console(&mut self, bytes: &[u8]);
}

/// Takes the header off a log: the first entry of its first batch.
pub fn header_of(batch: &Batch) -> Result<Header, OfflineError> {
    let entries = batch.decode().map_err(|source| FeedError::Decode {
        at: batch.first(),
        source,
    })?;
    match entries.into_iter().next() {
        Some(Entry::Header(header)) if header.machine_model == vmm::MACHINE_MODEL => Ok(header),
        Some(Entry::Header(header)) => Err(OfflineError::Model {
            found: header.machine_model,
        }),
        _ => Err(OfflineError::NoHeader),
    }
}

/// Replays a log from power-on through its end, or until the machine has passed landmark `until`.
pub fn replay(
    header: Header,
    setup: Setup,
    next: &mut NextBatch<'_>,
    until: Option<Position>,
    watch: &mut dyn Watch,
) -> Result<Replayed, OfflineError> {
    let config = MachineConfig::of(&header)?;
    let machine = KvmMachine::new(&config, &setup.image)?;
    let mut runner = Runner::new(machine);
    let mut tape = Replayer::new(OfflineHost::new(setup.disks), header);
    let mut ended = None;
    // One landmark a turn where the last one matters, many where it does not.
    let budget = if until.is_some() { 1 } else { 4_096 };
    loop {
        if until.is_some_and(|until| runner.at() >= until) {
            break;
        }
        let turn = runner
            .turn(&mut tape, budget)
            .map_err(|source| OfflineError::Stopped {
                at: runner.at(),
                marks: tape.marks(),
                source,
            })?;
        let said = std::mem::take(&mut tape.host().console);
        for bytes in &said {
            watch.console(bytes);
        }
        watch.progress(tape.executed(), runner.at());
        if turn == Turn::Ran || !tape.drained() {
            continue;
        }
        if let Turn::Ended(how) = turn {
            let at = runner.at();
            ended = Some(Ending { how, at });
        }
        match next().map_err(OfflineError::Read)? {
            Some(batch) => tape.feed(&batch)?,
            None => break,
        }
    }
    Ok(Replayed {
        at: runner.at(),
        entries: tape.executed(),
        marks: tape.marks(),
        outputs: tape.ongoing().outputs.0,
        ended,
    })
}

/// A host whose disks answer at once and whose outputs nobody waits for.
struct OfflineHost {
    disks: Vec<Overlay>,
    replies: VecDeque<DiskReply>,
    console: Vec<Bytes>,
}

impl OfflineHost {
    fn new(disks: Vec<Overlay>) -> Self {
        Self {
            disks,
            replies: VecDeque::new(),
            console: Vec::new(),
        }
    }

    fn execute(&mut self, request: &DiskRequest) -> Result<DiskData, String> {
        let disk = self
            .disks
            .get_mut(usize::from(request.disk))
            .ok_or_else(|| format!("the machine has no disk {}", request.disk))?;
        let done = match &request.op {
            DiskOp::Read { offset, len } => disk.read(*offset, *len).map(DiskData::Read),
            DiskOp::Write { offset, data } => disk.write(*offset, data).map(|()| DiskData::Written),
            DiskOp::Flush => Ok(DiskData::Flushed),
        };
        done.map_err(|error| error.to_string())
    }
}

impl Host for OfflineHost {
    fn now(&mut self) -> HostTime {
        HostTime(0)
    }

    fn entropy(&mut self, _: &mut [u8]) -> Result<(), TapeError> {
        Err(TapeError::Host {
            reason: "an offline replay takes entropy from its log".into(),
        })
    }

    fn arrival_waits(&mut self, _: Sources) -> bool {
        !self.replies.is_empty()
    }

    fn arrival(&mut self, _: Sources) -> Result<Option<Came>, TapeError> {
        let came = |reply| Came {
            at: HostTime(0),
            what: FromOutside::Disk(reply),
        };
        Ok(self.replies.pop_front().map(came))
    }

    fn submit(&mut self, requests: Vec<DiskRequest>) -> Result<(), TapeError> {
        for request in requests {
            let number: RequestNumber = request.number;
            let data = self
                .execute(&request)
                .map_err(|reason| TapeError::Host { reason })?;
            self.replies.push_back(DiskReply { number, data });
        }
        Ok(())
    }

    fn ship(&mut self, _: Shipment) -> Result<(), TapeError> {
        Err(TapeError::Host {
            reason: "an offline replay writes no log".into(),
        })
    }

    fn output(&mut self, output: Output) -> Result<(), TapeError> {
        if output.kind == OutputKind::Console {
            self.console.push(output.bytes);
        }
        Ok(())
    }

    fn send(&mut self) -> Result<(), TapeError> {
        Ok(())
    }
}

/// A watch that looks away.
#[derive(Debug, Default)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn progress(&mut self, _: LogIndex, _: Position) {}
    fn console(&mut self, _: &[u8]) {}
}
