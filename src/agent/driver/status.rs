//! What a driver tells about its VM: for `status`, metrics and the demo.

use super::VmDriver;
use super::guest::Doing;
use crate::agent::clock::now;
use crate::agent::operator::{Fetching, GuestStatus, StoreFigures, VmStatus};

impl VmDriver {
    /// How the VM is, seen from here.
    pub(super) fn status(&self) -> VmStatus {
        let mut node = self.node.status();
        // What the protocol follows is how far a log is executed; a primary writes it.
        if let Some(guest) = self
            .guest
            .as_ref()
            .filter(|g| g.doing() == Doing::Recording)
        {
            node.position = node.position.max(guest.at());
        }
        VmStatus {
            vm: self.vm.clone(),
            node,
            guest: self.guest.as_ref().map(|guest| GuestStatus {
                pid: guest.pid(),
                recording: guest.doing() == Doing::Recording,
                longest_deferral: guest.longest_deferral(),
                silence: guest.silence(),
                ended: guest.ended(),
            }),
            log_bytes: self.log.bytes(),
            store: StoreFigures {
                budget: self.log.budget(),
                over_budget: self.log.over_budget(),
                waiting: self.log.waiting_bytes() as u64,
                oldest_sync: self.log.oldest_sync(now()),
                full: self.log.full().map(ToOwned::to_owned),
            },
            waiting_output: self.outbox.bytes() as u64,
            gateways: self.gateways.port.served(),
            failure: self.failure(),
            fetching: self.fetching(),
        }
    }

    /// What is wrong here, if anything is.
    fn failure(&self) -> Option<String> {
        let failure = self.failure.as_ref();
        failure
            .map(|failure| failure.text.clone())
            .or_else(|| self.reaper.undead())
    }

    /// How far the disks have come that the guest is waiting for.
    fn fetching(&self) -> Option<Fetching> {
        self.awaiting_parts?;
        let disks = &self.header.as_ref()?.disks;
        let (bytes, of) = self.env.library.fetched(disks)?;
        Some(Fetching { bytes, of })
    }
}
