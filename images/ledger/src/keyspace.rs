//! The data: keys and values in order, the changes that the disk does not have yet, and the limits.

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::ops::Bound;

use crate::limits::KEY_OVERHEAD;
use crate::record::Record;

/// The data would outgrow memory or disk: the write is refused, nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// How much data there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Bytes of memory, overhead included.
    pub memory: usize,
    /// Bytes of log that hold every key once.
    pub log: usize,
}

/// All keys and values. An ordered map: nothing about it depends on a random seed.
#[derive(Debug)]
pub struct Keyspace {
    map: BTreeMap<Box<[u8]>, Box<[u8]>>,
    capacity: Capacity,
    memory: usize,
    log: usize,
    changes: Vec<u8>,
}

impl Keyspace {
    /// No keys yet.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            map: BTreeMap::new(),
            capacity,
            memory: 0,
            log: 0,
            changes: Vec::new(),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &[u8]) -> Option<&[u8]> {
        self.map.get(key).map(AsRef::as_ref)
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// All keys in order.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.map.keys().map(AsRef::as_ref)
    }

    /// The memory the data takes, in bytes.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// How much data there may be.
    pub fn capacity(&self) -> Capacity {
        self.capacity
    }

    /// Bytes of changes that wait for the disk.
    pub fn pending(&self) -> usize {
        self.changes.len()
    }

    /// Hands over the changes since the last call, as the payload of a batch.
    pub fn take_changes(&mut self) -> Vec<u8> {
        core::mem::take(&mut self.changes)
    }

    /// Whether these keys with values of these lengths can be set, all together.
    pub fn check<'k>(&self, pairs: impl Iterator<Item = (&'k [u8], usize)>) -> Result<(), Full> {
        let mut memory = self.memory;
        let mut log = self.log;
        for (key, value) in pairs {
            memory += key.len() + value + KEY_OVERHEAD;
            log += Record::set_len(key.len(), value);
            // A key that comes twice has its old value taken off twice: the data can outgrow the
            // capacity by less than one command, for which the capacity leaves room.
            if let Some(old) = self.get(key) {
                memory = memory.saturating_sub(key.len() + old.len() + KEY_OVERHEAD);
                log = log.saturating_sub(Record::set_len(key.len(), old.len()));
            }
        }
        let shrinks = memory <= self.memory && log <= self.log;
        if shrinks || (memory <= self.capacity.memory && log <= self.capacity.log) {
            Ok(())
        } else {
            Err(Full)
        }
    }

    /// Sets a key, if there is room.
    pub fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), Full> {
        self.check(core::iter::once((key, value.len())))?;
        self.set_checked(key, value);
        Ok(())
    }

    /// Sets a key for which [`Keyspace::check`] has found room.
    pub fn set_checked(&mut self, key: &[u8], value: &[u8]) {
        Record::Set { key, value }.encode(&mut self.changes);
        self.insert(key, value);
    }

    /// Deletes a key; says whether it was there.
    pub fn delete(&mut self, key: &[u8]) -> bool {
        let was_there = self.remove(key);
        if was_there {
            Record::Delete { key }.encode(&mut self.changes);
        }
        was_there
    }

    /// Deletes all keys.
    pub fn clear(&mut self) {
        if !self.map.is_empty() {
            Record::Clear.encode(&mut self.changes);
            self.forget_all();
        }
    }

    /// Applies a record read from the log: what was accepted once is accepted again.
    pub fn replay(&mut self, record: Record<'_>) {
        match record {
            Record::Set { key, value } => self.insert(key, value),
            Record::Delete { key } => {
                self.remove(key);
            }
            Record::Clear => self.forget_all(),
        }
    }

    /// Encodes keys and values into `payload`, from the first key after `after`, until `bytes` were
    /// added or no key is left. Returns the last key when some are left.
    pub fn copy_out(
        &self,
        after: Option<&[u8]>,
        bytes: usize,
        payload: &mut Vec<u8>,
    ) -> Option<Box<[u8]>> {
        let full = payload.len() + bytes;
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let mut rest = self
            .map
            .range::<[u8], _>((from, Bound::Unbounded))
            .peekable();
        while let Some((key, value)) = rest.next() {
            Record::Set { key, value }.encode(payload);
            if payload.len() >= full && rest.peek().is_some() {
                return Some(key.clone());
            }
        }
        None
    }

    fn insert(&mut self, key: &[u8], value: &[u8]) {
        self.memory += value.len();
        self.log += value.len();
        if let Some(old) = self.map.get_mut(key) {
            self.memory -= old.len();
            self.log -= old.len();
            if old.len() == value.len() {
                old.copy_from_slice(value);
            } else {
                *old = value.into();
            }
        } else {
            self.memory += key.len() + KEY_OVERHEAD;
            self.log += Record::set_len(key.len(), 0);
            self.map.insert(key.into(), value.into());
        }
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        let Some(old) = self.map.remove(key) else {
            return false;
        };
        self.memory -= key.len() + old.len() + KEY_OVERHEAD;
        self.log -= Record::set_len(key.len(), old.len());
        true
    }

    /// Empties it without a trace in the changes: what was replayed does not count.
    pub(crate) fn forget_all(&mut self) {
        self.map.clear();
        self.memory = 0;
        self.log = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::records;

    const SMALL: Capacity = Capacity {
        memory: 1000,
        log: 1000,
    };

    #[test]
    fn what_does_not_fit_is_refused_and_changes_nothing() {
        let mut keys = Keyspace::new(SMALL);
        keys.set(b"a", &[1; 500]).unwrap();
        let before = keys.pending();
        assert_eq!(keys.set(b"b", &[1; 500]), Err(Full));
        assert_eq!((keys.len(), keys.pending()), (1, before));
        // Replacing by something smaller and deleting always work.
        keys.set(b"a", &[1; 499]).unwrap();
        assert!(keys.delete(b"a"));
        assert_eq!((keys.memory, keys.log), (0, 0));
    }

    #[test]
    fn replaying_the_changes_gives_the_same_data() {
        let mut keys = Keyspace::new(SMALL);
        keys.set(b"a", b"1").unwrap();
        keys.set(b"b", b"22").unwrap();
        keys.clear();
        keys.set(b"c", b"3").unwrap();
        keys.set(b"c", b"4").unwrap();
        keys.set(b"d", b"").unwrap();
        assert!(keys.delete(b"d") && !keys.delete(b"d"));
        let mut copy = Keyspace::new(SMALL);
        for record in records(&keys.take_changes()) {
            copy.replay(record.unwrap());
        }
        assert_eq!(copy.map, keys.map);
        assert_eq!((copy.memory, copy.log), (keys.memory, keys.log));
    }

    #[test]
    fn copying_out_in_steps_covers_every_key_once() {
        let mut keys = Keyspace::new(SMALL);
        for key in [b"a", b"b", b"c", b"d"] {
            keys.set(key, b"x").unwrap();
        }
        let (mut payload, mut after, mut steps) = (Vec::new(), None, 0);
        loop {
            after = keys.copy_out(after.as_deref(), 20, &mut payload);
            steps += 1;
            if after.is_none() {
                break;
            }
        }
        let copied: Vec<_> = records(&payload).map(Result::unwrap).collect();
        assert_eq!((copied.len(), steps), (4, 2));
    }
}
