//! The devices: pure functions of their state, the guest's accesses and the tape.
//!
//! [`platform::Platform`] is all of them behind one bus; a machine owns one.

mod clock;
pub mod layout;
mod pic;
mod pit;
pub mod platform;
mod power;
mod print;
mod serial;
#[cfg(test)]
mod testing;
mod timer;
mod virtio;
