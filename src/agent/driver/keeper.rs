//! The log of one VM on this host: a store, the newest batches in memory, and the work on it that
//! must not hold up heartbeats.
//!
//! ```text
//!   here ── append of a log that is held in memory ──► held at once, written by `write_down`
//!    │  ▲   look up ──► done at once, after the appends before it
//!    │  └──────── back with what came of it ────────┐
//!    └── sync, or any append of a store that syncs ──┴──► away, on a blocking thread; what is asked
//!                                                        for meanwhile waits in order
//! ```

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use replay_log::{
    Batch, Entry, FileOptions, FileStore, Header, IoFailure, LogIndex, LogReader, LogTip,
    OpenError, ReadError, Store, SyncPolicy,
};
use tokio::sync::mpsc::UnboundedSender;

use crate::protocol::{HostName, Incarnation};
use crate::sentence::sentence;

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
    /// The log is held through here: in memory, or by the kernel.
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
}

/// The log of one VM on this host.
pub struct LogKeeper {
    dir: PathBuf,
    options: FileOptions,
    /// `None` while it is away, and after it could not be opened.
    store: Option<FileStore>,
    away: bool,
    waiting: VecDeque<Work>,
    recent: VecDeque<Batch>,
    recent_bytes: usize,
    tip: LogTip,
    incarnation: Incarnation,
    /// Counts the logs that were dropped, for the names of their folders.
    dropped: u64,
    /// The log is to be dropped as soon as its store is back: one that is away still writes by the
    /// names of its files, which the next log's will have, too.
    drop_when_back: bool,
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
            away: false,
            waiting: VecDeque::new(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            incarnation,
            dropped: 0,
            drop_when_back: false,
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
    fn first_batch(&self) -> Result<Option<Batch>, ReadError> {
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

    /// The header that the log begins with; `None` while it is empty, or when its beginning is gone.
    pub fn header(&self) -> Option<Header> {
        let entries = self.first_batch().ok()??.decode().ok()?;
        match entries.into_iter().next() {
            Some(Entry::Header(header)) => Some(header),
            _ => None,
        }
    }

    /// How many bytes the log takes on disk, as far as is known now.
    pub fn bytes(&self) -> Option<u64> {
        self.store.as_ref().map(Store::bytes)
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
        if self.options.sync == SyncPolicy::Never {
            // Held is held in memory: whoever waits for that does not wait for the file.
            self.waiting
                .push_back(Work::Append(self.incarnation, batch));
            news.push(LogNews::Stored(self.incarnation, self.tip));
        } else {
            self.ask(Work::Append(self.incarnation, batch), news);
        }
    }

    /// Whether there is something for [`Self::write_down`] to do.
    pub fn is_unwritten(&self) -> bool {
        self.store.is_some() && !self.waiting.is_empty()
    }

    /// Writes what was appended in memory.
    pub fn write_down(&mut self, news: &mut Vec<LogNews>) {
        self.proceed(news);
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
    pub fn set_options(&mut self, options: FileOptions) -> Result<(), OpenError> {
        self.options = options;
        if self.tip.index == LogIndex::START
            && self.waiting.is_empty()
            && self.store.take().is_some()
        {
            self.store = Some(FileStore::open(&self.dir, options)?);
        }
        Ok(())
    }

    /// Forgets the whole log and begins another holding.
    pub fn drop_log(&mut self, incarnation: Incarnation) -> Result<(), OpenError> {
        self.waiting.clear();
        self.recent.clear();
        self.recent_bytes = 0;
        self.incarnation = incarnation;
        self.tip = LogTip::default();
        if self.away {
            self.drop_when_back = true;
            return Ok(());
        }
        self.begin_anew()
    }

    /// Sets the folder aside, to be removed, and begins another log in its place.
    fn begin_anew(&mut self) -> Result<(), OpenError> {
        self.drop_when_back = false;
        // The lock on the folder goes with the store.
        self.store = None;
        self.dropped += 1;
        let gone = self.dir.with_extension(format!("old-{}", self.dropped));
        match std::fs::rename(&self.dir, &gone) {
            Ok(()) => drop(std::thread::spawn(move || std::fs::remove_dir_all(gone))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(OpenError::Io(IoFailure {
                    action: "set aside the log that was given up in",
                    path: self.dir.clone(),
                    source,
                }));
            }
        }
        self.store = Some(FileStore::open(&self.dir, self.options)?);
        Ok(())
    }

    /// A store is back.
    pub fn returned(&mut self, returned: Returned, news: &mut Vec<LogNews>) {
        self.away = false;
        self.store = Some(returned.store);
        if self.drop_when_back {
            // What it reports is about the log that is given up.
            if let Err(error) = self.begin_anew() {
                news.push(LogNews::Failed(sentence(&error)));
                return;
            }
        } else {
            news.extend(returned.news);
        }
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
        let mut done = Vec::new();
        work_off(store, self.waiting.drain(..), &mut done);
        // What is held in memory was told when it was.
        done.retain(|news| !matches!(news, LogNews::Stored(..)));
        news.append(&mut done);
    }

    fn send_away(&mut self) {
        let Some(mut store) = self.store.take() else {
            return;
        };
        self.away = true;
        let work = std::mem::take(&mut self.waiting);
        let returns = self.returns.clone();
        tokio::task::spawn_blocking(move || {
            let mut news = Vec::new();
            work_off(&mut store, work, &mut news);
            // Without a receiver the VM is gone from this host, and nobody asks.
            let _ = returns.send(Returned { store, news });
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
                let appended = store.append(&batch).map_err(|error| sentence(&error));
                appended.map(|tip| stored = Some((incarnation, tip)))
            }
            Work::Sync(incarnation) => {
                let synced = store.sync().map_err(|error| sentence(&error));
                synced.map(|tip| {
                    report(&mut stored, news);
                    news.push(LogNews::Synced(incarnation, tip));
                })
            }
            Work::LookUp(peer, index) => {
                let floor = store.floor(index).map_err(|error| sentence(&error));
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

#[cfg(test)]
mod tests {
    use replay_log::{BatchBuilder, Mark, MarkDigest, Position, Term};
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    fn batch(after: LogTip, digest: u64) -> Batch {
        let mut builder = BatchBuilder::new(Term(1), after.index);
        let mark = Mark {
            at: Position(1),
            digest: MarkDigest(digest),
        };
        builder.push(&Entry::Mark(mark)).expect("room");
        builder.finish().expect("an entry")
    }

    const DURABLE: FileOptions = FileOptions {
        sync: SyncPolicy::Explicit,
        segment_bytes: 64 << 20,
        checkpoint_bytes: 1 << 20,
    };

    /// A log that is given up while its store waits for the disk: the next begins when the store is
    /// back, nothing that it reports counts, and nothing of it is found in the next.
    #[tokio::test]
    async fn a_log_is_dropped_when_its_store_is_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("log");
        let (to_returns, mut returns) = unbounded_channel();
        let mut log = LogKeeper::open(&dir, DURABLE, Incarnation(1), to_returns).expect("a log");
        let mut news = Vec::new();
        log.append(batch(log.tip(), 1), &mut news);
        log.sync(&mut news);
        assert!(news.is_empty(), "the store is away: {news:?}");
        log.drop_log(Incarnation(2)).expect("dropped");
        let second = batch(LogTip::default(), 2);
        log.append(second.clone(), &mut news);
        log.sync(&mut news);
        for _ in 0..2 {
            let returned = returns.recv().await.expect("a store");
            log.returned(returned, &mut news);
        }
        let tip = second.tip(LogTip::default().chain);
        let told = |one: &LogNews| match one {
            LogNews::Stored(incarnation, at) | LogNews::Synced(incarnation, at) => {
                *incarnation == Incarnation(2) && *at == tip
            }
            _ => false,
        };
        assert!(!news.is_empty() && news.iter().all(told), "{news:?}");
        drop(log);
        let store = FileStore::open(&dir, DURABLE).expect("a log");
        assert_eq!(store.tip(), tip);
    }

    /// A log that could not begin is asked for again, not waited for.
    #[tokio::test]
    async fn a_log_that_cannot_begin_is_tried_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let (parent, hidden) = (folder.path().join("vm"), folder.path().join("hidden"));
        let dir = parent.join("log");
        let (to_returns, mut returns) = unbounded_channel();
        let mut log = LogKeeper::open(&dir, DURABLE, Incarnation(1), to_returns).expect("a log");
        std::fs::rename(&parent, &hidden).expect("moved");
        std::fs::write(&parent, b"in the way").expect("written");
        log.drop_log(Incarnation(2)).expect_err("nowhere to begin");
        std::fs::remove_file(&parent).expect("removed");
        std::fs::rename(&hidden, &parent).expect("moved back");
        log.drop_log(Incarnation(3)).expect("begins");
        let mut news = Vec::new();
        log.append(batch(log.tip(), 1), &mut news);
        // Only keeps a broken keeper from hanging.
        let patience = std::time::Duration::from_secs(10);
        let returned = tokio::time::timeout(patience, returns.recv()).await;
        let returned = returned.expect("the store is at work").expect("a store");
        log.returned(returned, &mut news);
        assert!(
            matches!(news[..], [LogNews::Stored(Incarnation(3), _)]),
            "{news:?}"
        );
    }

    #[test]
    fn a_damaged_log_is_set_aside() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path().join("log");
        let open = || {
            let (to_returns, _) = unbounded_channel();
            LogKeeper::open(&dir, FileOptions::default(), Incarnation(1), to_returns)
        };
        let mut log = open().expect("a log");
        let first = batch(log.tip(), 1);
        let mut store = log.store.take().expect("a store");
        store.append(&first).expect("appended");
        drop((log, store));
        let segment = std::fs::read_dir(&dir).expect("listed").flatten();
        let mut segments =
            segment.filter(|file| file.path().extension().is_some_and(|e| e == "open"));
        let segment = segments.next().expect("a segment").path();
        let mut bytes = std::fs::read(&segment).expect("read");
        bytes[20] ^= 1;
        std::fs::write(&segment, &bytes).expect("written");
        assert!(matches!(open(), Err(OpenError::Damaged(_))));
        let (to_returns, _) = unbounded_channel();
        let anew = LogKeeper::open_anew(&dir, FileOptions::default(), Incarnation(1), to_returns);
        assert_eq!(anew.expect("an empty log").tip(), LogTip::default());
        let kept = dir
            .with_extension(DAMAGED)
            .join(segment.file_name().expect("a name"));
        assert_eq!(std::fs::read(kept).expect("the evidence"), bytes);
    }
}
