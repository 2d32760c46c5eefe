//! Traffic with the keeper of records and with the gateway.

use replay_log::FrameNumber;

use super::facts::Fact;
use super::gateway::{Heard, Session, ToGateway, ToHost};
use super::host::Host;
use super::queue::{MICRO, MILLI, Moment};
use super::witness::{Answer, Ask};
use super::world::{Event, World, content};
use crate::protocol::{HostName, Input, Member, Record, Swapped};

/// What is lost on the way to the keeper is sent again after this long.
const AGAIN: Moment = 100 * MILLI;
/// Of a thousand losses, those with which the whole connection breaks.
const BREAKS: u64 = 50;

/// So long after it last heard anybody, no primary removes a member.
const REMOVAL: Moment = 500 * MILLI;

impl World {
    pub(super) fn ask(&mut self, host: usize, ask: Ask) {
        self.next_ask += 1;
        let (id, life) = (self.next_ask, self.hosts[host].life);
        let swap = ask.is_swap();
        let here = &mut self.hosts[host];
        here.asked.insert(id);
        here.swapping |= swap;
        let (asked, patience) = (self.now, here.keeper.span());
        let timeout = Event::Answered {
            host,
            life,
            id,
            answer: None,
            swap,
            asked,
        };
        self.queue.plan(self.now + patience, timeout);
        // Now and then a question is carried out long after its asker has given it up.
        let late = if self.random.chance(20) {
            self.random.below(600 * MILLI)
        } else {
            0
        };
        let takes = self
            .witness
            .takes(&mut self.random, swap, self.setup.keeper);
        let at = self.now + self.network.flight() + takes + late;
        self.queue.plan(
            at,
            Event::Asked {
                host,
                life,
                id,
                ask,
                asked,
            },
        );
    }

    pub(super) fn asked(&mut self, host: usize, life: u32, id: u64, ask: Ask, asked: Moment) {
        let unheard = self.witness.down > 0 || self.witness_blocks[host] > 0;
        if unheard || self.network.lost() {
            // What is lost is sent again, unless the connection has broken.
            if self.hosts[host].asked.contains(&id) && !self.random.chance(BREAKS) {
                let at = self.now + AGAIN;
                let event = Event::Asked {
                    host,
                    life,
                    id,
                    ask,
                    asked,
                };
                self.queue.plan(at, event);
            }
            return;
        }
        let swap = ask.is_swap();
        // A disk that fails may have done first what it was asked for.
        let refuses = self.witness.refuses > 0;
        let answer = if refuses && !(swap && self.random.chance(200)) {
            Answer::Refused("the witness cannot write records")
        } else {
            let before = self.witness.record.clone();
            let seen = ask.seen();
            let (answer, changed) = self.witness.ask(ask);
            if let Some(seen) = seen
                && !self.witness.blind
                && !matches!(answer, Answer::Refused(_))
            {
                let has = self.witness.record.as_ref().map(Record::seen);
                self.facts.push(Fact::Served { seen, has });
            }
            if changed && let Some(record) = self.witness.record.clone() {
                self.counts.records += 1;
                self.removed(host, before.as_ref(), &record, asked);
                self.history_ends(host, before, &record);
                self.facts.push(Fact::Recorded(record));
            }
            if refuses {
                Answer::Refused("the witness failed after it had written a record")
            } else {
                answer
            }
        };
        let mut at = self.now + self.network.flight();
        if self.hosts[host].deaf > 0 {
            return;
        }
        if self.network.lost() {
            if self.random.chance(10 * BREAKS) {
                return;
            }
            at += AGAIN;
        }
        let answer = Some(answer);
        self.queue.plan(
            at,
            Event::Answered {
                host,
                life,
                id,
                answer,
                swap,
                asked,
            },
        );
    }

    /// Whoever hears nobody, the keeper neither, does not know who is lost.
    fn removed(&mut self, host: usize, before: Option<&Record>, record: &Record, asked: Moment) {
        let deaf = self.hosts[host].deaf_since;
        let fewer = before.is_some_and(|before| {
            let mut members = before.members.iter();
            before.term == record.term && members.any(|m| record.member_on(&m.host).is_none())
        });
        if let Some(since) = deaf.filter(|_| fewer)
            && asked > since + REMOVAL
        {
            let for_ms = (asked - since) / MILLI;
            self.facts.push(Fact::Removed { host, for_ms });
        }
    }

    /// A new reign does not always go on with the history of the last one.
    pub(super) fn history_ends(&mut self, host: usize, before: Option<Record>, record: &Record) {
        let Some(before) = before.filter(|before| before.term < record.term) else {
            return;
        };
        if std::mem::take(&mut self.hosts[host].accepts_loss) {
            self.counts.losses_accepted += 1;
            self.given_up_before = record.term;
            self.loss_is_accepted(host, false);
        } else if self.loss_was_hidden(&before) {
            self.given_up_before = record.term;
            self.loss_is_accepted(host, true);
        } else if !before.all_copies().any(|copy| *copy == record.primary) {
            self.given_up_before = record.term;
            self.facts.push(Fact::Lost { before });
        } else if self.liars(&before) >= before.seals() {
            // Nothing has left yet that is missing; but the old primary may be frozen on its way to
            // let out what the others had acknowledged.
            self.given_up_before = record.term;
        }
    }

    /// How many of the copies have lost what they had synced, and do not know it.
    fn liars(&self, before: &Record) -> usize {
        let liar = |host: &&Host| {
            let copy = before.copy_on(&host.name);
            host.lies() && copy.is_some_and(|c| c.incarnation == host.durable.incarnation)
        };
        self.hosts.iter().filter(liar).count()
    }

    fn loss_is_accepted(&mut self, host: usize, hidden: bool) {
        self.facts.push(Fact::LossAccepted { host, hidden });
        // Gateways may be ahead of the guest: they begin anew.
        self.gateway.forget_answers();
        self.gateway.restart();
    }

    /// Whether disks that lost what they had synced, and could not know it, were more of the copies
    /// than the rule survives. A lying disk is a lost copy.
    fn loss_was_hidden(&self, before: &Record) -> bool {
        let released = self.checker.released();
        // Those that could be sealed, and lack what was let out.
        let lacks = |copy: &Member| {
            let host = self.hosts.iter().find(|host| host.name == copy.host);
            let view = host
                .map(Host::view)
                .filter(|view| (view.intact || view.lies) && view.incarnation == copy.incarnation);
            view.is_some_and(|view| view.chain_at(released.index) != Some(released.chain))
        };
        self.liars(before) > 0
            && before.all_copies().filter(|copy| lacks(copy)).count() >= before.seals()
    }

    pub(super) fn answered(
        &mut self,
        host: usize,
        id: u64,
        answer: Option<Answer>,
        swap: bool,
        asked: Moment,
    ) {
        let here = &mut self.hosts[host];
        if here.deaf > 0 && answer.is_some() {
            // It waits in vain.
            return;
        }
        if !here.asked.remove(&id) {
            return;
        }
        match &answer {
            Some(_) => here.keeper.answered(self.now - asked),
            None => here.keeper.unanswered(),
        }
        let reason = match &answer {
            Some(Answer::Refused(why)) => (*why).to_owned(),
            _ => "no answer in time".to_owned(),
        };
        let input = match answer {
            Some(Answer::Read(record)) => Input::RecordRead(record),
            Some(Answer::Swapped(swapped)) => {
                here.swapping = false;
                Input::RecordSwapped(swapped)
            }
            _ if swap => Input::RecordSwapped(Swapped::Unknown { reason }),
            _ => Input::ReadFailed { reason },
        };
        self.input(host, input);
    }

    pub(super) fn gateway_tick(&mut self) {
        self.queue.plan(self.now + 20 * MILLI, Event::GatewayTick);
        if self.witness.down == 0 && !self.witness.set_back {
            let record = self.witness.record.clone();
            let at = self.now + self.network.flight();
            self.queue.plan(at, Event::GatewayRead(record));
        }
        let say = self.gateway.tick(self.now);
        self.say_all(say);
    }

    pub(super) fn gateway_read(&mut self, record: Option<&Record>) {
        if let Some(record) = record
            && let Some(primary) = self.number_of(&record.primary.host)
        {
            self.gateway.learn(record.term, primary);
            if self.gateway.record.as_ref().map(Record::version) < Some(record.version()) {
                self.gateway.record = Some(record.clone());
            }
        }
    }

    pub(super) fn number_of(&self, name: &HostName) -> Option<usize> {
        self.hosts.iter().position(|host| host.name == *name)
    }

    pub(super) fn say_all(&mut self, say: Vec<ToHost>) {
        let (Some(session), Some(host)) = (self.gateway.session(), self.gateway.primary) else {
            return;
        };
        for message in say {
            self.to_host_at = self.to_host_at.max(self.now + self.network.flight());
            if self.gateway_blocks[host] == 0 {
                let event = Event::ToHost {
                    host,
                    session,
                    message,
                };
                self.queue.plan(self.to_host_at, event);
            }
        }
    }

    pub(super) fn gateway_says(&mut self, host: usize, session: Session, message: ToHost) {
        if self.gateway_blocks[host] > 0 || !self.hosts[host].is_up() {
            return;
        }
        let here = &mut self.hosts[host];
        let Some(vm) = here.vm.as_mut().filter(|vm| vm.records()) else {
            return;
        };
        if here.reign != Some(session.term) {
            return;
        }
        let mut answers = Vec::new();
        match message {
            ToHost::Attach { last } => {
                here.session = Some(session);
                let released = vm.outbox.released();
                let last = last.unwrap_or(released);
                answers.push(ToGateway::Welcome {
                    machine: here.machine,
                    accepted: vm.accepted(session.gateway),
                    next: FrameNumber(last.0 + 1),
                });
                for output in vm.outbox.released_after(last) {
                    answers.push(ToGateway::Output {
                        number: output.number,
                        content: content(&output.bytes),
                        bytes: output.bytes.clone(),
                    });
                }
            }
            _ if here.session != Some(session) => {}
            ToHost::Frame { source, bytes } => {
                vm.frame(source, bytes);
                self.plan_turn(host, 5 * MICRO);
            }
            ToHost::Received { through } => self.input(host, Input::GatewayReceived { through }),
            ToHost::Ping => answers.push(ToGateway::Pong {
                accepted: vm.accepted(session.gateway),
                released: vm.outbox.released(),
            }),
        }
        for answer in answers {
            self.tell_gateway(host, session, answer);
        }
    }

    pub(super) fn tell_gateway(&mut self, from: usize, session: Session, message: ToGateway) {
        self.to_gateway_at = self.to_gateway_at.max(self.now + self.network.flight());
        if self.gateway_blocks[from] == 0 {
            let event = Event::ToGateway {
                from,
                session,
                message,
            };
            self.queue.plan(self.to_gateway_at, event);
        }
    }

    pub(super) fn gateway_hears(&mut self, from: usize, session: Session, message: ToGateway) {
        if self.gateway_blocks[from] > 0 || self.gateway.primary != Some(from) {
            return;
        }
        let mut say = Vec::new();
        let heard = self.gateway.hear(self.now, session, message, &mut say);
        self.say_all(say);
        if let Heard::Passed {
            gateway,
            term,
            number,
            content,
            answered,
        } = heard
        {
            self.facts.push(Fact::Passed {
                gateway,
                term,
                number,
                content,
            });
            if let Some(answered) = answered {
                self.counts.answers += 1;
                if self.healed.is_some_and(|healed| answered.sent >= healed) {
                    self.fresh_answers[answered.client] += 1;
                }
                self.facts.push(Fact::Answered {
                    key: answered.key,
                    value: answered.value,
                    floor: answered.floor,
                });
            }
        }
    }

    pub(super) fn client(&mut self, client: usize) {
        let say = self.gateway.client(self.now, client, &mut self.random);
        self.say_all(say.into_iter().collect());
        let pause = self.random.between(5, 40) * MILLI;
        self.queue.plan(self.now + pause, Event::Client(client));
    }
}
