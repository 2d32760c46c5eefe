//! The CPU model that every guest sees: a table of our own, not what a host happens to have.
//!
//! It is the x86-64-v2 baseline with AES, without what lets the outside in (time stamp counter,
//! random numbers, clocks, counters), what depends on the host's scheduling (XSAVE and with it AVX)
//! and what needs registers that are denied (`msr.rs`: machine checks, MTRR, the local APIC). A host
//! either offers all of it or is refused; what a host has beyond it no guest is told. So the leaves
//! are equal on all hosts, whatever their generation, but for the vendor: software chooses code by
//! it where AMD and Intel differ in what no CPUID bit can hide.
//!
//! A change of the table is a new model: give it a new name and raise `MACHINE_MODEL`.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::Kvm;
use thiserror::Error;

use super::KvmError;
use super::cpuid::{self, Leaf};
use super::fingerprint::{KvmKind, host_kind};

/// The name of the model.
pub const CPU_MODEL: &str = "understudy-v1";

/// Family 6, model 26, stepping 3. Intel's first CPU with all of these features has this number; of
/// AMD's none has it, so no kernel takes it for one with flaws of its own.
const SIGNATURE: u32 = 0x0001_06a3;
/// What programs show: 48 bytes, padded with zeros.
const BRAND: &[u8; 48] =
    b"Understudy CPU v1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// The width of physical addresses: 64 GiB, twenty times what a machine can have, and no more than
/// what the narrowest hosts offer.
const PHYSICAL_BITS: u32 = 36;
/// The width of linear addresses: four levels of page tables.
const LINEAR_BITS: u32 = 48;
/// The length of a cache line in bytes.
const LINE: u32 = 64;

/// The last leaves. Intel's CPUs answer what lies beyond the last standard leaf with that leaf: it is
/// an empty one.
const LAST_STANDARD: u32 = 7;
const LAST_EXTENDED: u32 = 0x8000_0008;
/// The leaf by which a hypervisor names itself. KVM's own name and features are not there: nothing
/// that it offers its guests is repeatable.
const HYPERVISOR: u32 = 0x4000_0000;
/// Leaf 1, ECX: a hypervisor is there. It is we who say so, whatever the host's CPU says.
const UNDER_HYPERVISOR: u32 = 1 << 31;

const EAX: usize = 0;
const ECX: usize = 2;
const EDX: usize = 3;

/// A feature that the model has and a host must offer: a bit of a leaf.
struct Feature {
    name: &'static str,
    function: u32,
    register: usize,
    bit: u32,
}

const fn feature(name: &'static str, function: u32, register: usize, bit: u32) -> Feature {
    Feature {
        name,
        function,
        register,
        bit,
    }
}

/// All features of the model.
const FEATURES: [Feature; 27] = [
    feature("FPU", 1, EDX, 0),
    feature("DE", 1, EDX, 2),
    feature("PSE", 1, EDX, 3),
    feature("MSR", 1, EDX, 5),
    feature("PAE", 1, EDX, 6),
    feature("CMPXCHG8B", 1, EDX, 8),
    feature("SYSENTER", 1, EDX, 11),
    feature("PGE", 1, EDX, 13),
    feature("CMOV", 1, EDX, 15),
    feature("PAT", 1, EDX, 16),
    feature("CLFLUSH", 1, EDX, 19),
    feature("MMX", 1, EDX, 23),
    feature("FXSAVE", 1, EDX, 24),
    feature("SSE", 1, EDX, 25),
    feature("SSE2", 1, EDX, 26),
    feature("SSE3", 1, ECX, 0),
    feature("PCLMULQDQ", 1, ECX, 1),
    feature("SSSE3", 1, ECX, 9),
    feature("CMPXCHG16B", 1, ECX, 13),
    feature("SSE4.1", 1, ECX, 19),
    feature("SSE4.2", 1, ECX, 20),
    feature("POPCNT", 1, ECX, 23),
    feature("AES", 1, ECX, 25),
    feature("LAHF", 0x8000_0001, ECX, 0),
    feature("SYSCALL", 0x8000_0001, EDX, 11),
    feature("NX", 0x8000_0001, EDX, 20),
    feature("long mode", 0x8000_0001, EDX, 29),
];

/// A cache of the model. Programs size their copying by it; what the host has does not matter.
struct Cache {
    level: u32,
    kind: CacheKind,
    ways: u32,
    sets: u32,
}

#[derive(Clone, Copy)]
enum CacheKind {
    Data = 1,
    Code = 2,
    Unified = 3,
}

/// 32 KiB for data, 32 KiB for code, 512 KiB, 4 MiB.
const CACHES: [Cache; 4] = [
    cache(1, CacheKind::Data, 8, 64),
    cache(1, CacheKind::Code, 8, 64),
    cache(2, CacheKind::Unified, 8, 1024),
    cache(3, CacheKind::Unified, 16, 4096),
];

const fn cache(level: u32, kind: CacheKind, ways: u32, sets: u32) -> Cache {
    Cache {
        level,
        kind,
        ways,
        sets,
    }
}

/// A host that cannot offer the model.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "this host cannot offer the CPU model {CPU_MODEL}: it lacks {}; use a host with a CPU of 2011 or \
     newer or, if this one is a virtual machine, let its hypervisor pass its CPU through",
    missing.join(", ")
)]
pub struct NotOffered {
    /// What it lacks, by name.
    pub missing: Vec<String>,
}

/// The leaves that guests see on this host, which offers them all.
pub(super) fn of_host(kvm: &Kvm) -> Result<Vec<Leaf>, KvmError> {
    // Where masking has no effect, KVM's list has none either: guests see the CPU itself.
    let offered = if host_kind() == KvmKind::Pvm {
        cpuid::host_leaves()
    } else {
        supported(kvm)?
    };
    check(&offered)?;
    Ok(leaves(cpuid::host_vendor()))
}

/// The model as KVM takes it.
pub(super) fn for_kvm(kvm: &Kvm) -> Result<CpuId, KvmError> {
    let entries: Vec<kvm_cpuid_entry2> = of_host(kvm)?.into_iter().map(entry).collect();
    CpuId::from_entries(&entries).map_err(|_| KvmError::Ioctl {
        doing: "listing CPUID leaves",
        source: vmm_sys_util::errno::Error::new(libc::E2BIG),
    })
}

fn entry(leaf: Leaf) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = leaf.values;
    kvm_cpuid_entry2 {
        function: leaf.function,
        index: leaf.index,
        flags: match leaf.function {
            4 | 7 => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            _ => 0,
        },
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn supported(kvm: &Kvm) -> Result<Vec<Leaf>, KvmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::ioctl("asking which CPUID leaves KVM supports"))?;
    let leaf = |e: &kvm_cpuid_entry2| Leaf {
        function: e.function,
        index: e.index,
        values: [e.eax, e.ebx, e.ecx, e.edx],
    };
    Ok(supported.as_slice().iter().map(leaf).collect())
}

/// Whether a host with these leaves offers the model.
fn check(offered: &[Leaf]) -> Result<(), NotOffered> {
    let register = |function, register: usize| {
        offered
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, 0))
            .map_or(0, |leaf| leaf.values[register])
    };
    let mut missing: Vec<String> = FEATURES
        .iter()
        .filter(|f| register(f.function, f.register) & 1 << f.bit == 0)
        .map(|f| f.name.to_owned())
        .collect();
    let widths = register(LAST_EXTENDED, EAX);
    for (what, needed, found) in [
        ("physical", PHYSICAL_BITS, widths & 0xff),
        ("linear", LINEAR_BITS, widths >> 8 & 0xff),
    ] {
        if found < needed {
            missing.push(format!(
                "{what} addresses of {needed} bits (it has {found})"
            ));
        }
    }
    if missing.is_empty() {
        Ok(())
    } else {
        Err(NotOffered { missing })
    }
}

/// The whole model: EBX, EDX and ECX of leaf 0 are the host's `vendor`, all else is fixed.
fn leaves(vendor: [u32; 3]) -> Vec<Leaf> {
    let leaf = |function, values| Leaf {
        function,
        index: 0,
        values,
    };
    let [vendor_b, vendor_d, vendor_c] = vendor;
    let mut leaves = vec![
        leaf(0, [LAST_STANDARD, vendor_b, vendor_c, vendor_d]),
        // Cache lines in units of 8 bytes; one CPU, whose number is 0.
        leaf(
            1,
            [SIGNATURE, 1 << 16 | (LINE / 8) << 8, UNDER_HYPERVISOR, 0],
        ),
        // Ask leaf 4 for the caches.
        leaf(2, [0x0000_ff01, 0, 0, 0]),
        leaf(LAST_STANDARD, [0; 4]),
        leaf(HYPERVISOR, hypervisor()),
        leaf(0x8000_0000, [LAST_EXTENDED, 0, 0, 0]),
        leaf(0x8000_0001, [SIGNATURE, 0, 0, 0]),
        leaf(0x8000_0005, [0, 0, short_cache(0), short_cache(1)]),
        leaf(0x8000_0006, [0, 0, short_cache(2), short_cache(3)]),
        leaf(0x8000_0007, [0; 4]),
        leaf(LAST_EXTENDED, [LINEAR_BITS << 8 | PHYSICAL_BITS, 0, 0, 0]),
    ];
    for feature in &FEATURES {
        let holder = leaves.iter_mut().find(|l| l.function == feature.function);
        let holder = holder.expect("features are in leaves of the model");
        holder.values[feature.register] |= 1 << feature.bit;
    }
    leaves.extend(CACHES.iter().zip(0..).map(|(cache, index)| Leaf {
        function: 4,
        index,
        values: long_cache(cache),
    }));
    leaves.push(Leaf {
        function: 4,
        index: CACHES.len() as u32,
        values: [0; 4],
    });
    leaves.extend(
        (0x8000_0002..)
            .zip(BRAND.chunks_exact(16))
            .map(|(function, part)| leaf(function, words(part))),
    );
    leaves.sort_unstable();
    leaves
}

fn hypervisor() -> [u32; 4] {
    let [b, c, d, _] = words(b"UnderstudyVM\0\0\0\0");
    [HYPERVISOR, b, c, d]
}

/// Four registers of 16 bytes of text.
fn words(text: &[u8]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(text.chunks_exact(4)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |word, byte| word << 8 | u32::from(*byte));
    }
    words
}

/// A cache as leaf 4 tells of it: of its own, not shared, initializing itself.
fn long_cache(cache: &Cache) -> [u32; 4] {
    [
        cache.kind as u32 | cache.level << 5 | 1 << 8,
        (LINE - 1) | (cache.ways - 1) << 22,
        cache.sets - 1,
        0,
    ]
}

/// The same cache as the extended leaves tell of it, each level in a form of its own.
fn short_cache(which: usize) -> u32 {
    let cache = &CACHES[which];
    let bytes = LINE * cache.ways * cache.sets;
    // One line a tag.
    let line = LINE | 1 << 8;
    match (cache.level, cache.ways) {
        (1, ways) => bytes >> 10 << 24 | ways << 16 | line,
        // 8 and 16 ways have the codes 6 and 8.
        (2, _) => bytes >> 10 << 16 | 6 << 12 | line,
        (_, _) => bytes >> 19 << 18 | 8 << 12 | line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
    const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

    /// What a host supports that has the model's features, and then some.
    fn host(more: impl Fn(&mut Leaf)) -> Vec<Leaf> {
        let mut offered = leaves(AMD);
        for leaf in &mut offered {
            if leaf.function == LAST_EXTENDED {
                leaf.values[EAX] = 0x3028;
            }
            more(leaf);
        }
        offered
    }

    #[test]
    fn a_host_that_has_it_all_offers_the_model() {
        assert_eq!(check(&host(|_| {})), Ok(()));
    }

    #[test]
    fn what_a_host_lacks_is_named() {
        let old = host(|leaf| match leaf.function {
            1 => leaf.values[ECX] &= !(1 << 20 | 1 << 23),
            LAST_EXTENDED => leaf.values[EAX] = 0x3020,
            _ => {}
        });
        let error = check(&old).expect_err("it lacks something");
        let physical = "physical addresses of 36 bits (it has 32)";
        assert_eq!(error.missing, ["SSE4.2", "POPCNT", physical]);
        let sentence = error.to_string();
        for part in [CPU_MODEL, "it lacks SSE4.2, POPCNT, physical"] {
            assert!(sentence.contains(part), "{sentence}");
        }
        let nothing = check(&[]).expect_err("it has nothing");
        assert_eq!(nothing.missing.len(), FEATURES.len() + 2);
    }

    #[test]
    fn a_host_is_told_apart_by_its_vendor_alone() {
        // Nothing that a newer host has finds its way in, as nothing of it is looked at.
        let newer = host(|leaf| leaf.values = leaf.values.map(|v| v | 0x0f0f_0000));
        assert_eq!(check(&newer), Ok(()));
        let (amd, intel) = (leaves(AMD), leaves(INTEL));
        assert_eq!(amd[0].values[1..], [AMD[0], AMD[2], AMD[1]]);
        assert_eq!(amd[1..], intel[1..]);
        assert_ne!(amd[0], intel[0]);
    }

    fn values(function: u32) -> [u32; 4] {
        let leaves = leaves(AMD);
        let leaf = leaves.iter().find(|leaf| leaf.function == function);
        leaf.expect("a leaf of the model").values
    }

    #[test]
    fn what_lets_the_outside_in_is_not_there() {
        for (name, register, bit) in [
            ("TSC", EDX, 4),
            ("local APIC", EDX, 9),
            ("x2APIC", ECX, 21),
            ("TSC deadline", ECX, 24),
            ("XSAVE", ECX, 26),
            ("AVX", ECX, 28),
            ("RDRAND", ECX, 30),
        ] {
            assert_eq!(values(1)[register] & 1 << bit, 0, "{name}");
        }
        assert_eq!(values(0x8000_0001)[EDX] & 1 << 27, 0, "RDTSCP");
        assert_eq!(values(7), [0; 4]);
        let told: Vec<u32> = leaves(AMD).iter().map(|leaf| leaf.function).collect();
        // Counters, XSAVE, and KVM's own clocks.
        assert!(!told.iter().any(|f| [0xa, 0xd, 0x4000_0001].contains(f)));
    }

    #[test]
    fn the_numbers_are_in_the_forms_of_the_manuals() {
        let bytes =
            |values: &[u32]| -> Vec<u8> { values.iter().flat_map(|v| v.to_le_bytes()).collect() };
        assert_eq!(bytes(&values(HYPERVISOR)[1..]), b"UnderstudyVM");
        assert!(bytes(&values(0x8000_0002)).starts_with(b"Understudy CPU"));
        assert_eq!(values(1)[EAX], 0x106a3);
        assert_eq!(values(1)[1], 0x0001_0800);
        assert_eq!(values(LAST_EXTENDED)[EAX], 0x3024);
        // 32 KiB in 8 ways; 512 KiB in 8 ways; 8 times 512 KiB in 16 ways.
        assert_eq!(values(0x8000_0005)[ECX], 0x2008_0140);
        assert_eq!(values(0x8000_0006)[ECX..], [0x0200_6140, 0x0020_8140]);
        assert_eq!(long_cache(&CACHES[0]), [0x121, 0x01c0_003f, 0x3f, 0]);
    }
}
