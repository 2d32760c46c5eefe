//! The record of the VM: what is heard of it, and what is told.

use replay_log::LogIndex;

use super::{Core, Rest};
use crate::protocol::api::Action;
use crate::protocol::event::Event;
use crate::protocol::message::Message;
use crate::protocol::mutation::Mutation;
use crate::protocol::name::HostName;
use crate::protocol::record::{Committed, Record, Seen, Version};
use crate::protocol::status::SetBack;
use crate::protocol::time::{Span, Time};

impl Core {
    pub(in crate::protocol) fn version(&self) -> Version {
        self.record
            .as_ref()
            .map(Record::version)
            .unwrap_or_default()
    }

    /// Hears of a committed record. Says whether it is news.
    pub(in crate::protocol) fn learn(&mut self, committed: Committed) -> bool {
        let record = &committed.record;
        let namesake = self
            .record
            .as_ref()
            .is_some_and(|known| known.lineage != record.lineage);
        if record.version() <= self.version() || namesake {
            return false;
        }
        self.highest = self.highest.max(record.term);
        if record.term > self.version().term {
            self.stumble = None;
            self.run_at = self.awake();
            self.waiting_said = false;
            // What a log was to be deleted for may be gone before that is done.
            if self.renewal == Some(Rest::Delete) && self.log.appended.index > LogIndex::START {
                self.renewal = Some(Rest::Aside);
            }
        }
        self.journal(Event::RecordCommitted {
            version: record.version(),
            primary: record.primary.clone(),
            members: record.members.clone(),
        });
        self.durable.seen = Some(committed.clone());
        self.record = Some(committed.record);
        self.proof = committed.proof;
        self.agree_on_acks();
        self.persist();
        self.check_holding();
        true
    }

    /// The keeper says that this is the record. Whether it can be: a keeper that has less than this
    /// host has seen was set back, or emptied, and nothing that it says counts.
    pub(in crate::protocol) fn keeper_says(&mut self, theirs: Option<&Committed>) -> bool {
        let ours = self.seen();
        let theirs = theirs.map(Committed::seen);
        let back = ours.is_some_and(|ours| {
            theirs.is_none_or(|theirs| {
                theirs.lineage != ours.lineage || theirs.version < ours.version
            })
        });
        if !back || self.mutated(Mutation::KeeperTrusted) {
            self.keeper_heard = Some(self.now);
            self.keeper_silence = None;
            self.keeper_set_back = None;
            return true;
        }
        let kept = theirs.map(|theirs| theirs.version);
        let set_back = kept.map_or(SetBack::Emptied, SetBack::To);
        if self.keeper_set_back.replace(set_back) != Some(set_back) {
            self.journal(Event::KeeperSetBack {
                kept,
                seen: ours.map(|ours| ours.version).unwrap_or_default(),
            });
        }
        false
    }

    /// Whether the keeper has answered since this time.
    pub(in crate::protocol) fn keeper_heard_since(&self, since: Time) -> bool {
        self.keeper_heard.is_some_and(|at| at >= since)
    }

    /// The record names this host as the primary, and it does not reign (it has restarted, or its store
    /// failed): nobody need wait for its silence to say so.
    pub(in crate::protocol) fn disclaim(&mut self, host: &HostName) {
        let named = self
            .record
            .as_ref()
            .is_some_and(|r| r.primary.host == self.config.host);
        if named && self.concerns(host) {
            let version = self.version();
            self.send(
                host,
                Message::Abdicated {
                    version,
                    failed: self.stumble.clone(),
                },
            );
        }
    }

    /// Whether the record that is known concerns this host: it wants a copy there, or has one.
    pub(in crate::protocol) fn concerns(&self, host: &HostName) -> bool {
        self.record.as_ref().is_some_and(|r| r.concerns(host))
    }

    /// The longest round trip to any of these.
    pub(in crate::protocol) fn farthest<'a>(
        &self,
        hosts: impl IntoIterator<Item = &'a HostName>,
    ) -> Span {
        let peers = hosts.into_iter().filter_map(|host| self.peers.get(host));
        let rtts = peers.filter(|peer| peer.up).map(|peer| peer.rtt);
        rtts.max().unwrap_or_default()
    }

    /// What no keeper can be below that is the one asked before.
    pub(super) fn seen(&self) -> Option<Seen> {
        self.record.as_ref().map(Record::seen)
    }

    /// The same, for the keeper: it may not know that it has less than it had.
    pub(in crate::protocol) fn seen_to_tell(&self) -> Option<Seen> {
        self.seen().filter(|_| !self.mutated(Mutation::SeenUntold))
    }

    /// The latest record with its keeper's proof.
    pub(in crate::protocol) fn committed_record(&self) -> Option<Committed> {
        let record = self.record.clone()?;
        Some(Committed {
            record,
            proof: self.proof.clone(),
        })
    }

    /// Remembers durably what acknowledging means for this VM: it decides what a restart costs.
    pub(in crate::protocol) fn agree_on_acks(&mut self) {
        let wanted = self.record.as_ref().map(|record| record.policy.acks);
        if let Some(wanted) = wanted.filter(|acks| *acks != self.durable.acks)
            && self.settled()
        {
            self.durable.acks = wanted;
            self.persist();
        }
    }

    /// Whether the record names this very holding as a copy.
    pub(in crate::protocol) fn is_copy(&self) -> bool {
        let record = self.record.as_ref();
        let named = record.and_then(|record| record.copy_on(&self.config.host));
        named.is_some_and(|copy| copy.incarnation == self.durable.incarnation)
    }

    /// Asks the keeper, unless an answer is still due.
    pub(in crate::protocol) fn read_record(&mut self) {
        let patience = self.config.timing.claim_patience;
        if self
            .reading
            .is_none_or(|since| self.now.since(since) > patience)
        {
            self.reading = Some(self.now);
            let seen = self.seen_to_tell();
            self.do_(Action::ReadRecord { seen });
        }
    }

    /// The keeper has answered, or will not.
    pub(in crate::protocol) fn read_ended(&mut self) {
        self.reading = None;
    }
}
