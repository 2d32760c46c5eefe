//! No keeper of records commits or serves less than any host has seen.

use super::super::facts::{Fact, Invariant, View};

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct KeeperKeepsUp;

impl Invariant for KeeperKeepsUp {
    fn name(&self) -> &'static str {
        "keeper_keeps_up"
    }

    fn check(&mut self, fact: &Fact, view: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Recorded(record) => {
                let version = record.version();
                let seen = view.hosts.iter().filter_map(|host| host.seen).max();
                match seen.filter(|seen| version <= *seen) {
                    Some(seen) => Err(format!(
                        "{version} was committed, and a host had seen {seen}"
                    )),
                    None => Ok(()),
                }
            }
            Fact::Served { seen, has } => {
                let below =
                    has.is_none_or(|has| has.lineage != seen.lineage || has.version < seen.version);
                if below {
                    return Err(format!(
                        "a host that had seen {} was answered from {has:?}",
                        seen.version
                    ));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
