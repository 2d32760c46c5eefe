//! The streams of the log to other hosts: which part goes to whom, paced by what they have
//! acknowledged, so that a slow replica costs this host a bounded amount of memory.

use std::collections::{BTreeMap, VecDeque};

use replay_log::{LogIndex, ReadError, Term};

use super::keeper::{Cursor, LogKeeper};
use crate::protocol::{HostName, Message};

/// So many bytes of log may be under way to one host without an acknowledgement.
const WINDOW: usize = 8 << 20;

/// A part of the log that is to be sent.
struct Part {
    term: Term,
    cursor: Cursor,
    through: LogIndex,
}

#[derive(Default)]
struct Stream {
    parts: VecDeque<Part>,
    /// Sent and not acknowledged: the end of each batch and its bytes.
    under_way: VecDeque<(LogIndex, usize)>,
    bytes: usize,
}

/// The streams to all hosts.
#[derive(Default)]
pub struct Streams {
    streams: BTreeMap<HostName, Stream>,
}

impl Streams {
    /// Something more is to be sent, after what was asked for before.
    pub fn add(&mut self, to: HostName, term: Term, from: LogIndex, through: LogIndex) {
        let parts = &mut self.streams.entry(to).or_default().parts;
        if let Some(last) = parts.back_mut()
            && last.term == term
            && last.through == from
        {
            last.through = through;
            return;
        }
        parts.push_back(Part {
            term,
            cursor: Cursor::new(from),
            through,
        });
    }

    /// Nothing more is to be sent, and nothing that was is waited for.
    pub fn stop(&mut self, to: &HostName) {
        self.streams.remove(to);
    }

    /// The log is given up: nothing of it is sent any more.
    pub fn clear(&mut self) {
        self.streams.clear();
    }

    /// A host holds the log through here.
    pub fn acknowledged(&mut self, by: &HostName, held: LogIndex) {
        let Some(stream) = self.streams.get_mut(by) else {
            return;
        };
        while let Some((end, bytes)) = stream.under_way.front()
            && *end <= held
        {
            stream.bytes -= bytes;
            stream.under_way.pop_front();
        }
    }

    /// Hands everything to `send` that may be sent now.
    pub fn pump(
        &mut self,
        log: &LogKeeper,
        mut send: impl FnMut(&HostName, Message),
    ) -> Result<(), ReadError> {
        for (host, stream) in &mut self.streams {
            while let Some(part) = stream.parts.front_mut() {
                if part.cursor.next() >= part.through {
                    stream.parts.pop_front();
                    continue;
                }
                if stream.bytes >= WINDOW {
                    break;
                }
                let Some(batch) = log.read(&mut part.cursor)? else {
                    break;
                };
                let bytes = batch.payload().len();
                stream.under_way.push_back((batch.end(), bytes));
                stream.bytes += bytes;
                send(
                    host,
                    Message::Log {
                        term: part.term,
                        batch,
                    },
                );
            }
        }
        Ok(())
    }
}
