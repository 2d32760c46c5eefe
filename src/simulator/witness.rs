//! The simulated keeper of records: one record for each VM, compare-and-set; sometimes down, slow,
//! unwilling, set back or emptied.
//!
//! Hosts say with every question what they have seen. A keeper that has less has been set back: it
//! answers nothing any more until an operator has given it the newest record that any host has.

use bytes::Bytes;

use super::ids::VMS;
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

/// A question on its way to the keeper.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) id: u64,
    pub(super) ask: Ask,
    pub(super) asked: Moment,
    /// What the host had seen by then, durably, whether it says so or not.
    pub(super) knew: Option<Seen>,
}

/// What it says.
#[derive(Clone, Debug)]
pub(super) enum Answer {
    Read(Option<Committed>),
    Swapped(Swapped),
    /// It says no, for this reason.
    Refused(&'static str),
}

/// What the keeper has of one VM.
#[derive(Debug, Default)]
struct Kept {
    /// Survives its crashes.
    record: Option<Record>,
    /// What it would have if it had never been set back.
    truth: Option<Record>,
    /// It knows that it has less than it had.
    set_back: bool,
    /// Somebody has asked who has seen more.
    contradicted: bool,
}

/// The keeper.
#[derive(Debug)]
pub(super) struct Witness {
    kept: Vec<Kept>,
    /// Everything that it has ever committed, with its VM.
    history: Vec<(usize, Record)>,
    pub(super) down: u32,
    pub(super) slow: u32,
    pub(super) refuses: u32,
    /// It has less than it had, and heeds nobody who says so: only hosts can know.
    pub(super) blind: bool,
    key: [u8; 32],
}

impl Witness {
    /// The keeper of so many VMs.
    pub(super) fn new(vms: usize, random: &mut Random) -> Self {
        let mut key = [0; 32];
        key.fill_with(|| random.next() as u8);
        Self {
            kept: (0..vms).map(|_| Kept::default()).collect(),
            history: Vec::new(),
            down: 0,
            slow: 0,
            refuses: 0,
            blind: false,
            key,
        }
    }

    pub(super) fn record(&self, vm: usize) -> Option<&Record> {
        self.kept[vm].record.as_ref()
    }

    /// What it would have if it had never been set back.
    pub(super) fn truth(&self, vm: usize) -> Option<&Record> {
        self.kept[vm].truth.as_ref()
    }

    /// Whether it knows that it has less of a VM than it had, and so answers nothing about it.
    pub(super) fn refuses_all(&self, vm: usize) -> bool {
        self.kept[vm].set_back
    }

    /// Whether a host has told it that it has less than it had, and it has not heeded that.
    pub(super) fn contradicted(&self, vm: usize) -> bool {
        self.kept[vm].contradicted
    }

    /// An operator has found out that it has less than it had.
    pub(super) fn mistrust(&mut self, vm: usize) {
        self.kept[vm].set_back = true;
    }

    /// Answers; the record has changed if the second value says so.
    pub(super) fn ask(&mut self, vm: usize, ask: Ask) -> (Answer, bool) {
        let had = self.record(vm).map(Record::seen);
        let below = |seen: Seen| {
            had.is_none_or(|had| had.lineage != seen.lineage || had.version < seen.version)
        };
        let kept = &mut self.kept[vm];
        if ask.seen().is_some_and(below) {
            kept.contradicted = self.blind;
            kept.set_back |= !self.blind;
        }
        if kept.set_back {
            return (Answer::Refused(SET_BACK), false);
        }
        match ask {
            Ask::Read { .. } => (Answer::Read(self.committed(vm)), false),
            Ask::Swap { expect, new, .. } => {
                let current = self.record(vm);
                if current.map(Record::version) == expect && new.may_follow(current).is_ok() {
                    let committed = self.commit(vm, *new);
                    (Answer::Swapped(Swapped::Done(committed)), true)
                } else {
                    let conflict = Swapped::Conflict(self.committed(vm));
                    (Answer::Swapped(conflict), false)
                }
            }
        }
    }

    fn commit(&mut self, vm: usize, new: Record) -> Committed {
        self.history.push((vm, new.clone()));
        self.kept[vm].record = Some(new.clone());
        self.kept[vm].truth = Some(new.clone());
        self.sign(vm, new)
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

    /// Whether it answers everybody who asks about a VM, and soon.
    pub(super) fn is_well(&self, vm: usize) -> bool {
        let lively = self.down == 0 && self.slow == 0 && self.refuses == 0;
        lively && !self.kept[vm].set_back && !self.blind
    }

    fn committed(&self, vm: usize) -> Option<Committed> {
        let record = self.record(vm).cloned();
        record.map(|record| self.sign(vm, record))
    }

    /// What is said of one VM proves nothing of another.
    fn proof(&self, vm: usize, record: &Record) -> Proof {
        let bytes = postcard::to_stdvec(&(VMS[vm], record)).expect("a record is encoded");
        let hash = blake3::keyed_hash(&self.key, &bytes);
        Proof(Bytes::copy_from_slice(hash.as_bytes()))
    }

    fn sign(&self, vm: usize, record: Record) -> Committed {
        let proof = self.proof(vm, &record);
        Committed { record, proof }
    }

    /// Whether this keeper has committed it: what every driver checks.
    pub(super) fn vouches(&self, vm: usize, committed: &Committed) -> bool {
        self.proof(vm, &committed.record) == committed.proof
    }

    /// Its disk is as it was so many changes ago. `found_out` says whether it notices by itself.
    pub(super) fn turn_back(&mut self, changes: usize, found_out: bool, blind: bool) {
        let keep = self.history.len().saturating_sub(changes);
        let (left, gone) = self.history.split_at(keep);
        for (vm, kept) in self.kept.iter_mut().enumerate() {
            kept.set_back |= found_out && !blind;
            // What an operator has given it since counts where nothing newer is gone.
            if gone.iter().any(|(of, _)| *of == vm) {
                let last = left.iter().rfind(|(of, _)| *of == vm);
                kept.record = last.map(|(_, record)| record.clone());
            }
        }
        self.blind |= blind;
    }

    /// An operator gives it the newest record of a VM that is known.
    pub(super) fn recover(&mut self, vm: usize, newest: Option<Record>) {
        let kept = &mut self.kept[vm];
        kept.record = newest;
        kept.truth.clone_from(&kept.record);
        kept.set_back = false;
        kept.contradicted = false;
    }
}
