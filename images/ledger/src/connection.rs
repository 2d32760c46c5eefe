//! One client: what it sent, what it is to be told, and from when on it may be told.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use crate::journal::CommitNumber;
use crate::resp::RequestBuffer;

/// A client's number: counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientId(pub u64);

/// A client.
#[derive(Debug)]
pub struct Connection {
    /// What it sent.
    pub(crate) input: RequestBuffer,
    /// What is known about it.
    pub(crate) session: Session,
    /// Answers that were not sent yet, in order.
    output: Vec<u8>,
    /// How much of the output has been sent.
    sent: usize,
    /// Up to which byte of the output what commit must be durable.
    gates: VecDeque<(usize, CommitNumber)>,
}

/// What commands know about their client.
#[derive(Debug)]
pub struct Session {
    /// Its number.
    pub id: ClientId,
    /// The name it gave itself.
    pub name: Vec<u8>,
    /// It is to be closed when its answers are sent; nothing more of it is executed.
    pub closing: bool,
}

impl Connection {
    pub(crate) fn new(id: ClientId) -> Self {
        Self {
            input: RequestBuffer::default(),
            session: Session {
                id,
                name: Vec::new(),
                closing: false,
            },
            output: Vec::new(),
            sent: 0,
            gates: VecDeque::new(),
        }
    }

    /// Where answers are appended.
    #[cfg(test)]
    pub(crate) fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// The input, the session and the output at once.
    pub(crate) fn parts(&mut self) -> (&mut RequestBuffer, &mut Session, &mut Vec<u8>) {
        (&mut self.input, &mut self.session, &mut self.output)
    }

    /// Everything appended so far waits for this commit.
    pub(crate) fn hold(&mut self, gate: CommitNumber) {
        let end = self.output.len();
        match self.gates.back_mut() {
            Some((last, number)) if *number == gate => *last = end,
            _ => self.gates.push_back((end, gate)),
        }
    }

    /// How many bytes of answers are not sent yet.
    pub fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// The answers that may be sent when everything up to `durable` is durable.
    pub fn sendable(&self, durable: CommitNumber) -> &[u8] {
        // A gate covers everything appended before it, so what is held back is always a tail.
        let open = self
            .gates
            .iter()
            .take_while(|(_, number)| *number <= durable);
        let end = if open.clone().count() == self.gates.len() {
            self.output.len()
        } else {
            open.last().map_or(self.sent, |(until, _)| *until)
        };
        self.output.get(self.sent..end).unwrap_or_default()
    }

    /// The first `count` bytes of [`Connection::sendable`] are sent.
    pub fn mark_sent(&mut self, count: usize) {
        self.sent = (self.sent + count).min(self.output.len());
        while self
            .gates
            .front()
            .is_some_and(|(until, _)| *until <= self.sent)
        {
            self.gates.pop_front();
        }
        if self.sent == self.output.len() {
            self.output.clear();
            self.sent = 0;
            self.output.shrink_to(4096);
        } else if self.sent >= 64 * 1024 {
            self.output.drain(..self.sent);
            for (until, _) in &mut self.gates {
                *until -= self.sent;
            }
            self.sent = 0;
        }
    }

    /// Whether everything is said and the connection is to be closed.
    pub fn finished(&self) -> bool {
        self.session.closing && self.unsent() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_wait_for_their_commit_and_those_before_do_not() {
        let mut connection = Connection::new(ClientId(1));
        connection.output().extend_from_slice(b"read;");
        assert_eq!(connection.sendable(CommitNumber(0)), b"read;");
        connection.mark_sent(2);
        connection.output().extend_from_slice(b"write;");
        connection.hold(CommitNumber(1));
        connection.output().extend_from_slice(b"next;");
        connection.hold(CommitNumber(2));
        assert_eq!(connection.sendable(CommitNumber(0)), b"");
        assert_eq!(connection.sendable(CommitNumber(1)), b"ad;write;");
        connection.mark_sent(9);
        assert_eq!(connection.sendable(CommitNumber(1)), b"");
        assert_eq!(connection.sendable(CommitNumber(2)), b"next;");
        connection.mark_sent(5);
        assert_eq!((connection.unsent(), connection.gates.len()), (0, 0));
        connection.output().extend_from_slice(b"read;");
        assert_eq!(connection.sendable(CommitNumber(0)), b"read;");
    }
}
