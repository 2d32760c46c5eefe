//! Each released output is in every later primary's log.

use replay_log::{LogIndex, LogTip, Term};

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct ReleasedIsKept {
    /// The present and the past reigns, by where they began.
    reigns: Vec<(Term, LogTip)>,
    /// Every place up to which output was let out, in order.
    released: Vec<(LogIndex, Term)>,
}

impl Invariant for ReleasedIsKept {
    fn name(&self) -> &'static str {
        "released_is_kept"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Booted => *self = Self::default(),
            Fact::LossAccepted { .. } => self.reigns.clear(),
            Fact::Promoted { term, tip } => {
                self.reigns.push((*term, *tip));
                let released = view.released;
                let holder = view
                    .hosts
                    .iter()
                    .find(|host| host.chain_at(tip.index) == Some(tip.chain));
                let kept = released.index <= tip.index
                    && holder.is_some_and(|host| view.holds_released(host));
                if !kept {
                    return Err(format!(
                        "the primary of term {term} begins with a log through {}, and output was \
                         let out through {}",
                        tip.index, released.index
                    ));
                }
            }
            Fact::Released {
                host,
                term,
                through,
            } => {
                self.released.push((*through, *term));
                // Only an older primary's release can be one too many; the present one extends.
                let later = self.reigns.iter().find(|(t, _)| t > term);
                if let Some((later, tip)) = later
                    && through > &tip.index
                {
                    return Err(format!(
                        "host {host} let out through {through} by term {term}, and term {later} \
                         begins at {}",
                        tip.index
                    ));
                }
                let Some(host) = view.hosts.get(*host) else {
                    return Ok(());
                };
                if *through <= view.released.index && !view.holds_released(host) && later.is_none()
                {
                    return Err(format!(
                        "{} let out through {through} and does not hold what was let out before",
                        host.name
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}
