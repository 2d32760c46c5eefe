//! What the host's own CPU says of itself: which vendor and generation it is, and the leaves that
//! shine through where masking has no effect. (What guests are told is in `cpu_model.rs`.)

use serde::{Deserialize, Serialize};

/// One CPUID leaf: what is asked for and what comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX going in.
    pub function: u32,
    /// ECX going in.
    pub index: u32,
    /// EAX, EBX, ECX, EDX coming out.
    pub values: [u32; 4],
}

/// The host's own leaves, which shine through where masking has no effect, without what differs
/// between two CPUs of one host.
pub(super) fn host_leaves() -> Vec<Leaf> {
    const STANDARD: u32 = 0;
    const EXTENDED: u32 = 0x8000_0000;
    let mut leaves = Vec::new();
    for first in [STANDARD, EXTENDED] {
        let last = cpuid(first, 0).values[0];
        // A wild maximum is not walked: no CPU has more than a few dozen leaves.
        for function in first..=last.min(first + 0x40) {
            let indices = match function {
                4 | 0x8000_001d => 0..5,
                7 => 0..3,
                0xd => 0..20,
                _ => 0..1,
            };
            leaves.extend(indices.map(|index| steady(cpuid(function, index))));
        }
    }
    leaves
}

/// The vendor of the host's CPU: EBX, EDX and ECX of leaf 0, in the order of the text.
pub(super) fn host_vendor() -> [u32; 3] {
    let [_, b, c, d] = cpuid(0, 0).values;
    [b, d, c]
}

/// The vendor, family, model and stepping of the host.
pub(super) fn host_identity() -> (String, u32) {
    let vendor = host_vendor().map(u32::to_le_bytes);
    let signature = cpuid(1, 0).values[0];
    let vendor = String::from_utf8_lossy(vendor.as_flattened());
    (vendor.into_owned(), signature)
}

/// Whether the host's CPU shows VMX, SVM.
pub(super) fn host_virtualization() -> (bool, bool) {
    (
        cpuid(1, 0).values[2] & bits(&[5]) != 0,
        cpuid(0x8000_0001, 0).values[2] & bits(&[2]) != 0,
    )
}

/// XCR0: which XSAVE components KVM lets a guest enable, all of the host's.
pub(super) fn host_xcr0() -> u64 {
    let [a, _, _, d] = cpuid(0xd, 0).values;
    u64::from(a) | u64::from(d) << 32
}

/// Takes out what depends on the CPU or the moment: APIC ids, enabled XSAVE sizes.
fn steady(mut leaf: Leaf) -> Leaf {
    match leaf.function {
        1 => leaf.values[1] &= 0x00ff_ffff,
        0xb | 0x1f | 0x8000_001e | 0x8000_0026 => leaf.values = [0; 4],
        0xd if leaf.index < 2 => leaf.values[1] = 0,
        _ => {}
    }
    leaf
}

fn cpuid(function: u32, index: u32) -> Leaf {
    let r = core::arch::x86_64::__cpuid_count(function, index);
    Leaf {
        function,
        index,
        values: [r.eax, r.ebx, r.ecx, r.edx],
    }
}

const fn bits(set: &[u32]) -> u32 {
    let mut mask = 0;
    let mut i = 0;
    while i < set.len() {
        mask |= 1 << set[i];
        i += 1;
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_leaves_are_the_same_on_every_cpu() {
        let here = host_leaves();
        let there: Vec<_> = (0..4)
            .map(|_| std::thread::spawn(host_leaves))
            .map(|t| t.join().expect("the thread does not panic"))
            .collect();
        assert!(there.iter().all(|leaves| *leaves == here));
        assert!(here.len() > 8);
    }
}
