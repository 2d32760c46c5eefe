//! A simulated host's VMM: the production run loop, recorder and replayer over the model machine.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use replay_log::{
    Batch, DiskBase, Entry, FrameNumber, FrameSource, GatewayIncarnation, Header, ImageDigest,
    LogIndex, LogTip, Position, RequestNumber, Term,
};
use vmm::host::{Came, DiskData, DiskReply, FromOutside, Host, HostTime, Output, Shipment};
use vmm::machine::MachineError;
use vmm::model::{DISK_SIZE, Model};
use vmm::outbox::Outbox;
use vmm::recorder::{Policy, Recorder};
use vmm::replayer::{Replayer, Requeue};
use vmm::runner::{Runner, Turn};
use vmm::tape::{DiskOp, DiskRequest, Sources, TapeError};

use super::lines::Lines;
use super::random::Random;
use crate::protocol::VmRun;

/// Landmarks in one go.
const BUDGET: u32 = 32;

/// A disk: what was written, and what was flushed.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    written: Vec<u8>,
    pub(super) flushed: Vec<u8>,
}

impl Disk {
    pub(super) fn new(contents: Vec<u8>) -> Self {
        Self {
            written: contents.clone(),
            flushed: contents,
        }
    }

    /// How a log's header names these contents.
    pub(super) fn base(contents: &[u8]) -> DiskBase {
        DiskBase {
            digest: *blake3::hash(contents).as_bytes(),
            size: DISK_SIZE,
        }
    }

    fn execute(&mut self, op: &DiskOp) -> Option<DiskData> {
        match op {
            DiskOp::Read { offset, len } => {
                let start = *offset as usize;
                let data = self.written.get(start..start + *len as usize)?;
                Some(DiskData::Read(Bytes::copy_from_slice(data)))
            }
            DiskOp::Write { offset, data } => {
                let start = *offset as usize;
                let place = self.written.get_mut(start..start + data.len())?;
                place.copy_from_slice(data);
                Some(DiskData::Written)
            }
            DiskOp::Flush => {
                self.flushed.copy_from_slice(&self.written);
                Some(DiskData::Flushed)
            }
        }
    }
}

/// The edge that the recorder or replayer stands on.
#[derive(Debug)]
pub(super) struct Edge {
    now: HostTime,
    random: Random,
    frames: VecDeque<FromOutside>,
    replies: VecDeque<DiskReply>,
    disk: Disk,
    shipped: Vec<Shipment>,
    outputs: Vec<Output>,
}

impl Host for Edge {
    fn now(&mut self) -> HostTime {
        self.now
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), TapeError> {
        out.fill_with(|| self.random.next() as u8);
        Ok(())
    }

    fn arrival_waits(&mut self, can_take: Sources) -> bool {
        (can_take.frame && !self.frames.is_empty()) || !self.replies.is_empty()
    }

    fn arrival(&mut self, can_take: Sources) -> Result<Option<Came>, TapeError> {
        let what = match self.replies.pop_front() {
            Some(reply) => Some(FromOutside::Disk(reply)),
            None if can_take.frame => self.frames.pop_front(),
            None => None,
        };
        Ok(what.map(|what| Came { at: self.now, what }))
    }

    fn submit(&mut self, requests: Vec<DiskRequest>) -> Result<(), TapeError> {
        for request in requests {
            let data = self.disk.execute(&request.op);
            let data = data.ok_or_else(|| TapeError::Host {
                reason: "the request is outside the disk".to_owned(),
            })?;
            self.replies.push_back(DiskReply {
                number: request.number,
                data,
            });
        }
        Ok(())
    }

    fn ship(&mut self, shipment: Shipment) -> Result<(), TapeError> {
        self.shipped.push(shipment);
        Ok(())
    }

    fn output(&mut self, output: Output) -> Result<(), TapeError> {
        self.outputs.push(output);
        Ok(())
    }

    fn send(&mut self) -> Result<(), TapeError> {
        Ok(())
    }
}

impl Requeue for Edge {
    fn requeue(&mut self, finished: BTreeMap<RequestNumber, DiskData>) {
        for (number, data) in finished.into_iter().rev() {
            self.replies.push_front(DiskReply { number, data });
        }
    }
}

enum Tape {
    /// The log's header has not come yet.
    Blank {
        now: HostTime,
        random: Random,
    },
    Replaying(Box<Replayer<Edge>>),
    Recording(Box<Recorder<Edge>>),
}

/// What a turn of the VMM brought.
#[derive(Debug, Default)]
pub(super) struct Brought {
    pub(super) shipped: Vec<Shipment>,
    pub(super) executed: Option<(LogIndex, Position)>,
    pub(super) went_live: bool,
    pub(super) paused: bool,
    /// When it has to be called again by itself, on the host's clock.
    pub(super) again_at: Option<HostTime>,
    /// Call again at once.
    pub(super) busy: bool,
}

/// One run of a VMM.
pub(super) struct Vm {
    pub(super) run: VmRun,
    runner: Runner<Model>,
    tape: Option<Tape>,
    pub(super) outbox: Outbox,
    /// Which of its outputs are for which gateway.
    pub(super) lines: Lines,
    go_live: Option<(Term, LogTip)>,
    executed: LogIndex,
    /// Frames shipped, with where the log ends after them.
    pub(super) frames: VecDeque<(LogIndex, FrameSource)>,
    /// The last frame of each gateway that this machine was given.
    accepted: BTreeMap<GatewayIncarnation, FrameNumber>,
}

/// Which disks there are to start from, by their digests.
pub(super) type Bases = BTreeMap<[u8; 32], Vec<u8>>;

impl Vm {
    fn with(run: VmRun, tape: Tape) -> Self {
        Self {
            run,
            runner: Runner::new(Model::new()),
            tape: Some(tape),
            outbox: Outbox::new(),
            lines: Lines::default(),
            go_live: None,
            executed: LogIndex::START,
            frames: VecDeque::new(),
            accepted: BTreeMap::new(),
        }
    }

    /// A VMM that replays a log whose header will come.
    pub(super) fn replay(run: VmRun, now: HostTime, random: Random) -> Self {
        Self::with(run, Tape::Blank { now, random })
    }

    /// A VMM that starts the machine from these disk contents.
    pub(super) fn boot(
        run: VmRun,
        now: HostTime,
        mut random: Random,
        term: Term,
        contents: Vec<u8>,
    ) -> Result<Self, TapeError> {
        let mut boot = [0; 16];
        boot.fill_with(|| random.next() as u8);
        let header = Header {
            machine_model: vmm::MACHINE_MODEL,
            image: ImageDigest::default(),
            config: Bytes::new(),
            disks: vec![Disk::base(&contents)],
            term,
            boot,
        };
        let edge = Edge::new(now, random, contents);
        let recorder = Recorder::start(edge, Policy::default(), header)?;
        Ok(Self::with(run, Tape::Recording(Box::new(recorder))))
    }

    /// Gives the replay the next batch of the log.
    pub(super) fn feed(&mut self, batch: &Batch, bases: &Bases) -> Result<(), String> {
        if let Some(Tape::Blank { now, random }) = &self.tape {
            let entries = batch.decode().map_err(|error| error.to_string())?;
            let Some(Entry::Header(header)) = entries.into_iter().next() else {
                return Err("the log does not begin with its header".to_owned());
            };
            let base = header
                .disks
                .first()
                .and_then(|base| bases.get(&base.digest));
            let contents = base.ok_or("the disk base is not there")?.clone();
            let edge = Edge::new(*now, random.clone(), contents);
            self.tape = Some(Tape::Replaying(Box::new(Replayer::new(edge, header))));
        }
        match &mut self.tape {
            Some(Tape::Replaying(replayer)) => {
                replayer.feed(batch).map_err(|error| error.to_string())
            }
            _ => Ok(()),
        }
    }

    /// Goes on live once the log is executed to its end.
    pub(super) fn go_live(&mut self, term: Term, at: LogTip) {
        self.go_live = Some((term, at));
    }

    pub(super) fn pause(&mut self, pause: bool) {
        if let Some(Tape::Recording(recorder)) = &mut self.tape {
            recorder.pause(pause);
        }
    }

    pub(super) fn throttle(&mut self, on: bool) {
        if let Some(Tape::Recording(recorder)) = &mut self.tape {
            recorder.throttle(on);
        }
    }

    /// Where the guest is.
    pub(super) fn at(&self) -> Position {
        self.runner.at()
    }

    pub(super) fn records(&self) -> bool {
        matches!(self.tape, Some(Tape::Recording(_)))
    }

    /// What a crash leaves of the disks.
    pub(super) fn flushed(&mut self) -> Option<Vec<u8>> {
        self.edge().map(|edge| edge.disk.flushed.clone())
    }

    fn edge(&mut self) -> Option<&mut Edge> {
        match self.tape.as_mut()? {
            Tape::Blank { .. } => None,
            Tape::Replaying(replayer) => Some(replayer.host()),
            Tape::Recording(recorder) => Some(recorder.host()),
        }
    }

    /// The last frame of a gateway that this machine has or will get.
    pub(super) fn accepted(&self, gateway: GatewayIncarnation) -> FrameNumber {
        self.accepted.get(&gateway).copied().unwrap_or_default()
    }

    /// A frame from a gateway; only the next one in order is taken.
    pub(super) fn frame(&mut self, source: FrameSource, bytes: Bytes) {
        if source.number.0 != self.accepted(source.gateway).0 + 1 || !self.records() {
            return;
        }
        self.accepted.insert(source.gateway, source.number);
        if let Some(edge) = self.edge() {
            edge.frames.push_back(FromOutside::Frame { source, bytes });
        }
    }

    /// Runs the machine for a while.
    pub(super) fn turn(&mut self, now: HostTime) -> Result<Brought, MachineError> {
        let mut brought = Brought::default();
        if let Some(edge) = self.edge() {
            edge.now = edge.now.max(now);
        }
        let turn = match self.tape.as_mut() {
            None => return Ok(brought),
            Some(Tape::Blank { now: own, .. }) => {
                *own = now;
                return Ok(brought);
            }
            Some(Tape::Replaying(replayer)) => self.runner.turn(replayer.as_mut(), BUDGET)?,
            Some(Tape::Recording(recorder)) => self.runner.turn(recorder.as_mut(), BUDGET)?,
        };
        self.become_live(&mut brought)?;
        brought.busy |= turn == Turn::Ran;
        match self.tape.as_mut() {
            Some(Tape::Replaying(replayer)) => {
                let executed = replayer.executed();
                if executed > self.executed {
                    self.executed = executed;
                    brought.executed = Some((executed, self.runner.at()));
                }
                // What the own disk has finished is looked at again at once.
                brought.busy |=
                    replayer.host().arrival_waits(Sources::default()) && !replayer.drained();
            }
            Some(Tape::Recording(recorder)) => {
                brought.paused = turn == Turn::Paused;
                brought.again_at = recorder.wake_at();
            }
            _ => {}
        }
        self.collect(&mut brought);
        Ok(brought)
    }

    fn become_live(&mut self, brought: &mut Brought) -> Result<(), MachineError> {
        let Some((term, at)) = self.go_live else {
            return Ok(());
        };
        let ready = match &self.tape {
            Some(Tape::Replaying(replayer)) => {
                replayer.drained() && replayer.executed() == at.index
            }
            _ => false,
        };
        if ready && let Some(Tape::Replaying(replayer)) = self.tape.take() {
            self.go_live = None;
            self.accepted = replayer.ongoing().frames.clone();
            let recorder = replayer.go_live(Policy::default(), term)?;
            self.tape = Some(Tape::Recording(Box::new(recorder)));
            brought.went_live = true;
            brought.busy = true;
        }
        Ok(())
    }

    fn collect(&mut self, brought: &mut Brought) {
        let Some(edge) = self.edge() else { return };
        brought.shipped = std::mem::take(&mut edge.shipped);
        let outputs = std::mem::take(&mut edge.outputs);
        for output in outputs {
            self.lines.made(&output);
            self.outbox.push(output);
        }
        for shipment in &brought.shipped {
            let end = shipment.batch.end();
            self.frames
                .extend(shipment.frames.iter().map(|source| (end, *source)));
        }
    }
}

impl Edge {
    fn new(now: HostTime, random: Random, contents: Vec<u8>) -> Self {
        Self {
            now,
            random,
            frames: VecDeque::new(),
            replies: VecDeque::new(),
            disk: Disk::new(contents),
            shipped: Vec::new(),
            outputs: Vec::new(),
        }
    }
}
