//! The CPU model the guest sees, as far as the host lets us choose.
//!
//! Everything that would let the outside in (time stamp counter, random numbers, clocks) or whose
//! state depends on the host's scheduling (XSAVE, AVX) is masked, and so is what differs between
//! two CPUs of one host. On KVM without VMX or SVM masking has no effect: the host's own bits
//! shine through, and guests must not use what is masked here.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::KvmError;

/// Leaf 1 ECX: MONITOR, VMX, FMA, PDCM, x2APIC, TSC deadline, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
const HIDDEN_1_ECX: u32 = bits(&[3, 5, 12, 15, 21, 24, 26, 27, 28, 29, 30]);
/// Leaf 1 EDX: TSC, hyper-threading.
const HIDDEN_1_EDX: u32 = bits(&[4, 28]);
/// Leaf 7 EBX, what stays: FSGSBASE, BMI1, SMEP, BMI2, ERMS, INVPCID, ADX, SMAP, CLFLUSHOPT,
/// CLWB, SHA.
const SHOWN_7_EBX: u32 = bits(&[0, 3, 7, 8, 9, 10, 19, 20, 23, 24, 29]);
/// Leaf 7 ECX, what stays: UMIP.
const SHOWN_7_ECX: u32 = bits(&[2]);
/// Leaf 7 EDX, what stays: FSRM.
const SHOWN_7_EDX: u32 = bits(&[4]);
/// Leaf 0x8000_0001 ECX: SVM, IBS, XOP, SKINIT, WDT, LWP, FMA4, topology, performance counters,
/// MWAITX.
const HIDDEN_EXT1_ECX: u32 = bits(&[2, 10, 11, 12, 13, 15, 16, 22, 23, 24, 28, 29]);
/// Leaf 0x8000_0001 EDX: RDTSCP.
const HIDDEN_EXT1_EDX: u32 = bits(&[27]);

/// Leaves emptied wholly: MONITOR, thermal, PMU, topology, XSAVE, processor trace, TSC, frequency,
/// AMX, invariant TSC, SVM, AVX-10, AMD's topology, encryption, performance monitoring.
const EMPTIED: [u32; 21] = [
    5,
    6,
    0xa,
    0xb,
    0xd,
    0xf,
    0x10,
    0x12,
    0x14,
    0x15,
    0x16,
    0x1d,
    0x1e,
    0x1f,
    0x24,
    0x8000_0007,
    0x8000_000a,
    0x8000_001e,
    0x8000_001f,
    0x8000_0022,
    0x8000_0026,
];

/// The leaf by which a hypervisor names itself, and our name in its EBX, ECX, EDX. KVM's own name
/// and features are not there: nothing that it offers its guests is repeatable.
const SIGNATURE: u32 = 0x4000_0000;
const NAME: [u32; 3] = [
    u32::from_le_bytes(*b"Unde"),
    u32::from_le_bytes(*b"rstu"),
    u32::from_le_bytes(*b"dyVM"),
];

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

/// The CPU model for this host.
pub(super) fn model(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::ioctl("asking which CPUID leaves KVM supports"))?;
    let entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !is_dropped(entry))
        .map(|entry| {
            let mut entry = *entry;
            mask(&mut entry);
            entry
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| KvmError::Ioctl {
        doing: "listing CPUID leaves",
        source: vmm_sys_util::errno::Error::new(libc::E2BIG),
    })
}

/// KVM's leaves beyond the signature, further feature pages, further parts of emptied leaves.
fn is_dropped(entry: &kvm_cpuid_entry2) -> bool {
    match entry.function {
        function if (SIGNATURE + 1..SIGNATURE + 0x100).contains(&function) => true,
        7 => entry.index > 0,
        function => EMPTIED.contains(&function) && entry.index > 0,
    }
}

fn mask(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        1 => {
            // One CPU whose APIC id is 0.
            entry.ebx = (entry.ebx & 0xffff) | 1 << 16;
            entry.ecx &= !HIDDEN_1_ECX;
            entry.edx &= !HIDDEN_1_EDX;
        }
        // No threads or cores share a cache.
        4 | 0x8000_001d => entry.eax &= 0x3fff,
        7 => {
            entry.eax = 0;
            entry.ebx &= SHOWN_7_EBX;
            entry.ecx &= SHOWN_7_ECX;
            entry.edx &= SHOWN_7_EDX;
        }
        SIGNATURE => {
            entry.eax = SIGNATURE;
            [entry.ebx, entry.ecx, entry.edx] = NAME;
        }
        0x8000_0001 => {
            entry.ecx &= !HIDDEN_EXT1_ECX;
            entry.edx &= !HIDDEN_EXT1_EDX;
        }
        0x8000_0008 => {
            // Address sizes stay; features, core counts and RDPRU go.
            entry.ebx = 0;
            entry.ecx = 0;
            entry.edx = 0;
        }
        function if EMPTIED.contains(&function) => clear(entry),
        _ => {}
    }
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    entry.eax = 0;
    entry.ebx = 0;
    entry.ecx = 0;
    entry.edx = 0;
}

/// The leaves of a model, for comparing hosts.
pub(super) fn leaves(model: &CpuId) -> Vec<Leaf> {
    let mut leaves: Vec<Leaf> = model
        .as_slice()
        .iter()
        .map(|e| Leaf {
            function: e.function,
            index: e.index,
            values: [e.eax, e.ebx, e.ecx, e.edx],
        })
        .collect();
    leaves.sort_unstable();
    leaves
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

/// The vendor, family, model and stepping of the host.
pub(super) fn host_identity() -> (String, u32) {
    let [_, b, c, d] = cpuid(0, 0).values;
    let vendor: Vec<u8> = [b, d, c].iter().flat_map(|r| r.to_le_bytes()).collect();
    let signature = cpuid(1, 0).values[0];
    (String::from_utf8_lossy(&vendor).into_owned(), signature)
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

    fn masked(function: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        mask(&mut entry);
        entry
    }

    #[test]
    fn what_lets_the_outside_in_is_hidden() {
        let one = masked(1);
        for (name, bit) in [
            ("x2APIC", 21),
            ("TSC deadline", 24),
            ("XSAVE", 26),
            ("AVX", 28),
            ("RDRAND", 30),
        ] {
            assert_eq!(one.ecx & 1 << bit, 0, "{name}");
        }
        assert_ne!(one.ecx & 1 << 20, 0, "SSE4.2 stays");
        assert_eq!(masked(7).ebx & 1 << 18, 0, "RDSEED");
        assert_eq!(masked(7).ebx & 1 << 5, 0, "AVX2");
        let signature = masked(SIGNATURE);
        let name = [signature.ebx, signature.ecx, signature.edx].map(u32::to_le_bytes);
        assert_eq!(name.as_flattened(), b"UnderstudyVM");
        for function in [0xa, 0xd, 0x15] {
            let leaf = masked(function);
            assert_eq!(
                [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx],
                [0; 4],
                "{function:#x}"
            );
        }
    }

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
