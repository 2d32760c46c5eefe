//! The log of one VM on this host: a store, the newest batches in memory, and the work on it that
//! must not hold up heartbeats.
//!
//! ```text
//!   here ── append, look up ──► done at once (a write to the page cache)
//!    │  ▲
//!    │  └──────── back with what came of it ────────┐
//!    └── sync, or any append of a store that syncs ──┴──► away, on a blocking thread; what is asked
//!                                                        for meanwhile waits in order
//! ```

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use replay_log::{
    Batch, FileOptions, FileStore, IoFailure, LogIndex, LogReader, LogTip, OpenError, ReadError,
    Store, SyncPolicy,
};
use tokio::sync::mpsc::UnboundedSender;

use crate::protocol::{HostName, Incarnation};

/// The newest batches are kept in memory up to this many bytes: streams to replicas and to the
/// machine rarely read the disk.
const RECENT_BYTES: usize = 8 << 20;

/// The ending of the folder that holds a damaged log.
const DAMAGED: &str = "damaged";

/// What was asked of the log, in order. What is reported of an append or a sync is about the holding
/// that it was asked for, however late it is done: another may have begun by then.
enum Work {
    Append(Incarnation, Batch),
    Sync(Incarnation),
    LookUp(HostName, LogIndex),
}

/// What came of it.
#[derive(Debug)]
pub enum LogNews {
    /// The log is held through here by the kernel.
    Stored(Incarnation, LogTip),
    /// The log is held through here by the disk.
    Synced(Incarnation, LogTip),
    /// What was asked for a peer.
    TipAt(HostName, LogIndex, Option<LogTip>),
    /// The store failed.
    Failed(String),
}

/// A store that comes back from a blocking thread, with news.
pub struct Returned {
    store: FileStore,
    news: Vec<LogNews>,
    generation: u64,
}

/// The log of one VM on this host.
pub struct LogKeeper {
    dir: PathBuf,
    options: FileOptions,
    store: Option<FileStore>,
    waiting: VecDeque<Work>,
    recent: VecDeque<Batch>,
    recent_bytes: usize,
    tip: LogTip,
    incarnation: Incarnation,
    /// Raised when the log is dropped: what an earlier store reports is not about this one.
    generation: u64,
    returns: UnboundedSender<Returned>,
}

impl LogKeeper {
    /// Opens the log in `dir`. Stores that were away come back through `returns`, to be handed to
    /// [`LogKeeper::returned`].
    pub fn open(
        dir: &Path,
        options: FileOptions,
        incarnation: Incarnation,
        returns: UnboundedSender<Returned>,
    ) -> Result<Self, OpenError> {
        let store = FileStore::open(dir, options)?;
        Ok(Self {
            dir: dir.to_owned(),
            options,
            tip: store.tip(),
            store: Some(store),
            waiting: VecDeque::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            incarnation,
            generation: 0,
            returns,
        })
    }

    /// The same where what is there is damaged: that is set aside as evidence, the only one that is
    /// kept, and an empty log begins in its place.
    pub fn open_anew(
        dir: &Path,
        options: FileOptions,
        incarnation: Incarnation,
        returns: UnboundedSender<Returned>,
    ) -> Result<Self, OpenError> {
        let aside = dir.with_extension(DAMAGED);
        // An older one may be there or not; if it stays, the next line says so.
        let _ = std::fs::remove_dir_all(&aside);
        std::fs::rename(dir, &aside).map_err(|source| {
            OpenError::Io(IoFailure {
                action: "set aside the damaged log in",
                path: dir.to_owned(),
                source,
            })
        })?;
        Self::open(dir, options, incarnation, returns)
    }

    /// Where the log ends, appends that wait included.
    pub const fn tip(&self) -> LogTip {
        self.tip
    }

    /// The first batch that is kept.
    pub fn first_batch(&self) -> Result<Option<Batch>, ReadError> {
        if let Some(batch) = self
            .recent
            .front()
            .filter(|batch| batch.first() == LogIndex::START)
        {
            return Ok(Some(batch.clone()));
        }
        match &self.store {
            Some(store) => store.read_from(LogIndex::START)?.next_batch(),
            None => Ok(None),
        }
    }

    /// How many bytes the log takes on disk, as far as is known now.
    pub fn bytes(&self) -> Option<u64> {
        self.store.as_ref().map(FileStore::bytes)
    }

    /// Appends a batch. The answer comes as news.
    pub fn append(&mut self, batch: Batch, news: &mut Vec<LogNews>) {
        self.tip = batch.tip(self.tip.chain);
        self.recent_bytes += batch.payload().len();
        self.recent.push_back(batch.clone());
        while self.recent_bytes > RECENT_BYTES {
            let Some(old) = self.recent.pop_front() else {
                break;
            };
            self.recent_bytes -= old.payload().len();
        }
        self.ask(Work::Append(self.incarnation, batch), news);
    }

    /// Makes durable what was appended.
    pub fn sync(&mut self, news: &mut Vec<LogNews>) {
        self.ask(Work::Sync(self.incarnation), news);
    }

    /// Looks up where a batch ends.
    pub fn look_up(&mut self, peer: HostName, index: LogIndex, news: &mut Vec<LogNews>) {
        self.ask(Work::LookUp(peer, index), news);
    }

    /// What is held is this holding.
    pub const fn set_incarnation(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// From the next holding on, or from now on while nothing is held, the log is kept like this.
    pub fn set_options(&mut self, options: FileOptions) {
        self.options = options;
        if self.tip.index == LogIndex::START
            && self.waiting.is_empty()
            && self.store.take().is_some()
        {
            self.store = FileStore::open(&self.dir, options).ok();
        }
    }

    /// Forgets the whole log and begins another holding.
    pub fn drop_log(&mut self, incarnation: Incarnation) -> Result<(), OpenError> {
        self.generation += 1;
        self.waiting.clear();
        self.recent.clear();
        self.recent_bytes = 0;
        self.incarnation = incarnation;
        // The lock on the folder goes with the store; one that is away keeps its own folder, which
        // is gone by name when it comes back.
        self.store = None;
        let gone = self.dir.with_extension(format!("old-{}", self.generation));
        let moved = std::fs::rename(&self.dir, &gone);
        if moved.is_ok() {
            std::thread::spawn(move || std::fs::remove_dir_all(gone));
        }
        let store = FileStore::open(&self.dir, self.options)?;
        self.tip = store.tip();
        self.store = Some(store);
        Ok(())
    }

    /// A store is back.
    pub fn returned(&mut self, returned: Returned, news: &mut Vec<LogNews>) {
        if returned.generation != self.generation {
            return;
        }
        self.store = Some(returned.store);
        news.extend(returned.news);
        self.proceed(news);
    }

    fn ask(&mut self, work: Work, news: &mut Vec<LogNews>) {
        self.waiting.push_back(work);
        self.proceed(news);
    }

    /// Whether something may wait for the disk and so must not run here.
    fn blocks(&self, work: &Work) -> bool {
        match work {
            Work::Sync(_) => true,
            Work::Append(..) => self.options.sync != SyncPolicy::Never,
            Work::LookUp(..) => false,
        }
    }

    fn proceed(&mut self, news: &mut Vec<LogNews>) {
        if self.waiting.iter().any(|work| self.blocks(work)) {
            self.send_away();
            return;
        }
        let Some(store) = &mut self.store else { return };
        work_off(store, self.waiting.drain(..), news);
    }

    fn send_away(&mut self) {
        let Some(mut store) = self.store.take() else {
            return;
        };
        let work = std::mem::take(&mut self.waiting);
        let generation = self.generation;
        let returns = self.returns.clone();
        tokio::task::spawn_blocking(move || {
            let mut news = Vec::new();
            work_off(&mut store, work, &mut news);
            // Without a receiver the VM is gone from this host, and nobody asks.
            let _ = returns.send(Returned {
                store,
                news,
                generation,
            });
        });
    }

    /// Reads on from a place in the log. `None`: nothing there yet, or the store is away; try again
    /// after the next news.
    pub fn read(&self, cursor: &mut Cursor) -> Result<Option<Batch>, ReadError> {
        if cursor.next >= self.tip.index {
            return Ok(None);
        }
        let found = self
            .recent
            .partition_point(|batch| batch.first() < cursor.next);
        if let Some(batch) = self
            .recent
            .get(found)
            .filter(|batch| batch.first() == cursor.next)
        {
            cursor.reader = None;
            cursor.next = batch.end();
            return Ok(Some(batch.clone()));
        }
        let reader = match &mut cursor.reader {
            Some(reader) => reader,
            empty => {
                let Some(store) = &self.store else {
                    return Ok(None);
                };
                empty.insert(store.read_from(cursor.next)?)
            }
        };
        let batch = reader.next_batch()?;
        if let Some(batch) = &batch {
            cursor.next = batch.end();
        }
        Ok(batch)
    }
}

fn work_off(store: &mut FileStore, work: impl IntoIterator<Item = Work>, news: &mut Vec<LogNews>) {
    // One report for a row of appends of one holding.
    let mut stored: Option<(Incarnation, LogTip)> = None;
    for work in work {
        let done = match work {
            Work::Append(incarnation, batch) => {
                if stored.is_some_and(|(of, _)| of != incarnation) {
                    report(&mut stored, news);
                }
                let appended = store.append(&batch).map_err(|error| error.to_string());
                appended.map(|tip| stored = Some((incarnation, tip)))
            }
            Work::Sync(incarnation) => {
                let synced = store.sync().map_err(|error| error.to_string());
                synced.map(|tip| {
                    report(&mut stored, news);
                    news.push(LogNews::Synced(incarnation, tip));
                })
            }
            Work::LookUp(peer, index) => {
                let floor = store.floor(index).map_err(|error| error.to_string());
                floor.map(|floor| {
                    let tip = floor.filter(|tip| tip.index == index);
                    news.push(LogNews::TipAt(peer, index, tip));
                })
            }
        };
        if let Err(reason) = done {
            news.push(LogNews::Failed(reason));
            return;
        }
    }
    report(&mut stored, news);
}

fn report(stored: &mut Option<(Incarnation, LogTip)>, news: &mut Vec<LogNews>) {
    let last = stored.take();
    news.extend(last.map(|(incarnation, tip)| LogNews::Stored(incarnation, tip)));
}

/// A place in the log from which somebody reads on.
pub struct Cursor {
    next: LogIndex,
    reader: Option<Box<dyn LogReader>>,
}

impl Cursor {
    /// From here, where a batch begins.
    pub const fn new(next: LogIndex) -> Self {
        Self { next, reader: None }
    }

    /// Where the next batch begins.
    pub const fn next(&self) -> LogIndex {
        self.next
    }
}
