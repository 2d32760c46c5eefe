//! The VMM process of one VM on this host, as its driver sees it: started to boot or to replay,
//! fed with the log, told to go live, ended.

use std::io;

use bytes::Bytes;
use replay_log::{FrameSource, Header, LogIndex, LogTip, Position, Term};
use thiserror::Error;
use vmm::config::MachineConfig;
use vmm::tape::Ending;

use super::keeper::{Cursor, LogKeeper};
use crate::agent::budget::{Budget, OverBudget, Taken};
use crate::agent::clock::now;
use crate::agent::vm_process::{
    FromVm, IpcError, Spawned, Starved, ToVm, Verdict, VmProcess, Watch,
};
use crate::protocol::{Span, Time, VmRun};
use crate::sentence::sentence;

/// So many bytes of log may be with the VMM process and not executed.
const WINDOW: usize = 4 << 20;

/// So many bytes of frames may be with the VMM process and in no log; more wait in the port, and
/// with it at the gateways.
const FRAMES_WINDOW: usize = 1 << 20;

/// What a frame takes beside its bytes: many empty ones are not nothing.
const FRAME_COST: usize = 64;

/// What the process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// It replays what it is fed.
    Replaying,
    /// It was told to go live, or will be when it has the log through here.
    GoingLive,
    /// It records: this is a primary.
    Recording,
}

/// Why a guest cannot go on.
#[derive(Debug, Error)]
pub enum GuestError {
    /// No machine is like that.
    #[error(transparent)]
    Machine(#[from] vmm::config::ConfigError),
    /// It does not fit.
    #[error(transparent)]
    Memory(#[from] OverBudget),
    /// The process does not listen.
    #[error(transparent)]
    Ipc(#[from] IpcError),
    /// The log cannot be read to feed it.
    #[error("the log cannot be read to replay it: {0}")]
    Read(#[from] replay_log::ReadError),
}

/// A running VMM process.
pub struct Guest {
    run: VmRun,
    process: VmProcess,
    doing: Doing,
    at: Position,
    cursor: Cursor,
    /// Fed and not executed: the end of each batch and its bytes.
    under_way: std::collections::VecDeque<(LogIndex, usize)>,
    bytes: usize,
    /// Told and not recorded: each frame and its bytes.
    frames: std::collections::VecDeque<(FrameSource, usize)>,
    frame_bytes: usize,
    go_live: Option<(Term, LogTip)>,
    /// When it last showed that it came past a landmark, while recording.
    passed_at: Time,
    longest_deferral: Span,
    ended: Option<Ending>,
    watch: Watch,
    starved: Starved,
    /// Given back when the process is gone.
    memory: Taken,
}

/// A VMM process that has been ended and may not be gone yet: the kernel first takes its memory
/// apart, and a process that waits for a disk which does not answer goes when that answers, if ever.
pub struct Dying {
    pid: Option<u32>,
    process: VmProcess,
    /// Given back when the process is gone.
    _memory: Taken,
}

impl Dying {
    /// Its process id, unless it is gone already.
    pub const fn pid(&self) -> Option<u32> {
        self.pid
    }

    /// Waits until it is gone. Cancel safe.
    pub async fn gone(&mut self) -> io::Result<()> {
        self.process.wait().await.map(drop)
    }
}

impl Guest {
    /// Takes the memory that a guest needs.
    pub fn take_memory(header: &Header, budget: &Budget) -> Result<Taken, GuestError> {
        let machine = MachineConfig::from_bytes(&header.config)?;
        Ok(budget.take(machine.memory)?)
    }

    /// Has a process record from power-on (`boots`), or replay from the log's beginning, as it was
    /// prepared for.
    pub fn start(
        run: VmRun,
        spawned: Spawned,
        boots: bool,
        memory: Taken,
    ) -> Result<Self, GuestError> {
        let process = VmProcess::begin(spawned)?;
        Ok(Self {
            run,
            process,
            doing: if boots {
                Doing::Recording
            } else {
                Doing::Replaying
            },
            at: Position::START,
            cursor: Cursor::new(LogIndex::START),
            under_way: std::collections::VecDeque::new(),
            bytes: 0,
            frames: std::collections::VecDeque::new(),
            frame_bytes: 0,
            go_live: None,
            passed_at: now(),
            longest_deferral: Span::ZERO,
            ended: None,
            watch: Watch::new(now()),
            starved: Starved::default(),
            memory,
        })
    }

    /// Which run of the VM this is.
    pub const fn run(&self) -> VmRun {
        self.run
    }

    /// What it is doing.
    pub const fn doing(&self) -> Doing {
        self.doing
    }

    /// Its process id, while it lives.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// The next thing the process says; `None` when it is gone. Cancel safe.
    pub async fn recv(&mut self) -> Result<Option<FromVm>, IpcError> {
        let said = self.process.recv().await?;
        if let Some(said) = &said {
            self.watch.heard(said);
        }
        Ok(said)
    }

    /// When [`Self::look`] is due.
    pub fn look_due(&self) -> Time {
        self.watch.poll_timeout()
    }

    /// Sees to it that the process lives, after everything was taken in that has come from it. The
    /// error is a sentence that says why it is to be ended.
    pub fn look(&mut self) -> Result<(), String> {
        let (starved, pid) = (&mut self.starved, self.process.id());
        let starved = || pid.is_some_and(|pid| starved.look(pid));
        match self.watch.look(now(), starved) {
            Verdict::Well => Ok(()),
            Verdict::Ask { kick } => {
                let asked = self.tell(&ToVm::Ping { kick }).and_then(|()| self.flush());
                asked.map_err(|error| sentence(&error))
            }
            Verdict::Failed(why) => Err(why),
        }
    }

    /// Whether more has come from it than [`Self::recv`] has given.
    pub fn has_said_more(&self) -> bool {
        self.process.has_more()
    }

    /// Says something to it. It hears of it with [`Self::flush`].
    pub fn tell(&self, message: &ToVm) -> Result<(), GuestError> {
        Ok(self.process.sender().send(message)?)
    }

    /// Sends what it was told on its way, all at once.
    pub fn flush(&self) -> Result<(), GuestError> {
        Ok(self.process.sender().flush()?)
    }

    /// Whether it has as many frames as it may that are in no log yet.
    pub const fn has_frames_enough(&self) -> bool {
        self.frame_bytes >= FRAMES_WINDOW
    }

    /// Gives it a frame.
    pub fn frame(&mut self, source: FrameSource, bytes: Bytes) -> Result<(), GuestError> {
        let room = bytes.len() + FRAME_COST;
        self.frames.push_back((source, room));
        self.frame_bytes += room;
        self.tell(&ToVm::Frame { source, bytes })
    }

    /// It has recorded the frames of a gateway through this one.
    pub fn recorded(&mut self, through: FrameSource) {
        let left = &mut self.frame_bytes;
        self.frames.retain(|(source, bytes)| {
            let done = source.gateway == through.gateway && source.number <= through.number;
            *left -= if done { *bytes } else { 0 };
            !done
        });
    }

    /// It has told, while recording, which landmark it has passed.
    pub fn passed(&mut self, at: Position) {
        self.at = at;
        self.passed_at = now();
    }

    /// How long it has not shown that it came past a landmark. A guest that waits does so several
    /// times a second, by its marks.
    pub fn silence(&self) -> Span {
        now().since(self.passed_at)
    }

    /// Something that arrived had to wait so long for it.
    pub fn deferred(&mut self, longest: Span) {
        self.longest_deferral = self.longest_deferral.max(longest);
    }

    /// The longest that something which arrived has waited for it.
    pub const fn longest_deferral(&self) -> Span {
        self.longest_deferral
    }

    /// It has ended by its own doing.
    pub const fn has_ended(&mut self, ending: Ending) {
        self.ended = Some(ending);
    }

    /// How it ended by its own doing, if it did.
    pub const fn ended(&self) -> Option<Ending> {
        self.ended
    }

    /// The last landmark it told of.
    pub const fn at(&self) -> Position {
        self.at
    }

    /// It has told that it stands at this landmark.
    pub const fn stands_at(&mut self, at: Position) {
        self.at = at;
    }

    /// It has executed the log through here, which is at this landmark.
    pub fn executed(&mut self, through: LogIndex, at: Position) {
        self.at = at;
        while let Some((end, bytes)) = self.under_way.front()
            && *end <= through
        {
            self.bytes -= bytes;
            self.under_way.pop_front();
        }
    }

    /// Whether [`Self::feed`] has something to do.
    pub fn wants_log(&self, log: &LogKeeper) -> bool {
        let replays = self.doing != Doing::Recording;
        let more = self.bytes < WINDOW && self.cursor.next() < log.tip().index;
        replays && (more || self.go_live.is_some())
    }

    /// Whether it goes live as soon as it has the log.
    pub const fn is_about_to_live(&self) -> bool {
        self.go_live.is_some()
    }

    /// Feeds it what the log has beyond what it was fed, as far as the window allows.
    pub fn feed(&mut self, log: &LogKeeper) -> Result<(), GuestError> {
        if self.doing == Doing::Recording {
            return Ok(());
        }
        while self.bytes < WINDOW {
            let Some(batch) = log.read(&mut self.cursor)? else {
                break;
            };
            let mut framed = Vec::with_capacity(batch.payload().len() + 32);
            batch.encode_frame(&mut framed);
            self.under_way.push_back((batch.end(), framed.len()));
            self.bytes += framed.len();
            self.tell(&ToVm::Batch(framed.into()))?;
        }
        if let Some((term, at)) = self.go_live
            && self.cursor.next() >= at.index
        {
            self.go_live = None;
            self.tell(&ToVm::GoLive { term, at: at.index })?;
        }
        Ok(())
    }

    /// Lets it go live once it has the log through `at`.
    pub fn go_live(&mut self, term: Term, at: LogTip) {
        self.doing = Doing::GoingLive;
        self.go_live = Some((term, at));
    }

    /// It has said that it records now. How long it shows no landmark counts from here.
    pub fn is_live(&mut self) {
        self.doing = Doing::Recording;
        self.passed_at = now();
    }

    /// Ends the process, without waiting until it is gone.
    pub fn end(mut self) -> Dying {
        let pid = self.process.id();
        if let Err(error) = self.process.end() {
            tracing::warn!(?pid, %error, "a VMM process cannot be killed");
        }
        Dying {
            pid,
            process: self.process,
            _memory: self.memory,
        }
    }
}
