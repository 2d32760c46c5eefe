//! The simulated keeper of records: one record, compare-and-set; sometimes down, slow, unwilling,
//! set back or emptied.
//!
//! Hosts say with every question what they have seen. A keeper that has less has been set back: it
//! answers nothing any more until an operator has given it the newest record that any host has.

use bytes::Bytes;

use super::queue::{Moment, SECOND};
use super::random::Random;
use crate::protocol::{Committed, Proof, Record, Seen, Swapped, Version};

/// What a slow keeper takes for one question, at most.
const SLOW: Moment = 3 * SECOND;

/// What it says once it knows that it has less than it had.
const SET_BACK: &str = "the witness has less than a host has seen: 'understudy witness recover' \
                        gives it the newest record";

/// What a host asks of it.
#[derive(Clone, Debug)]
pub(super) enum Ask {
    Read {
        seen: Option<Seen>,
    },
    Swap {
        expect: Option<Version>,
        new: Box<Record>,
        seen: Option<Seen>,
    },
}

impl Ask {
    pub(super) fn seen(&self) -> Option<Seen> {
        match self {
            Self::Read { seen } | Self::Swap { seen, .. } => *seen,
        }
    }

    pub(super) fn is_swap(&self) -> bool {
        matches!(self, Self::Swap { .. })
    }
}

/// What it says.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Read(Option<Committed>),
    Swapped(Swapped),
    /// It says no, for this reason.
    Refused(&'static str),
}

/// The keeper.
#[derive(Debug, Default)]
pub(super) struct Witness {
    /// Survives its crashes.
    pub(super) record: Option<Record>,
    /// What it would have if it had never been set back.
    pub(super) truth: Option<Record>,
    /// Everything that it has ever committed.
    history: Vec<Record>,
    pub(super) down: u32,
    pub(super) slow: u32,
    pub(super) refuses: u32,
    /// It knows that it has less than it had.
    pub(super) set_back: bool,
    /// It has less than it had, and heeds nobody who says so: only hosts can know.
    pub(super) blind: bool,
    /// Somebody has asked who has seen more.
    pub(super) contradicted: bool,
    key: [u8; 32],
}

impl Witness {
    pub(super) fn new(random: &mut Random) -> Self {
        let mut key = [0; 32];
        key.fill_with(|| random.next() as u8);
        Self {
            key,
            ..Self::default()
        }
    }

    /// Answers; the record has changed if the second value says so.
    pub(super) fn ask(&mut self, ask: Ask) -> (Answer, bool) {
        let had = self.record.as_ref().map(Record::seen);
        let below = |seen: Seen| {
            had.is_none_or(|had| had.lineage != seen.lineage || had.version < seen.version)
        };
        if ask.seen().is_some_and(below) {
            self.contradicted = self.blind;
            self.set_back |= !self.blind;
        }
        if self.set_back {
            return (Answer::Refused(SET_BACK), false);
        }
        match ask {
            Ask::Read { .. } => (Answer::Read(self.committed()), false),
            Ask::Swap { expect, new, .. } => {
                let current = self.record.as_ref().map(Record::version);
                if current == expect && new.may_follow(self.record.as_ref()).is_ok() {
                    self.history.push(new.as_ref().clone());
                    self.record = Some(*new);
                    self.truth.clone_from(&self.record);
                    let committed = self.committed().expect("a record was kept just now");
                    (Answer::Swapped(Swapped::Done(committed)), true)
                } else {
                    let conflict = Swapped::Conflict(self.committed());
                    (Answer::Swapped(conflict), false)
                }
            }
        }
    }

    /// How long it takes for one question.
    pub(super) fn takes(&self, random: &mut Random, swap: bool, write: (Moment, Moment)) -> Moment {
        if self.slow > 0 {
            random.below(SLOW)
        } else if swap || write.1 >= SLOW {
            random.between(write.0, write.1)
        } else {
            0
        }
    }

    /// Whether it answers everybody, and soon.
    pub(super) fn is_well(&self) -> bool {
        self.down == 0 && self.slow == 0 && self.refuses == 0 && !self.set_back && !self.blind
    }

    fn committed(&self) -> Option<Committed> {
        self.record.clone().map(|record| self.sign(record))
    }

    fn proof(&self, record: &Record) -> Proof {
        let bytes = postcard::to_stdvec(record).expect("a record is encoded");
        let hash = blake3::keyed_hash(&self.key, &bytes);
        Proof(Bytes::copy_from_slice(hash.as_bytes()))
    }

    fn sign(&self, record: Record) -> Committed {
        let proof = self.proof(&record);
        Committed { record, proof }
    }

    /// Whether this keeper has committed it: what every driver checks.
    pub(super) fn vouches(&self, committed: &Committed) -> bool {
        self.proof(&committed.record) == committed.proof
    }

    /// Its disk is as it was so many changes ago. `found_out` says whether it notices by itself.
    pub(super) fn turn_back(&mut self, changes: usize, found_out: bool, blind: bool) {
        let keep = self.history.len().saturating_sub(changes);
        self.record = self.history[..keep].last().cloned();
        self.set_back |= found_out && !blind;
        self.blind |= blind;
    }

    /// An operator gives it the newest record that is known.
    pub(super) fn recover(&mut self, newest: Option<Record>) {
        self.record = newest;
        self.truth.clone_from(&self.record);
        self.set_back = false;
        self.blind = false;
        self.contradicted = false;
    }
}
