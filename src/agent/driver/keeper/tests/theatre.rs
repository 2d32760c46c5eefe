//! A keeper on a disk that does as it is told.

use std::sync::{Condvar, Mutex};

use replay_log::{AppendError, LogReader, MemoryStore, Store, SyncError, TruncateError};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::super::*;
use super::{PATIENCE, PAUSE};

/// A disk that hangs and fails on command.
#[derive(Debug, Default)]
pub(super) struct Disk {
    pub(super) hangs: Mutex<bool>,
    pub(super) goes_on: Condvar,
    pub(super) fails_syncs: Mutex<bool>,
}

impl Disk {
    pub(super) fn hang(&self, hangs: bool) {
        *self.hangs.lock().expect("no panic") = hangs;
        self.goes_on.notify_all();
    }

    fn wait(&self) {
        let hangs = self.hangs.lock().expect("no panic");
        drop(
            self.goes_on
                .wait_while(hangs, |hangs| *hangs)
                .expect("no panic"),
        );
    }
}

/// A store on such a disk.
#[derive(Debug)]
struct On(Arc<Disk>, Box<dyn Store>);

impl Store for On {
    fn append(&mut self, batch: &Batch) -> Result<LogTip, AppendError> {
        self.0.wait();
        self.1.append(batch)
    }

    fn sync(&mut self) -> Result<LogTip, SyncError> {
        self.0.wait();
        if *self.0.fails_syncs.lock().expect("no panic") {
            let failure = replay_log::IoFailure {
                action: "sync",
                path: "disk".into(),
                source: std::io::Error::other("it is gone"),
            };
            return Err(SyncError::Doubtful(failure));
        }
        self.1.sync()
    }

    fn truncate(&mut self, end: LogIndex) -> Result<LogTip, TruncateError> {
        self.1.truncate(end)
    }

    fn base(&self) -> LogTip {
        self.1.base()
    }

    fn tip(&self) -> LogTip {
        self.1.tip()
    }

    fn durable_tip(&self) -> LogTip {
        self.1.durable_tip()
    }

    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError> {
        self.1.floor(index)
    }

    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        self.1.read_from(from)
    }

    fn bytes(&self) -> u64 {
        self.1.bytes()
    }

    fn source(&self) -> Box<dyn LogSource> {
        Box::new(OnSource(Arc::clone(&self.0), self.1.source()))
    }
}

#[derive(Debug)]
struct OnSource(Arc<Disk>, Box<dyn LogSource>);

impl LogSource for OnSource {
    fn read_from(&self, from: LogIndex) -> Result<Box<dyn LogReader>, ReadError> {
        self.0.wait();
        self.1.read_from(from)
    }

    fn floor(&self, index: LogIndex) -> Result<Option<LogTip>, ReadError> {
        self.0.wait();
        self.1.floor(index)
    }
}

pub(super) struct Theatre {
    pub(super) log: LogKeeper,
    disk: Option<Arc<Disk>>,
    returns: UnboundedReceiver<FromStore>,
    pub(super) news: Vec<LogNews>,
}

impl Drop for Theatre {
    fn drop(&mut self) {
        // Also where a test fails: a runtime waits for its threads.
        if let Some(disk) = &self.disk {
            disk.hang(false);
        }
    }
}

impl Theatre {
    pub(super) fn open(dir: &Path, keeping: Keeping, open: Open) -> Self {
        let (to_returns, returns) = unbounded_channel();
        let quick = |writer: &mut Writer| writer.pause = PAUSE;
        let log = LogKeeper::open_with(dir, keeping, Incarnation(1), to_returns, open, quick);
        Self {
            log: log.expect("a log"),
            disk: None,
            returns,
            news: Vec::new(),
        }
    }

    pub(super) fn files(dir: &Path, keeping: Keeping) -> Self {
        let open: Open = Box::new(|dir, files| Ok(Box::new(FileStore::open(dir, files)?)));
        Self::open(dir, keeping, open)
    }

    pub(super) fn on(disk: &Arc<Disk>, dir: &Path, keeping: Keeping) -> Self {
        let under = Arc::clone(disk);
        let open: Open = Box::new(move |dir, files| {
            let store = FileStore::open(dir, files)?;
            Ok(Box::new(On(Arc::clone(&under), Box::new(store))))
        });
        let mut here = Self::open(dir, keeping, open);
        here.disk = Some(Arc::clone(disk));
        here
    }

    pub(super) fn memory(store: &MemoryStore, keeping: Keeping) -> Self {
        let store = store.clone();
        let open: Open = Box::new(move |_, _| Ok(Box::new(store.clone())));
        Self::open(Path::new("nowhere"), keeping, open)
    }

    pub(super) fn append(&mut self, batch: Batch) {
        self.log.append(batch, &mut self.news);
        self.log.write_down(&mut self.news);
    }

    pub(super) fn sync(&mut self) {
        self.log.sync(&mut self.news);
    }

    pub(super) async fn hear(&mut self) {
        let said = tokio::time::timeout(PATIENCE, self.returns.recv()).await;
        let said = said.expect("the store is at work").expect("a report");
        self.log.returned(said, &mut self.news);
    }

    /// Listens until there is such news; it and what came before it is taken.
    pub(super) async fn until(&mut self, wanted: impl Fn(&LogNews) -> bool) -> Vec<LogNews> {
        let begun = std::time::Instant::now();
        loop {
            if let Some(at) = self.news.iter().position(&wanted) {
                return self.news.drain(..=at).collect();
            }
            // A store that is full has something to say for as long as it is.
            assert!(begun.elapsed() < PATIENCE, "no such news: {:?}", self.news);
            self.hear().await;
        }
    }

    pub(super) async fn stored_through(&mut self, tip: LogTip) -> Vec<LogNews> {
        self.until(|one| matches!(one, LogNews::Stored(_, at) if *at == tip))
            .await
    }

    pub(super) async fn read_all(&mut self, from: LogIndex) -> Vec<Batch> {
        let (mut cursor, mut batches) = (Cursor::new(from), Vec::new());
        while cursor.next() < self.log.tip().index {
            match self.log.read(&mut cursor).expect("readable") {
                Some(batch) => batches.push(batch),
                None => self.hear().await,
            }
        }
        batches
    }
}
