use super::*;

fn member(host: &str) -> Member {
    Member {
        host: HostName::new(host).expect("a name"),
        incarnation: Incarnation(1),
    }
}

fn record(term: u64, epoch: u64, members: &[&str]) -> Record {
    Record {
        lineage: Lineage(7),
        term: Term(term),
        epoch: Epoch(epoch),
        primary: member("p"),
        members: members.iter().map(|m| member(m)).collect(),
        hosts: vec![],
        policy: Policy::default(),
        through: LogIndex(3),
        begins: LogIndex(2),
        follows: Term(0),
        loss: false,
        failed: None,
    }
}

#[test]
fn sealed_copies_and_committing_copies_always_overlap() {
    for rule in [
        Rule::All,
        Rule::Quorum,
        Rule::Any(1),
        Rule::Any(2),
        Rule::Any(9),
    ] {
        for copies in 1..=MAX_COPIES {
            let (needed, seals) = (rule.needed(copies), rule.seals(copies));
            assert!((1..=copies).contains(&needed), "{rule} of {copies}");
            assert!(needed + seals > copies, "{rule} of {copies}");
            assert_eq!(needed + seals, copies + 1, "no more seals than it takes");
        }
    }
}

#[test]
fn what_a_rule_survives_is_said() {
    assert!(Rule::Any(1).survives(3).contains("any 1 of 3"));
    assert!(
        Rule::Any(1)
            .survives(3)
            .contains("every replica must be reachable")
    );
    assert!(
        Rule::All
            .survives(3)
            .contains("1 of 2 replicas must be reachable")
    );
    assert!(Rule::All.survives(1).contains("unprotected"));
}

#[test]
fn rules_are_read_as_they_are_written() {
    for rule in [Rule::All, Rule::Quorum, Rule::Any(2)] {
        assert_eq!(rule.to_string().parse(), Ok(rule));
    }
    for bad in ["", "any", "any()", "any(0)", "any(99)", "ALL"] {
        assert!(bad.parse::<Rule>().is_err(), "{bad}");
    }
}

#[test]
fn a_record_follows_another_only_upwards() {
    let old = record(2, 5, &["a", "b"]);
    assert_eq!(record(2, 6, &["a"]).may_follow(Some(&old)), Ok(()));
    assert_eq!(record(3, 6, &["a"]).may_follow(Some(&old)), Ok(()));
    assert!(record(1, 6, &["a"]).may_follow(Some(&old)).is_err());
    assert!(record(3, 5, &["a"]).may_follow(Some(&old)).is_err());
    assert!(record(3, 7, &["a"]).may_follow(Some(&old)).is_err());
    assert!(record(1, 1, &[]).may_follow(None).is_ok());
    assert!(
        record(3 + TERM_LEAP, 6, &[])
            .may_follow(Some(&old))
            .is_err()
    );
    assert!(record(2 + TERM_LEAP, 6, &[]).may_follow(Some(&old)).is_ok());
    let mut namesake = record(3, 6, &["a"]);
    namesake.lineage = Lineage(8);
    assert!(namesake.may_follow(Some(&old)).is_err());
    let mut usurper = record(2, 6, &["a"]);
    usurper.primary = member("b");
    assert!(usurper.may_follow(Some(&old)).is_err());
}

#[test]
fn what_is_no_record_is_not_decoded() {
    for bad in [
        record(1, 1, &["b", "a"]),
        record(1, 1, &["a", "a"]),
        record(1, 1, &["p"]),
    ] {
        let encoded = postcard::to_stdvec(&bad).expect("it encodes");
        assert!(postcard::from_bytes::<Record>(&encoded).is_err(), "{bad:?}");
    }
    let good = record(1, 1, &["a", "b"]);
    let encoded = postcard::to_stdvec(&good).expect("it encodes");
    assert_eq!(postcard::from_bytes::<Record>(&encoded), Ok(good));
}
