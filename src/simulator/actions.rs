//! What the agent's driver does in production: carry out what a node wants done.

use replay_log::{LogIndex, LogTip, Position, Term};
use vmm::machine::MachineError;
use vmm::tape::TapeError;

use super::facts::Fact;
use super::gateway::ToGateway;
use super::network::Travel;
use super::queue::{MICRO, Moment};
use super::storage::{batches, tip_at};
use super::trace::short;
use super::vm::{Brought, Disk, Vm};
use super::witness::Ask;
use super::world::{Event, World, content};
use crate::protocol::{Action, Event as Journal, HostName, Input, Message, VmRun};

/// What a journal says when only an operator can go on: the words of the orders that do.
pub(super) const ORDERS: [&str; 2] = [ACCEPT_LOSS, RECOVER];
/// Go on without copies that do not come back.
pub(super) const ACCEPT_LOSS: &str = "--accept-loss";
/// Give the keeper of records its newest record again.
pub(super) const RECOVER: &str = "understudy witness recover";

impl World {
    pub(super) fn perform(&mut self, host: usize, action: Action) {
        if self.options.trace && !matches!(action, Action::Journal(_)) {
            self.trace
                .say(self.now, &format!("host{host} {}", short(&action)));
        }
        let now = self.now;
        match action {
            Action::Send { to, message } => match self.number_of(&to) {
                Some(to) => self.send(host, to, message),
                None if matches!(message, Message::Sealed { .. }) => {
                    self.leaked(&to, "a promise");
                }
                None if matches!(message, Message::Stream { .. }) => {
                    self.leaked(&to, "a stream of its log");
                }
                None => {}
            },
            Action::Append { batch } => self.append(host, &batch),
            Action::Sync => {
                let here = &mut self.hosts[host];
                let (life, tag, takes) = (here.life, here.tag, here.fsync());
                self.queue
                    .plan(now + takes, Event::Synced { host, life, tag });
            }
            Action::Persist(durable) => {
                let here = &mut self.hosts[host];
                here.tag = durable.incarnation;
                here.persisting.push_back(durable);
                let (life, takes) = (here.life, here.fsync());
                self.queue
                    .plan(now + takes, Event::Persisted { host, life });
            }
            Action::LookUp { peer, index } => {
                let here = &self.hosts[host];
                let tip = tip_at(&here.store, &here.storage.waiting, index);
                self.plan_input(5 * MICRO, host, Input::TipAt { peer, index, tip });
            }
            Action::StreamLog {
                to,
                term,
                from,
                through,
            } => {
                if let Some(to) = self.number_of(&to) {
                    self.hosts[host].streams.add(to, term, from, through);
                } else {
                    self.leaked(&to, "its log");
                }
            }
            Action::StopStream { to } => {
                if let Some(to) = self.number_of(&to) {
                    self.hosts[host].streams.stop(to);
                }
            }
            Action::ReadRecord { seen } => self.ask(host, Ask::Read { seen }),
            Action::SwapRecord { expect, new, seen } => {
                self.facts.push(Fact::Proposed(new.clone()));
                let new = Box::new(new);
                self.ask(host, Ask::Swap { expect, new, seen });
            }
            Action::DropLog { incarnation, aside } => self.drop_log(host, incarnation, aside),
            Action::Replay { run } => self.replay(host, run),
            Action::Boot { run, term, cold } => self.boot(host, run, term, cold),
            Action::GoLive { run, term, at } => self.go_live(host, run, term, at),
            Action::PauseVm { run } => {
                self.hosts[host].paused = Some(0);
                self.with_vm(host, run, |vm| vm.pause(true));
            }
            Action::ResumeVm { run } => {
                self.hosts[host].paused = None;
                self.with_vm(host, run, |vm| vm.pause(false));
            }
            Action::StopVm { run, .. } => self.stop_vm(host, run),
            Action::Release { term, through } => self.release(host, term, through),
            Action::ForgetOutputs { through } => {
                if let Some(vm) = &mut self.hosts[host].vm {
                    vm.outbox.forget(through);
                }
            }
            Action::Throttle { on } => {
                if let Some(vm) = &mut self.hosts[host].vm {
                    vm.throttle(on);
                }
                self.plan_turn(host, MICRO);
            }
            Action::Journal(event) => self.journal(host, &event),
        }
    }

    fn journal(&mut self, host: usize, event: &Journal) {
        match event {
            Journal::Promoted { .. } => self.counts.promotions += 1,
            Journal::HandedOver { .. } => self.counts.switchovers += 1,
            Journal::Claimed { term, .. } if self.claim_can_succeed() => {
                self.facts.push(Fact::Claimed { term: *term });
            }
            Journal::GuestStopsHosts { .. } => self.stopped = true,
            Journal::WentLive { .. } => {
                self.stopped = false;
                self.facts.push(Fact::WentLive);
                for host in &mut self.hosts {
                    host.named.clear();
                }
            }
            _ => {}
        }
        let text = event.to_string();
        for order in ORDERS {
            if text.contains(order) {
                self.hosts[host].named.insert(order);
            }
        }
        self.trace.journal(self.now, host, event);
    }

    /// Somebody who is no host is told what only copies may know.
    fn leaked(&mut self, to: &HostName, what: &'static str) {
        let to = to.clone();
        self.facts.push(Fact::Leaked { to, what });
    }

    pub(super) fn send(&mut self, from: usize, to: usize, message: Message) {
        match self.network.send(self.now, from, to, message) {
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
                            to,
                            message,
                        },
                    );
                }
            }
        }
    }

    // --- the VMM -----------------------------------------------------------------------------

    fn new_run(&mut self, host: usize, vm: Vm) {
        let here = &mut self.hosts[host];
        if let Some(old) = here.vm.as_mut().filter(|vm| vm.records()) {
            here.last_disk = old.flushed();
        }
        here.vm = Some(vm);
        here.turn_at = None;
        here.reign = None;
        here.released = LogIndex::START;
        here.session = None;
        here.paused = None;
        self.plan_turn(host, 50 * MICRO);
    }

    fn replay(&mut self, host: usize, run: VmRun) {
        let now = self.hosts[host].host_time(self.now);
        let random = self.hosts[host].random.fork();
        let mut vm = Vm::replay(run, now, random);
        let here = &self.hosts[host];
        for batch in batches(&here.store, &here.storage.waiting, LogIndex::START) {
            if let Err(reason) = vm.feed(&batch, &self.bases) {
                let at = vm.at();
                self.plan_input(5 * MICRO, host, Input::VmFailed { run, reason, at });
                break;
            }
        }
        self.new_run(host, vm);
    }

    fn boot(&mut self, host: usize, run: VmRun, term: Term, cold: bool) {
        if cold {
            self.counts.cold_boots += 1;
        }
        let here = &mut self.hosts[host];
        let zeros = vec![0; vmm::model::DISK_SIZE as usize];
        let disk = here.last_disk.take().filter(|_| cold).unwrap_or(zeros);
        self.bases.insert(Disk::base(&disk).digest, disk.clone());
        let (now, random) = (here.host_time(self.now), here.random.fork());
        self.facts.push(Fact::Booted);
        match Vm::boot(run, now, random, term, disk) {
            Ok(vm) => {
                self.new_run(host, vm);
                self.next_machine += 1;
                self.hosts[host].reign = Some(term);
                self.hosts[host].machine = self.next_machine;
                self.plan_input(20 * MICRO, host, Input::WentLive { run });
            }
            Err(error) => {
                let (reason, at) = (error.to_string(), Position::START);
                self.plan_input(5 * MICRO, host, Input::VmFailed { run, reason, at });
            }
        }
    }

    fn go_live(&mut self, host: usize, run: VmRun, term: Term, at: LogTip) {
        self.facts.push(Fact::Promoted {
            host,
            term,
            tip: at,
        });
        self.with_vm(host, run, |vm| vm.go_live(term, at));
        self.hosts[host].reign = Some(term);
        self.hosts[host].machine = self.next_machine;
    }

    fn with_vm(&mut self, host: usize, run: VmRun, order: impl FnOnce(&mut Vm)) {
        if let Some(vm) = self.hosts[host].vm.as_mut().filter(|vm| vm.run == run) {
            order(vm);
            self.plan_turn(host, MICRO);
        }
    }

    pub(super) fn stop_vm(&mut self, host: usize, run: VmRun) {
        let here = &mut self.hosts[host];
        here.reign = None;
        here.session = None;
        here.paused = None;
        if let Some(mut vm) = here.vm.take_if(|vm| vm.run == run)
            && vm.records()
        {
            here.last_disk = vm.flushed();
        }
    }

    /// Lets the VMM run after so long, unless it will be earlier anyway.
    pub(super) fn plan_turn(&mut self, host: usize, after: Moment) {
        let here = &mut self.hosts[host];
        let at = self.now + after;
        if let Some(vm) = &here.vm
            && here.turn_at.is_none_or(|planned| at < planned)
        {
            here.turn_at = Some(at);
            let (life, run) = (here.life, vm.run);
            self.queue.plan(at, Event::VmTurn { host, life, run });
        }
    }

    pub(super) fn vm_turn(&mut self, host: usize, life: u32, run: VmRun) {
        if !self.lives(host, life) {
            return;
        }
        let here = &mut self.hosts[host];
        let time = here.host_time(self.now);
        let Some(vm) = here.vm.as_mut().filter(|vm| vm.run == run) else {
            return;
        };
        if here.turn_at.is_some_and(|planned| planned > self.now) {
            return;
        }
        here.turn_at = None;
        match vm.turn(time) {
            Ok(brought) => self.brought(host, run, brought),
            Err(error) => {
                if let MachineError::Tape(TapeError::Diverged { .. }) = &error {
                    let what = error.to_string();
                    self.facts.push(Fact::Diverged { host, what });
                }
                let (reason, at) = (error.to_string(), vm.at());
                self.stop_vm(host, run);
                self.input(host, Input::VmFailed { run, reason, at });
            }
        }
    }

    fn brought(&mut self, host: usize, run: VmRun, brought: Brought) {
        let here = &mut self.hosts[host];
        let slow = here.slow_vm > 0;
        let pause = here.random.between(10, 60) * MICRO * if slow { 200 } else { 1 };
        let again = brought.again_at.map(|at| here.clock.moment(at.0));
        if brought.busy {
            self.plan_turn(host, pause);
        } else if let Some(at) = again {
            self.plan_turn(host, at.saturating_sub(self.now).max(20 * MICRO));
        }
        if brought.went_live {
            self.input(host, Input::WentLive { run });
        }
        for shipment in brought.shipped {
            let batch = shipment.batch;
            self.input(host, Input::Recorded { run, batch });
        }
        if let Some((through, position)) = brought.executed {
            self.input(
                host,
                Input::Executed {
                    run,
                    through,
                    position,
                },
            );
        }
        if brought.paused {
            self.input(host, Input::Paused { run });
        }
        self.let_out(host);
    }

    fn release(&mut self, host: usize, term: Term, through: LogIndex) {
        let here = &mut self.hosts[host];
        here.released = here.released.max(through);
        here.knew = here.knew.max(through);
        here.reign = Some(term);
        if term >= self.given_up_before {
            self.facts.push(Fact::Released {
                host,
                term,
                through,
            });
        }
        self.let_out(host);
    }

    /// Sends what is released, as far as the machine has made it.
    fn let_out(&mut self, host: usize) {
        let here = &mut self.hosts[host];
        let (Some(term), Some(vm)) = (here.reign, here.vm.as_mut()) else {
            return;
        };
        let session = here.session.filter(|session| session.term == term);
        let mut messages = Vec::new();
        for output in vm.outbox.release(here.released) {
            let (number, content) = (output.number, content(&output.bytes));
            if term >= self.given_up_before {
                self.facts.push(Fact::LetOut { number, content });
            }
            messages.push(ToGateway::Output {
                number,
                content,
                bytes: output.bytes.clone(),
            });
        }
        let released = here.released;
        let mut logged = None;
        while let Some((_, source)) = vm.frames.pop_front_if(|(end, _)| *end <= released) {
            logged = Some(source).filter(|s| session.is_some_and(|x| x.gateway == s.gateway));
        }
        if let Some(source) = logged {
            messages.push(ToGateway::Logged {
                through: source.number,
            });
        }
        if let Some(session) = session {
            for message in messages {
                self.tell_gateway(host, session, message);
            }
        }
    }
}
