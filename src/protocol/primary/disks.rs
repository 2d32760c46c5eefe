//! What a primary does when its own disk takes nothing more, fails, or has room again.

use replay_log::Position;

use super::Primary;
use super::switchover::Phase;
use crate::protocol::api::{Action, StopReason};
use crate::protocol::core::Core;
use crate::protocol::event::Event;
use crate::protocol::message::{Health, Message};
use crate::protocol::node::Turn;
use crate::protocol::record::{Member, Stumble};

impl Primary {
    /// The disk here takes nothing more. Whoever has room goes on; where nobody has, the guest waits
    /// for room, and nothing is lost.
    pub(in crate::protocol) fn store_full(&mut self, core: &mut Core, reason: String) -> Turn {
        if self.another_has_room(core) {
            return self.abdicate(core, reason, None);
        }
        self.park_if_full(core);
        self.advance(core)
    }

    /// A guest that went on while the disk takes nothing would fill the memory instead.
    pub(in crate::protocol) fn park_if_full(&mut self, core: &mut Core) {
        if core.full.is_some() && matches!(self.phase, Phase::Live) && !self.parked {
            self.parked = true;
            core.do_(Action::PauseVm { run: core.run });
            core.journal(Event::Waiting {
                why: "the guest is paused: the disk here takes nothing more, and no other copy could \
                      go on; make room on it, and the guest goes on by itself"
                    .to_owned(),
            });
        }
    }

    /// Whether a copy could go on whose disk is well.
    pub(super) fn another_has_room(&self, core: &Core) -> bool {
        let able = |member: &Member| {
            let follower = self.followers.get(&member.host);
            core.is_up(&member.host)
                && self.lost(core, member).is_none()
                && follower.is_some_and(|follower| follower.health() == Health::Well)
        };
        let record = core.record.as_ref();
        record.is_some_and(|record| record.members.iter().any(able))
    }

    /// There is room again.
    pub(in crate::protocol) fn store_room(&mut self, core: &mut Core) {
        // In a switchover the guest is paused for that, too.
        let would_run = matches!(self.phase, Phase::Live | Phase::Asking { .. });
        if std::mem::take(&mut self.parked) && would_run {
            core.do_(Action::ResumeVm { run: core.run });
        }
    }

    /// The VMM failed at this landmark: another host is to go on.
    pub(in crate::protocol) fn vm_failed(
        &mut self,
        core: &mut Core,
        reason: String,
        at: Position,
    ) -> Turn {
        let failed = core.stumbles(at, &reason);
        core.stumble = Some(failed.clone());
        self.abdicate(core, reason, Some(&failed))
    }

    pub(in crate::protocol) fn abdicate(
        &mut self,
        core: &mut Core,
        reason: String,
        failed: Option<&Stumble>,
    ) -> Turn {
        core.journal(Event::Abdicated {
            term: self.term,
            reason,
        });
        let version = core.version();
        for host in core.up_peers() {
            let failed = failed.cloned();
            core.send(&host, Message::Abdicated { version, failed });
        }
        core.stop_vm(StopReason::Failed);
        Turn::Abdicated
    }
}
