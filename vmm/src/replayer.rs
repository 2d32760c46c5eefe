//! The replayer: the tape of a replica. It reads the log and compares what the machine does.
//!
//! It lets the machine execute only as far as the log shows the primary to have come. Disk
//! requests go to this host's own disk; what the disk returns is delivered where the log says so.
//! Outputs are made again, with the same numbers, for whoever may have to send them once more.

mod queue;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use replay_log::{
    Answer, Arrival, Batch, DiskOutcome, Entry, FrameNumber, Group, GroupBody, Header, LogIndex,
    Mark, MarkDigest, Position, RequestNumber, Term,
};

use crate::host::{DiskData, FromOutside, Host, Output, OutputKind};
use crate::recorder::{Ongoing, Policy, Recorder, arm, read_hash};
use crate::tape::{
    Command, CpuState, Delivery, DigestKey, DiskRequest, Next, Pending, Query, Sources, Tape,
    TapeError,
};
pub use queue::FeedError;
use queue::Queue;

/// The tape of a replica.
pub struct Replayer<H> {
    host: H,
    key: DigestKey,
    queue: Queue,
    term: Term,
    ongoing: Ongoing,
    /// The position of the exit being served is one beyond this.
    closed: Position,
    /// How many answers of the exit being served are used.
    answered: usize,
    outputs: Vec<(OutputKind, bytes::Bytes)>,
    requests: Vec<DiskRequest>,
    /// Requests that the log has not shown to be finished.
    outstanding: BTreeSet<RequestNumber>,
    /// What this host's disk has finished and the log has not delivered yet.
    disk: BTreeMap<RequestNumber, DiskData>,
    marks: u64,
}

impl<H: Host> Replayer<H> {
    /// A tape for the machine that `header` describes, at power-on, with nothing fed yet.
    pub fn new(host: H, header: Header) -> Self {
        Self {
            host,
            key: DigestKey::of(&header),
            term: header.term,
            queue: Queue::new(header),
            ongoing: Ongoing::default(),
            closed: Position::START,
            answered: 0,
            outputs: Vec::new(),
            requests: Vec::new(),
            outstanding: BTreeSet::new(),
            disk: BTreeMap::new(),
            marks: 0,
        }
    }

    /// Adds the next batch of the log.
    pub fn feed(&mut self, batch: &Batch) -> Result<(), FeedError> {
        self.queue.feed(batch)
    }

    /// The host it stands on.
    pub const fn host(&mut self) -> &mut H {
        &mut self.host
    }

    /// How much of the log the machine has executed.
    pub const fn executed(&self) -> LogIndex {
        self.queue.executed()
    }

    /// How much of the log it was given.
    pub const fn fed(&self) -> LogIndex {
        self.queue.fed()
    }

    /// Whether everything that was fed is executed.
    pub const fn drained(&self) -> bool {
        self.queue.is_empty()
    }

    /// How many marks were compared and found equal.
    pub const fn marks(&self) -> u64 {
        self.marks
    }

    /// The term of the last entry executed.
    pub const fn term(&self) -> Term {
        self.term
    }

    /// What the machine has going on with the outside.
    pub const fn ongoing(&self) -> &Ongoing {
        &self.ongoing
    }

    /// Goes live: the machine goes on from here under a new term, with a recorder. Everything fed
    /// must be executed. Requests that this host's disk has finished and the log has not delivered
    /// are handed over as arrivals; those still under way arrive by themselves.
    ///
    /// # Panics
    /// If entries are left: going live before the end of the sealed log would undo them.
    pub fn go_live(self, policy: Policy, term: Term) -> Result<Recorder<H>, TapeError>
    where
        H: Requeue,
    {
        assert!(
            self.queue.is_empty(),
            "a replica goes live at the end of its log only"
        );
        let mut host = self.host;
        host.requeue(self.disk);
        Recorder::resume(host, policy, self.key, term, self.ongoing)
    }

    /// The next entry, if it belongs to `at`.
    fn entry_at(&self, at: Position) -> Option<&Entry> {
        self.queue.front().filter(|entry| entry.at() == at)
    }

    /// Takes the next entry off: it is executed now.
    fn take(&mut self) -> Option<Entry> {
        let entry = self.queue.pop()?;
        self.ongoing.index = self.queue.executed();
        Some(entry)
    }

    /// Takes off what asks nothing of the machine but to be here.
    fn skip_notes(&mut self, at: Position) {
        while let Some(Entry::Header(_) | Entry::Term(_)) = self.entry_at(at) {
            if let Some(Entry::Term(change)) = self.take() {
                self.term = change.term;
            }
        }
    }

    /// Moves finished disk requests to where the log will ask for them.
    fn collect_disk(&mut self) -> Result<(), TapeError> {
        while let Some(from) = self.host.arrival(Sources::default())? {
            if let FromOutside::Disk(reply) = from.what {
                self.disk.insert(reply.number, reply.data);
            }
        }
        Ok(())
    }

    /// Prepares the delivery of the arrival that is next in the log; `None` while this host's own
    /// disk is not there yet.
    fn arrival(&mut self, at: Position) -> Result<Option<Delivery>, TapeError> {
        let Some(Entry::Group(Group {
            body: GroupBody::Arrival(arrival),
            ..
        })) = self.entry_at(at)
        else {
            return Ok(None);
        };
        let arrival = arrival.clone();
        let data = match &arrival {
            Arrival::Frame { source, .. } => {
                self.ongoing.frames.insert(source.gateway, source.number);
                None
            }
            Arrival::TimerDue { timer } => {
                let slot = self.ongoing.timers.get_mut(usize::from(timer.0));
                let due = slot.and_then(Option::take);
                if due.is_none() {
                    return Err(diverged(at, &arrival, "has not armed that timer"));
                }
                self.ongoing.pass(due);
                None
            }
            Arrival::Console { .. } => None,
            Arrival::DiskDone { request, outcome } => {
                if !self.outstanding.contains(request) {
                    let expected = format!("disk request {} finished", request.0);
                    return Err(diverged(at, expected, "has no such request under way"));
                }
                let Some(own) = self.disk.remove(request) else {
                    return Ok(None);
                };
                self.outstanding.remove(request);
                Self::compare_disk(at, *request, *outcome, own)?
            }
        };
        self.take();
        Ok(Some(Delivery { arrival, data }))
    }

    fn compare_disk(
        at: Position,
        request: RequestNumber,
        logged: DiskOutcome,
        own: DiskData,
    ) -> Result<Option<bytes::Bytes>, TapeError> {
        match (logged, own) {
            (DiskOutcome::Read { hash }, DiskData::Read(data)) if hash == read_hash(&data) => {
                Ok(Some(data))
            }
            (DiskOutcome::Read { .. }, DiskData::Read(_)) => {
                Err(TapeError::DiskDiffers { at, request })
            }
            (DiskOutcome::Written, DiskData::Written)
            | (DiskOutcome::Flushed, DiskData::Flushed) => Ok(None),
            (logged, own) => Err(diverged(
                at,
                format_args!("disk request {} ended as {logged:?}", request.0),
                format_args!("a request of another kind ({})", kind_of(&own)),
            )),
        }
    }
}

fn kind_of(data: &DiskData) -> &'static str {
    match data {
        DiskData::Read(_) => "a read",
        DiskData::Written => "a write",
        DiskData::Flushed => "a flush",
    }
}

/// A host that can be given back disk requests that have finished but were not delivered.
pub trait Requeue {
    /// They come out of [`Host::arrival`] again, before anything else.
    fn requeue(&mut self, finished: BTreeMap<RequestNumber, DiskData>);
}

impl<H: Host> Tape for Replayer<H> {
    fn key(&self) -> DigestKey {
        self.key
    }

    fn pending(&mut self, at: Position, cpu: CpuState, _: Sources) -> Result<Pending, TapeError> {
        self.skip_notes(at);
        self.closed = at;
        match self.queue.front() {
            None => Ok(Pending::Hold),
            Some(entry) if entry.at() > at && cpu == CpuState::Ready => Ok(Pending::Nothing),
            Some(_) => Ok(Pending::Act),
        }
    }

    fn next(&mut self, at: Position, cpu: CpuState, _: Sources) -> Result<Next, TapeError> {
        self.skip_notes(at);
        self.closed = at;
        let Some(entry) = self.queue.front() else {
            return Ok(Next::Wait);
        };
        if entry.at() < at {
            let expected = describe(entry);
            return Err(diverged(entry.at(), expected, format!("passed on to {at}")));
        }
        if entry.at() > at {
            return match cpu {
                CpuState::Ready => Ok(Next::Run),
                state => Err(diverged(
                    at,
                    format_args!("it executing on to position {}", entry.at()),
                    format_args!("is {state:?} and nothing is there to wake it"),
                )),
            };
        }
        match entry {
            Entry::Mark(_) => Ok(Next::Mark),
            Entry::Group(Group {
                body: GroupBody::Arrival(_),
                ..
            }) => {
                self.collect_disk()?;
                match self.arrival(at)? {
                    Some(delivery) => Ok(Next::Deliver(delivery)),
                    None => Ok(Next::Wait),
                }
            }
            other => {
                let expected = describe(other);
                Err(diverged(
                    at,
                    expected,
                    "has passed this position without it",
                ))
            }
        }
    }

    fn answer(&mut self, query: Query) -> Result<Answer, TapeError> {
        let at = self.closed.next();
        let logged = match self.entry_at(at) {
            Some(Entry::Group(Group {
                body: GroupBody::Exit { answers, .. },
                ..
            })) => answers.get(self.answered).cloned(),
            _ => None,
        };
        self.answered += 1;
        match (query, logged) {
            (Query::Clock, Some(Answer::Clock(time))) => {
                self.ongoing.clock_floor = self.ongoing.clock_floor.max(time);
                Ok(Answer::Clock(time))
            }
            (Query::Entropy(len), Some(Answer::Entropy(bytes))) if bytes.len() == len as usize => {
                Ok(Answer::Entropy(bytes))
            }
            (query, None) => Err(diverged(at, "no answer", format_args!("asks {query:?}"))),
            (query, Some(answer)) => Err(diverged(
                at,
                format_args!("the answer {answer:?}"),
                format_args!("asks {query:?}"),
            )),
        }
    }

    fn command(&mut self, command: Command) -> Result<(), TapeError> {
        match command {
            Command::Frame(bytes) => self.outputs.push((OutputKind::Frame, bytes)),
            Command::Console(bytes) => self.outputs.push((OutputKind::Console, bytes)),
            Command::Disk(request) => {
                self.outstanding.insert(request.number);
                self.requests.push(request);
            }
            Command::ArmTimer { timer, deadline } => {
                arm(&mut self.ongoing.timers, timer, deadline)?;
            }
        }
        Ok(())
    }

    fn close(&mut self, at: Position) -> Result<(), TapeError> {
        self.closed = at;
        self.ongoing.at = at;
        if !self.requests.is_empty() {
            self.host.submit(std::mem::take(&mut self.requests))?;
        }
        let answered = std::mem::take(&mut self.answered);
        let made = std::mem::take(&mut self.outputs);
        let logged = match self.entry_at(at) {
            Some(Entry::Group(Group {
                body: GroupBody::Exit { answers, outputs },
                ..
            })) => Some((answers.len(), *outputs as usize)),
            _ => None,
        };
        let (answers, outputs) = logged.unwrap_or_default();
        if (answers, outputs) != (answered, made.len()) {
            return Err(diverged(
                at,
                format_args!("{answers} answers and {outputs} outputs"),
                format_args!("took {answered} and made {}", made.len()),
            ));
        }
        if logged.is_none() {
            return Ok(());
        }
        self.take();
        let needs = self.queue.executed();
        for (kind, bytes) in made {
            self.ongoing.outputs = FrameNumber(self.ongoing.outputs.0 + 1);
            let number = self.ongoing.outputs;
            self.host.output(Output {
                number,
                needs,
                kind,
                bytes,
            })?;
        }
        Ok(())
    }

    fn mark(&mut self, at: Position, digest: MarkDigest) -> Result<(), TapeError> {
        let Some(Entry::Mark(Mark { digest: logged, .. })) = self.entry_at(at) else {
            return Ok(());
        };
        let logged = *logged;
        if logged != digest {
            return Err(diverged(
                at,
                format_args!("the state digest {:016x}", logged.0),
                format_args!("has {:016x}", digest.0),
            ));
        }
        self.marks += 1;
        self.take();
        Ok(())
    }
}

fn diverged(at: Position, expected: impl Display, found: impl Display) -> TapeError {
    TapeError::Diverged {
        at,
        expected: expected.to_string(),
        found: found.to_string(),
    }
}

/// What an entry says, for a report.
fn describe(entry: &Entry) -> String {
    match entry {
        Entry::Header(_) => "the header".into(),
        Entry::Term(change) => format!("the beginning of term {}", change.term),
        Entry::Mark(mark) => format!("a mark at position {}", mark.at),
        Entry::Group(Group {
            at,
            body: GroupBody::Exit { answers, outputs },
        }) => {
            format!(
                "an exit at position {at} with {} answers and {outputs} outputs",
                answers.len()
            )
        }
        Entry::Group(Group {
            at,
            body: GroupBody::Arrival(arrival),
        }) => {
            format!("the arrival of {arrival} at position {at}")
        }
    }
}
