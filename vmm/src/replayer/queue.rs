//! The log between being fed and being executed: whole batches as they came, because their entries
//! take many times the room once they are decoded.
//!
//! A batch is checked when it is fed, so that whoever feeds hears at once that it is not the log of
//! this machine; its entries are decoded one at a time when they are executed.

use std::collections::VecDeque;

use replay_log::{Batch, Entries, Entry, Header, LogIndex, Term};
use thiserror::Error;

/// Why a log cannot be fed to a machine.
#[derive(Debug, Error)]
pub enum FeedError {
    /// A batch does not decode.
    #[error("the log cannot be read at entry {at}: {source}")]
    Decode {
        /// The batch's first entry.
        at: LogIndex,
        /// What is wrong with it.
        source: replay_log::DecodeError,
    },
    /// A batch does not follow the one before.
    #[error("entry {expected} of the log is missing; the next batch begins at {found}")]
    Gap {
        /// The entry that was to come.
        expected: LogIndex,
        /// The entry that came.
        found: LogIndex,
    },
    /// It does not say which machine it is of.
    #[error("the log does not begin with its header: feed it from its first batch")]
    NoHeader,
    /// The log is another machine's.
    #[error("the log is of another machine: its header differs in {what}")]
    OtherMachine {
        /// Which part of the header.
        what: &'static str,
    },
    /// A batch's term is not the one that the log says is in force there, or the log changes its
    /// term to one that cannot follow.
    #[error("entry {at} of the log is of term {found}, which does not follow from term {expected}")]
    Term {
        /// The entry.
        at: LogIndex,
        /// The term in force before it.
        expected: Term,
        /// The term it claims.
        found: Term,
    },
}

/// What was fed and is not executed.
pub(super) struct Queue {
    header: Header,
    batches: VecDeque<Entries>,
    /// The next entry; `None` only when nothing is left.
    front: Option<Entry>,
    executed: LogIndex,
    fed: LogIndex,
    /// The term in force at the end of what was fed.
    term: Term,
}

impl Queue {
    /// A queue for the log of the machine that `header` describes, from its beginning.
    pub(super) const fn new(header: Header) -> Self {
        Self {
            term: header.term,
            header,
            batches: VecDeque::new(),
            front: None,
            executed: LogIndex::START,
            fed: LogIndex::START,
        }
    }

    /// Adds the next batch, if it is that.
    pub(super) fn feed(&mut self, batch: &Batch) -> Result<(), FeedError> {
        if batch.first() != self.fed {
            return Err(FeedError::Gap {
                expected: self.fed,
                found: batch.first(),
            });
        }
        self.term = self.check(batch)?;
        self.fed = batch.end();
        self.batches.push_back(batch.entries());
        self.refill();
        Ok(())
    }

    /// Reads every entry of a batch once; the term in force after it.
    fn check(&self, batch: &Batch) -> Result<Term, FeedError> {
        let mut term = self.term;
        for (number, entry) in batch.entries().enumerate() {
            let entry = entry.map_err(|source| FeedError::Decode {
                at: batch.first(),
                source,
            })?;
            match entry {
                Entry::Header(header) => self.check_header(&header)?,
                _ if batch.first() == LogIndex::START && number == 0 => {
                    return Err(FeedError::NoHeader);
                }
                // A batch has one term, so only its first entry can begin one.
                Entry::Term(change) if number > 0 || change.term <= term => {
                    return Err(FeedError::Term {
                        at: batch.first().plus(number as u64),
                        expected: term,
                        found: change.term,
                    });
                }
                Entry::Term(change) => term = change.term,
                Entry::Group(_) | Entry::Mark(_) => {}
            }
        }
        if batch.term() == term {
            Ok(term)
        } else {
            Err(FeedError::Term {
                at: batch.first(),
                expected: term,
                found: batch.term(),
            })
        }
    }

    fn check_header(&self, header: &Header) -> Result<(), FeedError> {
        let ours = &self.header;
        let differs = [
            (
                header.machine_model != ours.machine_model,
                "the machine model's version",
            ),
            (header.image != ours.image, "the image"),
            (header.config != ours.config, "the configuration"),
            (header.disks != ours.disks, "the disk base"),
            (header.term != ours.term, "the term"),
            (header.boot != ours.boot, "the boot"),
        ];
        match differs.into_iter().find(|(differs, _)| *differs) {
            Some((_, what)) => Err(FeedError::OtherMachine { what }),
            None => Ok(()),
        }
    }

    /// Decodes the next entry, if there is one.
    fn refill(&mut self) {
        while self.front.is_none()
            && let Some(entries) = self.batches.front_mut()
        {
            // Each was decoded once when it was fed, so no error is left.
            match entries.next() {
                Some(Ok(entry)) => self.front = Some(entry),
                Some(Err(_)) | None => drop(self.batches.pop_front()),
            }
        }
    }

    /// The next entry.
    pub(super) const fn front(&self) -> Option<&Entry> {
        self.front.as_ref()
    }

    /// Takes the next entry off: it is executed now.
    pub(super) fn pop(&mut self) -> Option<Entry> {
        let entry = self.front.take()?;
        self.executed = self.executed.plus(1);
        self.refill();
        Some(entry)
    }

    /// Whether everything that was fed is executed.
    pub(super) const fn is_empty(&self) -> bool {
        self.front.is_none()
    }

    /// How much of the log is executed.
    pub(super) const fn executed(&self) -> LogIndex {
        self.executed
    }

    /// How much of the log was fed.
    pub(super) const fn fed(&self) -> LogIndex {
        self.fed
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use replay_log::{BatchBuilder, ImageDigest, Mark, MarkDigest, Position, TermChange};

    use super::*;

    fn header() -> Header {
        Header {
            machine_model: 1,
            image: ImageDigest::default(),
            config: Bytes::new(),
            disks: Vec::new(),
            term: Term(3),
            boot: [1; 16],
        }
    }

    fn mark(at: u64) -> Entry {
        Entry::Mark(Mark {
            at: Position(at),
            digest: MarkDigest(at),
        })
    }

    fn term(term: u64) -> Entry {
        Entry::Term(TermChange {
            at: Position(9),
            term: Term(term),
        })
    }

    /// A log of these batches, each with its term.
    fn log(batches: &[(u64, &[Entry])]) -> Vec<Batch> {
        let mut builder = BatchBuilder::new(Term(3), LogIndex::START);
        let build = |(term, entries): &(u64, &[Entry])| {
            builder.set_term(Term(*term));
            for entry in *entries {
                builder.push(entry).expect("fits");
            }
            builder.finish().expect("is not empty")
        };
        batches.iter().map(build).collect()
    }

    fn feed(batches: &[Batch]) -> Result<Queue, FeedError> {
        let mut queue = Queue::new(header());
        batches.iter().try_for_each(|batch| queue.feed(batch))?;
        Ok(queue)
    }

    #[test]
    fn what_was_fed_comes_out_in_order_and_is_kept_as_it_came() {
        let marks: Vec<Entry> = (0..1000).map(mark).collect();
        let begins = [Entry::Header(header())];
        let batches = log(&[(3, &begins), (3, &marks[..7]), (3, &marks[7..])]);
        let mut queue = feed(&batches).expect("is a log");
        assert_eq!(queue.fed(), LogIndex(1001));
        assert_eq!(
            queue.batches.len(),
            3,
            "nothing is decoded ahead but one entry"
        );
        assert_eq!(queue.pop().as_ref(), begins.first());
        for (number, mark) in (2..).zip(&marks) {
            assert_eq!(queue.front(), Some(mark));
            assert_eq!(queue.pop().as_ref(), Some(mark));
            assert_eq!(queue.executed(), LogIndex(number));
        }
        assert!(queue.is_empty() && queue.pop().is_none());
        assert!(queue.batches.is_empty());
    }

    #[test]
    fn a_log_begins_with_the_header_of_its_machine() {
        let headless = log(&[(3, &[mark(1)])]);
        assert!(matches!(feed(&headless), Err(FeedError::NoHeader)));
        let other = Header {
            term: Term(4),
            ..header()
        };
        let other = log(&[(3, &[Entry::Header(other)])]);
        let refused = feed(&other).err().expect("is refused");
        assert!(matches!(
            refused,
            FeedError::OtherMachine { what: "the term" }
        ));
    }

    #[test]
    fn terms_are_those_that_the_log_itself_tells_of() {
        let begins: &[Entry] = &[Entry::Header(header())];
        let good = log(&[(3, begins), (5, &[term(5), mark(9)]), (5, &[mark(10)])]);
        assert!(feed(&good).is_ok());
        for bad in [
            // Nothing says that the term changed.
            log(&[(4, begins)]),
            log(&[(3, begins), (5, &[mark(9)])]),
            log(&[(3, begins), (5, &[term(5)]), (6, &[mark(9)])]),
            // It says another.
            log(&[(3, begins), (5, &[term(6)])]),
            // Terms only rise.
            log(&[(3, begins), (3, &[term(3)])]),
            // Whoever reigned before cannot write the change.
            log(&[(3, begins), (5, &[mark(9), term(5)])]),
        ] {
            assert!(matches!(feed(&bad), Err(FeedError::Term { .. })), "{bad:?}");
        }
    }
}
