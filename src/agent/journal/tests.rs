//! Tests of the journal: numbers, restarts, lines that cannot be written, names of fields.

use std::fs;

use replay_log::Term;

use super::files::{FILE_BYTES, FILES};
use super::*;

fn host() -> HostName {
    HostName::new("a").expect("a name")
}

fn vm() -> VmName {
    VmName::new("ledger").expect("a name")
}

fn went_live(term: u64) -> Event {
    Event::WentLive { term: Term(term) }
}

#[tokio::test]
async fn lines_come_back_in_order_and_numbers_go_on_after_a_restart() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let journal = Journal::open(folder.path(), host()).expect("a journal");
    journal.write(Some(&vm()), went_live(7));
    let started = Incident::AgentStarted {
        version: "1".to_owned(),
    };
    journal.write(None, started.clone());
    let lines = journal.read(0, 10).await.expect("readable");
    assert_eq!(lines[0].what, went_live(7).into());
    assert_eq!(lines[0].vm, Some(vm()));
    assert_eq!(lines[1].what, started.into());
    assert_eq!(lines[1].number, 2);
    assert_eq!(journal.read(1, 10).await.expect("readable"), lines[1..]);
    assert_eq!(journal.read(0, 1).await.expect("readable"), lines[..1]);
    drop(journal);

    // The process dies within a line.
    let path = folder.path().join("journal.jsonl");
    let mut text = fs::read(&path).expect("written");
    text.extend_from_slice(br#"{"number":3,"at""#);
    fs::write(&path, text).expect("written");
    let journal = Journal::open(folder.path(), host()).expect("a journal");
    journal.write(None, went_live(8));
    let again = journal.read(0, 10).await.expect("readable");
    assert_eq!(again[..2], lines);
    assert_eq!((again[2].number, again.len()), (3, 3));
}

#[tokio::test]
async fn the_oldest_lines_go_and_the_files_stay_bounded() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let journal = Journal::open(folder.path(), host()).expect("a journal");
    let long = Event::Waiting {
        why: "x".repeat(60_000),
    };
    let count = 400;
    for _ in 0..count {
        journal.write(Some(&vm()), long.clone());
    }
    let lines = journal.read(0, usize::MAX).await.expect("readable");
    let first = lines.first().expect("lines").number;
    assert!(first > 1);
    let numbers: Vec<_> = lines.iter().map(|line| line.number).collect();
    assert_eq!(numbers, (first..=count).collect::<Vec<_>>());
    let files = fs::read_dir(folder.path()).expect("listed");
    let bytes: u64 = files
        .map(|file| file.expect("a file").metadata().expect("its size").len())
        .sum();
    assert!(bytes <= FILE_BYTES * u64::from(FILES), "{bytes}");
}

/// A field of an event that is called like one of the line's own is written twice, and the line
/// cannot be read any more.
#[test]
fn no_event_hides_behind_a_field_of_its_line() {
    let sources = concat!(
        include_str!("../../protocol/event.rs"),
        include_str!("../journal.rs")
    );
    let fields = sources
        .lines()
        .filter(|line| line.starts_with("        ") && line.trim_end().ends_with(','))
        .filter_map(|line| line.strip_prefix("        ")?.split_once(": "))
        .filter(|(name, kind)| {
            name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                && kind.starts_with(|c: char| c.is_ascii_alphabetic())
        });
    let mut seen = 0;
    for (name, kind) in fields {
        // Fields of enums' variants: types, not values.
        let of_a_type = kind.trim_end_matches(',');
        if ["String", "HostName", "Term", "LogIndex", "Version", "bool"].contains(&of_a_type)
            || of_a_type.starts_with('u')
        {
            seen += 1;
            let own = ["number", "at", "clock", "host", "vm", "text", "code"];
            assert!(!own.contains(&name), "{name}: {kind}");
        }
    }
    assert!(seen > 30, "only {seen} fields were found");
    let lost = Event::ReplicaLost {
        replica: HostName::new("b").expect("a name"),
        silence_ms: 1_000,
    };
    let line = Line {
        number: 7,
        at: "now".to_owned(),
        clock: 1,
        host: HostName::new("a").expect("a name"),
        vm: None,
        text: lost.to_string(),
        what: lost.into(),
    };
    let text = serde_json::to_string(&line).expect("JSON");
    let back: Line = serde_json::from_str(&text).expect("the line again");
    assert_eq!(back, line);
}

#[test]
fn codes_are_words_that_tools_can_match() {
    let claim = Event::Sealed {
        term: Term(3),
        claimant: host(),
        index: replay_log::LogIndex(9),
    };
    let text = serde_json::to_string(&What::from(claim.clone())).expect("JSON");
    assert!(text.contains(r#""code":"sealed""#), "{text}");
    let back: What = serde_json::from_str(&text).expect("JSON");
    assert_eq!(back, claim.into());
}

/// A disk that takes nothing costs lines, and no memory without end.
#[test]
fn lines_that_find_no_room_are_counted() {
    let (tasks, received) = channel();
    let (_tell, written) = watch::channel(0);
    let journal = Journal {
        host: HostName::new("a").expect("a name"),
        tasks: Some(tasks),
        thread: None,
        written,
        waiting: Arc::default(),
        lost: AtomicU64::new(0),
    };
    let write = || journal.write(None, Incident::DriverDeaf);
    (0..LINES_WAITING + 5).for_each(|_| write());
    assert_eq!(received.try_iter().count(), LINES_WAITING);
    write();
    let lines: Vec<_> = received
        .try_iter()
        .filter_map(|task| match task {
            Task::Write(line, _) => Some(line.what),
            Task::Read { .. } => None,
        })
        .collect();
    let [
        What::Incident(Incident::LinesLost { count, .. }),
        What::Incident(Incident::DriverDeaf),
    ] = &lines[..]
    else {
        panic!("{lines:?}");
    };
    assert_eq!(*count, 5);
}
