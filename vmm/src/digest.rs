//! The canonical digest of a machine on KVM: equal on every host for equal states (DESIGN.md
//! section 2, rules 5 and 6).
//!
//! Left out because they depend on the host and not on the guest: RF, the time stamp counter, the
//! last instruction and data pointers of the x87, XSTATE_BV (absent components enter with their
//! initial values, as KVM hands them out), the vector that KVM holds for injection (it is in the
//! exits). Guests that are replayed keep the accessed and dirty bits of their page tables set, so
//! nothing is masked in memory.

use kvm_bindings::{Msrs, kvm_regs, kvm_segment, kvm_sregs, kvm_xsave};
use replay_log::MarkDigest;
use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;

/// RFLAGS.RF: set and cleared by how an instruction was interrupted, not by the guest.
const RESUME_FLAG: u64 = 1 << 16;
/// Exits are folded into a hash when they take more room than this.
const EXITS_MAX: usize = 16 << 10;
const PAGE: usize = 4096;

/// What the guest did and what was injected, since the last digest.
#[derive(Default)]
pub(crate) struct Exits {
    bytes: Vec<u8>,
}

impl Exits {
    /// Adds one event: what kind, where, of which size, and its data.
    pub(crate) fn add(&mut self, kind: u8, address: u64, size: usize, data: &[u8]) {
        if self.bytes.len() + data.len() > EXITS_MAX {
            let folded = blake3::hash(&self.bytes);
            self.bytes.clear();
            self.bytes.extend_from_slice(folded.as_bytes());
        }
        self.bytes.push(kind);
        self.bytes.push(size as u8);
        self.bytes.extend_from_slice(&address.to_le_bytes());
        self.bytes
            .extend_from_slice(&(data.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(data);
    }

    /// Hashes what there is, and forgets it.
    pub(crate) fn take(&mut self, hasher: &mut blake3::Hasher) {
        hasher.update(&(self.bytes.len() as u64).to_le_bytes());
        hasher.update(&self.bytes);
        self.bytes.clear();
    }
}

/// Adds general and system registers.
pub(crate) fn registers(hasher: &mut blake3::Hasher, regs: &kvm_regs, sregs: &kvm_sregs) {
    let mut words = Words::new();
    for register in [
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rsp,
        regs.rbp,
        regs.r8,
        regs.r9,
        regs.r10,
        regs.r11,
        regs.r12,
        regs.r13,
        regs.r14,
        regs.r15,
        regs.rip,
        regs.rflags & !RESUME_FLAG,
    ] {
        words.push(register);
    }
    for s in [
        &sregs.cs, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs, &sregs.ss, &sregs.tr, &sregs.ldt,
    ] {
        words.push(s.base);
        words.push(u64::from(s.limit) | u64::from(s.selector) << 32);
        words.push(attributes(s));
    }
    for table in [&sregs.gdt, &sregs.idt] {
        words.push(table.base);
        words.push(table.limit.into());
    }
    for register in [
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.cr8,
        sregs.efer,
        sregs.apic_base,
    ] {
        words.push(register);
    }
    hasher.update(words.bytes());
}

/// An unusable segment has no other attribute: what KVM shows beside it differs between hosts.
fn attributes(s: &kvm_segment) -> u64 {
    if s.unusable != 0 {
        return u64::from(s.unusable);
    }
    [s.type_, s.present, s.dpl, s.db, s.s, s.l, s.g, s.avl]
        .iter()
        .fold(0, |word, &byte| word << 7 | u64::from(byte & 0x7f))
        << 1
}

/// Adds FPU and vector registers.
pub(crate) fn floating_point(hasher: &mut blake3::Hasher, xsave: &kvm_xsave) {
    // In 32-bit words: 0 control and status, 1 tag and opcode, 2 to 5 pointers, 6 MXCSR, 7 its
    // mask, 8 to 39 the x87 stack, 40 to 103 XMM, 128 to 143 the XSAVE header, then components.
    let region = &xsave.region;
    let mut words = Words::new();
    words.push(region[0].into());
    words.push(u64::from(region[1] & 0xff));
    words.push(region[6].into());
    for (i, pair) in region[8..104].chunks_exact(2).enumerate() {
        // Of an x87 register's 16 bytes the upper six mean nothing.
        let high = if i < 16 && i % 2 == 1 {
            pair[0] & 0xffff
        } else {
            pair[0]
        };
        let upper = if i < 16 && i % 2 == 1 { 0 } else { pair[1] };
        words.push(u64::from(high) | u64::from(upper) << 32);
    }
    hasher.update(words.bytes());
    let mut components = [0; (1024 - 144) * 4];
    for (bytes, word) in components.chunks_exact_mut(4).zip(&region[144..]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    hasher.update(&components);
}

/// Adds model-specific registers.
pub(crate) fn model_specific(hasher: &mut blake3::Hasher, msrs: &Msrs) {
    let mut words = Words::new();
    for entry in msrs.as_slice() {
        words.push(entry.index.into());
        words.push(entry.data);
    }
    hasher.update(words.bytes());
}

/// Adds pages of guest memory, each with its number; wraps around at the end of memory.
pub(crate) fn pages(
    hasher: &mut blake3::Hasher,
    memory: &GuestMemory,
    total: u64,
    (first, count): (u64, u32),
) -> Result<(), vm_memory::GuestMemoryError> {
    let mut content = [0; PAGE];
    for i in 0..u64::from(count).min(total) {
        let page = (first % total + i) % total;
        memory.read_slice(&mut content, GuestAddress(page * PAGE as u64))?;
        hasher.update(&page.to_le_bytes());
        hasher.update(&content);
    }
    Ok(())
}

/// What a log carries of a digest.
pub(crate) fn truncate(hasher: &blake3::Hasher) -> MarkDigest {
    let mut first = [0; 8];
    hasher.finalize_xof().fill(&mut first);
    MarkDigest(u64::from_le_bytes(first))
}

/// Words in a row, so that the hasher is called once. More than the room is a programmer's error.
struct Words {
    bytes: [u8; 640],
    len: usize,
}

impl Words {
    fn new() -> Self {
        Self {
            bytes: [0; 640],
            len: 0,
        }
    }

    fn push(&mut self, word: u64) {
        self.bytes[self.len..self.len + 8].copy_from_slice(&word.to_le_bytes());
        self.len += 8;
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}
