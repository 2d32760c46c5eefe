//! A small virtual machine monitor whose guests can be recorded and replayed.
//!
//! One run loop ([`runner`]) drives a [`machine::Machine`] and asks a [`tape::Tape`] for everything
//! that is not a function of the machine's own state. The recorder answers from the host and writes
//! the log, the replayer answers from the log; the machine cannot tell them apart.
//!
//! Arrivals wait for the guest's next exit. Cuts, which will end that wait, are not there yet: until
//! then a guest that computes without exits delays whatever arrives, its timers included, for as
//! long as it computes, and nothing can be paused or moved while it does.

pub mod boot;
pub mod config;
mod deferral;
pub mod devices;
mod digest;
pub mod disk;
pub mod host;
pub mod kvm;
pub mod machine;
pub mod model;
pub mod outbox;
mod overheard;
pub mod recorder;
pub mod replayer;
pub mod runner;
pub mod tape;
pub mod testing;

/// Guest memory. The bitmap remembers what the VMM itself wrote, because KVM's dirty log does not
/// (DESIGN.md section 2).
pub type GuestMemory = vm_memory::GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

/// The version of the machine model: what a log's entries mean to a machine. A change of any
/// device, of the boot state or of the landmark protocol that an old log would notice raises it.
pub const MACHINE_MODEL: u32 = 7;
