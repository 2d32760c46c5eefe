//! Output resumes: while enough healthy copies are connected, clients get answers again within a
//! bound.

use super::super::facts::{Fact, Invariant, View};
use super::super::queue::Moment;

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct OutputResumes {
    /// Since when somebody could have served, and nobody has.
    since: Option<Moment>,
}

impl Invariant for OutputResumes {
    fn name(&self) -> &'static str {
        "output_resumes"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Passed { .. } | Fact::Disturbed => self.since = None,
            Fact::Watched(watched) if !watched.could_serve => self.since = None,
            Fact::Watched(watched) => {
                let since = *self.since.get_or_insert(watched.now);
                if watched.now - since > watched.within {
                    return Err(format!(
                        "enough healthy copies have been connected for {} ms, and no output has \
                         left",
                        (watched.now - since) / 1_000_000
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
