//! The service: connections on one side, commits on the other, the data between them.
//!
//! One turn of the machine's loop: [`Service::receive`] and [`Service::serve`] for every connection
//! that has sent something, one [`Service::next_commit`], then [`Connection::sendable`] of every
//! connection. A commit in flight stops nothing: the next turn executes the next requests, whose
//! changes are collected for the next commit.

use crate::command::{self, Context};
use crate::connection::{ClientId, Connection};
use crate::journal::recovery::{self, Disk, Found, RecoveryError};
use crate::journal::{Commit, CommitNumber, Journal, JournalStats, NonceSequence};
use crate::keyspace::{Capacity, Keyspace};
use crate::limits::{INPUT_BUDGET, INPUT_FREE, MAX_COMMAND, MAX_LINE, OUTPUT_HIGH_WATER};
use crate::reply::Replies;

/// What `INFO` tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    /// Connections open now.
    pub connected: u64,
    /// Connections since boot.
    pub connections: u64,
    /// Commands since boot.
    pub commands: u64,
    /// What recovery found.
    pub recovered: Found,
    /// The log.
    pub journal: JournalStats,
}

/// The whole service.
#[derive(Debug)]
pub struct Service {
    keyspace: Keyspace,
    journal: Journal,
    figures: Figures,
    /// Bytes of input beyond what every connection has for itself.
    input_held: usize,
}

impl Service {
    /// Reads the log from `disk` and is ready. `memory` is what the data may take, in bytes.
    pub fn recover(
        disk: &mut dyn Disk,
        memory: usize,
        nonces: NonceSequence,
    ) -> Result<Self, RecoveryError> {
        let mut keyspace = Keyspace::new(Capacity {
            memory,
            log: Journal::live_capacity(disk.sectors()),
        });
        let (journal, recovered) = recovery::recover(disk, &mut keyspace, nonces)?;
        Ok(Self {
            keyspace,
            journal,
            figures: Figures {
                recovered,
                ..Figures::default()
            },
            input_held: 0,
        })
    }

    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.keyspace.len()
    }

    /// What recovery found.
    pub fn recovered(&self) -> Found {
        self.figures.recovered
    }

    /// A client has connected.
    pub fn connect(&mut self) -> Connection {
        self.figures.connected += 1;
        self.figures.connections += 1;
        Connection::new(ClientId(self.figures.connections))
    }

    /// A client is gone.
    pub fn disconnect(&mut self, connection: &Connection) {
        self.figures.connected = self.figures.connected.saturating_sub(1);
        self.input_held -= beyond_free(connection);
    }

    /// How many bytes [`Service::receive`] would take from this client now. When the buffers are
    /// full it still takes some: the client is told so and closed, because waiting could wait
    /// forever.
    pub fn room(&self, connection: &Connection) -> usize {
        if connection.session.closing || connection.unsent() >= OUTPUT_HIGH_WATER {
            return 0;
        }
        let free = INPUT_FREE.saturating_sub(connection.input.len());
        let shared = INPUT_BUDGET.saturating_sub(self.input_held);
        let most = (MAX_COMMAND + MAX_LINE).saturating_sub(connection.input.len());
        (free + shared).max(1).min(most)
    }

    /// A client has sent something.
    pub fn receive(&mut self, connection: &mut Connection, bytes: &[u8]) {
        if connection.session.closing {
            return;
        }
        let before = beyond_free(connection);
        connection.input.feed(bytes);
        self.input_held = self.input_held - before + beyond_free(connection);
    }

    /// Executes what a client has sent, as far as its output and the disk allow. Call it again
    /// whenever a commit is durable or answers were sent.
    pub fn serve(&mut self, connection: &mut Connection) {
        let before = beyond_free(connection);
        let mut executed = false;
        while connection.unsent() < OUTPUT_HIGH_WATER
            && !connection.session.closing
            && Journal::admits(&self.keyspace)
        {
            let (input, session, output) = connection.parts();
            match input.next_request() {
                Ok(None) => break,
                Ok(Some(request)) => {
                    self.figures.commands += 1;
                    self.figures.journal = self.journal.stats();
                    let mut context = Context {
                        keyspace: &mut self.keyspace,
                        session,
                        figures: &self.figures,
                        reply: Replies::new(output),
                    };
                    command::execute(&mut context, &request);
                    executed = true;
                }
                Err(error) => {
                    Replies::new(output).error(format_args!("ERR {error}"));
                    session.closing = true;
                    executed = true;
                }
            }
        }
        self.input_held = self.input_held - before + beyond_free(connection);
        if self.input_held > INPUT_BUDGET && beyond_free(connection) > 0 {
            let (_, session, output) = connection.parts();
            let full = "ERR too many unfinished requests of all clients together; try again";
            Replies::new(output).error(format_args!("{full}"));
            session.closing = true;
            executed = true;
        }
        if executed && let Some(gate) = self.journal.gate(&self.keyspace) {
            connection.hold(gate);
        }
    }

    /// Whether this client has sent something that [`Service::serve`] may go on with.
    pub fn unserved(&self, connection: &Connection) -> bool {
        !connection.input.is_empty() && !connection.session.closing
    }

    /// What is to be written next, if anything. Nothing while a commit is in flight.
    pub fn next_commit(&mut self) -> Option<Commit> {
        self.journal.next_commit(&mut self.keyspace)
    }

    /// The commit in flight is written and flushed.
    pub fn committed(&mut self) {
        self.journal.committed();
    }

    /// Answers that depend on commits up to this one may be sent.
    pub fn durable(&self) -> CommitNumber {
        self.journal.durable()
    }
}

/// What a connection takes of the shared input budget.
fn beyond_free(connection: &Connection) -> usize {
    connection.input.len().saturating_sub(INPUT_FREE)
}

#[cfg(test)]
mod tests;
