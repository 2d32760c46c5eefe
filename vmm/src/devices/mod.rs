//! The devices: pure functions of their state, the guest's accesses and the tape.
//!
//! [`platform::Platform`] is all of them behind one bus; a machine owns one.

pub mod layout;
pub mod platform;
