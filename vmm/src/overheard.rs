//! What passes between a machine and its tape, hashed: every answer, command and arrival enters
//! the next mark's digest whole, because much of it only ever reaches guest memory, which a mark
//! compares a few pages at a time.

use replay_log::{Answer, Arrival, DiskOutcome, MarkDigest, Position};

use crate::digest;
use crate::tape::{
    Command, CpuState, DigestKey, DiskOp, Next, Pending, Query, Sources, Tape, TapeError,
};

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

    /// Something arrives after this landmark.
    pub(crate) fn arrival(&mut self, at: Position, arrival: &Arrival) {
        self.note(0, at.0, &[]);
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

    /// The digest of a machine's state at a landmark together with what was overheard, which is
    /// forgotten.
    pub(crate) fn digest(
        &mut self,
        key: &DigestKey,
        at: Position,
        state: MarkDigest,
    ) -> MarkDigest {
        let mut hasher = blake3::Hasher::new_keyed(key.bytes());
        hasher.update(self.hasher.finalize().as_bytes());
        hasher.update(&at.0.to_le_bytes());
        hasher.update(&state.0.to_le_bytes());
        self.hasher.reset();
        digest::truncate(&hasher)
    }
}

/// A tape with an ear at it.
pub(crate) struct Overheard<'a> {
    pub(crate) tape: &'a mut dyn Tape,
    pub(crate) ear: &'a mut Ear,
}

impl Tape for Overheard<'_> {
    fn key(&self) -> DigestKey {
        self.tape.key()
    }

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

    fn entering(&mut self, interrupt_waits: bool) {
        self.tape.entering(interrupt_waits);
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

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use replay_log::{DiskBase, Header, ImageDigest, Term, TimerId};

    use super::*;

    /// What nothing else shows: a device may only note that its timer was due.
    #[test]
    fn an_arrival_counts_with_its_place_and_a_digest_with_its_own_and_its_key() {
        let digest = |key: &DigestKey, arrives: u64, at: u64| {
            let mut ear = Ear::default();
            let timer = TimerId(0);
            ear.arrival(Position(arrives), &Arrival::TimerDue { timer });
            ear.digest(key, Position(at), MarkDigest(5))
        };
        let (key, other) = (DigestKey::default(), DigestKey::of(&header()));
        let base = digest(&key, 4, 9);
        assert_eq!(digest(&key, 4, 9), base);
        assert_ne!(digest(&key, 5, 9), base);
        assert_ne!(digest(&key, 4, 8), base);
        assert_ne!(digest(&other, 4, 9), base);
    }

    fn header() -> Header {
        Header {
            machine_model: 1,
            image: ImageDigest::default(),
            config: Bytes::new(),
            disks: Vec::new(),
            term: Term(1),
            boot: [1; 16],
        }
    }

    #[test]
    fn a_key_depends_on_all_of_a_header() {
        let changes: [fn(&mut Header); 6] = [
            |header| header.machine_model = 2,
            |header| header.image.0[0] = 1,
            |header| header.config = Bytes::from_static(&[0]),
            |header| {
                header.disks.push(DiskBase {
                    digest: [0; 32],
                    size: 512,
                });
            },
            |header| header.term = Term(2),
            |header| header.boot[15] = 2,
        ];
        let mut seen = vec![DigestKey::of(&header())];
        for change in changes {
            let mut header = header();
            change(&mut header);
            let key = DigestKey::of(&header);
            assert!(!seen.contains(&key));
            seen.push(key);
        }
    }
}
