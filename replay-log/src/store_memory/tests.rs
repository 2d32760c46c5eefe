//! The suite for every store, and the faults that only this one has.

use super::*;
use crate::conformance::{self, Place, sample_batches};
use crate::position::Term;

struct Memory(MemoryStore);

impl Place for Memory {
    fn open(&mut self) -> Box<dyn Store> {
        self.0.restart().unwrap();
        // Like the readers of a process that was killed, those of the old handle see no more.
        Box::new(self.0.clone())
    }

    fn fill(&mut self, full: bool) {
        self.0.limit(full.then(|| self.0.bytes()));
    }

    fn break_syncs(&mut self, broken: bool) {
        self.0.fail_syncs(if broken { u32::MAX } else { 0 });
    }
}

fn filled(count: usize) -> (MemoryStore, Vec<Batch>) {
    let mut store = MemoryStore::new();
    let batches = sample_batches(3, Term(1), LogIndex::START, count);
    for batch in &batches {
        store.append(batch).unwrap();
    }
    (store, batches)
}

fn read_all(store: &MemoryStore) -> Result<Vec<Batch>, ReadError> {
    let mut reader = Store::read_from(store, store.first())?;
    std::iter::from_fn(|| reader.next_batch().transpose()).collect()
}

#[test]
fn keeps_what_every_store_promises() {
    conformance::all(&mut || Box::new(Memory(MemoryStore::new())));
}

#[test]
fn a_crash_loses_what_was_not_synced_and_tears() {
    for survive in 0.. {
        let (mut store, batches) = filled(4);
        store.sync().unwrap();
        let durable = store.durable_tip();
        let more = sample_batches(4, Term(1), durable.index, 3);
        for batch in &more {
            store.append(batch).unwrap();
        }
        let unsynced = store.unsynced_bytes();
        if survive > unsynced {
            break;
        }
        store.crash(survive);
        let torn = store.restart().unwrap();
        let left = read_all(&store).unwrap();
        assert_eq!(left, [&batches[..], &more][..].concat()[..left.len()]);
        assert!(left.len() >= batches.len(), "what was synced survives");
        assert_eq!(left.len() == 7, survive == unsynced);
        assert_eq!(store.unsynced_bytes() + torn, survive);
        assert_eq!(store.durable_tip(), durable);
        // It goes on where it now ends.
        let next = sample_batches(5, Term(2), store.tip().index, 1);
        store.append(&next[0]).unwrap();
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let (store, batches) = filled(5);
    for offset in 0..store.bytes() {
        assert!(store.corrupt(offset, 0x10));
        let error = store.restart().unwrap_err();
        let OpenError::Damaged(damage) = error else {
            panic!("damage, not {error}");
        };
        assert!(damage.offset <= offset);
        assert!(matches!(read_all(&store), Err(ReadError::Damaged(_))));
        assert!(store.corrupt(offset, 0x10));
        store.restart().unwrap();
    }
    assert!(!store.corrupt(store.bytes(), 1));
    assert_eq!(read_all(&store).unwrap(), batches);
}

#[test]
fn a_lying_disk_loses_what_it_had_synced() {
    let (mut store, batches) = filled(5);
    store.sync().unwrap();
    store.lose(2);
    store.restart().unwrap();
    assert_eq!(read_all(&store).unwrap(), batches[..3]);
    assert_eq!(store.durable_tip(), store.tip());
}

#[test]
fn a_disk_that_lies_about_syncs_loses_what_came_after() {
    let (mut store, batches) = filled(3);
    store.sync().unwrap();
    store.lie_about_syncs(true);
    let more = sample_batches(4, Term(1), store.tip().index, 2);
    for batch in &more {
        store.append(batch).unwrap();
    }
    let tip = store.tip();
    assert_eq!(store.sync().unwrap(), tip);
    assert_eq!(store.durable_tip(), tip, "so it says");
    assert!(store.unsynced_bytes() > 0);
    store.crash(0);
    store.restart().unwrap();
    assert_eq!(read_all(&store).unwrap(), batches);
    assert_eq!(store.durable_tip(), store.tip());
    store.lie_about_syncs(false);
    store.append(&more[0]).unwrap();
    store.sync().unwrap();
    store.crash(0);
    assert_eq!(store.tip().index, more[0].end());
}

#[test]
fn a_restored_backup_is_what_was_held_then() {
    let (mut store, batches) = filled(3);
    store.sync().unwrap();
    let backup = store.snapshot();
    let mut ahead = Store::read_from(&store, LogIndex::START).unwrap();
    let more = sample_batches(4, Term(1), store.tip().index, 2);
    for batch in &more {
        store.append(batch).unwrap();
    }
    store.sync().unwrap();
    while ahead.next_batch().unwrap().is_some() {}
    store.roll_back(&backup);
    store.restart().unwrap();
    assert_eq!(read_all(&store).unwrap(), batches);
    assert_eq!(store.durable_tip(), store.tip());
    let gone = ahead.next_batch();
    assert!(matches!(gone, Err(ReadError::Truncated { .. })));
    store.append(&more[0]).unwrap();
}

#[test]
fn a_write_that_is_refused_may_be_tried_again() {
    let (mut store, _) = filled(5);
    store.fail_appends(2);
    let next = &sample_batches(5, Term(2), store.tip().index, 1)[0];
    for _ in 0..2 {
        let error = store.append(next).unwrap_err();
        assert!(!error.is_doubtful(), "{error}");
    }
    store.append(next).unwrap();
    store.sync().unwrap();
}
