//! The outbox: outputs between the machine that made them and the world.
//!
//! ```text
//!   push ──► held ── release(through) ──► out ── forget(through) ──► gone
//!             │                            │
//!             └── the log that led to it   └── no gateway has confirmed it yet: sent again to
//!                 is not committed yet         whoever asks, by this copy or the next primary
//! ```
//!
//! A primary releases as the commit rule allows. A replica holds everything its replay makes until
//! the primary tells it that the world has it, because it may be the next to send it.

use std::collections::VecDeque;

use replay_log::{FrameNumber, LogIndex};

use crate::host::Output;

/// A queue of numbered outputs, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: VecDeque<Output>,
    /// The number of the last output released.
    released: FrameNumber,
    /// The number of the last output forgotten; a replica may make it later than that.
    forgotten: FrameNumber,
    bytes: usize,
}

impl Outbox {
    /// An empty outbox.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next output of the machine. One that was taken before, or that the world has
    /// confirmed already, is dropped.
    pub fn push(&mut self, output: Output) {
        if output.number <= self.forgotten {
            return;
        }
        if self
            .queue
            .back()
            .is_none_or(|last| last.number < output.number)
        {
            self.bytes += output.bytes.len();
            self.queue.push_back(output);
        }
    }

    /// Lets out every held output whose log is committed, in order.
    pub fn release(&mut self, committed: LogIndex) -> impl Iterator<Item = &Output> {
        let before = self.released;
        let held = self.queue.partition_point(|output| output.number <= before);
        let end = held
            + self
                .queue
                .range(held..)
                .take_while(|output| output.needs <= committed)
                .count();
        if end > held {
            self.released = self.queue[end - 1].number;
        }
        self.queue.range(held..end)
    }

    /// Released outputs after this number, for a receiver that says what it has.
    pub fn released_after(&self, number: FrameNumber) -> impl Iterator<Item = &Output> {
        let released = self.released;
        let first = self.queue.partition_point(|output| output.number <= number);
        self.queue
            .range(first..)
            .take_while(move |output| output.number <= released)
    }

    /// Forgets what the world has confirmed.
    pub fn forget(&mut self, through: FrameNumber) {
        while self
            .queue
            .front()
            .is_some_and(|first| first.number <= through)
        {
            if let Some(gone) = self.queue.pop_front() {
                self.bytes -= gone.bytes.len();
            }
        }
        self.forgotten = self.forgotten.max(through);
        self.released = self.released.max(through);
    }

    /// The number of the last output released.
    pub const fn released(&self) -> FrameNumber {
        self.released
    }

    /// The first output that is held back, if any.
    pub fn first_held(&self) -> Option<&Output> {
        self.queue.get(
            self.queue
                .partition_point(|output| output.number <= self.released),
        )
    }

    /// The bytes kept, held and released.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many outputs are kept.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::host::OutputKind;

    fn output(number: u64, needs: u64) -> Output {
        Output {
            number: FrameNumber(number),
            needs: LogIndex(needs),
            kind: OutputKind::Frame,
            bytes: Bytes::from_static(b"frame"),
        }
    }

    fn numbers<'a>(outputs: impl Iterator<Item = &'a Output>) -> Vec<u64> {
        outputs.map(|output| output.number.0).collect()
    }

    #[test]
    fn nothing_goes_out_before_its_log_is_committed() {
        let mut outbox = Outbox::new();
        (1..=4).for_each(|n| outbox.push(output(n, n * 10)));
        assert_eq!(outbox.release(LogIndex(9)).count(), 0);
        assert_eq!(numbers(outbox.release(LogIndex(25))), [1, 2]);
        assert_eq!(outbox.release(LogIndex(25)).count(), 0);
        assert_eq!(outbox.first_held().map(|o| o.number), Some(FrameNumber(3)));
        assert_eq!(numbers(outbox.release(LogIndex(40))), [3, 4]);
    }

    #[test]
    fn a_receiver_gets_again_what_it_lacks_and_only_what_is_released() {
        let mut outbox = Outbox::new();
        (1..=5).for_each(|n| outbox.push(output(n, n)));
        assert_eq!(outbox.release(LogIndex(4)).count(), 4);
        assert_eq!(numbers(outbox.released_after(FrameNumber(2))), [3, 4]);
        outbox.forget(FrameNumber(3));
        assert_eq!(numbers(outbox.released_after(FrameNumber(0))), [4]);
        assert_eq!((outbox.len(), outbox.bytes()), (2, 10));
    }

    #[test]
    fn a_late_replay_does_not_bring_back_what_is_forgotten() {
        let mut outbox = Outbox::new();
        outbox.forget(FrameNumber(2));
        (1..=3).for_each(|n| outbox.push(output(n, n)));
        outbox.push(output(3, 3));
        assert_eq!(numbers(outbox.release(LogIndex(9))), [3]);
    }
}
