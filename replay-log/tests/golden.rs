//! Files of every format version, committed: they must be read for ever, and what they hold must
//! be written the same way for as long as the version is current.
//!
//! `golden/v1/entries.json` says what the log is; the other files hold it in the forms of format
//! version 1. `cargo test -p replay-log --test golden -- --ignored` writes those that are missing
//! (for a new version: none is ever written over).

use std::fs;
use std::path::{Path, PathBuf};

use replay_log::{
    Batch, BatchBuilder, Entry, FORMAT_VERSION, FileOptions, FileStore, LogIndex, Store,
    StreamDecoder, StreamEncoder, SyncPolicy, Term, inspect, verify,
};

const OPTIONS: FileOptions = FileOptions {
    sync: SyncPolicy::Never,
    segment_bytes: 300,
    checkpoint_bytes: 100,
};

fn folder(version: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

fn entries(version: u32) -> Vec<Entry> {
    let json = fs::read(folder(version).join("entries.json")).unwrap();
    serde_json::from_slice(&json).unwrap()
}

/// The entries in batches of four; a term change is the first of its term's first batch.
fn batches(entries: &[Entry]) -> Vec<Batch> {
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    let mut batches = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        let change = match entry {
            Entry::Term(change) => Some(change.term),
            _ => None,
        };
        if i % 4 == 0 || change.is_some() {
            batches.extend(builder.finish());
        }
        if let Some(term) = change {
            builder.set_term(term);
        }
        builder.push(entry).unwrap();
    }
    batches.extend(builder.finish());
    batches
}

fn frames(batches: &[Batch]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for batch in batches {
        batch.encode_frame(&mut bytes);
    }
    bytes
}

fn read_segments(dir: &Path) -> Vec<Batch> {
    inspect(dir)
        .unwrap()
        .map(|found| found.unwrap().batch)
        .collect()
}

#[test]
fn version_1_is_read_and_written_the_same() {
    let (dir, expected) = (folder(1), entries(1));
    let written = fs::read(dir.join("batches")).unwrap();
    let mut rest = &written[..];
    let mut read = Vec::new();
    while let Some((batch, len)) = Batch::decode_frame(rest).unwrap() {
        read.push(batch);
        rest = &rest[len..];
    }
    assert!(rest.is_empty());
    let decoded: Vec<_> = read.iter().flat_map(|b| b.decode().unwrap()).collect();
    assert_eq!(decoded, expected);
    assert_eq!(read, batches(&expected));
    assert_eq!(frames(&batches(&decoded)), written);
}

#[test]
fn version_1_streams_are_read() {
    // How zstd compresses is not ours to keep the same; how it decompresses is.
    let mut decoder = StreamDecoder::new();
    decoder.feed(&fs::read(folder(1).join("stream")).unwrap());
    let read: Vec<_> = std::iter::from_fn(|| decoder.poll().unwrap()).collect();
    assert_eq!(read, batches(&entries(1)));
}

#[test]
fn version_1_segments_are_read_and_written_on() {
    let golden = folder(1);
    let expected = batches(&entries(1));
    let report = verify(&golden, |_| {}).unwrap();
    assert!(report.damage.is_none() && report.torn.is_none());
    assert!(report.segments.len() > 1 && report.segments[0].sealed);
    assert_eq!(read_segments(&golden), expected);
    let chain = expected
        .iter()
        .fold(replay_log::Chain::default(), |chain, b| b.chain(chain));
    assert_eq!(report.tip.chain, chain);

    let copy = tempfile::tempdir().unwrap();
    for segment in &report.segments {
        let name = segment.path.file_name().unwrap();
        fs::copy(&segment.path, copy.path().join(name)).unwrap();
    }
    let mut store = FileStore::open(copy.path(), OPTIONS).unwrap();
    let mut builder = BatchBuilder::new(store.tip().term, store.tip().index);
    builder.push(entries(1).last().unwrap()).unwrap();
    let more = builder.finish().unwrap();
    store.append(&more).unwrap();
    let all = [&expected[..], &[more]].concat();
    assert_eq!(read_segments(copy.path()), all);
}

#[test]
#[ignore = "writes the golden files that are missing"]
fn write_missing() {
    let dir = folder(FORMAT_VERSION);
    let batches = batches(&entries(FORMAT_VERSION));
    let write = |name: &str, bytes: Vec<u8>| {
        let path = dir.join(name);
        if !path.exists() {
            fs::write(path, bytes).unwrap();
        }
    };
    write("batches", frames(&batches));
    let mut stream = StreamEncoder::new();
    let sent = batches.iter().flat_map(|batch| stream.push(batch));
    write("stream", sent.collect());
    if read_segments(&dir).is_empty() {
        let mut store = FileStore::open(&dir, OPTIONS).unwrap();
        for batch in &batches {
            store.append(batch).unwrap();
        }
    }
}
