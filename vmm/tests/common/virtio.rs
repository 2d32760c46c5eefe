//! Drivers of virtio devices for guests that are assembled: one buffer at a time, no frills.

use iced_x86::code_asm::*;
use vmm::devices::layout;

use super::guest::{Guest, ok};

/// Queues have eight entries.
pub const ENTRIES: u64 = 8;

const DEVICE_FEATURES_SELECT: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;

const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// VIRTIO_F_VERSION_1, in the second word of features.
const VERSION_1: u32 = 1;

/// The descriptor continues in the next one; the device writes it.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// A queue: descriptors, then the available ring, then the used ring.
#[derive(Clone, Copy, Debug)]
pub struct Queue {
    pub device: u64,
    pub index: u32,
    pub at: u64,
}

/// One descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub address: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Queue {
    pub fn descriptors(&self) -> u64 {
        self.at
    }

    pub fn available(&self) -> u64 {
        self.at + 0x100
    }

    pub fn used(&self) -> u64 {
        self.at + 0x200
    }

    /// Puts descriptors into the image, and the first `offered` of them into the available ring.
    pub fn prepare(&self, guest: &mut Guest, descriptors: &[Descriptor], offered: u16) {
        let mut bytes = Vec::new();
        for d in descriptors {
            bytes.extend_from_slice(&d.address.to_le_bytes());
            bytes.extend_from_slice(&d.len.to_le_bytes());
            bytes.extend_from_slice(&d.flags.to_le_bytes());
            bytes.extend_from_slice(&d.next.to_le_bytes());
        }
        guest.data(self.descriptors(), bytes);
        let mut ring = vec![0, 0];
        ring.extend_from_slice(&offered.to_le_bytes());
        for head in 0..offered {
            ring.extend_from_slice(&head.to_le_bytes());
        }
        guest.data(self.available(), ring);
    }

    /// Offers the chain whose head is in ECX, `counter` being the ring's index so far, and tells
    /// the device. Uses RAX and RDX.
    pub fn offer(&self, guest: &mut Guest, counter: AsmRegister32, notify: bool) {
        let a = &mut guest.asm;
        ok(a.mov(eax, counter));
        ok(a.and(eax, ENTRIES as i32 - 1));
        ok(a.mov(word_ptr(rax * 2 + self.available() + 4), cx));
        ok(a.inc(counter));
        ok(a.mov(eax, counter));
        ok(a.mov(word_ptr(self.available() + 2), ax));
        if notify {
            guest.write32(window(self.device) + QUEUE_NOTIFY, self.index);
        }
    }

    /// Waits until the device has used more than `seen` chains (the low word counts). The
    /// interrupt is acknowledged before each wait. Uses RAX and RDX.
    pub fn wait_for_used(&self, guest: &mut Guest, seen: AsmRegister32) {
        let mut look = guest.asm.create_label();
        let mut found = guest.asm.create_label();
        // An instruction takes one label, and the caller may have set one.
        ok(guest.asm.nop());
        ok(guest.asm.set_label(&mut look));
        ok(guest.asm.movzx(eax, word_ptr(self.used() + 2)));
        ok(guest.asm.movzx(edx, low_half(seen)));
        ok(guest.asm.cmp(eax, edx));
        ok(guest.asm.jne(found));
        ok(guest.asm.mov(edx, window(self.device) as u32));
        ok(guest.asm.mov(eax, dword_ptr(rdx + INTERRUPT_STATUS)));
        ok(guest.asm.mov(dword_ptr(rdx + INTERRUPT_ACK), eax));
        guest.idle();
        ok(guest.asm.jmp(look));
        ok(guest.asm.set_label(&mut found));
    }
}

fn low_half(register: AsmRegister32) -> AsmRegister16 {
    match register {
        r if r == r12d => r12w,
        r if r == r13d => r13w,
        r if r == r14d => r14w,
        _ => panic!("a counter lives in r12 to r14"),
    }
}

fn window(device: u64) -> u64 {
    layout::VIRTIO_BASE + device * layout::VIRTIO_WINDOW
}

/// Negotiates with a device, sets its queues up and brings it to life; folds what it says.
pub fn start(guest: &mut Guest, device: u64, features: u32, queues: &[Queue]) {
    let base = window(device);
    for status in [0, 1, 3] {
        guest.write32(base + STATUS, status);
    }
    guest.write32(base + DEVICE_FEATURES_SELECT, 1);
    for (page, word) in [(0, features), (1, VERSION_1)] {
        guest.write32(base + DRIVER_FEATURES_SELECT, page);
        guest.write32(base + DRIVER_FEATURES, word);
    }
    guest.write32(base + STATUS, 3 | FEATURES_OK);
    for queue in queues {
        guest.write32(base + QUEUE_SELECT, queue.index);
        guest.write32(base + QUEUE_SIZE, ENTRIES as u32);
        for (register, address) in [
            (0x80, queue.descriptors()),
            (0x90, queue.available()),
            (0xa0, queue.used()),
        ] {
            guest.write32(base + register, address as u32);
            guest.write32(base + register + 4, (address >> 32) as u32);
        }
        guest.write32(base + QUEUE_READY, 1);
    }
    guest.write32(base + STATUS, 3 | FEATURES_OK | DRIVER_OK);
    ok(guest.asm.mov(edx, base as u32));
    ok(guest.asm.mov(eax, dword_ptr(rdx + STATUS)));
    guest.fold();
}
