//! What is going to happen, in order of time; what is due at the same moment in order of planning.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A moment of the simulated world, in nanoseconds. No host knows it.
pub(super) type Moment = u64;
pub(super) const MICRO: Moment = 1_000;
pub(super) const MILLI: Moment = 1_000_000;
pub(super) const SECOND: Moment = 1_000_000_000;

#[derive(Debug)]
struct Planned<E> {
    at: Moment,
    number: u64,
    event: E,
}

impl<E> Ord for Planned<E> {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives its greatest: the earliest.
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl<E> PartialOrd for Planned<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> PartialEq for Planned<E> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<E> Eq for Planned<E> {}

/// The plan.
#[derive(Debug)]
pub(super) struct Queue<E> {
    heap: BinaryHeap<Planned<E>>,
    planned: u64,
}

impl<E> Queue<E> {
    pub(super) fn new() -> Self {
        Self {
            heap: BinaryHeap::new(),
            planned: 0,
        }
    }

    pub(super) fn plan(&mut self, at: Moment, event: E) {
        self.planned += 1;
        self.heap.push(Planned {
            at,
            number: self.planned,
            event,
        });
    }

    pub(super) fn next(&mut self) -> Option<(Moment, E)> {
        self.heap.pop().map(|planned| (planned.at, planned.event))
    }
}
