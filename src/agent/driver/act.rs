//! The driver's hands: the protocol's actions are carried out, in their order.

use std::sync::Arc;
use std::time::Duration;

use replay_log::{FrameNumber, Header, LogIndex, Position, Term};
use vmm::host::OutputKind;
use vmm::outbox::Outbox;

use super::gather::Gather;
use super::guest::{Guest, GuestError};
use super::keeper::LogKeeper;
use super::parts::{self, Parts};
use super::reaper;
use super::{Back, CHORES, Failure, HostMessage, VmDriver};
use crate::agent::clock::now;
use crate::agent::frame_streams::FrameStreams;
use crate::agent::frames::{FrameLimits, FramePort};
use crate::agent::journal::Incident;
use crate::agent::vm_process::ToVm;
use crate::gateway::frames::Boot;
use crate::protocol::{
    Action, Durable, Event, HostName, Input, LogFull, Message, Record, RoleName, Seen, Version,
    VmRun,
};
use crate::sentence::sentence;

/// After a failure to make something durable, the next attempt waits for this long: the protocol
/// has something new to persist at once, and a broken disk would be asked in a loop.
const PERSIST_PAUSE: Duration = Duration::from_secs(1);

impl VmDriver {
    /// Carries out everything the node wants, then lets everything flow that may.
    pub(super) fn settle(&mut self) {
        loop {
            while let Some(action) = self.node.poll_action() {
                self.carry_out(action);
            }
            if self.inputs.is_empty() {
                break;
            }
            let now = now();
            while let Some(input) = self.inputs.pop_front() {
                self.node.handle(now, input);
            }
        }
        self.flow();
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Send { to, message } => self.send(&to, message),
            Action::Append { batch } => {
                let mut news = Vec::new();
                self.log.append(batch, &mut news);
                self.log_news(news);
                self.start_awaited();
            }
            Action::Sync => {
                let mut news = Vec::new();
                self.log.sync(&mut news);
                self.log_news(news);
            }
            Action::LookUp { peer, index } => {
                let mut news = Vec::new();
                self.log.look_up(peer, index, &mut news);
                self.log_news(news);
            }
            Action::Persist(durable) => self.persist(durable),
            Action::StreamLog {
                to,
                term,
                from,
                through,
            } => {
                self.streams.add(to, term, from, through);
            }
            Action::StopStream { to } => self.streams.stop(&to),
            Action::ReadRecord { seen } => self.read_record(seen),
            Action::SwapRecord { expect, new, seen } => self.swap_record(expect, new, seen),
            Action::DropLog { incarnation, aside } => self.drop_log(incarnation, aside),
            Action::Replay { run } => {
                self.end_guest();
                self.replay(run);
            }
            Action::Boot { run, term, cold } => {
                self.end_guest();
                self.boot(run, term, cold);
            }
            Action::GoLive { run, term, at } => {
                self.known_term = self.known_term.max(term);
                if let Some(guest) = self.guest.as_mut().filter(|guest| guest.run() == run) {
                    guest.go_live(term, at);
                } else if self.awaiting(run) {
                    self.live_when_started = Some((term, at));
                }
            }
            Action::PauseVm { run } => self.tell_guest(run, &ToVm::Pause(true)),
            Action::ResumeVm { run } => self.tell_guest(run, &ToVm::Pause(false)),
            Action::StopVm { run, .. } => {
                if self.awaiting(run) || self.guest.as_ref().is_some_and(|guest| guest.run() == run)
                {
                    self.end_guest();
                }
            }
            Action::Release { term, through } => self.release(term, through),
            Action::ForgetOutputs { through } => self.gateways.port.forget(through),
            Action::Throttle { on } => {
                if let Some(guest) = &self.guest {
                    let run = guest.run();
                    self.tell_guest(run, &ToVm::Throttle(on));
                }
            }
            Action::Journal(event) => self.journal(&event),
        }
    }

    fn send(&self, to: &HostName, message: Message) {
        let message = HostMessage::Vm {
            vm: self.vm.clone(),
            message,
        };
        // A message that cannot be sent is lost; the protocol resumes at the next `PeerUp`.
        if let Err(error) = self.env.link.send(to.as_str(), &message) {
            tracing::debug!(vm = %self.vm, %to, %error, "not sent");
        }
    }

    /// Streams, the guest's feed and the gateways go on as far as their windows allow.
    fn flow(&mut self) {
        let (env, vm) = (&self.env, &self.vm);
        let sent = self.streams.pump(&self.log, |to, message| {
            let message = HostMessage::Vm {
                vm: vm.clone(),
                message,
            };
            if let Err(error) = env.link.send(to.as_str(), &message) {
                tracing::debug!(%vm, %to, %error, "not sent");
            }
        });
        match sent {
            Ok(late) => {
                for peer in late {
                    let late = Incident::CopyTooLate { peer };
                    self.env.journal.write(Some(&self.vm), late);
                }
            }
            Err(error) => self.inputs.push_back(Input::StoreFailed {
                reason: sentence(&error),
            }),
        }
        self.let_out();
        let arrivals = self.arrivals.poll(now());
        if !arrivals.is_empty() {
            for (source, bytes) in arrivals {
                self.with_guest(|guest, _| guest.frame(source, bytes));
            }
            self.holds_arrivals();
        }
        self.with_guest(|guest, _| guest.flush());
        // What gateways have not taken yet waits as well: a guest that fills it is held back.
        let waiting = (self.outbox.bytes() + self.gateways.port.overdue_bytes()) as u64;
        // Told in steps: what matters is whether it grows out of bounds.
        if waiting >> 16 != self.told_waiting >> 16 {
            self.told_waiting = waiting;
            self.inputs.push_back(Input::OutputWaits { bytes: waiting });
        }
    }

    /// Whether there is something that nobody outside waits for: the guest of a replica has log to
    /// execute, or a log that is held in memory is to be written down.
    pub(super) fn has_chores(&self) -> bool {
        let feeds = |guest: &Guest| guest.wants_log(&self.log);
        self.guest.as_ref().is_some_and(feeds) || self.log.is_unwritten()
    }

    /// Does that, once in a while and after what others wait for has gone out. Where replica and
    /// primary share processors, an acknowledgement would else wait until the batch is executed,
    /// and every batch would wake the guest's process for itself.
    pub(super) async fn catch_up(&mut self) {
        if !self.has_chores() {
            return;
        }
        let urgent = self.guest.as_ref().is_some_and(Guest::is_about_to_live);
        if !urgent && self.chores_done.plus(CHORES) > now() {
            return;
        }
        tokio::task::yield_now().await;
        self.with_guest(|guest, log| guest.feed(log).and_then(|()| guest.flush()));
        let mut news = Vec::new();
        self.log.write_down(&mut news);
        self.log_news(news);
        self.chores_done = now();
    }

    fn with_guest(&mut self, act: impl FnOnce(&mut Guest, &LogKeeper) -> Result<(), GuestError>) {
        if let Some(guest) = &mut self.guest
            && let Err(error) = act(guest, &self.log)
        {
            let (run, at) = (guest.run(), guest.at());
            self.inputs.push_back(Input::VmFailed {
                run,
                reason: sentence(&error),
                at,
            });
        }
    }

    fn tell_guest(&mut self, run: VmRun, message: &ToVm) {
        let Some(guest) = self.guest.as_ref().filter(|guest| guest.run() == run) else {
            return;
        };
        if let Err(error) = guest.tell(message) {
            let at = guest.at();
            self.inputs.push_back(Input::VmFailed {
                run,
                reason: sentence(&error),
                at,
            });
        }
    }

    /// Whether this run has been asked for and has not started yet.
    fn awaiting(&self, run: VmRun) -> bool {
        self.awaiting_header == Some(run) || self.awaiting_parts == Some(run)
    }

    /// Ends the guest, and whatever waits to become one. Nothing here waits for its end.
    pub(super) fn end_guest(&mut self) {
        self.awaiting_header = None;
        self.awaiting_parts = None;
        self.live_when_started = None;
        self.let_guest_die();
    }

    /// Ends the VMM process, if there is one, and leaves it to the reaper.
    pub(super) fn let_guest_die(&mut self) {
        let Some(guest) = self.guest.take() else {
            return;
        };
        let (env, vm) = (Arc::clone(&self.env), self.vm.clone());
        self.reaper.take(guest.end(), move |pid| {
            env.journal
                .write(Some(&vm), Incident::VmmDoesNotDie { pid });
        });
    }

    // ---- durable state ----

    fn persist(&mut self, durable: Durable) {
        if let Some(seen) = &durable.seen {
            self.env.reports.saw(&self.vm, seen);
        }
        self.log.set_incarnation(durable.incarnation);
        if durable.acks != self.acks {
            self.acks = durable.acks;
            let options = super::home::log_options(&self.env.config, durable.acks);
            self.log.set_options(options);
        }
        self.to_persist = Some(durable);
        self.persist_next();
    }

    /// One at a time, on a blocking thread: a promise waits for the disk, heartbeats do not.
    pub(super) fn persist_next(&mut self) {
        if self.persisting {
            return;
        }
        let Some(durable) = self.to_persist.take() else {
            return;
        };
        self.persisting = true;
        let (home, back) = (self.home.clone(), self.to_back.clone());
        let pause = if self.persist_failed {
            PERSIST_PAUSE
        } else {
            Duration::ZERO
        };
        tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let persisted = tokio::task::spawn_blocking(move || {
                let persisted = home.persist(&durable);
                (durable, persisted.map_err(|error| sentence(&error)))
            });
            // Only a runtime that ends lets it go.
            if let Ok((durable, persisted)) = persisted.await {
                let _ = back.send(Back::Persist(durable, persisted));
            }
        });
    }

    /// What came of that. Where the disk takes nothing, the state that was to be replaced is as it
    /// was, and it is tried again.
    pub(super) fn persisted(&mut self, durable: Durable, outcome: Result<(), String>) {
        self.persisting = false;
        self.persist_failed = outcome.is_err();
        match outcome {
            Ok(()) => {
                self.inputs.push_back(Input::Persisted(durable));
                if std::mem::take(&mut self.full.state) && !self.full.is_anything() {
                    self.inputs.push_back(Input::StoreRoom);
                }
            }
            Err(reason) => {
                self.to_persist.get_or_insert(durable);
                self.full.state = true;
                self.inputs.push_back(Input::StoreFull { reason });
            }
        }
        self.persist_next();
    }

    fn drop_log(&mut self, incarnation: crate::protocol::Incarnation, aside: bool) {
        self.streams.clear();
        self.header = None;
        self.log.drop_log(incarnation, aside);
    }

    // ---- the record ----

    fn read_record(&self, seen: Option<Seen>) {
        let (vm, back) = (self.vm.clone(), self.to_back.clone());
        let witness = self.env.witness.clone();
        tokio::spawn(async move {
            let input = match witness {
                None => Input::ReadFailed {
                    reason: "this cluster has no witness".into(),
                },
                Some(witness) => match witness.read(&vm, seen).await {
                    Ok(committed) => Input::RecordRead(committed),
                    Err(error) => Input::ReadFailed {
                        reason: sentence(&error),
                    },
                },
            };
            let _ = back.send(Back::Input(input));
        });
    }

    fn swap_record(&self, expect: Option<Version>, new: Record, seen: Option<Seen>) {
        let (vm, back) = (self.vm.clone(), self.to_back.clone());
        let witness = self.env.witness.clone();
        tokio::spawn(async move {
            let swapped = match witness {
                None => crate::protocol::Swapped::Unknown {
                    reason: "this cluster has no witness".into(),
                },
                Some(witness) => witness.swap(&vm, expect, new, seen).await,
            };
            let _ = back.send(Back::Input(Input::RecordSwapped(swapped)));
        });
    }

    // ---- the guest ----

    /// Starts a replay of the log; when the log is empty as yet, as soon as its header is there.
    fn replay(&mut self, run: VmRun) {
        self.awaiting_header = Some(run);
        self.start_awaited();
    }

    fn start_awaited(&mut self) {
        let Some(run) = self.awaiting_header else {
            return;
        };
        if self.header.is_none() {
            match self.log.header() {
                Ok(header) => self.header = header.cloned(),
                Err(error) => {
                    self.awaiting_header = None;
                    let reason = sentence(error);
                    let at = Position::START;
                    self.inputs.push_back(Input::VmFailed { run, reason, at });
                    return;
                }
            }
        }
        let Some(header) = self.header.clone() else {
            return;
        };
        self.awaiting_header = None;
        self.fetch_parts(run, header);
    }

    /// Gets the image and the disk bases that a log names, from this host or another.
    fn fetch_parts(&mut self, run: VmRun, header: Header) {
        self.awaiting_parts = Some(run);
        let (home, back, env) = (self.home.clone(), self.to_back.clone(), self.env.clone());
        let reaper = self.reaper.clone();
        tokio::spawn(async move {
            let parts = async {
                let fetched = env.library.fetch_bases(&header).await;
                fetched.map_err(|error| sentence(&error))?;
                if !header.disks.is_empty() {
                    // The run before may still write to the same files.
                    reaper.all_gone(reaper::PATIENCE).await?;
                }
                parts::of_replica(home, env, header).await
            };
            let _ = back.send(Back::Parts(run, false, parts.await));
        });
    }

    fn boot(&mut self, run: VmRun, term: Term, cold: bool) {
        self.known_term = self.known_term.max(term);
        self.awaiting_parts = Some(run);
        let (home, back, env) = (self.home.clone(), self.to_back.clone(), self.env.clone());
        let (reaper, vm) = (self.reaper.clone(), self.vm.clone());
        tokio::spawn(async move {
            let parts = async {
                // The run before may still write to the disks that this one boots from, or removes.
                reaper.all_gone(reaper::PATIENCE).await?;
                parts::to_boot(home, env, vm, term, cold).await
            };
            let _ = back.send(Back::Parts(run, true, parts.await));
        });
    }

    /// Everything a guest starts from is there.
    pub(super) fn start_guest(&mut self, run: VmRun, boots: bool, parts: Result<Parts, String>) {
        if self.awaiting_parts != Some(run) {
            // The node wants another run by now, or none.
            return;
        }
        let parts =
            match parts.map(|parts| (Guest::take_memory(&parts.header, &self.env.memory), parts)) {
                Ok((Err(GuestError::Memory(_)), parts)) if self.reaper.waits() => {
                    // Its predecessor has the memory yet.
                    return self.start_when_reaped(run, boots, parts);
                }
                Ok((Ok(memory), parts)) => Ok((memory, parts)),
                Ok((Err(error), _)) => Err(sentence(&error)),
                Err(reason) => Err(reason),
            };
        self.awaiting_parts = None;
        let started = parts.and_then(|(memory, parts)| {
            let guest = Guest::start(run, parts.process, boots, memory);
            Ok((parts.header, guest.map_err(|error| sentence(&error))?))
        });
        match started {
            Ok((header, guest)) => {
                let boot = Boot(header.boot);
                self.header = Some(header);
                if let Some(pid) = guest.pid() {
                    let doing = if boots { "boot" } else { "replay" }.to_owned();
                    let started = Incident::VmmStarted { pid, doing };
                    self.env.journal.write(Some(&self.vm), started);
                }
                let guest = self.guest.insert(guest);
                if let Some((term, at)) = self.live_when_started.take() {
                    guest.go_live(term, at);
                }
                self.outbox = Outbox::new();
                self.committed = LogIndex::START;
                self.arrivals = Gather::default();
                self.told_received = FrameNumber(0);
                // A machine at power-on has made no output and taken no frame yet.
                let port = FramePort::new(self.vm.clone(), boot, FrameLimits::default());
                self.gateways = FrameStreams::new(port);
                self.gateways.port.follow(self.known_term);
                if boots {
                    self.gateways.port.lead(self.known_term, [], now());
                }
            }
            Err(reason) => {
                let at = Position::START;
                self.inputs.push_back(Input::VmFailed { run, reason, at });
            }
        }
    }

    fn start_when_reaped(&self, run: VmRun, boots: bool, parts: Parts) {
        let (reaper, back) = (self.reaper.clone(), self.to_back.clone());
        tokio::spawn(async move {
            let gone = reaper.all_gone(reaper::PATIENCE).await;
            let _ = back.send(Back::Parts(run, boots, gone.map(|()| parts)));
        });
    }

    // ---- outputs ----

    fn release(&mut self, term: Term, through: LogIndex) {
        self.known_term = self.known_term.max(term);
        self.committed = through;
        self.let_out();
        self.gateways.port.committed(through, now());
    }

    /// Lets out what may be: an output may come from the VMM process after the commit of the batch
    /// that it waits for.
    fn let_out(&mut self) {
        let (mut last, mut frames) = (None, 0);
        let mut console = Vec::new();
        for output in self.outbox.release(self.committed) {
            last = Some(output.number);
            match output.kind {
                OutputKind::Frame => {
                    frames += 1;
                    self.gateways
                        .port
                        .output(output.number, output.bytes.clone());
                }
                OutputKind::Console => console.extend_from_slice(&output.bytes),
            }
        }
        if let Some(last) = last {
            self.outbox.forget(last);
            self.arrivals.answered(frames, now());
        }
        if !console.is_empty() {
            self.console.say(&console);
            self.write_console();
        }
    }

    /// Has the console written down what waits, where the disk is waited for.
    pub(super) fn write_console(&mut self) {
        if let Some(write) = self.console.next() {
            let back = self.to_back.clone();
            tokio::task::spawn_blocking(move || {
                write();
                // Without a receiver the VM is gone from this host.
                let _ = back.send(Back::Console);
            });
        }
    }

    fn journal(&mut self, event: &Event) {
        if let Event::RecordCommitted {
            version, primary, ..
        } = event
        {
            self.known_term = self.known_term.max(version.term);
            if primary.host != self.env.host {
                self.gateways.port.follow(self.known_term);
            }
        }
        if let Event::Deposed { by, .. } = event {
            self.known_term = self.known_term.max(by.term);
            self.gateways.port.follow(self.known_term);
        }
        if let Event::VmFailed { .. } | Event::StoreFailed { .. } = event {
            self.failure = Some(Failure {
                text: event.to_string(),
                log: self.log.tip().index,
            });
        }
        if let Event::RecordCommitted { .. } | Event::Promoted { .. } | Event::Deposed { .. } =
            event
        {
            self.log.set_unlimited(self.goes_beyond_budget());
        }
        self.env.journal.write(Some(&self.vm), event.clone());
    }

    /// Whether this host runs the guest, and its owner chose that it goes on when the log has used up
    /// its budget.
    fn goes_beyond_budget(&self) -> bool {
        let status = self.node.status();
        let chosen = status.record.map(|record| record.policy.log_full);
        let reigns = matches!(
            status.role,
            RoleName::Primary | RoleName::GoingLive | RoleName::HandingOver
        );
        reigns && chosen == Some(LogFull::Unprotected)
    }
}
