//! The thread of one log's store: the only one that writes, syncs, begins and removes its files.
//!
//! ```text
//!             orders, numbered                       reports
//!   keeper ───────────────────► waiting ─► store ───────────────► keeper
//!                                  ▲          │
//!                                  └─ refused ┘  stays at the front, and is tried again every second
//! ```
//!
//! A store whose sync failed takes nothing more: what is ordered then is dropped, until a log is begun
//! anew.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use replay_log::{AppendError, Batch, FileOptions, LogSource, LogTip, OpenError, Store, SyncError};
use tokio::sync::mpsc::UnboundedSender;

use super::super::aside;
use super::{FromStore, Keeping, LogNews};
use crate::protocol::Incarnation;
use crate::sentence::sentence;

/// What was refused is tried again after this long.
const PAUSE: Duration = Duration::from_secs(1);
/// After so many bytes of batches it is told how far it has come, however much waits.
const REPORT_BYTES: usize = 1 << 20;
/// What is asked of the store. What is reported of an append or a sync is about the holding that it
/// was asked for, however late it is done.
#[derive(Debug)]
pub(super) enum Work {
    Append(Incarnation, Batch),
    Sync(Incarnation),
    /// The log is kept like this from now on, if it is empty.
    Keep(Keeping),
    /// The log is given up, and another begun in its place.
    Begin {
        keeping: Keeping,
        aside: bool,
    },
}

/// Work with its place in the order of all work.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) number: u64,
    pub(super) work: Work,
}

/// How the store is.
#[derive(Debug)]
pub(super) enum Condition {
    Working,
    /// It takes nothing more at the moment.
    Refused(String),
    /// What it holds is doubtful.
    Failed(String),
}

/// How far the store has come.
#[derive(Debug)]
pub(super) struct Report {
    /// The order that began the log this is about; 0 for the one that was found.
    pub(super) log: u64,
    /// Everything ordered through here is done.
    pub(super) through: u64,
    pub(super) news: Vec<LogNews>,
    pub(super) bytes: u64,
    pub(super) condition: Condition,
    /// The log has just begun: this reads it.
    pub(super) source: Option<Box<dyn LogSource>>,
}

/// How a store is opened: from files, or a test's own.
pub(super) type Open =
    Box<dyn Fn(&Path, FileOptions) -> Result<Box<dyn Store>, OpenError> + Send + Sync>;

/// Why work was not done.
enum Undone {
    Refused(String),
    Doubtful(String),
}

impl From<AppendError> for Undone {
    fn from(error: AppendError) -> Self {
        match &error {
            AppendError::Full(_) => Self::Refused(sentence(&error)),
            // One that does not continue the log shows that the log is not what it was thought to be.
            _ => Self::Doubtful(sentence(&error)),
        }
    }
}

impl From<SyncError> for Undone {
    fn from(error: SyncError) -> Self {
        if error.is_doubtful() {
            Self::Doubtful(sentence(&error))
        } else {
            Self::Refused(sentence(&error))
        }
    }
}

pub(super) struct Writer {
    dir: PathBuf,
    keeping: Keeping,
    /// The budget is no limit: the primary goes on beyond it.
    unlimited: Arc<AtomicBool>,
    open: Open,
    store: Option<Box<dyn Store>>,
    orders: Receiver<Vec<Order>>,
    reports: UnboundedSender<FromStore>,
    waiting: VecDeque<Order>,
    /// Which order began the present log, or is beginning it.
    log: u64,
    done: u64,
    /// What is at the front was refused.
    refused: bool,
    failed: Option<String>,
    /// The log that is given up is out of the way.
    cleared: bool,
    pub(super) pause: Duration,
}

impl Writer {
    /// Whether the budget is no limit, from outside and at once.
    pub(super) fn unlimited(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.unlimited)
    }

    pub(super) fn new(
        dir: PathBuf,
        keeping: Keeping,
        open: Open,
        store: Box<dyn Store>,
        orders: Receiver<Vec<Order>>,
        reports: UnboundedSender<FromStore>,
    ) -> Self {
        Self {
            dir,
            keeping,
            unlimited: Arc::default(),
            open,
            store: Some(store),
            orders,
            reports,
            waiting: VecDeque::new(),
            log: 0,
            done: 0,
            refused: false,
            failed: None,
            cleared: false,
            pause: PAUSE,
        }
    }

    /// Works until nobody orders any more and what was ordered is done, or is refused.
    pub(super) fn run(mut self) {
        while self.gather() {
            self.work_off();
        }
    }

    /// Waits for something to do. Says whether there will be any.
    fn gather(&mut self) -> bool {
        if self.refused {
            let until = Instant::now() + self.pause;
            loop {
                let left = until.saturating_duration_since(Instant::now());
                match self.orders.recv_timeout(left) {
                    Ok(orders) => {
                        if self.take(orders) {
                            break;
                        }
                    }
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return false,
                }
            }
        } else if self.waiting.is_empty() {
            match self.orders.recv() {
                Ok(orders) => drop(self.take(orders)),
                Err(_) => return false,
            }
        }
        while let Ok(orders) = self.orders.try_recv() {
            self.take(orders);
        }
        true
    }

    /// Takes orders. Says whether the log is to be begun anew, which does not wait for what it makes
    /// pointless.
    fn take(&mut self, orders: Vec<Order>) -> bool {
        let mut begins = false;
        for order in orders {
            if let Work::Begin { aside, .. } = order.work {
                begins = true;
                // As evidence, a log is the better the more of it is there; and one that is to be
                // set aside is, whatever follows.
                if !aside || self.refused || self.failed.is_some() {
                    let evidence =
                        |order: &Order| matches!(order.work, Work::Begin { aside: true, .. });
                    let keep = self.waiting.iter().rposition(evidence);
                    self.waiting.truncate(keep.map_or(0, |at| at + 1));
                }
            }
            self.waiting.push_back(order);
        }
        begins
    }

    fn work_off(&mut self) {
        self.refused = false;
        let mut news = Vec::new();
        let mut since_report = 0;
        while let Some(Order { number, work }) = self.waiting.pop_front() {
            // Another store may be open then: what is read from now on is read of that one.
            let opens = matches!(work, Work::Begin { .. } | Work::Keep(_));
            let payload = match &work {
                Work::Append(_, batch) => batch.payload().len(),
                _ => 0,
            };
            if matches!(work, Work::Begin { .. }) {
                self.log = number;
            }
            match self.carry_out(&work, &mut news) {
                Ok(()) => self.done = number,
                Err(Undone::Refused(reason)) => {
                    self.waiting.push_front(Order { number, work });
                    self.refused = true;
                    self.sync_what_is_stored(&mut news);
                    if self.failed.is_none() {
                        return self.report(news, Condition::Refused(reason), None);
                    }
                }
                Err(Undone::Doubtful(reason)) => {
                    self.done = number;
                    self.failed = Some(reason);
                }
            }
            if opens {
                let source = self.store.as_ref().map(|store| store.source());
                self.report(std::mem::take(&mut news), Condition::Working, source);
            }
            since_report += payload;
            if since_report >= REPORT_BYTES {
                since_report = 0;
                let condition = self.condition();
                self.report(std::mem::take(&mut news), condition, None);
            }
        }
        let condition = self.condition();
        self.report(news, condition, None);
    }

    fn condition(&self) -> Condition {
        match &self.failed {
            Some(reason) => Condition::Failed(reason.clone()),
            None => Condition::Working,
        }
    }

    fn report(&self, news: Vec<LogNews>, condition: Condition, source: Option<Box<dyn LogSource>>) {
        let report = Report {
            log: self.log,
            through: self.done,
            news,
            bytes: self.store.as_ref().map_or(0, |store| store.bytes()),
            condition,
            source,
        };
        // Without a receiver the VM is gone from this host, and nobody asks.
        let _ = self.reports.send(FromStore::report(report));
    }

    fn carry_out(&mut self, work: &Work, news: &mut Vec<LogNews>) -> Result<(), Undone> {
        match work {
            Work::Append(..) | Work::Sync(_) if self.failed.is_some() => Ok(()),
            Work::Append(incarnation, batch) => {
                let tip = self.append(batch)?;
                stored(*incarnation, tip, news);
                Ok(())
            }
            Work::Sync(incarnation) => {
                if let Some(store) = &mut self.store {
                    news.push(LogNews::Synced(*incarnation, store.sync()?));
                }
                Ok(())
            }
            Work::Keep(keeping) => self.keep(*keeping),
            Work::Begin { keeping, aside } => {
                self.keeping = *keeping;
                self.begin(*aside, news)
            }
        }
    }

    fn append(&mut self, batch: &Batch) -> Result<LogTip, Undone> {
        let Some(store) = &mut self.store else {
            return Err(Undone::Refused("the log has not begun yet".to_owned()));
        };
        let budget = self.keeping.budget;
        if store.bytes() >= budget && !self.unlimited.load(Ordering::Relaxed) {
            return Err(Undone::Refused(format!(
                "the log has come to its budget of {} MiB: raise log.retention, where there is space",
                budget >> 20
            )));
        }
        Ok(store.append(batch)?)
    }

    /// What was stored before the refusal can be sure even so, and somebody may wait for that.
    fn sync_what_is_stored(&mut self, news: &mut Vec<LogNews>) {
        let mut syncs = self.waiting.iter().filter_map(|order| match order.work {
            Work::Sync(incarnation) => Some(incarnation),
            _ => None,
        });
        let (Some(incarnation), Some(store)) = (syncs.next(), &mut self.store) else {
            return;
        };
        let before = store.durable_tip();
        match store.sync() {
            Ok(tip) if tip != before => news.push(LogNews::Synced(incarnation, tip)),
            Err(error) if error.is_doubtful() => self.failed = Some(sentence(&error)),
            Ok(_) | Err(_) => {}
        }
    }

    fn keep(&mut self, keeping: Keeping) -> Result<(), Undone> {
        let empty = |store: &dyn Store| store.tip() == LogTip::default();
        if self.store.as_deref().is_some_and(|store| !empty(store)) {
            return Ok(());
        }
        self.keeping = keeping;
        // The lock on the folder goes with the store.
        self.store = None;
        self.store = Some(self.open_store()?);
        Ok(())
    }

    fn open_store(&self) -> Result<Box<dyn Store>, Undone> {
        (self.open)(&self.dir, self.keeping.files)
            .map_err(|error| Undone::Refused(sentence(&error)))
    }

    /// Moves the folder out of the way and begins another log in its place. What is refused is tried
    /// again from where it was.
    fn begin(&mut self, is_evidence: bool, news: &mut Vec<LogNews>) -> Result<(), Undone> {
        // The lock on the folder goes with the store.
        self.store = None;
        if !self.cleared {
            let cleared = if is_evidence {
                aside::set_aside(&self.dir)
            } else {
                aside::delete(&self.dir).map(|()| None)
            };
            let aside = cleared.map_err(|failure| Undone::Refused(sentence(&failure)))?;
            news.extend(aside.map(LogNews::SetAside));
            self.cleared = true;
        }
        self.store = Some(self.open_store()?);
        self.cleared = false;
        self.failed = None;
        Ok(())
    }
}

/// One report for a row of appends of one holding.
fn stored(incarnation: Incarnation, tip: LogTip, news: &mut Vec<LogNews>) {
    match news.last_mut() {
        Some(LogNews::Stored(of, before)) if *of == incarnation => *before = tip,
        _ => news.push(LogNews::Stored(incarnation, tip)),
    }
}
