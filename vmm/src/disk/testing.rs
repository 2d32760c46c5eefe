//! A file that forgets what was not synced, as a disk does when its host loses power.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::Storage;

const SECTOR: usize = 512;

#[derive(Debug, Default)]
struct Inner {
    /// What survives for certain.
    durable: Vec<u8>,
    /// What a reader sees.
    cached: Vec<u8>,
    /// What was written since the last sync, sector by sector.
    pending: Vec<(usize, Vec<u8>)>,
    fails: bool,
    syncs: usize,
}

/// Several files of one host: how many operations it lives to see.
#[derive(Clone, Debug)]
pub struct Fuse(Arc<AtomicU64>);

impl Fuse {
    /// Power fails after this many writes, syncs and truncations.
    pub fn set(&self, operations: u64) {
        self.0.store(operations, Ordering::SeqCst);
    }

    fn burn(&self) -> io::Result<()> {
        let left = self.0.load(Ordering::SeqCst).checked_sub(1);
        self.set(left.ok_or(io::ErrorKind::BrokenPipe)?);
        Ok(())
    }
}

impl Default for Fuse {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(u64::MAX)))
    }
}

/// A file in memory. Clones are the same file.
#[derive(Clone, Debug, Default)]
pub struct Volatile(Arc<Mutex<Inner>>, Fuse);

impl Volatile {
    /// An empty file on a host that may lose power.
    pub fn on(fuse: &Fuse) -> Self {
        Self(Arc::default(), fuse.clone())
    }

    /// Loses power: each sector that was written since the last sync is on the disk if `survives`
    /// says so. Returns what the next process finds; this one's handle is dead to it.
    pub fn crash(&self, mut survives: impl FnMut() -> bool) -> Self {
        let inner = self.0.lock().unwrap();
        let mut content = inner.durable.clone();
        for (offset, data) in &inner.pending {
            if survives() {
                let end = offset + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(data);
            }
        }
        let inner = Inner {
            durable: content.clone(),
            cached: content,
            ..Inner::default()
        };
        Self(Arc::new(Mutex::new(inner)), self.1.clone())
    }

    /// From now on, writes and syncs fail.
    pub fn fail(&self, fails: bool) {
        self.0.lock().unwrap().fails = fails;
    }

    /// How often it was synced.
    pub fn syncs(&self) -> usize {
        self.0.lock().unwrap().syncs
    }
}

impl Storage for Volatile {
    fn read_exact_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.0.lock().unwrap();
        let from = inner
            .cached
            .get(offset as usize..offset as usize + data.len());
        data.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.1.burn()?;
        let mut inner = self.0.lock().unwrap();
        if inner.fails {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let (start, end) = (offset as usize, offset as usize + data.len());
        if inner.cached.len() < end {
            inner.cached.resize(end, 0);
        }
        inner.cached[start..end].copy_from_slice(data);
        let mut at = start;
        while at < end {
            let stop = (at / SECTOR * SECTOR + SECTOR).min(end);
            inner
                .pending
                .push((at, data[at - start..stop - start].to_vec()));
            at = stop;
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.1.burn()?;
        let mut inner = self.0.lock().unwrap();
        if inner.fails {
            return Err(io::ErrorKind::StorageFull.into());
        }
        inner.durable = inner.cached.clone();
        inner.pending.clear();
        inner.syncs += 1;
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.1.burn()?;
        let mut inner = self.0.lock().unwrap();
        inner.cached.resize(len as usize, 0);
        // Sizes are metadata that a journal keeps in order; the tests lose data, not those.
        inner.durable.resize(len as usize, 0);
        inner
            .pending
            .retain(|(offset, data)| offset + data.len() <= len as usize);
        Ok(())
    }
}
