//! Hosts and strangers that mean harm: what they say to others. Who says it is known from the
//! certificate; what they say is whatever they like.

use bytes::Bytes;
use replay_log::{BatchBuilder, Entry, LogTip, Mark, MarkDigest, Position, Store, Term};

use super::super::ids::SeatId;
use super::super::queue::{MICRO, MILLI};
use super::super::world::{Event, World};
use super::Kind;
use crate::protocol::{
    Authority, Claim, Committed, Epoch, HostName, Incarnation, Lineage, Member, Message,
    PROTOCOL_VERSION, Policy, Proof, Record, Refusal, Version,
};

impl World {
    pub(super) fn forge(&mut self, kind: Kind, seat: SeatId) {
        let stranger = self
            .faults
            .stranger
            .clone()
            .filter(|_| kind == Kind::Stranger);
        let (from, concerned) = match stranger {
            Some(stranger) => (stranger, false),
            // One that the record may concern, and that does not reign.
            None if self.primary(seat.vm) == Some(seat) => return,
            None => (self.hosts[seat.host].name.clone(), true),
        };
        for _ in 0..self.random.between(1, 4) {
            let to = self.any_host();
            let there = &self.hosts[to];
            if there.name == from || !there.is_up() {
                continue;
            }
            let to = SeatId {
                vm: seat.vm,
                host: to,
            };
            let said = self.forgery(&from, to, concerned);
            let mut at = self.now + self.setup.delay;
            for message in said {
                at += self.random.below(MILLI) + MICRO;
                let (from, message) = (from.clone(), Box::new(message));
                self.queue.plan(at, Event::Forged { to, from, message });
            }
        }
    }

    /// What is true, whatever the keeper has lost: else a true primary could be taken for a forger.
    fn known(&self, vm: usize) -> Version {
        let record = self.witness.truth(vm);
        record.map(Record::version).unwrap_or_default()
    }

    /// A version that is later than every real one: a little, much, or wildly.
    fn later(&mut self, vm: usize) -> Version {
        let known = self.known(vm);
        let leap = *self.random.pick(&[1, 3, 1 << 10, 1 << 40, u64::MAX / 2]);
        Version {
            term: Term(known.term.0.saturating_add(leap)),
            epoch: Epoch(known.epoch.0.saturating_add(leap)),
        }
    }

    fn forged_record(&mut self, vm: usize, from: &HostName) -> Committed {
        let version = self.later(vm);
        let primary = Member {
            host: from.clone(),
            incarnation: Incarnation(self.random.next()),
        };
        let base = self.witness.record(vm).cloned();
        let record = Record {
            lineage: base.as_ref().map_or(Lineage(7), |record| record.lineage),
            term: version.term,
            epoch: version.epoch,
            primary,
            members: vec![],
            hosts: vec![from.clone()],
            policy: base.map_or_else(Policy::default, |record| record.policy),
            through: replay_log::LogIndex::START,
            begins: replay_log::LogIndex::START,
            follows: replay_log::Term(0),
            loss: false,
            failed: None,
        };
        let proof = Proof(Bytes::copy_from_slice(&self.random.next().to_le_bytes()));
        Committed { record, proof }
    }

    fn claim(&mut self, vm: usize, from: &HostName) -> Claim {
        let known = self.known(vm);
        let term = if self.random.chance(500) {
            Term(known.term.0 + 1 + self.random.below(3))
        } else {
            self.later(vm).term
        };
        Claim {
            term,
            claimant: from.clone(),
            base: known,
        }
    }

    /// What is said to `to`. A host that the record concerns may claim like others; it is only not
    /// believed to reign.
    fn forgery(&mut self, from: &HostName, to: SeatId, concerned: bool) -> Vec<Message> {
        let vm = to.vm;
        let tip = self.seats[to].store.tip();
        let reign = Authority::Reign(self.later(vm));
        let choices = if concerned { 6 } else { 11 };
        match self.random.below(choices) {
            0 => vec![Message::Record(self.forged_record(vm, from))],
            1 => vec![Message::Refused {
                term: self.known(vm).term,
                why: Refusal::RecordMovedOn,
                promise: None,
                record: Some(self.forged_record(vm, from)),
            }],
            2 => {
                let term = reign.term();
                let stream = Message::Stream {
                    authority: reign,
                    after: tip,
                };
                let log = forged_log(term, tip);
                [Some(stream), log].into_iter().flatten().collect()
            }
            3 => vec![Message::Diverged {
                authority: reign,
                tip,
            }],
            4 => {
                let version = self.later(vm);
                let beat = Message::Heartbeat {
                    version,
                    tail: tip.index,
                    committed: tip.index,
                    forget: replay_log::FrameNumber(u64::MAX),
                };
                vec![beat; 12]
            }
            5 => {
                let mut claim = self.claim(vm, from);
                claim.term = Term(u64::MAX);
                vec![Message::Seal {
                    claim,
                    consent: false,
                }]
            }
            6 => {
                let claim = self.claim(vm, from);
                let fetch = Message::Fetch {
                    term: claim.term,
                    after: LogTip::default(),
                };
                let seal = Message::Seal {
                    claim,
                    consent: true,
                };
                vec![seal, fetch.clone(), fetch]
            }
            7 => vec![Message::Hello {
                protocol: PROTOCOL_VERSION,
                incarnation: Incarnation(1),
                tip: LogTip::default(),
                known: self.known(vm),
            }],
            8 => vec![Message::Refused {
                term: self.known(vm).term,
                why: Refusal::Sealed,
                promise: Some(self.claim(vm, from)),
                record: None,
            }],
            9 => {
                let promise = self.seats[to].durable.promise.clone();
                let claim = promise.unwrap_or_else(|| self.claim(vm, from));
                let take_back = Message::TakeBack {
                    claim: claim.clone(),
                };
                vec![Message::Renounced { claim }, take_back]
            }
            _ => {
                let claim = self.claim(vm, from);
                vec![
                    Message::Handover {
                        claim: Claim {
                            claimant: self.hosts[to.host].name.clone(),
                            ..claim.clone()
                        },
                        tip,
                    },
                    Message::Consent { claim },
                ]
            }
        }
    }
}

/// A batch that continues a log and that no machine has made.
fn forged_log(term: Term, tip: LogTip) -> Option<Message> {
    let mut builder = BatchBuilder::new(term, tip.index);
    let mark = Mark {
        at: Position(u64::MAX / 2),
        digest: MarkDigest(7),
    };
    builder.push(&Entry::Mark(mark)).ok()?;
    let batch = builder.finish()?;
    Some(Message::Log { term, batch })
}
