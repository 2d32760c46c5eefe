//! What passes between a machine and its tape, hashed: every answer, command and arrival enters
//! the next mark's digest whole, because much of it only ever reaches guest memory, which a mark
//! compares a few pages at a time.

use replay_log::{Answer, Arrival, DiskOutcome, MarkDigest, Position};

use crate::tape::{Command, CpuState, DiskOp, Next, Pending, Query, Sources, Tape, TapeError};

/// The hash of what was overheard since the last mark.
#[derive(Debug, Default)]
pub(crate) struct Ear {
    hasher: Box<blake3::Hasher>,
}

impl Ear {
    fn note(&mut self, tag: u8, number: u64, bytes: &[u8]) {
        let mut head = [0; 17];
        head[0] = tag;
        head[1..9].copy_from_slice(&number.to_le_bytes());
        head[9..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.hasher.update(&head);
        self.hasher.update(bytes);
    }

    /// Something arrives.
    pub(crate) fn arrival(&mut self, arrival: &Arrival) {
        match arrival {
            Arrival::Frame { source, bytes } => {
                self.note(1, source.gateway.0, &source.number.0.to_le_bytes());
                self.note(2, 0, bytes);
            }
            Arrival::DiskDone { request, outcome } => match outcome {
                DiskOutcome::Written => self.note(3, request.0, &[]),
                DiskOutcome::Flushed => self.note(4, request.0, &[]),
                DiskOutcome::Read { hash } => self.note(5, request.0, &hash.to_le_bytes()),
            },
            Arrival::TimerDue { timer } => self.note(6, u64::from(timer.0), &[]),
            Arrival::Console { bytes } => self.note(7, 0, bytes),
        }
    }

    fn answer(&mut self, answer: &Answer) {
        match answer {
            Answer::Clock(time) => self.note(8, time.0, &[]),
            Answer::Entropy(bytes) => self.note(9, 0, bytes),
        }
    }

    fn command(&mut self, command: &Command) {
        match command {
            Command::Frame(bytes) => self.note(10, 0, bytes),
            Command::Console(bytes) => self.note(11, 0, bytes),
            Command::Disk(request) => {
                self.note(12, request.number.0, &[request.disk]);
                match &request.op {
                    DiskOp::Read { offset, len } => self.note(13, *offset, &len.to_le_bytes()),
                    DiskOp::Write { offset, data } => self.note(14, *offset, data),
                    DiskOp::Flush => self.note(15, 0, &[]),
                }
            }
            Command::ArmTimer { timer, deadline } => {
                let deadline = deadline.map_or(u64::MAX, |deadline| deadline.0);
                self.note(16, u64::from(timer.0), &deadline.to_le_bytes());
            }
        }
    }

    /// The digest of a machine's state together with what was overheard, which is forgotten.
    pub(crate) fn digest(&mut self, state: MarkDigest) -> MarkDigest {
        self.hasher.update(&state.0.to_le_bytes());
        let mut first = [0; 8];
        first.copy_from_slice(&self.hasher.finalize().as_bytes()[..8]);
        self.hasher.reset();
        MarkDigest(u64::from_le_bytes(first))
    }
}

/// A tape with an ear at it.
pub(crate) struct Overheard<'a> {
    pub(crate) tape: &'a mut dyn Tape,
    pub(crate) ear: &'a mut Ear,
}

impl Tape for Overheard<'_> {
    fn pending(
        &mut self,
        at: Position,
        cpu: CpuState,
        can_take: Sources,
    ) -> Result<Pending, TapeError> {
        self.tape.pending(at, cpu, can_take)
    }

    fn next(&mut self, at: Position, cpu: CpuState, can_take: Sources) -> Result<Next, TapeError> {
        self.tape.next(at, cpu, can_take)
    }

    fn answer(&mut self, query: Query) -> Result<Answer, TapeError> {
        let answer = self.tape.answer(query)?;
        self.ear.answer(&answer);
        Ok(answer)
    }

    fn command(&mut self, command: Command) -> Result<(), TapeError> {
        self.ear.command(&command);
        self.tape.command(command)
    }

    fn close(&mut self, at: Position) -> Result<(), TapeError> {
        self.tape.close(at)
    }

    fn mark(&mut self, at: Position, digest: MarkDigest) -> Result<(), TapeError> {
        self.tape.mark(at, digest)
    }
}
