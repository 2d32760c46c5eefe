//! The run of the VMM: begun, ended, how far it has come, and whether it fails.

use replay_log::{FrameNumber, LogIndex, Position};

use super::{Core, Vm};
use crate::protocol::api::{Action, StopReason};
use crate::protocol::message::Health;
use crate::protocol::name::VmRun;
use crate::protocol::record::Stumble;

/// A reign that has come no further than so many landmarks beyond the place where the last one
/// failed has failed at the same place: what arrives from outside moves it a little.
const SAME_PLACE: u64 = 256;

impl Core {
    /// Starts a replay of the stored log, unless one is running.
    pub(in crate::protocol) fn ensure_replay(&mut self) {
        if self.vm != Vm::Replaying {
            self.begin_run(Vm::Replaying);
            self.do_(Action::Replay { run: self.run });
        }
    }

    /// Gives the next VMM its number. What an earlier one still reports is ignored.
    pub(in crate::protocol) fn begin_run(&mut self, vm: Vm) {
        self.run = self.run.next();
        self.vm = vm;
        self.executed = LogIndex::START;
        self.position = Position::START;
    }

    /// Ends the VMM, if there is one.
    pub(in crate::protocol) fn stop_vm(&mut self, why: StopReason) {
        if self.vm != Vm::Absent {
            self.do_(Action::StopVm { run: self.run, why });
            self.begin_run(Vm::Absent);
        }
    }

    pub(in crate::protocol) fn executed(
        &mut self,
        run: VmRun,
        through: LogIndex,
        position: Position,
    ) {
        if run == self.run {
            self.executed = self.executed.max(through);
            self.position = self.position.max(position);
        }
    }

    pub(in crate::protocol) fn forget(&mut self, through: FrameNumber) {
        if through > self.forgotten {
            self.forgotten = through;
            self.do_(Action::ForgetOutputs { through });
        }
    }

    /// A reign has failed at this landmark: how many in a row have by now.
    pub(in crate::protocol) fn stumbles(&self, at: Position, reason: &str) -> Stumble {
        let before = self.record.as_ref().and_then(|r| r.failed.as_ref());
        let again = before.filter(|before| at.0 <= before.at.0.saturating_add(SAME_PLACE));
        let mut reason = reason.to_owned();
        while reason.len() > Stumble::REASON_MAX {
            reason.pop();
        }
        Stumble {
            at: again.map_or(at, |before| before.at.max(at)),
            reigns: again.map_or(1, |before| before.reigns.saturating_add(1)),
            reason,
        }
    }

    /// What keeps this copy from being counted on.
    pub(in crate::protocol) fn health(&self) -> Health {
        if self.full.is_some() {
            Health::Full
        } else if self.failures >= 2 && self.executed <= self.failed_at {
            Health::Unable
        } else {
            Health::Well
        }
    }

    /// How many times the usual patience a VMM that has failed waits before it is tried again.
    pub(in crate::protocol) fn backoff(&self) -> u64 {
        1 << self.failures.saturating_sub(1).min(5)
    }

    /// The VMM failed: until it has executed what it had by then, this host is not fit to reign. (Not
    /// all that is held: the end of a log is executed only when more follows.)
    pub(in crate::protocol) fn note_vm_failure(&mut self) {
        self.failures = if self.failures > 0 && self.executed <= self.failed_at {
            self.failures.saturating_add(1)
        } else {
            1
        };
        self.failed_at = self.executed;
        self.unfit_before = self.executed.max(LogIndex(1));
    }
}
