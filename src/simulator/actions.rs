//! What the agent's driver does in production: carry out what a node wants done.

use std::collections::BTreeMap;

use replay_log::{LogIndex, LogTip, Position, Term};
use vmm::machine::MachineError;
use vmm::tape::TapeError;

use super::facts::Fact;
use super::gateway::{ToGateway, number_of};
use super::ids::{GatewayId, SeatId};
use super::network::Travel;
use super::queue::{MICRO, Moment};
use super::storage::{batches, tip_at};
use super::trace::short;
use super::vm::{Brought, Disk, Vm};
use super::witness::Ask;
use super::world::{Event, World};
use crate::protocol::{Action, Event as Journal, HostName, Input, Message, VmRun};

/// What a journal says when only an operator can go on: the words of the orders that do.
pub(super) const ORDERS: [&str; 2] = [ACCEPT_LOSS, RECOVER];
/// Go on without copies that do not come back.
pub(super) const ACCEPT_LOSS: &str = "--accept-loss";
/// Give the keeper of records its newest record again.
pub(super) const RECOVER: &str = "understudy witness recover";

impl World {
    pub(super) fn perform(&mut self, seat: SeatId, action: Action) {
        if self.options.trace && !matches!(action, Action::Journal(_)) {
            self.trace
                .say(self.now, &format!("{seat} {}", short(&action)));
        }
        let now = self.now;
        match action {
            Action::Send { to, message } => match self.number_of(&to) {
                Some(to) => self.send(seat, to, message),
                None if matches!(message, Message::Sealed { .. }) => {
                    self.leaked(seat.vm, &to, "a promise");
                }
                None if matches!(message, Message::Stream { .. }) => {
                    self.leaked(seat.vm, &to, "a stream of its log");
                }
                None => {}
            },
            Action::Append { batch } => self.append(seat, &batch),
            Action::Sync => {
                let here = &mut self.seats[seat];
                let life = self.hosts[seat.host].life;
                let (tag, takes) = (here.tag, here.fsync(self.hosts[seat.host].drive.slow));
                self.queue
                    .plan(now + takes, Event::Synced { seat, life, tag });
            }
            Action::Persist(durable) => {
                let here = &mut self.seats[seat];
                here.tag = durable.incarnation;
                here.persisting.push_back(durable);
                let life = self.hosts[seat.host].life;
                let takes = here.fsync(self.hosts[seat.host].drive.slow);
                self.queue
                    .plan(now + takes, Event::Persisted { seat, life });
            }
            Action::LookUp { peer, index } => {
                let here = &self.seats[seat];
                let tip = tip_at(&here.store, &here.storage.waiting, index);
                self.plan_input(5 * MICRO, seat, Input::TipAt { peer, index, tip });
            }
            Action::StreamLog {
                to,
                term,
                from,
                through,
            } => {
                if let Some(to) = self.number_of(&to) {
                    self.seats[seat].streams.add(to, term, from, through);
                } else {
                    self.leaked(seat.vm, &to, "its log");
                }
            }
            Action::StopStream { to } => {
                if let Some(to) = self.number_of(&to) {
                    self.seats[seat].streams.stop(to);
                }
            }
            Action::ReadRecord { seen } => self.ask(seat, Ask::Read { seen }),
            Action::SwapRecord { expect, new, seen } => {
                self.facts.push((seat.vm, Fact::Proposed(new.clone())));
                let new = Box::new(new);
                self.ask(seat, Ask::Swap { expect, new, seen });
            }
            Action::DropLog { incarnation, aside } => self.drop_log(seat, incarnation, aside),
            Action::Replay { run } => self.replay(seat, run),
            Action::Boot { run, term, cold } => self.boot(seat, run, term, cold),
            Action::GoLive { run, term, at } => self.go_live(seat, run, term, at),
            Action::PauseVm { run } => {
                self.seats[seat].paused = Some(0);
                self.with_vm(seat, run, |vm| vm.pause(true));
            }
            Action::ResumeVm { run } => {
                self.seats[seat].paused = None;
                self.with_vm(seat, run, |vm| vm.pause(false));
            }
            Action::StopVm { run, .. } => self.stop_vm(seat, run),
            Action::Release { term, through } => self.release(seat, term, through),
            Action::ForgetOutputs { through } => {
                if let Some(vm) = &mut self.seats[seat].vm {
                    vm.outbox.forget(through);
                }
            }
            Action::Throttle { on } => {
                if let Some(vm) = &mut self.seats[seat].vm {
                    vm.throttle(on);
                }
                self.plan_turn(seat, MICRO);
            }
            Action::Journal(event) => self.journal(seat, &event),
        }
    }

    fn journal(&mut self, seat: SeatId, event: &Journal) {
        match event {
            Journal::Promoted { .. } => self.counts.promotions += 1,
            Journal::HandedOver { .. } => self.counts.switchovers += 1,
            Journal::Claimed { term, .. } if self.claim_can_succeed(seat.vm) => {
                self.facts.push((seat.vm, Fact::Claimed { term: *term }));
            }
            Journal::GuestStopsHosts { .. } => self.guests[seat.vm].stopped = true,
            Journal::WentLive { .. } => {
                self.guests[seat.vm].stopped = false;
                self.facts.push((seat.vm, Fact::WentLive));
                for here in self.seats.of_vm_mut(seat.vm) {
                    here.named.clear();
                }
            }
            _ => {}
        }
        let text = event.to_string();
        for order in ORDERS {
            if text.contains(order) {
                self.seats[seat].named.insert(order);
            }
        }
        self.trace.journal(self.now, seat, event);
    }

    /// Somebody who is no host is told what only copies may know.
    fn leaked(&mut self, vm: usize, to: &HostName, what: &'static str) {
        let to = to.clone();
        self.facts.push((vm, Fact::Leaked { to, what }));
    }

    pub(super) fn send(&mut self, from: SeatId, to: usize, message: Message) {
        let (vm, from) = (from.vm, from.host);
        match self.network.send(self.now, from, to, vm, message) {
            Travel::Lost => {}
            Travel::Lane(key, at) => self.queue.plan(at, Event::Lane(key)),
            Travel::Datagram(link, moments, message) => {
                for at in moments {
                    let message = message.clone();
                    self.queue.plan(
                        at,
                        Event::Datagram {
                            link,
                            from,
                            to: SeatId { vm, host: to },
                            message,
                        },
                    );
                }
            }
        }
    }

    // --- the VMM -----------------------------------------------------------------------------

    fn new_run(&mut self, seat: SeatId, vm: Vm) {
        let here = &mut self.seats[seat];
        if let Some(old) = here.vm.as_mut().filter(|vm| vm.records()) {
            here.last_disk = old.flushed();
        }
        here.vm = Some(vm);
        here.turn_at = None;
        here.reign = None;
        here.released = LogIndex::START;
        here.sessions.clear();
        here.paused = None;
        self.plan_turn(seat, 50 * MICRO);
    }

    fn replay(&mut self, seat: SeatId, run: VmRun) {
        let now = self.seats[seat].host_time(self.now);
        let random = self.seats[seat].random.fork();
        let mut vm = Vm::replay(run, now, random);
        let here = &self.seats[seat];
        for batch in batches(&here.store, &here.storage.waiting, LogIndex::START) {
            if let Err(reason) = vm.feed(&batch, &self.bases) {
                let at = vm.at();
                self.plan_input(5 * MICRO, seat, Input::VmFailed { run, reason, at });
                break;
            }
        }
        self.new_run(seat, vm);
    }

    fn boot(&mut self, seat: SeatId, run: VmRun, term: Term, cold: bool) {
        if cold {
            self.counts.cold_boots += 1;
        }
        let here = &mut self.seats[seat];
        let zeros = vec![0; vmm::model::DISK_SIZE as usize];
        let disk = here.last_disk.take().filter(|_| cold).unwrap_or(zeros);
        self.bases.insert(Disk::base(&disk).digest, disk.clone());
        let (now, random) = (here.host_time(self.now), here.random.fork());
        self.facts.push((seat.vm, Fact::Booted));
        match Vm::boot(run, now, random, term, disk) {
            Ok(vm) => {
                self.new_run(seat, vm);
                let guest = &mut self.guests[seat.vm];
                guest.next_machine += 1;
                let here = &mut self.seats[seat];
                here.reign = Some(term);
                here.machine = guest.next_machine;
                self.plan_input(20 * MICRO, seat, Input::WentLive { run });
            }
            Err(error) => {
                let (reason, at) = (error.to_string(), Position::START);
                self.plan_input(5 * MICRO, seat, Input::VmFailed { run, reason, at });
            }
        }
    }

    fn go_live(&mut self, seat: SeatId, run: VmRun, term: Term, at: LogTip) {
        let host = seat.host;
        let promoted = Fact::Promoted {
            host,
            term,
            tip: at,
        };
        self.facts.push((seat.vm, promoted));
        self.with_vm(seat, run, |vm| vm.go_live(term, at));
        self.seats[seat].reign = Some(term);
        self.seats[seat].machine = self.guests[seat.vm].next_machine;
    }

    fn with_vm(&mut self, seat: SeatId, run: VmRun, order: impl FnOnce(&mut Vm)) {
        if let Some(vm) = self.seats[seat].vm.as_mut().filter(|vm| vm.run == run) {
            order(vm);
            self.plan_turn(seat, MICRO);
        }
    }

    pub(super) fn stop_vm(&mut self, seat: SeatId, run: VmRun) {
        let here = &mut self.seats[seat];
        here.reign = None;
        here.sessions.clear();
        here.paused = None;
        if let Some(mut vm) = here.vm.take_if(|vm| vm.run == run)
            && vm.records()
        {
            here.last_disk = vm.flushed();
        }
    }

    /// Lets the VMM run after so long, unless it will be earlier anyway.
    pub(super) fn plan_turn(&mut self, seat: SeatId, after: Moment) {
        let here = &mut self.seats[seat];
        let at = self.now + after;
        if let Some(vm) = &here.vm
            && here.turn_at.is_none_or(|planned| at < planned)
        {
            here.turn_at = Some(at);
            let (life, run) = (self.hosts[seat.host].life, vm.run);
            self.queue.plan(at, Event::VmTurn { seat, life, run });
        }
    }

    pub(super) fn vm_turn(&mut self, seat: SeatId, life: u32, run: VmRun) {
        if !self.lives(seat, life) {
            return;
        }
        let here = &mut self.seats[seat];
        let time = here.host_time(self.now);
        let Some(vm) = here.vm.as_mut().filter(|vm| vm.run == run) else {
            return;
        };
        if here.turn_at.is_some_and(|planned| planned > self.now) {
            return;
        }
        here.turn_at = None;
        match vm.turn(time) {
            Ok(brought) => self.brought(seat, run, brought),
            Err(error) => {
                if let MachineError::Tape(TapeError::Diverged { .. }) = &error {
                    let (host, what) = (seat.host, error.to_string());
                    self.facts.push((seat.vm, Fact::Diverged { host, what }));
                }
                let (reason, at) = (error.to_string(), vm.at());
                self.stop_vm(seat, run);
                self.input(seat, Input::VmFailed { run, reason, at });
            }
        }
    }

    fn brought(&mut self, seat: SeatId, run: VmRun, brought: Brought) {
        let here = &mut self.seats[seat];
        let slow = self.hosts[seat.host].slow_vm > 0;
        let pause = here.random.between(10, 60) * MICRO * if slow { 200 } else { 1 };
        let again = brought.again_at.map(|at| here.clock.moment(at.0));
        if brought.busy {
            self.plan_turn(seat, pause);
        } else if let Some(at) = again {
            self.plan_turn(seat, at.saturating_sub(self.now).max(20 * MICRO));
        }
        if brought.went_live {
            self.input(seat, Input::WentLive { run });
        }
        for shipment in brought.shipped {
            let batch = shipment.batch;
            self.input(seat, Input::Recorded { run, batch });
        }
        if let Some((through, position)) = brought.executed {
            self.input(
                seat,
                Input::Executed {
                    run,
                    through,
                    position,
                },
            );
        }
        if brought.paused {
            self.input(seat, Input::Paused { run });
        }
        self.let_out(seat);
    }

    fn release(&mut self, seat: SeatId, term: Term, through: LogIndex) {
        let here = &mut self.seats[seat];
        here.released = here.released.max(through);
        here.knew = here.knew.max(through);
        here.reign = Some(term);
        if term >= self.guests[seat.vm].given_up_before {
            let released = Fact::Released {
                host: seat.host,
                term,
                through,
            };
            self.facts.push((seat.vm, released));
        }
        self.let_out(seat);
    }

    /// Sends what is released, as far as the machine has made it, to the gateways that it is for.
    fn let_out(&mut self, seat: SeatId) {
        let here = &mut self.seats[seat];
        let (Some(term), Some(vm)) = (here.reign, here.vm.as_mut()) else {
            return;
        };
        let sessions = here.sessions.iter();
        let sessions: Vec<_> = sessions.filter(|(_, open)| open.term == term).collect();
        let mut messages = Vec::new();
        for output in vm.outbox.release(here.released) {
            let passed = vm.lines.address(output);
            if term >= self.guests[seat.vm].given_up_before {
                self.facts.push((seat.vm, passed.let_out()));
            }
            for (gateway, session) in &sessions {
                if let Some(message) = passed.message(**gateway) {
                    messages.push((**gateway, **session, message));
                }
            }
        }
        let released = here.released;
        let mut logged = BTreeMap::new();
        while let Some((_, source)) = vm.frames.pop_front_if(|(end, _)| *end <= released) {
            logged.insert(number_of(source.gateway), source);
        }
        for (gateway, session) in sessions {
            let last = logged.get(gateway);
            if let Some(source) = last.filter(|last| last.gateway == session.gateway) {
                let through = source.number;
                messages.push((*gateway, *session, ToGateway::Logged { through }));
            }
        }
        for (number, session, message) in messages {
            let gateway = GatewayId {
                vm: seat.vm,
                number,
            };
            self.tell_gateway(gateway, seat.host, session, message);
        }
    }
}
