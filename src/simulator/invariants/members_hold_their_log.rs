//! No member without the log it claims.
//!
//! When a record is committed, every new member that is still the holding named in it holds
//! everything that had been released when it was first proposed. At every release and every commit
//! no set of copies that would be enough for a promotion consists of copies that lack it. A disk
//! that lied counts as one that lacks everything once a primary could know. And nobody starts the
//! machine anew while a copy has its log.

use replay_log::LogIndex;

use super::super::facts::{Fact, Invariant, Released, View};
use crate::protocol::{Member, Record};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct MembersHoldTheirLog {
    /// What had been released when a record was first proposed.
    proposed: Vec<(Record, Released)>,
    before: Option<Record>,
}

impl Invariant for MembersHoldTheirLog {
    fn name(&self) -> &'static str {
        "members_hold_their_log"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        let record = match fact {
            Fact::Proposed(record) => {
                if !self.proposed.iter().any(|(before, _)| before == record) {
                    self.proposed.push((record.clone(), view.released));
                }
                None
            }
            Fact::Recorded(record) => {
                let proposed = self
                    .proposed
                    .iter()
                    .find(|(proposed, _)| proposed == record);
                let released = proposed.map(|(_, released)| *released).unwrap_or_default();
                self.proposed
                    .retain(|(proposed, _)| proposed.epoch > record.epoch);
                let before = self.before.replace(record.clone());
                // A copy that stays promises nothing new.
                let stays = |member: &&Member| {
                    let mut copies = before.iter().flat_map(Record::all_copies);
                    copies.any(|copy| copy == *member)
                };
                let mut members = record.members.iter().filter(|member| !stays(member));
                let lacking = members.find(|m| lacks(m, released, view));
                if let Some(member) = lacking {
                    return Err(format!(
                        "{} names {member}, which does not hold the log released through {}",
                        record.version(),
                        released.index
                    ));
                }
                Some(record)
            }
            // What an operator has given up is demanded of nobody, be it proposed before.
            Fact::LossAccepted { .. } => {
                for (_, released) in &mut self.proposed {
                    if released.index > view.released.index {
                        *released = view.released;
                    }
                }
                None
            }
            Fact::Lost { before } => return gone(before, view),
            Fact::Released { through, .. } => {
                if let Some(record) = view.record {
                    found_out(record, *through, view)?;
                }
                view.record
            }
            Fact::Persisted { .. } => view.record,
            _ => None,
        };
        record.map_or(Ok(()), |record| enough(record, view))
    }
}

/// Whether a holding exists and lacks what was released.
fn lacks(member: &Member, released: Released, view: &View<'_>) -> bool {
    view.host(&member.host).is_some_and(|host| {
        host.intact
            && host.incarnation == member.incarnation
            && host.chain_at(released.index) != Some(released.chain)
    })
}

/// A disk that has lost what it had synced is one copy fewer, until a primary has been told of it:
/// from then on that primary counts nothing that the disk does not hold.
fn found_out(record: &Record, through: LogIndex, view: &View<'_>) -> Result<(), String> {
    let lacks = |copy: &&Member| {
        view.host(&copy.host).is_some_and(|host| {
            host.incarnation == copy.incarnation
                && (host.intact || host.found_out)
                && host.chain_at(through).is_none()
        })
    };
    let liar = |copy: &Member| {
        let host = view.host(&copy.host);
        host.is_some_and(|host| host.found_out && host.incarnation == copy.incarnation)
    };
    let lacking = record.all_copies().filter(lacks).count();
    if record.all_copies().any(liar) && lacking >= record.seals() {
        return Err(format!(
            "what was let out through {through} counts a disk that is known to have lost it"
        ));
    }
    Ok(())
}

fn gone(before: &Record, view: &View<'_>) -> Result<(), String> {
    let still = before.all_copies().find(|copy| {
        let host = view.host(&copy.host);
        host.is_some_and(|host| host.intact && host.incarnation == copy.incarnation)
    });
    still.map_or(Ok(()), |copy| {
        Err(format!(
            "the machine is started anew, and {copy} still has its log"
        ))
    })
}

fn enough(record: &Record, view: &View<'_>) -> Result<(), String> {
    let lacking = record
        .all_copies()
        .filter(|copy| lacks(copy, view.released, view))
        .count();
    if lacking >= record.seals() {
        return Err(format!(
            "{lacking} copies of {} lack what was released through {}, and {} are enough for a \
             promotion",
            record.version(),
            view.released.index,
            record.seals()
        ));
    }
    Ok(())
}
