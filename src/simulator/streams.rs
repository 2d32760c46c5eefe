//! The streams of a simulated host's log to others, as the driver has them: which part goes to
//! whom, no more of it than fits into a window.

use std::collections::{BTreeMap, VecDeque};

use replay_log::{Batch, LogIndex, Term};

#[derive(Clone, Copy, Debug)]
struct Part {
    term: Term,
    next: LogIndex,
    through: LogIndex,
}

#[derive(Debug, Default)]
struct Stream {
    parts: VecDeque<Part>,
    /// Sent and not acknowledged: the end of each batch and its bytes.
    under_way: VecDeque<(LogIndex, usize)>,
    bytes: usize,
}

/// The streams to all hosts, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Streams(BTreeMap<usize, Stream>);

impl Streams {
    /// Something more is to be sent, after what was asked for before.
    pub(super) fn add(&mut self, to: usize, term: Term, from: LogIndex, through: LogIndex) {
        let parts = &mut self.0.entry(to).or_default().parts;
        match parts.back_mut() {
            Some(last) if last.term == term && last.through == from => last.through = through,
            _ => parts.push_back(Part {
                term,
                next: from,
                through,
            }),
        }
    }

    /// Nothing more is to be sent, and nothing that was is waited for.
    pub(super) fn stop(&mut self, to: usize) {
        self.0.remove(&to);
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// A host holds the log through here.
    pub(super) fn acknowledged(&mut self, by: usize, held: LogIndex) {
        let Some(stream) = self.0.get_mut(&by) else {
            return;
        };
        while let Some((end, bytes)) = stream.under_way.front()
            && *end <= held
        {
            stream.bytes -= bytes;
            stream.under_way.pop_front();
        }
    }

    /// What may be sent now. `read` gives the batch that begins at a place, once it is there.
    pub(super) fn pump(
        &mut self,
        window: usize,
        mut read: impl FnMut(LogIndex) -> Option<Batch>,
    ) -> Vec<(usize, Term, Batch)> {
        let mut sent = Vec::new();
        for (to, stream) in &mut self.0 {
            while let Some(part) = stream.parts.front_mut() {
                if part.next >= part.through {
                    stream.parts.pop_front();
                    continue;
                }
                if stream.bytes >= window {
                    break;
                }
                let Some(batch) = read(part.next) else { break };
                part.next = batch.end();
                let bytes = batch.payload().len();
                stream.under_way.push_back((batch.end(), bytes));
                stream.bytes += bytes;
                sent.push((*to, part.term, batch));
            }
        }
        sent
    }
}
