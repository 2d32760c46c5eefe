//! The log this host holds: how far, and what it says of it to others.

use replay_log::{Batch, LogIndex, LogTip, Term};

use super::{Core, Rest};
use crate::protocol::api::Action;
use crate::protocol::event::Event;
use crate::protocol::message::{Ack, Authority};
use crate::protocol::name::{HostName, Incarnation};
use crate::protocol::record::Acks;

impl Core {
    /// What counting as a holder of the log means for this VM.
    pub(in crate::protocol) fn acks(&self) -> Acks {
        let wanted = self.record.as_ref().map(|record| record.policy.acks);
        match (wanted, self.persisted.acks) {
            // Until a restart would give up the holding, memory is no promise.
            (Some(Acks::Memory), Acks::Memory) => Acks::Memory,
            _ => Acks::Disk,
        }
    }

    /// Through where this host holds its log, in the VM's sense of holding.
    pub(in crate::protocol) fn held(&self) -> LogIndex {
        match self.acks() {
            Acks::Memory => self.log.stored.index,
            Acks::Disk => self.log.synced.index,
        }
    }

    pub(in crate::protocol) fn append(&mut self, batch: Batch) {
        self.log.appended = batch.tip(self.log.appended.chain);
        self.highest = self.highest.max(batch.term());
        self.do_(Action::Append { batch });
        if self.acks() == Acks::Disk {
            self.sync();
        }
    }

    pub(super) fn sync(&mut self) {
        if !self.log.syncing && self.log.synced.index < self.log.appended.index {
            self.log.syncing = true;
            self.do_(Action::Sync);
        }
    }

    pub(in crate::protocol) fn stored(&mut self, incarnation: Incarnation, tip: LogTip) {
        let news = tip.index > self.log.stored.index && tip.index <= self.log.appended.index;
        if self.is_current(incarnation) && news {
            self.log.stored = tip;
        }
    }

    pub(in crate::protocol) fn synced(&mut self, incarnation: Incarnation, tip: LogTip) {
        if self.is_current(incarnation) {
            self.log.syncing = false;
            // A store that was told never to sync makes no progress: it is not asked in a loop.
            if tip.index > self.log.synced.index && tip.index <= self.log.appended.index {
                self.log.synced = tip;
                self.log.stored = self.log.stored.max(tip);
                if self.acks() == Acks::Disk {
                    self.sync();
                }
            }
        }
    }

    /// The store has not taken what was appended after here: nobody has been told that it is held, and
    /// nobody has had it from here. Says whether the log is shorter for it.
    pub(in crate::protocol) fn shortened(&mut self, incarnation: Incarnation, tip: LogTip) -> bool {
        let shorter = self.is_current(incarnation) && tip.index < self.log.appended.index;
        if shorter {
            self.log.appended = tip;
            self.executed = self.executed.min(tip.index);
            self.committed = self.committed.min(tip.index);
            // They would go on from where it ended before.
            self.feeds.stop_all(&mut self.actions);
        }
        shorter
    }

    /// The store failed: what it held may be gone.
    pub(in crate::protocol) fn store_failed(&mut self, reason: String) {
        self.journal(Event::StoreFailed { reason });
        self.renew(Rest::Aside, "what the local store holds is doubtful");
    }

    pub(super) fn is_current(&self, incarnation: Incarnation) -> bool {
        let dropping = self.renewal.is_some_and(|rest| rest != Rest::Keep);
        self.holdings.contains(&incarnation) && !dropping
    }

    pub(in crate::protocol) fn ack(&self, term: Term) -> Ack {
        Ack {
            term,
            incarnation: self.durable.incarnation,
            held: self.held(),
            run: self.run,
            executed: self.executed,
            position: self.position,
            known: self.version(),
            health: self.health(),
        }
    }

    /// Begins to serve this host's log to another.
    pub(in crate::protocol) fn feed(
        &mut self,
        to: &HostName,
        authority: Authority,
        theirs: LogTip,
    ) {
        let ours = self.log.appended;
        self.feeds
            .start(to, authority, theirs, ours, &mut self.actions);
    }
}
