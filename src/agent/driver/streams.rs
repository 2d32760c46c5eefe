//! The streams of the log to other hosts: which part goes to whom, paced by what they have
//! acknowledged, so that a slow replica costs this host a bounded amount of memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

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
    /// Hosts that need what the log does not have any more, and have been told of.
    too_late: BTreeSet<HostName>,
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
        self.too_late.clear();
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

    /// Hands everything to `send` that may be sent now. The streams of hosts whose beginning is out
    /// of the log by now end; who is new among them is returned.
    pub fn pump(
        &mut self,
        log: &LogKeeper,
        mut send: impl FnMut(&HostName, Message),
    ) -> Result<Vec<HostName>, ReadError> {
        let mut late = Vec::new();
        for (host, stream) in &mut self.streams {
            while let Some(part) = stream.parts.front_mut() {
                if part.cursor.next() >= part.through {
                    stream.parts.pop_front();
                    continue;
                }
                if stream.bytes >= WINDOW {
                    break;
                }
                let batch = match log.read(&mut part.cursor) {
                    Ok(Some(batch)) => batch,
                    Ok(None) => break,
                    // Nothing is wrong with the store, and nobody else is concerned.
                    Err(ReadError::Dropped { .. }) => {
                        stream.parts.clear();
                        if self.too_late.insert(host.clone()) {
                            late.push(host.clone());
                        }
                        break;
                    }
                    Err(error) => return Err(error),
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
        Ok(late)
    }
}

#[cfg(test)]
mod tests {
    use replay_log::conformance::sample_batches;
    use replay_log::{FileOptions, FileStore, Store as _, SyncPolicy};
    use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

    use super::super::keeper::{FromStore, Keeping};
    use super::*;
    use crate::protocol::Incarnation;

    /// A log whose beginning is gone: an earlier version dropped it.
    fn log_without_beginning(
        folder: &std::path::Path,
        returns: UnboundedSender<FromStore>,
    ) -> LogKeeper {
        let options = FileOptions {
            sync: SyncPolicy::Never,
            segment_bytes: 1 << 10,
            ..FileOptions::default()
        };
        let mut store = FileStore::open(folder, options).expect("a new log");
        for batch in sample_batches(1, Term(1), LogIndex::START, 100) {
            store.append(&batch).expect("room");
        }
        drop(store);
        let files = std::fs::read_dir(folder).expect("listed").flatten();
        let oldest = files.map(|file| file.path()).min().expect("segments");
        std::fs::remove_file(oldest).expect("removed");
        let keeping = Keeping {
            files: options,
            budget: u64::MAX,
        };
        LogKeeper::open(folder, keeping, Incarnation(1), returns).expect("a log")
    }

    #[tokio::test]
    async fn a_host_that_comes_too_late_disturbs_nobody() {
        let folder = tempfile::tempdir().expect("a folder");
        let (to_returns, mut returns) = unbounded_channel();
        let log = log_without_beginning(&folder.path().join("log"), to_returns);
        let host = |name: &str| HostName::new(name).expect("a name");
        let mut streams = Streams::default();
        let mut sent = Vec::new();
        let end = log.tip().index;
        // One needs the log from boot, one has nearly everything.
        let last = sample_batches(1, Term(1), LogIndex::START, 100);
        let last = last.last().expect("some").first();
        streams.add(host("late"), Term(1), LogIndex::START, end);
        streams.add(host("near"), Term(1), last, end);
        let mut late = Vec::new();
        while sent.is_empty() || late.is_empty() {
            let told = streams.pump(&log, |to, _| sent.push(to.clone()));
            late.extend(told.expect("the store is well"));
            if sent.is_empty() || late.is_empty() {
                returns.recv().await.expect("something was read");
            }
        }
        assert_eq!((late, &sent), (vec![host("late")], &vec![host("near")]));
        // It asks again and again, and is told of once.
        streams.add(host("late"), Term(1), LogIndex::START, end);
        loop {
            let late = streams.pump(&log, |to, _| sent.push(to.clone()));
            assert_eq!(late.expect("the store is well"), []);
            if streams.streams[&host("late")].parts.is_empty() {
                break;
            }
            returns.recv().await.expect("something was read");
        }
        assert_eq!(sent.len(), 1);
    }
}
