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
use crate::machine::DigestScope;

/// RFLAGS.RF: set and cleared by how an instruction was interrupted, not by the guest.
const RESUME_FLAG: u64 = 1 << 16;
/// Exits are folded into a hash when they take more room than this.
const EXITS_MAX: usize = 16 << 10;
const PAGE: usize = 4096;
/// How many pages are hashed together.
const RUN_PAGES: u64 = 16;

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

/// Adds the scope's pages of guest memory with their numbers; wraps around at the end of memory.
pub(crate) fn pages(
    hasher: &mut blake3::Hasher,
    memory: &GuestMemory,
    total: u64,
    scope: &DigestScope,
) -> Result<(), vm_memory::GuestMemoryError> {
    let (first, count) = scope.scrub;
    let mut left = u64::from(count).min(total);
    let mut page = first.checked_rem(total).unwrap_or(0);
    let mut content = vec![0; left.min(RUN_PAGES) as usize * PAGE];
    while left > 0 {
        let run = left.min(RUN_PAGES).min(total - page);
        let bytes = &mut content[..run as usize * PAGE];
        memory.read_slice(bytes, GuestAddress(page * PAGE as u64))?;
        // Apart from the rest: aligned to its own beginning, a run is hashed many chunks at once.
        let hash = blake3::keyed_hash(scope.key.bytes(), bytes);
        hasher.update(&page.to_le_bytes());
        hasher.update(&run.to_le_bytes());
        hasher.update(hash.as_bytes());
        left -= run;
        page = (page + run) % total;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn of(add: impl FnOnce(&mut blake3::Hasher)) -> MarkDigest {
        let mut hasher = blake3::Hasher::new();
        add(&mut hasher);
        truncate(&hasher)
    }

    fn of_registers(change: impl FnOnce(&mut kvm_regs, &mut kvm_sregs)) -> MarkDigest {
        let (mut regs, mut sregs) = (kvm_regs::default(), kvm_sregs::default());
        change(&mut regs, &mut sregs);
        of(|hasher| registers(hasher, &regs, &sregs))
    }

    #[test]
    fn registers_count_except_what_depends_on_the_host() {
        let base = of_registers(|_, _| {});
        assert_eq!(of_registers(|regs, _| regs.rflags = RESUME_FLAG), base);
        assert_eq!(of_registers(|_, sregs| sregs.interrupt_bitmap[0] = 1), base);
        let changes: [fn(&mut kvm_regs, &mut kvm_sregs); 10] = [
            |regs, _| regs.rax = 1,
            |regs, _| regs.r15 = 1,
            |regs, _| regs.rip = 1,
            |regs, _| regs.rflags = 0x200,
            |_, sregs| sregs.cr2 = 1,
            |_, sregs| sregs.fs.base = 1,
            |_, sregs| sregs.cs.selector = 1,
            |_, sregs| sregs.ss.dpl = 3,
            |_, sregs| sregs.idt.limit = 1,
            |_, sregs| sregs.efer = 1,
        ];
        let mut seen = vec![base];
        for change in changes {
            let digest = of_registers(change);
            assert!(!seen.contains(&digest));
            seen.push(digest);
        }
    }

    #[test]
    fn an_unusable_segment_has_no_other_attribute() {
        let unusable = |sregs: &mut kvm_sregs| sregs.ldt.unusable = 1;
        let bare = of_registers(|_, sregs| unusable(sregs));
        let more = of_registers(|_, sregs| {
            unusable(sregs);
            sregs.ldt.type_ = 2;
        });
        assert_eq!(bare, more);
        assert_ne!(bare, of_registers(|_, _| {}));
    }

    fn of_xsave(word: usize, value: u32) -> MarkDigest {
        let mut xsave = kvm_xsave::default();
        xsave.region[word] = value;
        of(|hasher| floating_point(hasher, &xsave))
    }

    #[test]
    fn floating_point_counts_except_what_depends_on_the_host() {
        let base = of_xsave(0, 0);
        // The opcode, the pointers, the mask of MXCSR, the end of an x87 register, XSTATE_BV.
        for (word, value) in [
            (1, 0xffff_0000),
            (2, 9),
            (5, 9),
            (7, 9),
            (11, 9),
            (10, 1 << 16),
            (128, 7),
        ] {
            assert_eq!(of_xsave(word, value), base, "word {word}");
        }
        // Control, tag, MXCSR, mantissa, exponent, XMM0, XMM15, a component.
        for (word, value) in [
            (0, 1),
            (1, 1),
            (6, 1),
            (8, 1),
            (10, 1),
            (40, 1),
            (43, 1),
            (103, 1),
            (144, 1),
        ] {
            assert_ne!(of_xsave(word, value), base, "word {word}");
        }
    }

    fn of_exits(add: impl FnOnce(&mut Exits)) -> MarkDigest {
        let mut exits = Exits::default();
        add(&mut exits);
        of(|hasher| exits.take(hasher))
    }

    #[test]
    fn exits_count_in_all_they_say() {
        let base = of_exits(|exits| exits.add(1, 0x3f8, 1, &[7]));
        for (kind, address, size, data) in [
            (0, 0x3f8, 1, [7]),
            (1, 0x3f9, 1, [7]),
            (1, 0x3f8, 2, [7]),
            (1, 0x3f8, 1, [8]),
        ] {
            assert_ne!(
                of_exits(|exits| exits.add(kind, address, size, &data)),
                base
            );
        }
    }

    #[test]
    fn many_exits_take_little_room_and_still_count() {
        let flood = |last: u8| {
            let mut exits = Exits::default();
            for i in 0..1000u16 {
                exits.add(1, i.into(), 1, &[0; 300]);
            }
            exits.add(1, 0, 1, &[last]);
            assert!(exits.bytes.len() <= EXITS_MAX + 32);
            let digest = of(|hasher| exits.take(hasher));
            assert!(exits.bytes.is_empty());
            digest
        };
        assert_eq!(flood(1), flood(1));
        assert_ne!(flood(1), flood(2));
    }

    #[test]
    fn pages_wrap_around_and_each_counts() {
        const PAGES: u64 = 40;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), PAGES as usize * PAGE)])
            .expect("memory can be mapped");
        let digest = |scrub| {
            let scope = DigestScope {
                scrub,
                ..DigestScope::default()
            };
            of(|hasher| pages(hasher, &memory, PAGES, &scope).expect("inside"))
        };
        let before = [
            digest((0, 4)),
            digest((38, 4)),
            digest((0, 40)),
            digest((0, 1000)),
        ];
        memory
            .write_obj(1u8, GuestAddress(PAGE as u64))
            .expect("inside");
        let after = [
            digest((0, 4)),
            digest((38, 4)),
            digest((0, 40)),
            digest((0, 1000)),
        ];
        for (before, after) in before.iter().zip(after) {
            assert_ne!(*before, after);
        }
        let elsewhere = digest((2, 30));
        memory
            .write_obj(2u8, GuestAddress(PAGE as u64))
            .expect("inside");
        assert_eq!(digest((2, 30)), elsewhere);
        assert_eq!(digest((u64::MAX, 3)), digest((u64::MAX % PAGES, 3)));
        // Equal content in another place is another state.
        assert_ne!(digest((2, 1)), digest((3, 1)));
    }
}
