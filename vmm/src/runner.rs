//! The one run loop: it drives a machine from landmark to landmark, whoever holds the tape.
//!
//! ```text
//!            ┌──────────────── Pending::Nothing ────────────────┐
//!            │                                                  ▼
//!   ┌─► at a landmark ── Act ──► settle ──► tape.next ── Run ─► inject? ─► enter guest ─┐
//!   │        │                     │ exit      │ Deliver, Mark: done, ask again         │
//!   │        │ Hold                └─► number  │ Wait, Pause                            │
//!   │        ▼                         it      ▼                                        │
//!   │      Waiting                           Waiting, Paused, Ended                     │
//!   └───────────────────────── exit served, group closed, position + 1 ◄────────────────┘
//! ```
//!
//! A machine that nobody replays ([`Runner::unrepeatable`]) is also attended to wherever a kick takes
//! it out; that has no position of its own.

use replay_log::Position;

use crate::machine::{DigestScope, Enter, Entered, Machine, MachineError};
use crate::overheard::{Ear, Overheard};
use crate::tape::{CpuState, GuestEnd, Next, Pending, Tape, TapeError};

/// Every so many marks the digest is deep: FPU and MSRs too.
const DEEP_EVERY: u64 = 64;
/// Pages that a mark scrubs after something has happened: a few microseconds. Also when the guest
/// waits: under load it waits for its disk, and clients wait with it.
const SCRUB_BUSY: u32 = 4;
/// Pages that a mark scrubs when nothing has happened since the last: nobody is in a hurry then.
const SCRUB_RESTING: u32 = 64;

/// Where the run loop stands when it hands control back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The budget is used up or a kick came; call again.
    Ran,
    /// Nothing to do before something happens outside.
    Waiting,
    /// The tape asked to leave the loop at this landmark.
    Paused,
    /// The guest has ended by its own doing, and the tape has heard of it.
    Ended(GuestEnd),
}

/// Where the machine may be given something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stops {
    /// At landmarks, which a replay finds again.
    Landmarks,
    /// Wherever a kick takes it out: nobody replays it.
    Anywhere,
}

impl Stops {
    const fn run(self) -> Enter {
        match self {
            Self::Landmarks => Enter::Run,
            Self::Anywhere => Enter::RunAnywhere,
        }
    }
}

/// What has happened since the last mark: exits and arrivals, or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SinceMark {
    Nothing,
    Something,
}

/// A machine together with the place it has reached.
pub struct Runner<M> {
    machine: M,
    stops: Stops,
    at: Position,
    /// The last exit's I/O may be pending.
    unsettled: bool,
    /// An interrupt was injected and no exit has come since: there is no room for another.
    injected: bool,
    /// A kick took the vCPU out between two landmarks: nothing may be done but to go back in.
    in_slice: bool,
    kicks: u64,
    marks: u64,
    since_mark: SinceMark,
    scrub_page: u64,
    ear: Ear,
}

impl<M: Machine> Runner<M> {
    /// A machine that was just powered on.
    pub fn new(machine: M) -> Self {
        Self::stopping(machine, Stops::Landmarks)
    }

    /// The same, whose kicks are as good as landmarks: what arrives is delivered at once, whatever
    /// the guest does, and no log of it could be replayed.
    pub fn unrepeatable(machine: M) -> Self {
        Self::stopping(machine, Stops::Anywhere)
    }

    fn stopping(machine: M, stops: Stops) -> Self {
        Self {
            machine,
            stops,
            at: Position::START,
            unsettled: false,
            injected: false,
            in_slice: false,
            kicks: 0,
            marks: 0,
            since_mark: SinceMark::Something,
            scrub_page: 0,
            ear: Ear::default(),
        }
    }

    /// The last landmark passed.
    pub const fn at(&self) -> Position {
        self.at
    }

    /// How often a kick took the vCPU out.
    pub const fn kicks(&self) -> u64 {
        self.kicks
    }

    /// The machine.
    pub const fn machine(&self) -> &M {
        &self.machine
    }

    /// What the vCPU can do now.
    pub fn cpu(&self) -> CpuState {
        match self.machine.cpu() {
            CpuState::Halted | CpuState::Idle if self.injected => CpuState::Ready,
            state => state,
        }
    }

    /// Runs on until there is something to tell, for at most `budget` landmarks.
    pub fn turn(&mut self, tape: &mut dyn Tape, budget: u32) -> Result<Turn, MachineError> {
        for _ in 0..budget {
            if !self.in_slice
                && let Some(turn) = self.landmark(tape)?
            {
                return Ok(turn);
            }
            tape.entering(self.machine.interrupt_waits());
            if self.enter(self.stops.run(), tape)? == Entered::Kicked {
                return Ok(Turn::Ran);
            }
        }
        Ok(Turn::Ran)
    }

    /// Does what is to be done at this landmark; `None` when the guest may execute on.
    fn landmark(&mut self, tape: &mut dyn Tape) -> Result<Option<Turn>, MachineError> {
        match tape.pending(self.at, self.cpu(), self.machine.can_take())? {
            Pending::Hold => Ok(Some(self.rest(Turn::Waiting))),
            Pending::Nothing if !self.needs_care() => Ok(None),
            Pending::Nothing | Pending::Act => self.attend(tape),
        }
    }

    /// Whether the machine itself wants something done at this landmark.
    fn needs_care(&self) -> bool {
        self.machine.cpu() != CpuState::Ready || self.machine.interrupt_waits()
    }

    /// Completes pending I/O and does what the tape says until the guest may execute (`None`) or
    /// the loop has to be left.
    fn attend(&mut self, tape: &mut dyn Tape) -> Result<Option<Turn>, MachineError> {
        loop {
            while self.unsettled {
                if self.enter(Enter::Complete, tape)? == Entered::Settled {
                    break;
                }
                if tape.pending(self.at, self.cpu(), self.machine.can_take())? == Pending::Hold {
                    return Ok(Some(self.rest(Turn::Waiting)));
                }
            }
            // A waiting vCPU is woken by an interrupt before it is asked what it waits for.
            if self.machine.cpu() != CpuState::Ready {
                self.inject()?;
            }
            match tape.next(self.at, self.cpu(), self.machine.can_take())? {
                Next::Deliver(delivery) => {
                    self.since_mark = SinceMark::Something;
                    self.ear.arrival(self.at, &delivery.arrival);
                    let taken = self.machine.deliver(delivery);
                    taken.map_err(|error| placed(error, self.at))?;
                }
                Next::Mark => self.mark(tape)?,
                Next::Wait => return Ok(Some(self.rest(Turn::Waiting))),
                Next::Pause => return Ok(Some(self.rest(Turn::Paused))),
                Next::Run => {
                    self.inject()?;
                    return Ok(None);
                }
            }
        }
    }

    /// Injects an interrupt if one waits, there is room for it and the vCPU is ready.
    fn inject(&mut self) -> Result<(), MachineError> {
        if !self.injected && self.machine.interrupt_waits() {
            self.injected = self.machine.inject()?;
        }
        Ok(())
    }

    /// Enters the guest once; numbers the exit and closes its group.
    fn enter(&mut self, how: Enter, tape: &mut dyn Tape) -> Result<Entered, MachineError> {
        let ear = &mut self.ear;
        let entered = self.machine.enter(
            how,
            &mut Overheard {
                tape: &mut *tape,
                ear,
            },
        )?;
        match entered {
            Entered::Exit => {
                self.at = self.at.next();
                self.since_mark = SinceMark::Something;
                if how != Enter::Complete {
                    self.injected = false;
                    self.in_slice = false;
                }
                self.unsettled = true;
                tape.close(self.at)?;
            }
            Entered::Settled => self.unsettled = false,
            Entered::Kicked => {
                self.kicks += 1;
                match self.stops {
                    Stops::Landmarks => self.in_slice |= how == Enter::Run,
                    // The vCPU knows whether the guest has seen what was injected last.
                    Stops::Anywhere => {
                        self.injected = false;
                        self.unsettled = true;
                    }
                }
            }
        }
        Ok(entered)
    }

    fn mark(&mut self, tape: &mut dyn Tape) -> Result<(), MachineError> {
        let pages = match self.since_mark {
            SinceMark::Nothing => SCRUB_RESTING,
            SinceMark::Something => SCRUB_BUSY,
        };
        let scope = DigestScope {
            deep: self.marks.is_multiple_of(DEEP_EVERY),
            scrub: (self.scrub_page, pages),
            key: tape.key(),
        };
        let state = self.machine.digest(scope)?;
        let digest = self.ear.digest(&scope.key, self.at, state);
        self.marks += 1;
        self.since_mark = SinceMark::Nothing;
        self.scrub_page = self.scrub_page.wrapping_add(u64::from(pages));
        tape.mark(self.at, digest)?;
        Ok(())
    }

    /// What leaving the loop means, given how the guest stands.
    fn rest(&self, turn: Turn) -> Turn {
        match self.machine.cpu() {
            CpuState::Stopped(end) => Turn::Ended(end),
            _ => turn,
        }
    }
}

/// What a machine cannot take at a landmark was not taken there when it was recorded either.
fn placed(error: MachineError, at: Position) -> MachineError {
    match error {
        MachineError::CannotTake { what } => MachineError::Tape(TapeError::Diverged {
            at,
            expected: format!("the arrival of {what}"),
            found: "cannot take it".to_owned(),
        }),
        other => other,
    }
}
