//! `log`: what is in a recorded log, and whether it is whole.

use super::*;

/// A log of a header and `marks` marks, in several batches.
pub fn write_log(dir: &std::path::Path, marks: u64) {
    use replay_log::{
        BatchBuilder, Entry, FileOptions, FileStore, Header, ImageDigest, LogIndex, Mark,
        MarkDigest, Position, Store as _, Term,
    };
    let header = Header {
        machine_model: vmm::MACHINE_MODEL,
        image: ImageDigest([7; 32]),
        config: bytes::Bytes::new(),
        disks: Vec::new(),
        term: Term(1),
        boot: [1; 16],
    };
    let mut store = FileStore::open(dir, FileOptions::default()).expect("an empty folder");
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    builder.push(&Entry::Header(header)).expect("fits");
    for n in 1..=marks {
        let mark = Mark {
            at: Position(n),
            digest: MarkDigest(n.wrapping_mul(0x1234_5678_9abc_def1)),
        };
        builder.push(&Entry::Mark(mark)).expect("fits");
        if n % 10 == 0 {
            let batch = builder.finish().expect("not empty");
            store.append(&batch).expect("appended");
        }
    }
}

#[test]
fn a_whole_log_is_counted_printed_and_verified() {
    let dir = tempfile::tempdir().expect("a folder");
    write_log(dir.path(), 30);
    let dir = dir.path().to_str().expect("UTF-8");
    let (code, out, err) = run(&["log", "stat", dir, "--json"]);
    assert_eq!(code, 0, "{err}");
    let stat: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(stat["end"], 31);
    assert_eq!(stat["entries"]["mark"], 30);
    assert_eq!(stat["entries"]["header"], 1);
    assert_eq!(stat["landmarks"], 30);
    let (code, out, _) = run(&["log", "inspect", dir, "--from", "12", "--limit", "3"]);
    assert_eq!(code, 0);
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(out.trim_start().starts_with("12  @12"), "{out}");
    let (code, out, _) = run(&["log", "verify", dir]);
    assert_eq!(code, 0);
    assert!(out.contains("entries 0..31 are whole"), "{out}");
}

#[test]
fn a_damaged_log_names_segment_and_offset_and_its_good_part_stays_readable() {
    let dir = tempfile::tempdir().expect("a folder");
    write_log(dir.path(), 3000);
    let segment = std::fs::read_dir(dir.path())
        .expect("a folder")
        .map(|file| file.expect("a file").path())
        .find(|path| path.extension().is_some_and(|e| e == "open"))
        .expect("a segment");
    let mut bytes = std::fs::read(&segment).expect("readable");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&segment, bytes).expect("writable");
    let dir = dir.path().to_str().expect("UTF-8");
    let (code, out, err) = run(&["log", "verify", dir]);
    assert_eq!(code, 4, "{err}");
    assert!(out.contains("are whole"), "{out}");
    let segment = segment.to_str().expect("UTF-8");
    assert!(
        err.contains(&format!("segment {segment} is damaged at byte")),
        "{err}"
    );
    let (code, out, _) = run(&["log", "inspect", dir]);
    assert_eq!(code, 4);
    assert!(out.lines().count() > 1000, "the good part is printed");
}

#[test]
fn a_folder_without_a_log_is_a_failure() {
    let dir = tempfile::tempdir().expect("a folder");
    for command in ["stat", "inspect", "verify"] {
        let dir = dir.path().to_str().expect("UTF-8");
        let (code, _, err) = run(&["log", command, dir]);
        assert_eq!(code, 1, "{command}");
        assert!(err.contains("there is no log in"), "{command}: {err}");
    }
}
