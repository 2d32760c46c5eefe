//! Virtio over MMIO, version 2, polled: small drivers for the devices of one machine.
//!
//! The device side runs on the same thread as we do, at exits, so what is needed of barriers is
//! that the compiler keeps the order; the fences say so (and are free on x86).

pub mod block;
pub mod mmio;
pub mod net;
pub mod queue;

use core::fmt;

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// Nothing is at this window, or something else.
    Missing {
        /// What was looked for.
        what: &'static str,
        /// The window's address.
        at: u64,
    },
    /// It lacks a feature, or refused ours.
    Features {
        /// Which device.
        what: &'static str,
    },
    /// A queue is too small or missing.
    Queue {
        /// Which device.
        what: &'static str,
    },
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { what, at } => {
                write!(f, "there is no {what} at {at:#x}; configure one")
            }
            Self::Features { what } => {
                write!(f, "the {what} does not offer virtio 1 and what it needs")
            }
            Self::Queue { what } => write!(f, "the {what} has no queue that is large enough"),
        }
    }
}
