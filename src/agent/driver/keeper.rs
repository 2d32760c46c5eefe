//! The log of one VM on this host: the newest batches in memory, and a store on a thread of its own
//! for everything else, because no disk may hold up heartbeats.
//!
//! ```text
//!   append, sync ──► unsent ──► pending ── orders ──► writer (a thread) ──► files
//!                                  ▲                      │
//!                                  └────── reports ───────┘──► news: stored, synced, full, room, failed
//!   read, look up ──► recent batches, or a blocking thread ──► files
//! ```
//!
//! What is not written yet is always in memory, so it can be read, and what is not in memory can be
//! read from the files. The store is *full* when the system takes no more, when the budget is used up,
//! when too much waits for it ([`QUEUE_BYTES`]) or when it has not come back for too long ([`STUCK`]):
//! then nothing more is acknowledged, what waits stays in order, and it ends by itself when all of
//! that is stored. What is appended beyond a second bound ([`QUEUE_MAX`]) is not taken, and said so
//! at once: the log ends before it, and its owner gets it again from a peer. It has *failed* when a
//! sync did, and then only another log helps.

mod cursor;
mod header;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use replay_log::{
    Batch, FileOptions, FileStore, Header, LogIndex, LogSource, LogTip, OpenError, ReadError,
    SyncPolicy,
};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::aside;
use crate::agent::clock::now;
use crate::protocol::{HostName, Incarnation, Span, Time};
use crate::sentence::sentence;
pub use cursor::Cursor;
pub use header::HeaderError;
use header::{first_header, header_of};
use writer::{Condition, Open, Order, Report, Work, Writer};

/// The newest batches are kept in memory up to this many bytes: streams to replicas and to the
/// machine rarely read the disk.
const RECENT_BYTES: usize = 8 << 20;
/// When so many bytes of batches wait for the store, it is full.
const QUEUE_BYTES: usize = 32 << 20;
/// Beyond so many no more are taken: whoever goes on appending to a full store is told where its log
/// ends.
const QUEUE_MAX: usize = 2 * QUEUE_BYTES;
/// A store that has not come back with anything for this long is full.
const STUCK: Span = Span::from_millis(3_000);
/// At these parts of its budget, in percent, it is told how large the log is.
const LEVELS: [u8; 3] = [50, 80, 90];

/// How a log is kept.
#[derive(Clone, Copy, Debug)]
pub struct Keeping {
    /// In which files, and when they are synced.
    pub files: FileOptions,
    /// How many bytes it may take. It is never made smaller: its beginning is the only way back to
    /// the machine. Beyond, the store is full.
    pub budget: u64,
}

/// What came of what was asked.
#[derive(Debug)]
pub enum LogNews {
    /// The log is held through here: in memory, or by the kernel.
    Stored(Incarnation, LogTip),
    /// The log is held through here by the disk.
    Synced(Incarnation, LogTip),
    /// What was asked for a peer.
    TipAt(HostName, LogIndex, Option<LogTip>),
    /// The log has come to this part of its budget.
    Filling {
        /// In percent.
        percent: u8,
        /// How many bytes it takes.
        used: u64,
        /// How many it may take.
        budget: u64,
    },
    /// The store takes nothing more at the moment, for this reason. What was appended is kept in
    /// order, and what is acknowledged stays true; until [`Self::Room`] nothing more is.
    Full(String),
    /// What was appended after here is not taken: the log ends here, and goes on from here.
    Short(Incarnation, LogTip),
    /// The store works again, and has stored what waited.
    Room,
    /// A log was set aside in this folder.
    SetAside(PathBuf),
    /// What the store holds is doubtful.
    Failed(String),
}

/// What comes from the threads that touch files; for [`LogKeeper::returned`].
#[derive(Debug)]
pub struct FromStore(Said);

#[derive(Debug)]
enum Said {
    Report(Report),
    /// Something was looked up in the log that this order began.
    Found(u64, LogNews),
    /// Something was read that a cursor waits for.
    Read,
}

impl FromStore {
    fn report(report: Report) -> Self {
        Self(Said::Report(report))
    }

    fn read() -> Self {
        Self(Said::Read)
    }
}

type Source = Arc<dyn LogSource>;

/// Something that was ordered and is not done.
struct Pending {
    number: u64,
    bytes: usize,
    syncs: bool,
    asked: Time,
}

/// The log of one VM on this host.
pub struct LogKeeper {
    /// How the present log is kept.
    keeping: Keeping,
    /// How the next one will be.
    next_keeping: Keeping,
    unlimited: Arc<AtomicBool>,
    orders: Option<Sender<Vec<Order>>>,
    returns: UnboundedSender<FromStore>,
    ended: oneshot::Receiver<()>,
    /// Reads what is written; `None` until a log that is begun anew has begun.
    source: Option<Source>,
    /// Orders so far.
    number: u64,
    /// Which of them began this log; 0 for the one that was found.
    log: u64,
    unsent: Vec<Order>,
    pending: VecDeque<Pending>,
    pending_bytes: usize,
    /// Since when the oldest of them is the oldest.
    oldest_since: Time,
    /// Batches with where the log ends after each.
    recent: VecDeque<(Batch, LogTip)>,
    recent_bytes: usize,
    tip: LogTip,
    /// Written through here.
    written: LogIndex,
    /// Through here it was told that the log is stored.
    told: LogIndex,
    incarnation: Incarnation,
    header: Result<Option<Header>, HeaderError>,
    /// On disk, by the last report.
    bytes: u64,
    /// The highest of [`LEVELS`] that was told.
    level: u8,
    /// The store's own reason to take nothing more.
    refusal: Option<String>,
    full: Option<Full>,
    failed: bool,
}

/// The store is full.
struct Full {
    reason: String,
    /// What was ordered through here waits to be stored, since there is no reason any more.
    through: Option<u64>,
}

impl LogKeeper {
    /// Opens the log in `dir`. What the threads that touch files have to say comes through `returns`,
    /// to be handed to [`LogKeeper::returned`]. Needs a runtime, and blocks.
    pub fn open(
        dir: &Path,
        keeping: Keeping,
        incarnation: Incarnation,
        returns: UnboundedSender<FromStore>,
    ) -> Result<Self, OpenError> {
        let open: Open = Box::new(|dir, files| Ok(Box::new(FileStore::open(dir, files)?)));
        Self::open_with(dir, keeping, incarnation, returns, open, |_| {})
    }

    fn open_with(
        dir: &Path,
        keeping: Keeping,
        incarnation: Incarnation,
        returns: UnboundedSender<FromStore>,
        open: Open,
        adapt: impl FnOnce(&mut Writer),
    ) -> Result<Self, OpenError> {
        let store = open(dir, keeping.files)?;
        let (tip, bytes) = (store.tip(), store.bytes());
        let source: Source = Arc::from(store.source());
        let header = first_header(store.as_ref());
        let (orders, ordered) = channel();
        let to_keeper = returns.clone();
        let mut writer = Writer::new(dir.to_owned(), keeping, open, store, ordered, to_keeper);
        let unlimited = writer.unlimited();
        adapt(&mut writer);
        let (tell_ended, ended) = oneshot::channel();
        // For as long as the log is kept. A thread of the runtime's, because those have ordinary
        // priority.
        tokio::task::spawn_blocking(move || {
            writer.run();
            // Whoever waited may have gone.
            let _ = tell_ended.send(());
        });
        Ok(Self {
            keeping,
            next_keeping: keeping,
            unlimited,
            orders: Some(orders),
            returns,
            ended,
            source: Some(source),
            number: 0,
            log: 0,
            unsent: Vec::new(),
            pending: VecDeque::new(),
            pending_bytes: 0,
            oldest_since: now(),
            recent: VecDeque::new(),
            recent_bytes: 0,
            tip,
            written: tip.index,
            told: tip.index,
            incarnation,
            header,
            bytes,
            level: level(bytes, keeping.budget),
            refusal: None,
            full: None,
            failed: false,
        })
    }

    /// The same where what is there is damaged: that is set aside as evidence, numbered and never
    /// deleted by itself, and an empty log begins in its place. Also says where it is.
    pub fn open_anew(
        dir: &Path,
        keeping: Keeping,
        incarnation: Incarnation,
        returns: UnboundedSender<FromStore>,
    ) -> Result<(Self, Option<PathBuf>), OpenError> {
        let aside = aside::set_aside(dir)?;
        Ok((Self::open(dir, keeping, incarnation, returns)?, aside))
    }

    /// Stores what was appended, as far as the system takes it, and lets the log's folder go. Gives
    /// up after `patience`: a disk that hangs may keep the folder for longer.
    pub async fn close(&mut self, patience: Duration) {
        self.send_unsent();
        self.orders = None;
        // It has ended, or it is waited for no longer.
        let _ = tokio::time::timeout(patience, &mut self.ended).await;
    }

    /// Where the log ends, appends that wait included.
    pub const fn tip(&self) -> LogTip {
        self.tip
    }

    /// The header that the log begins with; `None` while it is empty. An error: it begins otherwise,
    /// or its beginning is gone, and no machine can be replayed from it.
    pub const fn header(&self) -> Result<Option<&Header>, &HeaderError> {
        match &self.header {
            Ok(header) => Ok(header.as_ref()),
            Err(error) => Err(error),
        }
    }

    /// How many bytes the log takes on disk, as far as is known now.
    #[allow(
        clippy::unnecessary_wraps,
        reason = "what tells of it has room for not knowing"
    )]
    pub const fn bytes(&self) -> Option<u64> {
        Some(self.bytes)
    }

    /// How many bytes it may take.
    pub const fn budget(&self) -> u64 {
        self.keeping.budget
    }

    /// Whether the log may grow beyond its budget, for as long as the disk has room: where the owner
    /// chose to go on rather than to wait, the primary's may.
    pub fn set_unlimited(&self, unlimited: bool) {
        self.unlimited.store(unlimited, Ordering::Relaxed);
    }

    /// Whether the log has come to its budget: it takes no more for that reason.
    pub const fn over_budget(&self) -> bool {
        self.bytes >= self.keeping.budget
    }

    /// Why the store takes nothing more at the moment, if it does not.
    pub fn full(&self) -> Option<&str> {
        self.full.as_ref().map(|full| full.reason.as_str())
    }

    /// How many bytes of batches wait for the store.
    pub const fn waiting_bytes(&self) -> usize {
        self.pending_bytes
    }

    /// For how long the oldest sync that is not done has been asked for.
    pub fn oldest_sync(&self, now: Time) -> Option<Span> {
        let oldest = self.pending.iter().find(|pending| pending.syncs)?;
        Some(now.since(oldest.asked))
    }

    /// Appends a batch. The answer comes as news.
    pub fn append(&mut self, batch: Batch, news: &mut Vec<LogNews>) {
        // A store that has failed takes nothing, and what follows on something that was not taken
        // cannot be taken either: where the log ends is told by what was stored.
        if self.failed || batch.first() != self.tip.index || batch.term() < self.tip.term {
            return;
        }
        let bytes = batch.payload().len();
        if self.pending_bytes + bytes > QUEUE_MAX {
            // Taken up by nobody else, what follows on this would not fit either, for ever.
            news.push(LogNews::Short(self.incarnation, self.tip));
            return;
        }
        self.tip = batch.tip(self.tip.chain);
        if batch.first() == LogIndex::START {
            self.header = header_of(&batch).map(Some);
        }
        self.recent.push_back((batch.clone(), self.tip));
        self.recent_bytes += bytes;
        let sync = self.keeping.files.sync;
        let syncs = matches!(sync, SyncPolicy::EveryBatch | SyncPolicy::Interval(_));
        self.order(Work::Append(self.incarnation, batch), bytes, syncs);
        if sync == SyncPolicy::Never {
            // Held is held in memory: whoever waits for that does not wait for the file.
            self.tell_stored(news);
        } else if syncs {
            self.send_unsent();
        }
        self.review(news);
    }

    /// Tells that what is held in memory is held, unless the store is full.
    fn tell_stored(&mut self, news: &mut Vec<LogNews>) {
        if self.full.is_none() && self.told < self.tip.index {
            self.told = self.tip.index;
            news.push(LogNews::Stored(self.incarnation, self.tip));
        }
    }

    /// Whether there is something for [`Self::write_down`] to do.
    pub fn is_unwritten(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Hands what was appended to the store. It is worth while to let some of it come together: each
    /// time wakes a thread.
    pub fn write_down(&mut self, _news: &mut Vec<LogNews>) {
        self.send_unsent();
    }

    /// Makes durable what was appended.
    pub fn sync(&mut self, _news: &mut Vec<LogNews>) {
        if !self.failed {
            self.order(Work::Sync(self.incarnation), 0, true);
            self.send_unsent();
        }
    }

    /// Looks up where a batch ends.
    pub fn look_up(&mut self, peer: HostName, index: LogIndex, news: &mut Vec<LogNews>) {
        let oldest = self.recent.front();
        let in_memory = oldest.map_or(self.tip.index, |(batch, _)| batch.first());
        if index > in_memory || index >= self.tip.index {
            let known = self.recent.iter().map(|(_, tip)| *tip).chain([self.tip]);
            let tip = known.into_iter().find(|tip| tip.index == index);
            news.push(LogNews::TipAt(peer, index, tip));
            return;
        }
        let Some(source) = self.source.clone() else {
            // Of a log that has not begun everything is in memory, but its very start.
            let tip = (index == LogIndex::START).then(LogTip::default);
            news.push(LogNews::TipAt(peer, index, tip));
            return;
        };
        let (returns, log) = (self.returns.clone(), self.log);
        tokio::task::spawn_blocking(move || {
            let found = match source.floor(index) {
                Ok(floor) => LogNews::TipAt(peer, index, floor.filter(|tip| tip.index == index)),
                Err(ReadError::Damaged(damage)) => LogNews::Failed(sentence(&damage)),
                Err(error) => {
                    // Nobody is told anything: the peer asks again when it connects again.
                    tracing::warn!(%peer, error = %sentence(&error), "the log cannot be read");
                    return;
                }
            };
            // Without a receiver the VM is gone from this host, and nobody asks.
            let _ = returns.send(FromStore(Said::Found(log, found)));
        });
    }

    /// What is held is this holding.
    pub const fn set_incarnation(&mut self, incarnation: Incarnation) {
        self.incarnation = incarnation;
    }

    /// From the next holding on, or from now on while nothing is held, the log is kept like this.
    pub fn set_options(&mut self, keeping: Keeping) {
        self.next_keeping = keeping;
        if self.tip.index == LogIndex::START {
            self.keeping = keeping;
            self.order(Work::Keep(keeping), 0, false);
            self.send_unsent();
        }
    }

    /// Gives the whole log up and begins another holding. `aside`: the old log is set aside as
    /// evidence, numbered and never deleted by itself; otherwise it is deleted.
    pub fn drop_log(&mut self, incarnation: Incarnation, aside: bool) {
        self.keeping = self.next_keeping;
        let keeping = self.keeping;
        self.order(Work::Begin { keeping, aside }, 0, false);
        self.log = self.number;
        self.send_unsent();
        self.recent.clear();
        self.recent_bytes = 0;
        self.source = None;
        self.incarnation = incarnation;
        self.tip = LogTip::default();
        self.written = LogIndex::START;
        self.told = LogIndex::START;
        self.header = Ok(None);
        self.bytes = 0;
        self.level = 0;
        self.refusal = None;
        self.failed = false;
    }

    fn order(&mut self, work: Work, bytes: usize, syncs: bool) {
        self.number += 1;
        let asked = now();
        if self.pending.is_empty() {
            self.oldest_since = asked;
        }
        self.pending.push_back(Pending {
            number: self.number,
            bytes,
            syncs,
            asked,
        });
        self.pending_bytes += bytes;
        self.unsent.push(Order {
            number: self.number,
            work,
        });
    }

    fn send_unsent(&mut self) {
        let orders = std::mem::take(&mut self.unsent);
        if let Some(to) = &self.orders
            && !orders.is_empty()
        {
            // The thread ends after this.
            let _ = to.send(orders);
        }
    }

    /// The threads that touch files have something to say.
    pub fn returned(&mut self, said: FromStore, news: &mut Vec<LogNews>) {
        match said.0 {
            Said::Report(report) => self.reported(report, news),
            Said::Found(log, LogNews::Failed(reason)) if log == self.log => self.fail(reason, news),
            Said::Found(log, found) if log == self.log => news.push(found),
            // About a log that is given up, or for the cursor that asked.
            Said::Found(..) | Said::Read => {}
        }
    }

    fn reported(&mut self, report: Report, news: &mut Vec<LogNews>) {
        while let Some(oldest) = self.pending.front()
            && oldest.number <= report.through
        {
            self.pending_bytes -= oldest.bytes;
            self.pending.pop_front();
            self.oldest_since = now();
        }
        if report.log != self.log {
            // What it reports is about a log that is given up, but where another one went.
            let aside = |one: &LogNews| matches!(one, LogNews::SetAside(_));
            news.extend(report.news.into_iter().filter(aside));
            // What keeps the store from ending that one keeps it from beginning this one.
            if let Condition::Refused(reason) = report.condition {
                self.refusal = Some(reason);
                self.review(news);
            }
            return;
        }
        self.bytes = report.bytes;
        if let Some(source) = report.source {
            self.source = Some(Arc::from(source));
        }
        for one in report.news {
            match one {
                LogNews::Stored(incarnation, tip) => {
                    self.written = self.written.max(tip.index);
                    if tip.index > self.told {
                        self.told = tip.index;
                        news.push(LogNews::Stored(incarnation, tip));
                    }
                }
                other => news.push(other),
            }
        }
        self.refusal = match report.condition {
            Condition::Working => None,
            Condition::Refused(reason) => Some(reason),
            Condition::Failed(reason) => {
                self.fail(reason, news);
                None
            }
        };
        self.forget_recent();
        let level = level(self.bytes, self.keeping.budget);
        if level > self.level {
            news.push(LogNews::Filling {
                percent: level,
                used: self.bytes,
                budget: self.keeping.budget,
            });
        }
        self.level = level;
        self.review(news);
    }

    fn fail(&mut self, reason: String, news: &mut Vec<LogNews>) {
        if !std::mem::replace(&mut self.failed, true) {
            news.push(LogNews::Failed(reason));
        }
    }

    /// Forgets the oldest batches in memory, as far as they are written.
    fn forget_recent(&mut self) {
        while self.recent_bytes > RECENT_BYTES
            && let Some((batch, _)) = self.recent.front()
            && batch.end() <= self.written
        {
            self.recent_bytes -= batch.payload().len();
            self.recent.pop_front();
        }
    }

    fn recent_at(&self, index: LogIndex) -> Option<Batch> {
        let found = self
            .recent
            .partition_point(|(batch, _)| batch.first() < index);
        let (batch, _) = self.recent.get(found)?;
        (batch.first() == index).then(|| batch.clone())
    }

    /// Watches over the store: one that does not come back says nothing of itself. To be called
    /// about once a second.
    pub fn watch(&mut self, now: Time, news: &mut Vec<LogNews>) {
        self.review_at(now, news);
    }

    fn review(&mut self, news: &mut Vec<LogNews>) {
        self.review_at(now(), news);
    }

    /// Why the store is to be held for full.
    fn cause(&self, now: Time) -> Option<String> {
        if let Some(reason) = &self.refusal {
            return Some(reason.clone());
        }
        if self.pending_bytes >= QUEUE_BYTES {
            let waiting = self.pending_bytes >> 20;
            return Some(format!("{waiting} MiB of the log wait for the disk"));
        }
        let waits = now.since(self.oldest_since);
        if !self.pending.is_empty() && waits >= STUCK {
            return Some(format!("the disk has not come back for {waits}"));
        }
        None
    }

    fn review_at(&mut self, now: Time, news: &mut Vec<LogNews>) {
        if self.failed {
            self.full = None;
            return;
        }
        match (self.cause(now), &mut self.full) {
            (None, None) => {}
            (Some(reason), Some(full)) => {
                full.reason = reason;
                full.through = None;
            }
            (Some(reason), None) => {
                news.push(LogNews::Full(reason.clone()));
                self.full = Some(Full {
                    reason,
                    through: None,
                });
            }
            (None, Some(full)) => {
                let through = *full.through.get_or_insert(self.number);
                let oldest = self.pending.front();
                if oldest.is_none_or(|oldest| oldest.number > through) {
                    self.full = None;
                    news.push(LogNews::Room);
                    if self.keeping.files.sync == SyncPolicy::Never {
                        self.tell_stored(news);
                    }
                }
            }
        }
    }
}

/// The highest of [`LEVELS`] that a log has come to.
fn level(used: u64, budget: u64) -> u8 {
    let percent = u128::from(used) * 100 / u128::from(budget.max(1));
    let reached = LEVELS
        .into_iter()
        .filter(|level| percent >= u128::from(*level));
    reached.max().unwrap_or(0)
}
