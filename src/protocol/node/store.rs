//! What a host's store and durable state report.

use replay_log::LogTip;

use super::{Node, Role, Turn};
use crate::protocol::event::Event;
use crate::protocol::name::Incarnation;

impl Node {
    pub(super) fn log_moved(&mut self) -> Turn {
        if let Role::Replica(replica) = &mut self.role {
            replica.try_tell_sealed(&mut self.core);
            replica.acknowledge(&mut self.core);
        }
        self.advance()
    }

    pub(super) fn persisted(&mut self, settled: bool) -> Turn {
        if settled {
            self.core.agree_on_acks();
        }
        match &mut self.role {
            Role::Replica(replica) => {
                if settled {
                    replica.renewed(&mut self.core);
                }
                replica.try_tell_sealed(&mut self.core);
            }
            _ if settled => self.core.hello_all(),
            _ => {}
        }
        self.advance()
    }

    pub(super) fn store_failed(&mut self, reason: String) -> Turn {
        let turn = match &mut self.role {
            Role::Primary(primary) => primary.abdicate(&mut self.core, reason.clone(), None),
            Role::Claimant(controller) => {
                controller.give_up(&mut self.core, "the local store failed")
            }
            Role::Replica(_) => Turn::Abdicated,
        };
        self.turn(turn);
        self.core.store_failed(reason);
        Turn::Stay
    }

    /// The disk takes nothing more.
    pub(super) fn store_full(&mut self, reason: String) -> Turn {
        if self.core.full.is_none() {
            let reason = reason.clone();
            self.core.journal(Event::StoreFull { reason });
        }
        self.core.full = Some(reason.clone());
        match &mut self.role {
            Role::Replica(replica) => {
                replica.acknowledge(&mut self.core);
                Turn::Stay
            }
            Role::Claimant(controller) => controller.store_full(&mut self.core),
            Role::Primary(primary) => primary.store_full(&mut self.core, reason),
        }
    }

    /// The store has not taken all that it was given. What is missing is had again from a peer, as after
    /// a connection that was lost.
    pub(super) fn store_short(&mut self, incarnation: Incarnation, tip: LogTip) -> Turn {
        if !self.core.shortened(incarnation, tip) {
            return Turn::Stay;
        }
        match &mut self.role {
            Role::Replica(replica) => {
                replica.store_short(&self.core);
                Turn::Stay
            }
            Role::Claimant(controller) => controller.store_full(&mut self.core),
            Role::Primary(primary) => {
                // Its guest has gone on where no log follows. What it has done there nobody has seen.
                let why =
                    "the disk here does not take the guest's log fast enough: the guest goes on \
                           from where the log ends"
                        .to_owned();
                primary.abdicate(&mut self.core, why, None)
            }
        }
    }

    /// The disk takes more again.
    pub(super) fn store_room(&mut self) -> Turn {
        if self.core.full.take().is_some() {
            self.core.journal(Event::StoreRoom);
        }
        match &mut self.role {
            Role::Replica(replica) => {
                replica.store_room(&mut self.core);
                Turn::Stay
            }
            Role::Claimant(controller) => controller.advance(&mut self.core),
            Role::Primary(primary) => {
                primary.store_room(&mut self.core);
                primary.advance(&mut self.core)
            }
        }
    }
}
