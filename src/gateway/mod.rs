//! The gateway: a process beside the clients that publishes TCP ports of a guest and survives every
//! change of its primary. See README.md.

mod device;
#[cfg(test)]
mod exactly_once;
pub mod frames;
pub mod port;
pub mod stack;
