//! Whatever waits somewhere stays under a bound.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct QueuesAreBounded;

impl Invariant for QueuesAreBounded {
    fn name(&self) -> &'static str {
        "queues_are_bounded"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        let Fact::Watched(watched) = fact else {
            return Ok(());
        };
        let over = watched.queues.iter().find(|queue| queue.len > queue.most);
        over.map_or(Ok(()), |queue| {
            Err(format!(
                "{} {} wait, and {} may",
                queue.len, queue.what, queue.most
            ))
        })
    }
}
