//! Traffic with the keeper of records and with gateways.

use replay_log::FrameNumber;

use super::facts::Fact;
use super::gateway::{Answered, Gateway, Heard, Session, ToGateway, ToHost};
use super::ids::{GatewayId, SeatId};
use super::queue::{MICRO, MILLI, Moment};
use super::seat::Seat;
use super::witness::{Answer, Ask, Question};
use super::world::{Event, World};
use crate::protocol::{HostName, Input, Member, Record, Seen, Swapped};

/// What is lost on the way to the keeper is sent again after this long.
const AGAIN: Moment = 100 * MILLI;
/// Of a thousand losses, those with which the whole connection breaks.
const BREAKS: u64 = 50;

/// So long after it last heard anybody, no primary removes a member.
const REMOVAL: Moment = 500 * MILLI;

impl World {
    pub(super) fn ask(&mut self, seat: SeatId, ask: Ask) {
        self.next_ask += 1;
        let (id, life) = (self.next_ask, self.hosts[seat.host].life);
        let swap = ask.is_swap();
        let here = &mut self.seats[seat];
        let kept = here.durable.seen.as_ref().map(|kept| kept.record.seen());
        let knew = [kept, ask.seen()].into_iter().flatten();
        let knew = knew.max_by_key(|seen| seen.version);
        here.asked.insert(id);
        here.swapping |= swap;
        let (asked, patience) = (self.now, here.keeper.span());
        let timeout = Event::Answered {
            seat,
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
        let question = Box::new(Question {
            id,
            ask,
            asked,
            knew,
        });
        let event = Event::Asked {
            seat,
            life,
            question,
        };
        self.queue.plan(at, event);
    }

    pub(super) fn asked(&mut self, seat: SeatId, life: u32, question: Box<Question>) {
        let unheard = self.witness.down > 0 || self.witness_blocks[seat.host] > 0;
        if unheard || self.network.lost() {
            // What is lost is sent again, unless the connection has broken.
            if self.seats[seat].asked.contains(&question.id) && !self.random.chance(BREAKS) {
                let at = self.now + AGAIN;
                let event = Event::Asked {
                    seat,
                    life,
                    question,
                };
                self.queue.plan(at, event);
            }
            return;
        }
        let Question {
            id,
            ask,
            asked,
            knew,
        } = *question;
        let swap = ask.is_swap();
        // A disk that fails may have done first what it was asked for.
        let refuses = self.witness.refuses > 0;
        let answer = if refuses && !(swap && self.random.chance(200)) {
            Answer::Refused("the witness cannot write records")
        } else {
            let answer = self.keeper_answers(seat, ask, asked, knew);
            if refuses {
                Answer::Refused("the witness failed after it had written a record")
            } else {
                answer
            }
        };
        let mut at = self.now + self.network.flight();
        if self.hosts[seat.host].deaf > 0 {
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
                seat,
                life,
                id,
                answer,
                swap,
                asked,
            },
        );
    }

    pub(super) fn keeper_answers(
        &mut self,
        seat: SeatId,
        ask: Ask,
        asked: Moment,
        knew: Option<Seen>,
    ) -> Answer {
        let before = self.witness.record(seat.vm).cloned();
        let (answer, changed) = self.witness.ask(seat.vm, ask);
        if let Some(seen) = knew
            && !self.witness.blind
            && !matches!(answer, Answer::Refused(_))
        {
            let has = self.witness.record(seat.vm).map(Record::seen);
            self.facts.push((seat.vm, Fact::Served { seen, has }));
        }
        if changed && let Some(record) = self.witness.record(seat.vm).cloned() {
            self.counts.records += 1;
            self.removed(seat, before.as_ref(), &record, asked);
            self.history_ends(seat, before, &record);
            self.facts.push((seat.vm, Fact::Recorded(record)));
        }
        answer
    }

    /// Whoever hears nobody, the keeper neither, does not know who is lost.
    fn removed(&mut self, seat: SeatId, before: Option<&Record>, record: &Record, asked: Moment) {
        let deaf = self.hosts[seat.host].deaf_since;
        let fewer = before.is_some_and(|before| {
            let mut members = before.members.iter();
            before.term == record.term && members.any(|m| record.member_on(&m.host).is_none())
        });
        if let Some(since) = deaf.filter(|_| fewer)
            && asked > since + REMOVAL
        {
            let for_ms = (asked - since) / MILLI;
            let host = seat.host;
            self.facts.push((seat.vm, Fact::Removed { host, for_ms }));
        }
    }

    /// A new reign does not always go on with the history of the last one.
    pub(super) fn history_ends(&mut self, seat: SeatId, before: Option<Record>, record: &Record) {
        let Some(before) = before.filter(|before| before.term < record.term) else {
            return;
        };
        if std::mem::take(&mut self.seats[seat].accepts_loss) {
            self.counts.losses_accepted += 1;
            self.loss_is_accepted(seat, false);
        } else if self.loss_was_hidden(seat.vm, &before) {
            self.loss_is_accepted(seat, true);
        } else if !before.all_copies().any(|copy| *copy == record.primary) {
            self.facts.push((seat.vm, Fact::Lost { before }));
        } else if self.liars(seat.vm, &before) < before.seals() {
            return;
        }
        // In the last case nothing has left yet that is missing; but the old primary may be frozen on
        // its way to let out what the others had acknowledged.
        self.guests[seat.vm].given_up_before = record.term;
    }

    /// How many of the copies have lost what they had synced, and do not know it.
    fn liars(&self, vm: usize, before: &Record) -> usize {
        let liar = |seat: &&Seat| {
            let copy = before.copy_on(&seat.host);
            seat.lies() && copy.is_some_and(|c| c.incarnation == seat.durable.incarnation)
        };
        self.seats.of_vm(vm).iter().filter(liar).count()
    }

    fn loss_is_accepted(&mut self, seat: SeatId, hidden: bool) {
        let host = seat.host;
        self.facts
            .push((seat.vm, Fact::LossAccepted { host, hidden }));
        self.guests[seat.vm].forget_answers();
    }

    /// Whether disks that lost what they had synced, and could not know it, were more of the copies
    /// than the rule survives. A lying disk is a lost copy.
    fn loss_was_hidden(&self, vm: usize, before: &Record) -> bool {
        let released = self.guests[vm].checker.released();
        let seats = self.seats.of_vm(vm);
        // Those that could be sealed, and lack what was let out.
        let lacks = |copy: &Member| {
            let seat = seats.iter().find(|seat| seat.host == copy.host);
            let view = seat
                .map(Seat::view)
                .filter(|view| (view.intact || view.lies) && view.incarnation == copy.incarnation);
            view.is_some_and(|view| view.chain_at(released.index) != Some(released.chain))
        };
        self.liars(vm, before) > 0
            && before.all_copies().filter(|copy| lacks(copy)).count() >= before.seals()
    }

    pub(super) fn answered(
        &mut self,
        seat: SeatId,
        id: u64,
        answer: Option<Answer>,
        swap: bool,
        asked: Moment,
    ) {
        let here = &mut self.seats[seat];
        if self.hosts[seat.host].deaf > 0 && answer.is_some() {
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
        self.input(seat, input);
    }

    pub(super) fn gateway(&mut self, id: GatewayId) -> &mut Gateway {
        &mut self.guests[id.vm].gateways[id.number]
    }

    pub(super) fn gateway_tick(&mut self, id: GatewayId) {
        self.queue
            .plan(self.now + 20 * MILLI, Event::GatewayTick(id));
        if self.witness.down == 0 && !self.witness.refuses_all(id.vm) {
            let record = self.witness.record(id.vm).cloned();
            let at = self.now + self.network.flight();
            self.queue.plan(at, Event::GatewayRead(id, record));
        }
        let now = self.now;
        let say = self.gateway(id).tick(now);
        self.say_all(id, say);
    }

    pub(super) fn gateway_read(&mut self, id: GatewayId, record: Option<&Record>) {
        if let Some(record) = record
            && let Some(primary) = self.number_of(&record.primary.host)
        {
            let gateway = self.gateway(id);
            gateway.learn(record.term, primary);
            if gateway.record.as_ref().map(Record::version) < Some(record.version()) {
                gateway.record = Some(record.clone());
            }
        }
    }

    pub(super) fn number_of(&self, name: &HostName) -> Option<usize> {
        self.hosts.iter().position(|host| host.name == *name)
    }

    pub(super) fn say_all(&mut self, id: GatewayId, say: Vec<ToHost>) {
        let gateway = self.gateway(id);
        let (Some(session), Some(host)) = (gateway.session(), gateway.primary) else {
            return;
        };
        for message in say {
            let arrives = self.now + self.network.flight();
            let gateway = self.gateway(id);
            gateway.heard_at = gateway.heard_at.max(arrives);
            let (at, blocked) = (gateway.heard_at, gateway.blocks[host] > 0);
            if !blocked {
                let event = Event::ToHost {
                    host,
                    gateway: id,
                    session,
                    message,
                };
                self.queue.plan(at, event);
            }
        }
    }

    pub(super) fn gateway_says(
        &mut self,
        host: usize,
        id: GatewayId,
        session: Session,
        message: ToHost,
    ) {
        if self.gateway(id).blocks[host] > 0 || !self.hosts[host].is_up() {
            return;
        }
        let gateways = self.guests[id.vm].gateways.len();
        let seat = SeatId { vm: id.vm, host };
        let here = &mut self.seats[seat];
        let Some(vm) = here.vm.as_mut().filter(|vm| vm.records()) else {
            return;
        };
        if here.reign != Some(session.term) {
            return;
        }
        let released = vm.outbox.released();
        let mut answers = Vec::new();
        match message {
            ToHost::Attach { last } => {
                here.sessions.insert(id.number, session);
                let last = last.unwrap_or(released);
                here.received.insert(id.number, last);
                answers.push(ToGateway::Welcome {
                    machine: here.machine,
                    accepted: vm.accepted(session.gateway),
                    next: FrameNumber(last.0 + 1),
                });
                let lacking = vm.outbox.released_after(last);
                answers.extend(lacking.filter_map(|o| vm.lines.address(o).message(id.number)));
            }
            _ if here.sessions.get(&id.number) != Some(&session) => {}
            ToHost::Frame { source, bytes } => {
                vm.frame(source, bytes);
                self.plan_turn(seat, 5 * MICRO);
            }
            ToHost::Received { through } => {
                here.received.insert(id.number, through);
                let lines = &vm.lines;
                let through = lines.received_by_all(gateways, &here.received, released);
                self.input(seat, Input::GatewayReceived { through });
            }
            ToHost::Ping => answers.push(ToGateway::Pong {
                accepted: vm.accepted(session.gateway),
                released: vm.lines.last(id.number, released),
            }),
        }
        for answer in answers {
            self.tell_gateway(id, host, session, answer);
        }
    }

    pub(super) fn tell_gateway(
        &mut self,
        id: GatewayId,
        from: usize,
        session: Session,
        message: ToGateway,
    ) {
        let arrives = self.now + self.network.flight();
        let gateway = self.gateway(id);
        gateway.hears_at = gateway.hears_at.max(arrives);
        let (at, blocked) = (gateway.hears_at, gateway.blocks[from] > 0);
        if !blocked {
            let event = Event::ToGateway {
                from,
                gateway: id,
                session,
                message,
            };
            self.queue.plan(at, event);
        }
    }

    pub(super) fn gateway_hears(
        &mut self,
        from: usize,
        id: GatewayId,
        session: Session,
        message: ToGateway,
    ) {
        let guest = &mut self.guests[id.vm];
        let gateway = &mut guest.gateways[id.number];
        if gateway.blocks[from] > 0 || gateway.primary != Some(from) {
            return;
        }
        let mut say = Vec::new();
        let heard = gateway.hear(self.now, session, message, &mut guest.highest, &mut say);
        self.say_all(id, say);
        if let Heard::Passed {
            gateway,
            term,
            number,
            content,
            answered,
        } = heard
        {
            let passed = Fact::Passed {
                gateway,
                term,
                number,
                content,
            };
            self.facts.push((id.vm, passed));
            if let Some(answered) = answered {
                self.answered_client(id, answered);
            }
        }
    }

    fn answered_client(&mut self, id: GatewayId, answered: Answered) {
        self.counts.answers += 1;
        if self.healed.is_some_and(|healed| answered.sent >= healed) {
            self.gateway(id).fresh_answers[answered.client] += 1;
        }
        let answered = Fact::Answered {
            key: answered.key,
            value: answered.value,
            floor: answered.floor,
        };
        self.facts.push((id.vm, answered));
    }

    pub(super) fn client(&mut self, id: GatewayId, client: usize) {
        let guest = &mut self.guests[id.vm];
        let gateway = &mut guest.gateways[id.number];
        let say = gateway.client(self.now, client, &guest.highest, &mut self.random);
        self.say_all(id, say.into_iter().collect());
        let pause = self.random.between(5, 40) * MILLI;
        self.queue.plan(self.now + pause, Event::Client(id, client));
    }
}
