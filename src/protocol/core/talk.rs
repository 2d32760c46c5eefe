//! What a host says to others whatever its role.

use replay_log::Term;

use super::Core;
use crate::protocol::event::Event;
use crate::protocol::message::{Message, PROTOCOL_VERSION, Refusal};
use crate::protocol::name::HostName;
use crate::protocol::record::{Committed, Version};

impl Core {
    pub(in crate::protocol) fn hello(&mut self, to: &HostName) {
        if self.settled() {
            let message = Message::Hello {
                protocol: PROTOCOL_VERSION,
                incarnation: self.durable.incarnation,
                tip: self.log.appended,
                known: self.version(),
            };
            self.send(to, message);
        }
    }

    pub(in crate::protocol) fn hello_all(&mut self) {
        for host in self.up_peers() {
            self.hello(&host);
        }
    }

    pub(in crate::protocol) fn send_record(&mut self, to: &HostName) {
        if let Some(record) = self.committed_record() {
            self.send(to, Message::Record(record));
        }
    }

    /// Answers an inquiry.
    pub(in crate::protocol) fn heard(&mut self, from: &HostName, base: Version, alive: bool) {
        let incarnation = self.durable.incarnation;
        self.send(
            from,
            Message::Heard {
                base,
                alive,
                incarnation,
            },
        );
    }

    /// Sends the record to a peer that knows an older one, but not with every message of its.
    pub(in crate::protocol) fn inform(&mut self, host: &HostName, known: Version) {
        let (now, pause) = (self.now, self.config.timing.heartbeat.times(3));
        if known >= self.version() {
            return;
        }
        if let Some(peer) = self.peers.get_mut(host)
            && peer.record_sent_at.is_none_or(|at| now.since(at) >= pause)
        {
            peer.record_sent_at = Some(now);
            self.send_record(host);
        }
    }

    /// Refuses what a peer asks under a term. Repeated refusals are neither sent nor written down
    /// more often than a few times a second.
    pub(in crate::protocol) fn refuse(
        &mut self,
        peer: &HostName,
        term: Term,
        why: Refusal,
        asked: Version,
    ) {
        let (now, pause) = (self.now, self.config.timing.heartbeat.times(3));
        let entry = self.peers.entry(peer.clone()).or_default();
        if entry.refused_at.is_some_and(|at| now.since(at) < pause) {
            return;
        }
        entry.refused_at = Some(now);
        let newer = self
            .committed_record()
            .filter(|committed| committed.record.version() > asked);
        let message = Message::Refused {
            term,
            why,
            promise: self.durable.promise.clone(),
            record: newer,
        };
        self.send(peer, message);
        let peer = peer.clone();
        self.journal(Event::Refused { peer, term, why });
    }

    /// Refuses every time, without a word in the journal.
    pub(in crate::protocol) fn refuse_at_once(
        &mut self,
        peer: &HostName,
        term: Term,
        why: Refusal,
        record: Option<Committed>,
    ) {
        let message = Message::Refused {
            term,
            why,
            promise: self.durable.promise.clone(),
            record,
        };
        self.send(peer, message);
    }

    /// The keeper could not be asked. That is said once, until it can be asked again.
    pub(in crate::protocol) fn keeper_silent(&mut self, reason: &str) {
        if self.keeper_silence.as_deref() != Some(reason) {
            self.keeper_silence = Some(reason.to_owned());
            let reason = reason.to_owned();
            self.journal(Event::RecordUnreachable { reason });
        }
    }
}
