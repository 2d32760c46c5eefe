//! The records that the witness has, beside those that hosts have seen: a witness that does not answer
//! is a cluster that promotes nobody, and one whose disk was set back or lost is worse. Either is
//! invisible as long as all goes well, so it is looked for.

use std::collections::BTreeMap;

use serde::Serialize;

use super::standing::{Look, RECOVER, all};
use crate::agent::operator::Client;
use crate::protocol::{Record, Version, VmName};
use crate::sentence::sentence;

/// What the witness has, or why that is not known.
pub type Records = Result<BTreeMap<VmName, Record>, String>;

/// How the witness does.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct WitnessState {
    /// Whether it answers.
    pub reachable: bool,
    /// The VMs of which it has less than a host has seen.
    pub set_back: Vec<VmName>,
    /// What is wrong, in sentences; empty when nothing is.
    pub trouble: Vec<String>,
}

/// Asks the witness. Hosts must have been asked before: they hear of a change after the witness has
/// made it, so that it cannot seem to lag behind them.
pub async fn ask(client: &Client) -> Records {
    let witness = client.witness().map_err(|error| sentence(&error))?;
    witness.list().await.map_err(|error| sentence(&error))
}

/// Compares what it has with what hosts have seen.
pub fn compare(look: &Look, records: &Records) -> WitnessState {
    let records = match records {
        Ok(records) => records,
        Err(why) => {
            let trouble = format!(
                "DOES NOT ANSWER: until it does nobody is promoted and no copy is added or removed ({why})"
            );
            return WitnessState {
                reachable: false,
                set_back: Vec::new(),
                trouble: vec![trouble],
            };
        }
    };
    let (mut set_back, mut trouble) = (Vec::new(), Vec::new());
    for standing in all(look) {
        let (vm, seen) = (standing.vm(), standing.record);
        let what = match records.get(vm) {
            None => "nothing".to_owned(),
            Some(kept) if kept.lineage != seen.lineage => "another VM of this name".to_owned(),
            Some(kept) if kept.version() < seen.version() => kept.version().to_string(),
            Some(_) => continue,
        };
        set_back.push(vm.clone());
        trouble.push(lost(vm, &what, seen.version()));
    }
    WitnessState {
        reachable: true,
        set_back,
        trouble,
    }
}

fn lost(vm: &VmName, what: &str, seen: Version) -> String {
    format!(
        "HAS LOST RECORDS: it has {what} of {vm}, and hosts have seen {seen}; until they are put back nobody is promoted: {RECOVER}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::standing::tests::{Told, node, record, shop};
    use crate::protocol::{Epoch, Lineage, RoleName};

    #[test]
    fn a_witness_that_has_less_than_hosts_have_seen_is_told_of() {
        let seen = record(&["b"]);
        let told = Told::default().says("a", node(RoleName::Primary, &seen));
        let compare = |change: fn(&mut Record)| {
            let mut kept = seen.clone();
            change(&mut kept);
            compare(&told.0, &Ok(BTreeMap::from([(shop(), kept)])))
        };
        let well = compare(|_| {});
        assert!(well.reachable && well.trouble.is_empty(), "{well:?}");
        let newer = compare(|kept| kept.epoch = Epoch(6));
        assert_eq!(newer, well, "hosts hear of changes later");
        for (older, what) in [
            (
                compare(|kept| kept.epoch = Epoch(4)),
                "it has term 3 epoch 4 of shop, and hosts have seen term 3 epoch 5",
            ),
            (
                compare(|kept| kept.lineage = Lineage(8)),
                "it has another VM of this name of shop",
            ),
            (
                super::compare(&told.0, &Ok(BTreeMap::new())),
                "it has nothing of shop",
            ),
        ] {
            assert_eq!(older.set_back, [shop()]);
            let said = &older.trouble[0];
            assert!(said.contains(what) && said.contains(RECOVER), "{said}");
        }
    }

    #[test]
    fn a_witness_that_does_not_answer_is_told_of() {
        let state = compare(&Look::new(), &Err("no route".to_owned()));
        assert!(!state.reachable);
        assert!(state.trouble[0].contains("no route"), "{state:?}");
    }
}
