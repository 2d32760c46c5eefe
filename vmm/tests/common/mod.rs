//! What the tests on KVM share: guests assembled on the spot, and ways to run them.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod guest;
pub mod guests;
pub mod run;
#[path = "../../../tests/common/skip.rs"]
pub mod skip;
pub mod tape;
pub mod virtio;

use vm_memory::{Bytes, GuestAddress};
use vmm::boot::BootImage;
use vmm::config::MachineConfig;
use vmm::kvm::{KvmError, KvmMachine};

/// Whether `/dev/kvm` can be had; says aloud if not, so that no test passes by not running.
pub fn kvm_is_here(test: &str) -> bool {
    let image = guest::Guest::new(guest::Ring::Zero).build();
    match KvmMachine::new(&config(), &image) {
        Ok(_) => true,
        Err(e @ (KvmError::NoDevice { .. } | KvmError::NoPermission { .. })) => {
            skip::skipped(test, &e);
            false
        }
        Err(e) => panic!("KVM is there, but no machine can be made: {e:?}"),
    }
}

/// A small machine without network and disks.
pub fn config() -> MachineConfig {
    MachineConfig {
        memory: 4 << 20,
        command_line: "console=ttyS0".to_owned(),
        mac: None,
        disks: Vec::new(),
        acpi: false,
    }
}

/// A machine about to run `image`.
pub fn machine(config: &MachineConfig, image: &BootImage) -> KvmMachine {
    KvmMachine::new(config, image).unwrap_or_else(|e| panic!("no machine: {e:?}"))
}

/// The content of all guest memory.
pub fn all_memory(machine: &KvmMachine) -> Vec<u8> {
    let mut bytes = vec![0; config().memory as usize];
    machine
        .memory()
        .read_slice(&mut bytes, GuestAddress(0))
        .expect("guest memory can be read");
    bytes
}
