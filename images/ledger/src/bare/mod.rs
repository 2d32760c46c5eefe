//! The bare machine: all code that is `unsafe`, and the loop that uses it.

pub mod boot;
pub mod clock;
pub mod console;
pub mod disk;
mod heap;
pub mod machine;
mod memory;
pub mod network;
pub mod ports;
pub mod virtio;

core::arch::global_asm!(include_str!("boot.s"));
