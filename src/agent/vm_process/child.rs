//! The VMM process: one machine, one vCPU thread (the main thread), driven by messages from its
//! agent. It dies with the agent.
//!
//! ```text
//!              Start{Primary}                 Pause(true)
//!   started ──────────────────► recording ◄──────────────► paused
//!      │                          ▲
//!      │ Start{Replica}           │ GoLive, once everything fed is executed
//!      └───────────────► replaying
//!   any state: the agent gone ─► exit;  guest ended ─► ended;  failure ─► Failed, exit
//! ```
//!
//! A panic is a failure like any other, told with the guest's position: if it is the guest that leads to
//! it, every copy comes to it, and whoever watches several hosts fail has to see that they did so at
//! one place.

use std::any::Any;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use replay_log::{Batch, LogIndex, Position, Term};
use thiserror::Error;
use vmm::config::MachineConfig;
use vmm::disk::{DiskWorker, Finish};
use vmm::host::{Host, HostTime};
use vmm::kvm::KvmMachine;
use vmm::machine::MachineError;
use vmm::recorder::{Policy, Recorder};
use vmm::replayer::{FeedError, Replayer};
use vmm::runner::{Runner, Turn};
use vmm::tape::{Ending, TapeError};

use super::background::Background;
use super::disks::open_disks;
use super::host::{Inbox, ProcessHost, Stamped, stamped};
use super::ipc::{FailureKind, FromVm, Inlet, Start, StartAs, ToVm};
use super::prompter::Prompter;
use super::pulse::{Pulse, Voice};
use crate::agent::thread::ahead_of_others;

/// Landmarks between two looks at the agent's messages.
const TURN_BUDGET: u32 = 64;
/// The same of a machine whose next deadline somebody else has to know before it executes on.
const TURN_BUDGET_PROMPTED: u32 = 1;
/// A replica reports how far it has come, with the outputs that it has made, at most this often, in
/// nanoseconds: nobody waits for them.
const REPORT_EVERY: u64 = 5_000_000;

/// Why the process ends other than by `Stop`.
#[derive(Debug, Error)]
enum ChildError {
    #[error("the first message of the agent is not Start")]
    NoStart,
    #[error("the machine cannot be built: {0}")]
    Build(String),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error("the agent's batch cannot be read: {0}")]
    Batch(String),
    #[error("told to go live at entry {told}, but the log was fed through {fed}")]
    LiveElsewhere { told: LogIndex, fed: LogIndex },
    #[error("a primary was told to {0}")]
    NotForPrimary(&'static str),
    #[error("a replica was told to {0}")]
    NotForReplica(&'static str),
    #[error("the VMM came upon a bug of its own: {0}")]
    Bug(String),
}

impl From<TapeError> for ChildError {
    fn from(error: TapeError) -> Self {
        Self::Machine(error.into())
    }
}

impl ChildError {
    const fn kind(&self) -> FailureKind {
        match self {
            Self::Machine(MachineError::Tape(TapeError::Diverged { .. })) => FailureKind::Diverged,
            Self::Machine(MachineError::Tape(TapeError::DiskDiffers { .. })) => {
                FailureKind::DiskDiffers
            }
            Self::Feed(_) | Self::Batch(_) | Self::LiveElsewhere { .. } => FailureKind::Log,
            _ => FailureKind::Host,
        }
    }
}

/// Runs the VMM process: its standard input is the socket to the agent, whose process id is
/// `agent`.
pub fn run(agent: u32) -> ExitCode {
    // The agent's thread, which started this process, goes before other work; a guest does not.
    let reversible = crate::agent::thread::ordinary(0);
    // The kernel ends this process with the agent; if the agent died before it was asked to, the
    // socket's end says so.
    let dies_with_agent = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    if dies_with_agent.is_err() || nix::unistd::getppid().as_raw().unsigned_abs() != agent {
        eprintln!("a VMM process is started by an agent, not by hand");
        return ExitCode::from(2);
    }
    let Ok(stream) = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(UnixStream::from)
    else {
        return ExitCode::from(2);
    };
    let Ok(reading) = stream.try_clone() else {
        return ExitCode::from(2);
    };
    let (sender, receiver) = channel();
    let for_disk = sender.clone();
    let voice = Voice::new(stream);
    let about = About {
        background: Arc::new(Background::new(reversible)),
        prompter: Arc::new(Prompter::default()),
        pulse: Arc::new(Pulse::new(voice.clone())),
    };
    let for_reader = about.clone();
    ahead_of_others(reversible, || {
        std::thread::Builder::new()
            .name("agent-reader".into())
            .spawn(move || read_agent(reading, &sender, &for_reader))
            .expect("a thread for the agent's messages")
    });
    let host = ProcessHost::new(receiver, voice, Arc::clone(&about.pulse));
    serve(host, for_disk, about)
}

/// What the threads of this process know of the vCPU's.
#[derive(Clone)]
struct About {
    /// Its priority.
    background: Arc<Background>,
    /// Who takes it out of the guest for what has arrived.
    prompter: Arc<Prompter>,
    /// Whether it lives.
    pulse: Arc<Pulse>,
}

/// Moves the agent's messages into the inbox until the agent is gone. What comes together is handed
/// on together: the vCPU thread is woken once.
fn read_agent(stream: UnixStream, inbox: &Sender<Stamped>, about: &About) {
    let mut inlet = Inlet::new(stream);
    loop {
        let mut ping = None;
        let heard = match inlet.messages::<ToVm>() {
            Ok(messages) if messages.is_empty() => Inbox::Lost(None),
            Ok(messages) => {
                watch(&messages, &about.background);
                ping = messages.iter().rev().find_map(|message| match message {
                    ToVm::Ping { kick } => Some(*kick),
                    _ => None,
                });
                Inbox::Agent(messages)
            }
            Err(error) => Inbox::Lost(Some(error)),
        };
        let lost = matches!(heard, Inbox::Lost(_));
        let sent = inbox.send(stamped(heard));
        about.prompter.arrived();
        if sent.is_err() || lost {
            return;
        }
        if let Some(kick) = ping
            && let Err(error) = about.pulse.asked(kick)
        {
            tracing::error!(%error, "the agent is gone");
        }
    }
}

/// Tells whoever sees to the vCPU's priority what is on its way to it.
fn watch(messages: &[ToVm], background: &Background) {
    let is = |what: fn(&ToVm) -> bool| messages.iter().any(what);
    if is(|message| matches!(message, ToVm::Batch(_))) {
        background.fed(crate::agent::clock::now());
    }
    if is(|message| matches!(message, ToVm::Ping { kick: true })) {
        background.asked();
    }
    if is(|message| matches!(message, ToVm::GoLive { .. })) {
        background.end();
    }
}

fn serve(mut host: ProcessHost, for_disk: Sender<Stamped>, about: About) -> ExitCode {
    let start = match await_start(&mut host) {
        Ok(Some(start)) => start,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => return fail(&mut host, Position::START, &error),
    };
    let machine = match build(&start, &mut host, for_disk, &about) {
        Ok(machine) => machine,
        Err(error) => return fail(&mut host, Position::START, &error),
    };
    let mut vmm = match Vmm::start(machine, host, start, about) {
        Ok(vmm) => vmm,
        Err(error) => {
            tracing::error!(%error, "the machine did not start");
            return ExitCode::FAILURE;
        }
    };
    loop {
        match unwound(|| vmm.step()) {
            Ok(()) if vmm.host().lost() => return ExitCode::SUCCESS,
            Ok(()) => {}
            // It panicked between two tapes, and the way to the agent is lost with them.
            Err(_) if matches!(vmm.play, Play::Changing) => return ExitCode::FAILURE,
            Err(error) => {
                vmm.keep_the_end();
                let at = vmm.runner.at();
                return fail(vmm.host(), at, &error);
            }
        }
    }
}

/// Makes a panic an error. The process ends with it: nothing that it left half done is used but the way
/// to the agent.
fn unwound(step: impl FnOnce() -> Result<(), ChildError>) -> Result<(), ChildError> {
    catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| Err(ChildError::Bug(said(&*panic))))
}

/// What a panic said.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without words".to_owned())
}

/// Tells the agent why the process ends.
fn fail(host: &mut ProcessHost, at: Position, error: &ChildError) -> ExitCode {
    let said = host
        .say(&FromVm::Failed {
            kind: error.kind(),
            at,
            reason: error.to_string(),
        })
        .and_then(|()| host.send());
    if said.is_err() {
        tracing::error!(%error, "the VMM process failed and its agent is gone");
    }
    ExitCode::FAILURE
}

fn await_start(host: &mut ProcessHost) -> Result<Option<Start>, ChildError> {
    loop {
        match host.control() {
            Some(ToVm::Start(start)) => return Ok(Some(*start)),
            Some(_) => return Err(ChildError::NoStart),
            None if host.lost() => return Ok(None),
            None => host.wait(None),
        }
    }
}

fn build(
    start: &Start,
    host: &mut ProcessHost,
    for_disk: Sender<Stamped>,
    about: &About,
) -> Result<KvmMachine, ChildError> {
    let prompter = &about.prompter;
    let may_go_ahead = about.background.reversible();
    let build_error = |error: &dyn std::error::Error| ChildError::Build(error.to_string());
    let config = MachineConfig::of(&start.header).map_err(|e| build_error(&e))?;
    let disks = open_disks(&start.header, &start.disks).map_err(|e| build_error(&e))?;
    let for_worker = Arc::clone(prompter);
    let notify = move |news| {
        // The vCPU thread outlives the worker; if it is gone, so is the process.
        let _ = for_disk.send(stamped(Inbox::Disk(news)));
        for_worker.arrived();
    };
    let finish = match start.start_as {
        StartAs::Recorded | StartAs::Unrecorded | StartAs::Unprotected => Finish::Done,
        StartAs::Primary => Finish::Ahead,
        StartAs::Replica => Finish::Later,
    };
    if !disks.is_empty() {
        let worker = ahead_of_others(may_go_ahead, || {
            DiskWorker::new(disks, finish, Box::new(notify))
        });
        let worker = worker.map_err(|e| build_error(&e))?;
        host.set_worker(worker, finish);
    }
    let machine = KvmMachine::new(&config, &start.image).map_err(|e| build_error(&e))?;
    if start.start_as == StartAs::Unprotected {
        prompter
            .set(machine.kicker())
            .map_err(|e| build_error(&e))?;
    }
    about.pulse.built(machine.kicker());
    Ok(machine)
}

/// Whether a longest wait is longer than the one before by so much that it is worth a message.
const fn is_news(longest: u64, told: u64) -> bool {
    longest > told.saturating_add(told / 8)
}

fn policy(start_as: StartAs) -> Policy {
    match start_as {
        StartAs::Primary | StartAs::Replica => Policy::default(),
        StartAs::Recorded => Policy::recording(),
        StartAs::Unrecorded | StartAs::Unprotected => Policy {
            record: false,
            ..Policy::recording()
        },
    }
}

/// Which tape the machine is on.
enum Play {
    Replaying(Box<Replayer<ProcessHost>>),
    Recording(Box<Recorder<ProcessHost>>),
    /// Between the two, for the length of a function.
    Changing,
}

/// A running machine.
struct Vmm {
    runner: Runner<KvmMachine>,
    budget: u32,
    play: Play,
    go_live: Option<(Term, LogIndex)>,
    about: About,
    /// What was last told to the agent.
    reported: LogIndex,
    reported_at: HostTime,
    told_paused: bool,
    told_ended: bool,
    /// The longest deferral that the agent knows of, in nanoseconds.
    told_deferral: u64,
}

impl Vmm {
    fn start(
        machine: KvmMachine,
        mut host: ProcessHost,
        start: Start,
        about: About,
    ) -> Result<Self, ChildError> {
        host.say(&FromVm::Ready)?;
        host.send()?;
        about.pulse.hears();
        let (runner, budget) = match start.start_as {
            StartAs::Unprotected => (Runner::unrepeatable(machine), TURN_BUDGET_PROMPTED),
            _ => (Runner::new(machine), TURN_BUDGET),
        };
        let play = if start.start_as == StartAs::Replica {
            Play::Replaying(Box::new(Replayer::new(host, start.header)))
        } else {
            let policy = policy(start.start_as);
            Play::Recording(Box::new(Recorder::start(host, policy, start.header)?))
        };
        Ok(Self {
            runner,
            budget,
            play,
            go_live: None,
            about,
            reported: LogIndex::START,
            reported_at: HostTime(0),
            told_paused: false,
            told_ended: false,
            told_deferral: 0,
        })
    }

    fn host(&mut self) -> &mut ProcessHost {
        match &mut self.play {
            Play::Replaying(replayer) => replayer.host(),
            Play::Recording(recorder) => recorder.host(),
            Play::Changing => unreachable!("left within the function that sets it"),
        }
    }

    /// A recording of a machine that fails has everything that led there.
    fn keep_the_end(&mut self) {
        if let Play::Recording(recorder) = &mut self.play
            && let Err(error) = recorder.flush()
        {
            tracing::error!(%error, "the end of the log cannot be handed on");
        }
    }

    /// Does what the agent asks, runs the machine for a turn, and waits if there is nothing to do.
    fn step(&mut self) -> Result<(), ChildError> {
        while let Some(message) = self.host().control() {
            self.control(message)?;
        }
        let turn = match &mut self.play {
            Play::Replaying(replayer) => self.runner.turn(replayer.as_mut(), self.budget)?,
            Play::Recording(recorder) => {
                self.about.prompter.due_at(recorder.wake_at());
                self.runner.turn(recorder.as_mut(), self.budget)?
            }
            Play::Changing => unreachable!("left within the function that sets it"),
        };
        self.report(turn)?;
        if turn == Turn::Ran || self.try_go_live()? {
            return Ok(());
        }
        let until = match &mut self.play {
            Play::Recording(recorder) if turn == Turn::Waiting => recorder.wake_at(),
            Play::Recording(_) | Play::Changing => None,
            Play::Replaying(replayer) => {
                if replayer.drained() {
                    self.about.background.drained();
                }
                let unsaid = replayer.executed() != self.reported || replayer.host().has_unsent();
                unsaid.then(|| self.reported_at.plus(REPORT_EVERY))
            }
        };
        self.host().wait(until);
        Ok(())
    }

    fn control(&mut self, message: ToVm) -> Result<(), ChildError> {
        match (message, &mut self.play) {
            (ToVm::Batch(bytes), Play::Replaying(replayer)) => {
                let batch = Batch::decode_frame(&bytes)
                    .map_err(|error| ChildError::Batch(error.to_string()))?
                    .ok_or_else(|| ChildError::Batch("it is torn".into()))?
                    .0;
                replayer.feed(&batch)?;
            }
            (ToVm::GoLive { term, at }, Play::Replaying(replayer)) => {
                if replayer.fed() != at {
                    let fed = replayer.fed();
                    return Err(ChildError::LiveElsewhere { told: at, fed });
                }
                self.go_live = Some((term, at));
            }
            (ToVm::Pause(pause), Play::Recording(recorder)) => {
                recorder.pause(pause);
                self.told_paused = false;
            }
            (ToVm::Throttle(on), Play::Recording(recorder)) => recorder.throttle(on),
            (ToVm::Batch(_), _) => return Err(ChildError::NotForPrimary("replay a batch")),
            (ToVm::GoLive { .. }, _) => return Err(ChildError::NotForPrimary("go live")),
            (ToVm::Pause(_), _) => return Err(ChildError::NotForReplica("pause")),
            (ToVm::Throttle(_), _) => return Err(ChildError::NotForReplica("hold back")),
            // Handled before they get here.
            (ToVm::Start(_) | ToVm::Frame { .. } | ToVm::Console(_) | ToVm::Ping { .. }, _) => {}
        }
        Ok(())
    }

    /// Tells the agent what it has to know after a turn.
    fn report(&mut self, turn: Turn) -> Result<(), ChildError> {
        let at = self.runner.at();
        match &mut self.play {
            Play::Replaying(replayer) => {
                let through = replayer.executed();
                let now = replayer.host().now();
                let due = now.since(self.reported_at) >= REPORT_EVERY;
                if due && through != self.reported {
                    replayer.host().say(&FromVm::Executed { through, at })?;
                    self.reported = through;
                }
                if due && replayer.host().has_unsent() {
                    replayer.host().send()?;
                    self.reported_at = now;
                }
            }
            Play::Recording(recorder) if turn == Turn::Paused && !self.told_paused => {
                self.told_paused = true;
                let index = recorder.index();
                recorder.host().say(&FromVm::Paused { at, index })?;
                recorder.host().send()?;
            }
            Play::Recording(recorder)
                if is_news(recorder.longest_deferral(), self.told_deferral) =>
            {
                self.told_deferral = recorder.longest_deferral();
                let longest = self.told_deferral;
                // It leaves with whatever leaves next.
                recorder.host().say(&FromVm::Deferred { longest })?;
            }
            _ => {}
        }
        if let Turn::Ended(how) = turn
            && !self.told_ended
        {
            self.told_ended = true;
            self.host().finish_outputs()?;
            self.host().say(&FromVm::Ended(Ending { how, at }))?;
            self.host().send()?;
        }
        Ok(())
    }

    /// Goes live if that was asked for and everything fed is executed.
    fn try_go_live(&mut self) -> Result<bool, ChildError> {
        let Some((term, _)) = self.go_live else {
            return Ok(false);
        };
        match std::mem::replace(&mut self.play, Play::Changing) {
            Play::Replaying(mut replayer) if replayer.drained() => {
                let ongoing = replayer.ongoing();
                let live = FromVm::Live {
                    at: self.runner.at(),
                    outputs: ongoing.outputs,
                    frames: ongoing.frames.iter().map(|(g, n)| (*g, *n)).collect(),
                };
                replayer.host().sync_disks()?;
                // Said first: the first batch of the new term follows it.
                replayer.host().say(&live)?;
                let recorder = replayer.go_live(Policy::default(), term)?;
                self.play = Play::Recording(Box::new(recorder));
                self.go_live = None;
                self.told_ended = false;
                Ok(true)
            }
            other => {
                self.play = other;
                Ok(false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_of_the_host_in_its_own_words() {
        for (step, words) in [
            (
                (|| panic!("ring {} is torn", 7)) as fn() -> _,
                "ring 7 is torn",
            ),
            (|| panic!("plain"), "plain"),
            (|| std::panic::panic_any(5), "a panic without words"),
        ] {
            let error = unwound(step).expect_err("it panics");
            assert_eq!(error.kind(), FailureKind::Host);
            assert!(error.to_string().ends_with(words), "{error}");
        }
        assert!(unwound(|| Ok(())).is_ok());
    }
}
