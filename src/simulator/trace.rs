//! The trace: a hash over every step, the journal of all hosts as text, and every step as text if
//! that was asked for.

use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::ids::SeatId;
use super::queue::Moment;
use super::world::Event;
use crate::protocol;

/// How many lines are kept.
const LINES: usize = 200_000;

/// What has happened.
#[derive(Debug)]
pub(super) struct Trace {
    hasher: DefaultHasher,
    verbose: bool,
    lines: Vec<String>,
}

impl Trace {
    pub(super) fn new(verbose: bool) -> Self {
        Self {
            // Fixed keys: the same everywhere and always for one version of the program.
            hasher: DefaultHasher::new(),
            verbose,
            lines: Vec::new(),
        }
    }

    pub(super) fn step(&mut self, now: Moment, event: &Event) {
        now.hash(&mut self.hasher);
        std::mem::discriminant(event).hash(&mut self.hasher);
        if self.verbose && !matches!(event, Event::NodeDue { .. } | Event::Links) {
            self.say(now, &short(event));
        }
    }

    pub(super) fn journal(&mut self, now: Moment, seat: SeatId, event: &protocol::Event) {
        (now, seat.host, event.code()).hash(&mut self.hasher);
        if seat.vm > 0 {
            seat.vm.hash(&mut self.hasher);
        }
        let millis = now / 1_000_000;
        self.push(format!("{millis:>6} ms  {seat}  {}: {event}", event.code()));
    }

    pub(super) fn say(&mut self, now: Moment, what: &str) {
        let micros = now / 1_000;
        self.push(format!(
            "{:>6}.{:03} ms  {what}",
            micros / 1_000,
            micros % 1_000
        ));
    }

    fn push(&mut self, line: String) {
        if self.lines.len() < LINES {
            self.lines.push(line);
        }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hasher.finish()
    }

    pub(super) fn lines(self) -> Vec<String> {
        self.lines
    }
}

/// One line about something, payloads cut off.
pub(super) fn short(what: &impl Debug) -> String {
    let mut text = format!("{what:?}");
    if text.len() > 300 {
        let end = (0..=300).rev().find(|at| text.is_char_boundary(*at));
        text.truncate(end.unwrap_or(0));
        text.push('…');
    }
    text
}
