//! What `understudy witness recover` gives back to a witness: the newest that hosts have seen.
//!
//! Whoever changed a record last is named in the record before it. So when every host that the
//! newest known record names has said what it has seen, nobody has seen anything newer.

use std::collections::{BTreeMap, BTreeSet};

use thiserror::Error;

use super::keeper::Kept;
use crate::protocol::{Committed, HostName, Record, VmName};

/// What hosts have seen, by host; hosts that did not answer are not in it.
pub type SeenByHosts = BTreeMap<HostName, BTreeMap<VmName, Committed>>;

/// Why nothing can be given back.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RecoveryError {
    /// A host that may have seen something newer did not answer.
    #[error(
        "{} did not answer, and may have seen a newer record of {vm}: start {}; or, if what was seen there alone may be lost, add {}",
        list(hosts), if hosts.len() == 1 { "it" } else { "them" }, without(hosts)
    )]
    Missing {
        /// Of which VM.
        vm: VmName,
        /// Who.
        hosts: BTreeSet<HostName>,
    },
    /// Two VMs have had the same name.
    #[error(
        "{one} and {other} have seen different VMs of the name {vm}: move the folder vms/{vm} of the one that is not wanted out of its host's data folder, start that host again, and repeat this"
    )]
    TwoLineages {
        /// The name.
        vm: VmName,
        /// A host that has seen the one.
        one: HostName,
        /// A host that has seen the other.
        other: HostName,
    },
}

fn list(hosts: &BTreeSet<HostName>) -> String {
    let names: Vec<_> = hosts.iter().map(HostName::as_str).collect();
    names.join(", ")
}

fn without(hosts: &BTreeSet<HostName>) -> String {
    let words: Vec<_> = hosts
        .iter()
        .map(|host| format!("--without {host}"))
        .collect();
    words.join(" ")
}

/// The newest record of each VM that hosts have seen. The hosts in `without` need not have answered.
pub fn newest(
    seen: &SeenByHosts,
    kept: &BTreeMap<VmName, Kept>,
    without: &BTreeSet<HostName>,
) -> Result<BTreeMap<VmName, Committed>, RecoveryError> {
    let vms: BTreeSet<&VmName> = seen.values().flat_map(BTreeMap::keys).collect();
    let mut newest = BTreeMap::new();
    for vm in vms {
        let at_witness = kept.get(vm).and_then(|kept| kept.committed.as_ref());
        let of_this = seen
            .iter()
            .filter_map(|(host, seen)| Some((host, seen.get(vm)?)));
        let mut best: Option<(&HostName, &Committed)> = None;
        for (host, committed) in of_this {
            let lineage = committed.record.lineage;
            // A witness that still has the VM knows which of two is meant.
            if at_witness.is_some_and(|kept| kept.record.lineage != lineage) {
                continue;
            }
            match best {
                Some((other, known)) if known.record.lineage != lineage => {
                    return Err(RecoveryError::TwoLineages {
                        vm: vm.clone(),
                        one: other.clone(),
                        other: host.clone(),
                    });
                }
                Some((_, known)) if known.record.version() >= committed.record.version() => {}
                _ => best = Some((host, committed)),
            }
        }
        let Some((_, committed)) = best else { continue };
        let latest = at_witness
            .filter(|kept| kept.record.version() > committed.record.version())
            .unwrap_or(committed);
        let missing: BTreeSet<HostName> = named(&latest.record)
            .into_iter()
            .filter(|host| !seen.contains_key(host) && !without.contains(host))
            .collect();
        if !missing.is_empty() {
            let vm = vm.clone();
            return Err(RecoveryError::Missing { vm, hosts: missing });
        }
        newest.insert(vm.clone(), committed.clone());
    }
    Ok(newest)
}

/// The hosts that may have changed a record after this state of it.
fn named(record: &Record) -> BTreeSet<HostName> {
    let copies = record.all_copies().map(|copy| copy.host.clone());
    copies.chain(record.hosts.iter().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::witness::testing::{record, vm};
    use crate::protocol::{Lineage, Proof};

    fn host(name: &str) -> HostName {
        HostName::new(name).expect("a name")
    }

    fn committed(record: Record) -> Committed {
        Committed {
            record,
            proof: Proof::default(),
        }
    }

    fn saw(seen: &[(&str, Record)]) -> SeenByHosts {
        seen.iter()
            .map(|(name, record)| {
                let seen = BTreeMap::from([(vm(), committed(record.clone()))]);
                (host(name), seen)
            })
            .collect()
    }

    fn no_hosts() -> BTreeSet<HostName> {
        BTreeSet::new()
    }

    #[test]
    fn the_newest_that_all_its_hosts_know_of_is_given_back() {
        let seen = saw(&[
            ("a", record(1, 3, "a", &["b", "c"])),
            ("b", record(2, 4, "b", &["c"])),
            ("c", record(1, 3, "a", &["b", "c"])),
        ]);
        let newest = newest(&seen, &BTreeMap::new(), &no_hosts()).expect("one");
        assert_eq!(newest[&vm()].record, record(2, 4, "b", &["c"]));
    }

    #[test]
    fn a_host_that_may_have_seen_more_must_answer_or_be_left_out_by_name() {
        let seen = saw(&[("a", record(1, 3, "a", &["b", "c"]))]);
        let missing = newest(&seen, &BTreeMap::new(), &no_hosts());
        let expected = RecoveryError::Missing {
            vm: vm(),
            hosts: [host("b"), host("c")].into(),
        };
        assert_eq!(missing, Err(expected.clone()));
        assert!(expected.to_string().contains("--without b --without c"));
        let one = newest(&seen, &BTreeMap::new(), &[host("b")].into());
        assert!(matches!(one, Err(RecoveryError::Missing { hosts, .. }) if hosts.len() == 1));
        let both = newest(&seen, &BTreeMap::new(), &[host("b"), host("c")].into());
        assert_eq!(both.expect("one").len(), 1);
        // What the witness itself knows names hosts, too.
        let alone = saw(&[("a", record(1, 3, "a", &[]))]);
        let kept = Kept {
            committed: Some(committed(record(1, 4, "a", &["d"]))),
            set_back: None,
        };
        let missing = newest(&alone, &BTreeMap::from([(vm(), kept)]), &no_hosts());
        assert!(
            matches!(missing, Err(RecoveryError::Missing { hosts, .. }) if hosts == [host("d")].into())
        );
    }

    #[test]
    fn of_two_vms_of_a_name_the_witness_knows_which_is_meant() {
        let mut other = record(5, 9, "b", &[]);
        other.lineage = Lineage(2);
        let seen = saw(&[("a", record(1, 3, "a", &[])), ("b", other)]);
        assert!(matches!(
            newest(&seen, &BTreeMap::new(), &no_hosts()),
            Err(RecoveryError::TwoLineages { .. })
        ));
        let kept = Kept {
            committed: Some(committed(record(1, 2, "a", &[]))),
            set_back: None,
        };
        let newest = newest(&seen, &BTreeMap::from([(vm(), kept)]), &no_hosts()).expect("one");
        assert_eq!(newest[&vm()].record, record(1, 3, "a", &[]));
    }
}
