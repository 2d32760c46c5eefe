//! The recorder: the tape of a primary. It asks the host and writes down what it was told.
//!
//! Everything that reaches the machine passes here once, is appended to the batch under
//! construction, and leaves with it: when an output waits, at 64 KiB, or after a millisecond. In a
//! recording that nobody goes on from, outputs wait for nothing.

use std::collections::BTreeMap;

use replay_log::{
    Answer, Arrival, BatchBuilder, DiskOutcome, EncodeError, Entry, FrameNumber, FrameSource,
    GatewayIncarnation, Group, GroupBody, GuestTime, Header, LogIndex, Mark, MarkDigest, Position,
    Term, TermChange, TimerId,
};

use crate::deferral::Deferral;
use crate::devices::layout::MAX_FRAME;
use crate::host::{Came, DiskData, FromOutside, Host, HostTime, Output, OutputKind, Shipment};
use crate::tape::{
    Command, CpuState, Delivery, DigestKey, DiskRequest, Next, Pending, Query, Sources, Tape,
    TapeError,
};

/// How many timers a machine can have.
pub const TIMERS: usize = 4;

/// Marks take at most one part in so many of the time: on a host where a digest takes long they are
/// further apart, up to [`Policy::mark_age_max`].
const MARK_SHARE: u64 = 128;
/// The same of marks that only scrub the memory of a waiting guest, up to this, in nanoseconds.
const IDLE_MARK_MAX: u64 = 1_000_000_000;

/// When the recorder does what it may choose the time of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Whether a log is written at all. Off only for measuring what recording costs.
    pub record: bool,
    /// Whether an output waits for the log that led to it, so that the batch under construction
    /// leaves with each.
    pub output_commit: bool,
    /// A batch this large leaves at once, in bytes.
    pub batch_bytes: usize,
    /// A batch leaves when its first entry is this old, in nanoseconds.
    pub batch_age: u64,
    /// A mark after this many nanoseconds of execution…
    pub mark_age: u64,
    /// …or, on a host where marks take long, after up to so many: replicas execute what marks have
    /// shown them…
    pub mark_age_max: u64,
    /// …or this many landmarks.
    pub mark_landmarks: u64,
    /// A guest that has waited this long since something happened gets one, in nanoseconds: longer
    /// than it waits for a disk under load, because clients wait with it.
    pub wait_mark: u64,
    /// While it waits, memory is scrubbed with a mark each time this many nanoseconds pass.
    pub idle_mark: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            record: true,
            output_commit: true,
            batch_bytes: 64 << 10,
            batch_age: 1_000_000,
            mark_age: 2_000_000,
            mark_age_max: 100_000_000,
            mark_landmarks: 1_024,
            wait_mark: 2_000_000,
            idle_mark: 250_000_000,
        }
    }
}

impl Policy {
    /// For a log that is kept and that no machine will go on from: larger batches, outputs do not
    /// wait for them, and no replica for marks. A process that is killed takes the last
    /// [`Policy::batch_age`] with it.
    #[must_use]
    pub fn recording() -> Self {
        Self {
            output_commit: false,
            batch_age: 200_000_000,
            mark_age_max: 250_000_000,
            wait_mark: 20_000_000,
            ..Self::default()
        }
    }
}

/// What a machine has going on with the outside at the end of its log: what a new primary takes
/// over. Empty at power-on.
#[derive(Clone, Debug, Default)]
pub struct Ongoing {
    /// The last landmark.
    pub at: Position,
    /// The end of the log.
    pub index: LogIndex,
    /// The last clock answer: the guest's time never goes below it.
    pub clock_floor: GuestTime,
    /// Armed timers.
    pub timers: [Option<GuestTime>; TIMERS],
    /// The number of the last output.
    pub outputs: FrameNumber,
    /// The last frame delivered of each gateway.
    pub frames: BTreeMap<GatewayIncarnation, FrameNumber>,
}

impl Ongoing {
    /// A timer that was due then is delivered: whoever goes on never tells an earlier time.
    pub(crate) fn pass(&mut self, due: Option<GuestTime>) {
        self.clock_floor = self.clock_floor.max(due.unwrap_or_default());
    }
}

/// The tape of a primary.
pub struct Recorder<H> {
    host: H,
    policy: Policy,
    key: DigestKey,
    term: Term,
    builder: BatchBuilder,
    ongoing: Ongoing,
    /// Guest time is host time less this, never below the floor.
    clock_zero: i128,
    /// When the batch under construction got its first entry.
    batch_since: Option<HostTime>,
    /// The exit being served.
    answers: Vec<Answer>,
    outputs: Vec<(OutputKind, bytes::Bytes)>,
    requests: Vec<DiskRequest>,
    /// Frames delivered in the batch under construction.
    batch_frames: BTreeMap<GatewayIncarnation, FrameNumber>,
    overlong: u64,
    deferral: Deferral,
    last_mark: HostTime,
    /// When the machine was asked for the mark being made, and how long the last one took, in
    /// nanoseconds.
    mark_began: HostTime,
    mark_took: u64,
    marked_at: Option<Position>,
    /// Something was delivered at the marked position after the mark.
    stale_mark: bool,
    /// Since when the guest has been waiting.
    waiting_since: Option<HostTime>,
    pause: bool,
    throttled: bool,
}

impl<H: Host> Recorder<H> {
    /// Starts a log with its header: the machine was just powered on.
    pub fn start(host: H, policy: Policy, header: Header) -> Result<Self, TapeError> {
        let (key, term) = (DigestKey::of(&header), header.term);
        let mut recorder = Self::new(host, policy, key, term, Ongoing::default());
        recorder.write(&Entry::Header(header))?;
        recorder.flush()?;
        Ok(recorder)
    }

    /// Goes on with a log under a new term, from where the replay has ended.
    pub(crate) fn resume(
        host: H,
        policy: Policy,
        key: DigestKey,
        term: Term,
        ongoing: Ongoing,
    ) -> Result<Self, TapeError> {
        let at = ongoing.at;
        let mut recorder = Self::new(host, policy, key, term, ongoing);
        recorder.write(&Entry::Term(TermChange { at, term }))?;
        recorder.flush()?;
        Ok(recorder)
    }

    fn new(mut host: H, policy: Policy, key: DigestKey, term: Term, ongoing: Ongoing) -> Self {
        let now = host.now();
        Self {
            clock_zero: i128::from(now.0) - i128::from(ongoing.clock_floor.0),
            builder: BatchBuilder::new(term, ongoing.index),
            host,
            policy,
            key,
            term,
            ongoing,
            batch_since: None,
            answers: Vec::new(),
            outputs: Vec::new(),
            requests: Vec::new(),
            batch_frames: BTreeMap::new(),
            overlong: 0,
            deferral: Deferral::default(),
            last_mark: now,
            mark_began: now,
            mark_took: 0,
            marked_at: None,
            stale_mark: true,
            waiting_since: None,
            pause: false,
            throttled: false,
        }
    }

    /// The host it stands on.
    pub const fn host(&mut self) -> &mut H {
        &mut self.host
    }

    /// The term it writes under.
    pub const fn term(&self) -> Term {
        self.term
    }

    /// The end of the log, entries not yet shipped included.
    pub fn index(&self) -> LogIndex {
        self.builder.end()
    }

    /// What the machine has going on with the outside.
    pub const fn ongoing(&self) -> &Ongoing {
        &self.ongoing
    }

    /// How many frames came that no guest can take, longer than [`MAX_FRAME`].
    pub const fn overlong(&self) -> u64 {
        self.overlong
    }

    /// The longest that something which arrived has waited because the guest made no exit or took
    /// no interrupts, in nanoseconds.
    pub const fn longest_deferral(&self) -> u64 {
        self.deferral.longest()
    }

    /// Asks the run loop to leave at the next landmark, everything shipped (`true`), or lets it
    /// go on (`false`).
    pub fn pause(&mut self, pause: bool) {
        self.pause = pause;
        self.held_no_longer();
    }

    /// Holds the guest back at landmarks while its replicas are too far behind.
    pub fn throttle(&mut self, throttled: bool) {
        self.throttled = throttled;
        self.held_no_longer();
    }

    /// What came while the guest was held back has waited for others, not for the guest.
    fn held_no_longer(&mut self) {
        let now = self.host.now();
        self.deferral.nothing(now);
    }

    /// When a waiting machine has something to do by itself: a timer, a mark, an unshipped batch.
    pub fn wake_at(&self) -> Option<HostTime> {
        let timer = self
            .ongoing
            .timers
            .iter()
            .flatten()
            .map(|due| self.host_time(*due))
            .min();
        let batch = self
            .batch_since
            .map(|since| since.plus(self.policy.batch_age));
        let timer = if self.throttled { None } else { timer };
        [timer, batch, self.wait_mark_at()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Ships what is written so far.
    pub fn flush(&mut self) -> Result<(), TapeError> {
        self.ship()?;
        self.host.send()
    }

    fn ship(&mut self) -> Result<(), TapeError> {
        self.batch_since = None;
        let Some(batch) = self.builder.finish() else {
            return Ok(());
        };
        let frames = std::mem::take(&mut self.batch_frames)
            .into_iter()
            .map(|(gateway, number)| FrameSource { gateway, number })
            .collect();
        let at = self.ongoing.at;
        self.host.ship(Shipment { batch, at, frames })
    }

    fn write(&mut self, entry: &Entry) -> Result<LogIndex, TapeError> {
        if !self.policy.record {
            return Ok(self.ongoing.index);
        }
        // However much arrives at one landmark: a batch leaves when it is large enough.
        if self.builder.bytes() >= self.policy.batch_bytes {
            self.ship()?;
        }
        if self.batch_since.is_none() {
            self.batch_since = Some(self.host.now());
        }
        let mut pushed = self.builder.push(entry);
        if pushed == Err(EncodeError::BatchFull) {
            // An entry is a whole group: the batch may end before it.
            self.ship()?;
            pushed = self.builder.push(entry);
        }
        let end = pushed.map_err(|error| TapeError::Host {
            reason: format!("an entry cannot be written to the log: {error}"),
        })?;
        self.ongoing.index = end;
        Ok(end)
    }

    fn guest_time(&self, now: HostTime) -> GuestTime {
        let elapsed = i128::from(now.0) - self.clock_zero;
        GuestTime(u64::try_from(elapsed).unwrap_or(0)).max(self.ongoing.clock_floor)
    }

    fn host_time(&self, guest: GuestTime) -> HostTime {
        let at = i128::from(guest.0) + self.clock_zero;
        HostTime(u64::try_from(at.max(0)).unwrap_or(u64::MAX))
    }

    /// The timer that is due first, if one is due.
    fn due_timer(&self, now: HostTime) -> Option<usize> {
        let now = self.guest_time(now);
        (0..TIMERS)
            .filter(|&timer| self.ongoing.timers[timer].is_some_and(|due| due <= now))
            .min_by_key(|&timer| self.ongoing.timers[timer])
    }

    fn batch_due(&self, now: HostTime) -> bool {
        self.builder.bytes() >= self.policy.batch_bytes
            || self
                .batch_since
                .is_some_and(|since| now.since(since) >= self.policy.batch_age)
    }

    /// When a waiting guest's next mark is due.
    fn wait_mark_at(&self) -> Option<HostTime> {
        let since = self.waiting_since.filter(|_| self.policy.record)?;
        let affordable = self.affordable_mark_age();
        Some(if self.stale_mark {
            // Where all is slow, every wait is long: a mark for each would slow what is waited for. In
            // the lab on one processor it took 250 s to Redis, and takes 74 s.
            let next = self
                .last_mark
                .plus(affordable.min(self.policy.mark_age_max));
            since.plus(self.policy.wait_mark).max(next)
        } else {
            let affordable = affordable.min(IDLE_MARK_MAX);
            self.last_mark.plus(self.policy.idle_mark.max(affordable))
        })
    }

    fn mark_due(&self, at: Position, now: HostTime) -> bool {
        if !self.policy.record {
            return false;
        }
        if let Some(due) = self.wait_mark_at() {
            return now >= due;
        }
        let passed = at.0 - self.marked_at.unwrap_or_default().0;
        passed >= self.policy.mark_landmarks
            || (passed > 0 && now.since(self.last_mark) >= self.mark_age())
    }

    /// After how much execution the next mark is due, in nanoseconds.
    fn mark_age(&self) -> u64 {
        let affordable = self.affordable_mark_age().min(self.policy.mark_age_max);
        self.policy.mark_age.max(affordable)
    }

    /// How long after the last mark another may follow for marks to take no more than their share.
    const fn affordable_mark_age(&self) -> u64 {
        self.mark_took.saturating_mul(MARK_SHARE)
    }

    fn arrive(&mut self, at: Position, came: Came) -> Result<Next, TapeError> {
        self.deferral.delivered(came.at);
        let (arrival, data) = match came.what {
            FromOutside::Frame { source, mut bytes } => {
                self.ongoing.frames.insert(source.gateway, source.number);
                if bytes.len() > MAX_FRAME {
                    // Only its number is kept, so that its gateway goes on counting: the network
                    // device drops what is no frame.
                    self.overlong += 1;
                    bytes.clear();
                }
                (Arrival::Frame { source, bytes }, None)
            }
            FromOutside::Console(bytes) => (Arrival::Console { bytes }, None),
            FromOutside::Disk(reply) => {
                let (outcome, data) = match reply.data {
                    DiskData::Read(data) => (
                        DiskOutcome::Read {
                            hash: read_hash(&data),
                        },
                        Some(data),
                    ),
                    DiskData::Written => (DiskOutcome::Written, None),
                    DiskData::Flushed => (DiskOutcome::Flushed, None),
                };
                (
                    Arrival::DiskDone {
                        request: reply.number,
                        outcome,
                    },
                    data,
                )
            }
        };
        self.deliver(at, arrival, data)
    }

    fn deliver(
        &mut self,
        at: Position,
        arrival: Arrival,
        data: Option<bytes::Bytes>,
    ) -> Result<Next, TapeError> {
        let group = Group {
            at,
            body: GroupBody::Arrival(arrival),
        };
        let entry = Entry::Group(group);
        self.write(&entry)?;
        self.stale_mark = true;
        self.waiting_since = None;
        let Entry::Group(Group {
            body: GroupBody::Arrival(arrival),
            ..
        }) = entry
        else {
            unreachable!("built as an arrival a few lines above")
        };
        if let Arrival::Frame { source, .. } = &arrival {
            self.batch_frames.insert(source.gateway, source.number);
        }
        Ok(Next::Deliver(Delivery { arrival, data }))
    }
}

/// The hash by which copies compare what their disks returned.
pub(crate) fn read_hash(data: &[u8]) -> u64 {
    let hash = blake3::hash(data);
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

impl<H: Host> Tape for Recorder<H> {
    fn key(&self) -> DigestKey {
        self.key
    }

    fn pending(
        &mut self,
        at: Position,
        cpu: CpuState,
        can_take: Sources,
    ) -> Result<Pending, TapeError> {
        let held = self.pause || self.throttled;
        if cpu != CpuState::Ready || held || self.host.arrival_waits(can_take) {
            return Ok(Pending::Act);
        }
        let now = self.host.now();
        if self.due_timer(now).is_some() || self.mark_due(at, now) {
            return Ok(Pending::Act);
        }
        self.deferral.nothing(now);
        if self.batch_due(now) {
            // The exit's group is closed, so nothing needs to be completed first.
            self.flush()?;
        }
        Ok(Pending::Nothing)
    }

    fn next(&mut self, at: Position, cpu: CpuState, can_take: Sources) -> Result<Next, TapeError> {
        let now = self.host.now();
        let stopped = matches!(cpu, CpuState::Stopped(_));
        let held = self.pause || self.throttled;
        if !stopped && !held {
            if let Some(timer) = self.due_timer(now) {
                let due = self.ongoing.timers[timer].take();
                self.ongoing.pass(due);
                if let Some(due) = due {
                    self.deferral.delivered(self.host_time(due));
                }
                let timer = TimerId(timer as u8);
                return self.deliver(at, Arrival::TimerDue { timer }, None);
            }
            if let Some(came) = self.host.arrival(can_take)? {
                return self.arrive(at, came);
            }
        }
        self.deferral.nothing(now);
        let rests = cpu != CpuState::Ready || held;
        if rests && self.waiting_since.is_none() {
            self.waiting_since = Some(now);
        }
        // A guest that stops for good, or is paused, shows its last state at once.
        let last_mark = (stopped || self.pause) && self.stale_mark && self.policy.record;
        if last_mark || self.mark_due(at, now) {
            self.mark_began = now;
            return Ok(Next::Mark);
        }
        if stopped || self.pause || self.batch_due(now) {
            self.flush()?;
        }
        Ok(if self.pause {
            Next::Pause
        } else if rests {
            Next::Wait
        } else {
            self.waiting_since = None;
            Next::Run
        })
    }

    fn answer(&mut self, query: Query) -> Result<Answer, TapeError> {
        let answer = match query {
            Query::Clock => {
                let now = self.host.now();
                let time = self.guest_time(now);
                self.ongoing.clock_floor = time;
                Answer::Clock(time)
            }
            Query::Entropy(len) => {
                let mut bytes = vec![0; len as usize];
                self.host.entropy(&mut bytes)?;
                Answer::Entropy(bytes.into())
            }
        };
        self.answers.push(answer.clone());
        Ok(answer)
    }

    fn command(&mut self, command: Command) -> Result<(), TapeError> {
        match command {
            Command::Frame(bytes) => self.outputs.push((OutputKind::Frame, bytes)),
            Command::Console(bytes) => self.outputs.push((OutputKind::Console, bytes)),
            Command::Disk(request) => self.requests.push(request),
            Command::ArmTimer { timer, deadline } => {
                arm(&mut self.ongoing.timers, timer, deadline)?;
            }
        }
        Ok(())
    }

    fn close(&mut self, at: Position) -> Result<(), TapeError> {
        self.ongoing.at = at;
        self.stale_mark = true;
        self.waiting_since = None;
        if !self.requests.is_empty() {
            self.host.submit(std::mem::take(&mut self.requests))?;
        }
        if self.answers.is_empty() && self.outputs.is_empty() {
            return Ok(());
        }
        let outputs = std::mem::take(&mut self.outputs);
        let answers = std::mem::take(&mut self.answers);
        let body = GroupBody::Exit {
            answers,
            outputs: outputs.len() as u32,
        };
        let needs = self.write(&Entry::Group(Group { at, body }))?;
        if outputs.is_empty() {
            return Ok(());
        }
        if self.policy.output_commit {
            self.ship()?;
        }
        for (kind, bytes) in outputs {
            self.ongoing.outputs.0 += 1;
            let number = self.ongoing.outputs;
            self.host.output(Output {
                number,
                needs,
                kind,
                bytes,
            })?;
        }
        self.host.send()
    }

    fn entering(&mut self, interrupt_waits: bool) {
        if !interrupt_waits && self.deferral.is_running() {
            let now = self.host.now();
            self.deferral.ended(now);
        }
    }

    fn mark(&mut self, at: Position, digest: MarkDigest) -> Result<(), TapeError> {
        self.write(&Entry::Mark(Mark { at, digest }))?;
        self.last_mark = self.host.now();
        self.mark_took = self.last_mark.since(self.mark_began);
        self.marked_at = Some(at);
        self.stale_mark = false;
        Ok(())
    }
}

/// Keeps an armed timer; a device that names a timer the machine does not have is a bug.
pub(crate) fn arm(
    timers: &mut [Option<GuestTime>; TIMERS],
    timer: TimerId,
    deadline: Option<GuestTime>,
) -> Result<(), TapeError> {
    let slot = timers
        .get_mut(usize::from(timer.0))
        .ok_or_else(|| TapeError::Host {
            reason: format!("the machine has no timer {}", timer.0),
        })?;
    *slot = deadline;
    Ok(())
}
