//! The records that the witness has, beside those that hosts have seen: a witness that does not answer
//! is a cluster that promotes nobody, and one whose disk was set back or lost is worse. Either is
//! invisible as long as all goes well, so it is looked for.

use std::collections::BTreeMap;

use serde::Serialize;

use super::standing::{Look, RECOVER, all};
use crate::agent::operator::Client;
use crate::agent::witness::reporter::WitnessHealth;
use crate::protocol::{HostName, Record, Version, VmName};
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

/// Compares what it has with what hosts have seen, and adds what hosts say of it.
pub fn compare(look: &Look, records: &Records) -> WitnessState {
    let told: Vec<_> = look
        .iter()
        .filter_map(|(host, status)| Some((host, status.as_ref().ok()?.witness.as_ref()?)))
        .collect();
    let mut state = WitnessState {
        reachable: records.is_ok() || told.iter().any(|(_, health)| health.reachable),
        set_back: Vec::new(),
        trouble: unreached(&told, records),
    };
    for (_, health) in &told {
        if let Some(why) = &health.keeper.refuses_writes {
            state.say(format!(
                "REFUSES WRITES: nobody is promoted and no copy is added or removed until it takes them again ({why})"
            ));
        }
        if health.keeper.copied {
            state.say(format!("ITS FOLDER WAS COPIED OR PUT BACK: {RECOVER}"));
        }
    }
    for standing in all(look) {
        let (vm, seen) = (standing.vm(), standing.record);
        let Ok(records) = records else { break };
        let what = match records.get(vm) {
            None => "nothing".to_owned(),
            Some(kept) if kept.lineage != seen.lineage => "another VM of this name".to_owned(),
            Some(kept) if kept.version() < seen.version() => kept.version().to_string(),
            Some(_) => continue,
        };
        state.lost(vm, &what, seen.version());
    }
    // What it was told by hosts that do not answer here.
    for (vm, fact) in told.iter().flat_map(|(_, health)| &health.set_back) {
        let kept = fact.kept.map(|kept| kept.version.to_string());
        let kept = kept.unwrap_or_else(|| "nothing".to_owned());
        state.lost(vm, &kept, fact.seen.version);
    }
    state
}

/// Who does not reach it.
fn unreached(told: &[(&HostName, &WitnessHealth)], records: &Records) -> Vec<String> {
    let reach: Vec<_> = told
        .iter()
        .filter(|(_, health)| health.reachable)
        .map(|(host, _)| host.as_str())
        .collect();
    let mut trouble = Vec::new();
    match records {
        Ok(_) => {}
        Err(why) if reach.is_empty() => {
            return vec![format!(
                "DOES NOT ANSWER: until it does nobody is promoted and no copy is added or removed ({why})"
            )];
        }
        Err(why) => trouble.push(format!(
            "does not answer here ({why}), and is reached from {}",
            reach.join(", ")
        )),
    }
    for (host, health) in told {
        if let Some(why) = health.unreachable.as_ref().filter(|_| !health.reachable) {
            trouble.push(format!(
                "IS NOT REACHED FROM {host}: until it is, that host neither succeeds nor changes copies ({why})"
            ));
        }
    }
    trouble
}

impl WitnessState {
    /// Why no order about this VM can come to anything: whoever shall reign has to be recorded.
    pub fn in_the_way(&self, vm: &VmName) -> Option<String> {
        let stands = !self.reachable || self.set_back.contains(vm);
        stands.then(|| format!("the witness {}", self.trouble.join("; ")))
    }

    /// Says something once, whoever has noticed it.
    fn say(&mut self, trouble: String) {
        if !self.trouble.contains(&trouble) {
            self.trouble.push(trouble);
        }
    }

    fn lost(&mut self, vm: &VmName, what: &str, seen: Version) {
        if !self.set_back.contains(vm) {
            self.set_back.push(vm.clone());
            self.say(lost(vm, what, seen));
        }
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
    use crate::agent::witness::keeper::{KeeperHealth, SetBack};
    use crate::cli::standing::tests::{Told, host, node, record, shop};
    use crate::protocol::{Epoch, Lineage, RoleName, Seen, Time};

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
        assert_eq!(well.in_the_way(&shop()), None);
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
            assert!(older.in_the_way(&shop()).is_some());
            assert_eq!(older.in_the_way(&VmName::new("x").expect("a name")), None);
            let said = &older.trouble[0];
            assert!(said.contains(what) && said.contains(RECOVER), "{said}");
        }
    }

    #[test]
    fn a_witness_that_does_not_answer_is_told_of() {
        let state = compare(&Look::new(), &Err("no route".to_owned()));
        assert!(!state.reachable && state.in_the_way(&shop()).is_some());
        assert!(state.trouble[0].contains("no route"), "{state:?}");
    }

    fn health() -> WitnessHealth {
        WitnessHealth {
            reachable: true,
            since: Time::from_nanos(0),
            unreachable: None,
            keeper: KeeperHealth::default(),
            set_back: BTreeMap::new(),
        }
    }

    /// What hosts a and b say of the witness, and what is made of it.
    fn said(records: &Records, a: WitnessHealth, b: WitnessHealth) -> WitnessState {
        let seen = record(&["b"]);
        let mut look = Told::default()
            .says("a", node(RoleName::Primary, &seen))
            .says("b", node(RoleName::Member, &seen))
            .0;
        for (name, health) in [("a", a), ("b", b)] {
            let status = look.get_mut(&host(name)).expect("has said something");
            status.as_mut().expect("answers").witness = Some(health);
        }
        compare(&look, records)
    }

    #[test]
    fn what_hosts_say_of_the_witness_is_told_once() {
        let kept = Ok(BTreeMap::from([(shop(), record(&["b"]))]));
        assert_eq!(said(&kept, health(), health()).trouble, [""; 0]);
        let mut full = health();
        full.keeper.refuses_writes = Some("No space left on device".to_owned());
        let state = said(&kept, full.clone(), full);
        assert_eq!(state.trouble.len(), 1, "{state:?}");
        assert!(state.trouble[0].starts_with("REFUSES WRITES"), "{state:?}");
        let mut copied = health();
        copied.keeper.copied = true;
        let state = said(&kept, copied, health());
        assert!(state.trouble[0].contains(RECOVER), "{state:?}");
        // What a host that is away has told it of.
        let mut lost = health();
        let seen = Seen {
            lineage: Lineage(7),
            version: record(&[]).version(),
        };
        let other = VmName::new("other").expect("a name");
        lost.set_back
            .insert(other.clone(), SetBack { kept: None, seen });
        let state = said(&kept, lost.clone(), lost);
        assert_eq!(state.set_back, [other]);
        assert_eq!(state.trouble.len(), 1, "{state:?}");
    }

    #[test]
    fn who_does_not_reach_the_witness_is_told_by_name() {
        let kept = Ok(BTreeMap::from([(shop(), record(&["b"]))]));
        let mut cut_off = health();
        cut_off.reachable = false;
        cut_off.unreachable = Some("timed out".to_owned());
        let state = said(&kept, health(), cut_off.clone());
        assert!(
            state.reachable && state.trouble[0].starts_with("IS NOT REACHED FROM b"),
            "{state:?}"
        );
        let state = said(&Err("no route".to_owned()), health(), health());
        assert_eq!(
            state.trouble,
            ["does not answer here (no route), and is reached from a, b"]
        );
        let state = said(&Err("no route".to_owned()), cut_off.clone(), cut_off);
        assert!(!state.reachable);
        assert_eq!(state.trouble.len(), 1, "{state:?}");
        assert!(state.trouble[0].starts_with("DOES NOT ANSWER"), "{state:?}");
    }
}
