//! Whose folder it is, and where it comes from.

use std::process::Command;

use super::*;
use crate::agent::witness::testing::{record, vm};

fn with_a_record(path: &Path) {
    let mut opened = Folder::open(path).expect("opened");
    let entry = Entry {
        record: Some(record(1, 1, "a", &["b"])),
        set_back: None,
        named_by: None,
    };
    let changes = Entries::from([(vm(), entry)]);
    opened
        .store
        .append(&opened.entries, &changes)
        .expect("kept");
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status();
    assert!(copied.expect("cp runs").success());
}

#[test]
fn a_folder_is_its_own_over_restarts_and_only_one_process_has_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("records");
    with_a_record(&path);
    let opened = Folder::open(&path).expect("opened");
    assert!(!opened.copied);
    assert_eq!(opened.entries.len(), 1);
    assert!(matches!(
        Folder::open(&path),
        Err(OpenError::Locked(LockFolderError::Taken { folder, .. })) if folder == path
    ));
    drop(opened);
    assert!(!Folder::open(&path).expect("free again").copied);
}

#[test]
fn a_copy_is_none_and_neither_is_what_was_put_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let (path, backup) = (dir.path().join("records"), dir.path().join("backup"));
    with_a_record(&path);
    copy(&path, &backup);
    let opened = Folder::open(&backup).expect("opened");
    assert!(opened.copied);
    assert_eq!(opened.entries.len(), 1, "it is read all the same");
    drop(opened);
    // Put back where it was.
    fs::remove_dir_all(&path).expect("removed");
    copy(&backup, &path);
    let opened = Folder::open(&path).expect("opened");
    assert!(opened.copied);
    // Until it is said that it is good.
    opened.folder.settle(opened.store.id()).expect("settled");
    drop(opened);
    assert!(!Folder::open(&path).expect("opened").copied);
}

#[test]
fn files_of_another_folder_are_not_taken_for_its_own() {
    let dir = tempfile::tempdir().expect("a folder");
    let (path, other) = (dir.path().join("records"), dir.path().join("other"));
    with_a_record(&path);
    with_a_record(&other);
    for slot in ["slot-0", "slot-1"] {
        fs::copy(other.join(slot), path.join(slot)).expect("copied");
    }
    assert!(Folder::open(&path).expect("opened").copied);
    for slot in ["slot-0", "slot-1"] {
        fs::remove_file(path.join(slot)).expect("removed");
    }
    assert!(matches!(
        Folder::open(&path),
        Err(OpenError::Damaged { .. })
    ));
}

#[test]
fn records_of_an_earlier_version_are_taken_over() {
    let dir = tempfile::tempdir().expect("a folder");
    let text = serde_json::to_string_pretty(&record(3, 7, "a", &["b"])).expect("JSON");
    let file = dir.path().join("ledger.json");
    fs::write(&file, &text).expect("written");
    fs::write(dir.path().join("slot-0"), b"a start that was cut off").expect("written");
    let opened = Folder::open(dir.path()).expect("opened");
    let kept = opened.entries[&vm()].record.clone();
    assert_eq!(kept, Some(record(3, 7, "a", &["b"])));
    drop(opened);
    assert!(!file.exists());
    assert!(dir.path().join("before/ledger.json").exists());
    let again = Folder::open(dir.path()).expect("opened");
    assert_eq!(again.entries[&vm()].record, kept);
    assert!(!again.copied);
    drop(again);
    let other = tempfile::tempdir().expect("a folder");
    fs::write(other.path().join("ledger.json"), &text[..20]).expect("written");
    assert!(matches!(
        Folder::open(other.path()),
        Err(OpenError::Damaged { .. })
    ));
}
