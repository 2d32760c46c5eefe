//! Who is meant, where a world has several VMs and a VM several gateways.

use std::fmt;

/// The names of the VMs that a world may have.
pub(super) const VMS: [&str; 2] = ["shop", "till"];

/// One VM on one host.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct SeatId {
    pub(super) vm: usize,
    pub(super) host: usize,
}

impl fmt::Display for SeatId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host{}", self.host)?;
        // Most worlds have only the first.
        if self.vm > 0 {
            write!(f, "/{}", VMS[self.vm])?;
        }
        Ok(())
    }
}

impl fmt::Debug for SeatId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One gateway of one VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GatewayId {
    pub(super) vm: usize,
    pub(super) number: usize,
}
