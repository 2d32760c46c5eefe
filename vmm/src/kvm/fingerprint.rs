//! What pairing compares of two hosts: a machine recorded on one must behave the same on the other.

use std::fmt;

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use super::arithmetic;
use super::cpu_model::{self, CPU_MODEL};
use super::cpuid::{self, Leaf};
use super::{KvmError, vm};

/// How KVM runs guests on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmKind {
    /// Intel's VMX.
    Vmx,
    /// AMD's SVM.
    Svm,
    /// Neither: ring 3 runs natively, ring 0 is emulated.
    Pvm,
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
            Self::Pvm => "pvm",
        })
    }
}

/// What pairing compares.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFingerprint {
    /// VMX, SVM or neither.
    pub kvm: KvmKind,
    /// The CPU's vendor.
    pub vendor: String,
    /// The CPU's signature (CPUID leaf 1, EAX): family, model, stepping.
    pub signature: u32,
    /// The name of the CPU model that guests see; the host offers all of it.
    pub cpu_model: String,
    /// The leaves that guests are told.
    pub cpuid: Vec<Leaf>,
    /// A hash of what the CPU computes where the architecture leaves it open.
    pub arithmetic: [u8; 16],
    /// What guests see nevertheless.
    pub unmasked: Option<Unmasked>,
    /// Whether unlisted MSRs are denied, and whether that is an exit.
    pub msr_filter: bool,
    /// Whether denied MSR accesses are exits.
    pub msr_exits: bool,
    /// The CPU's microcode, empty if the host does not say.
    pub microcode: String,
    /// The host's kernel.
    pub kernel: String,
}

/// What shines through where masking has no effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmasked {
    /// The CPUID leaves of the host itself.
    pub cpuid: Vec<Leaf>,
    /// Its XSAVE components.
    pub xcr0: u64,
}

/// Why two hosts may not pair, or should be looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// Whether pairing is refused for it.
    pub severity: Severity,
    /// A sentence.
    pub text: String,
}

/// How bad a difference is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// A log of one cannot be replayed on the other.
    Refusal,
    /// It should work.
    Warning,
}

impl HostFingerprint {
    /// CPU family (with its extension), model (with its extension) and stepping.
    pub fn family_model_stepping(&self) -> (u32, u32, u32) {
        let s = self.signature;
        let (family, model) = (s >> 8 & 0xf, s >> 4 & 0xf);
        let wide = family == 0xf || family == 6;
        (
            if family == 0xf {
                family + (s >> 20 & 0xff)
            } else {
                family
            },
            if wide {
                model | (s >> 16 & 0xf) << 4
            } else {
                model
            },
            s & 0xf,
        )
    }

    /// What differs; empty if nothing does. Pairing is possible if no reason is a refusal.
    pub fn compatible_with(&self, other: &Self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let mut refuse = |what: &str, here: String, there: String| {
            if here != there {
                reasons.push(Reason {
                    severity: Severity::Refusal,
                    text: format!("{what} differs: {here} here, {there} there"),
                });
            }
        };
        refuse(
            "the kind of KVM",
            self.kvm.to_string(),
            other.kvm.to_string(),
        );
        refuse(
            "the CPU's vendor",
            self.vendor.clone(),
            other.vendor.clone(),
        );
        refuse(
            "the CPU model of guests",
            self.cpu_model.clone(),
            other.cpu_model.clone(),
        );
        refuse(
            "MSR protection",
            format!("filter {}, exits {}", self.msr_filter, self.msr_exits),
            format!("filter {}, exits {}", other.msr_filter, other.msr_exits),
        );
        if let Some((here, there)) = first_differing_leaf(&self.cpuid, &other.cpuid) {
            refuse("a CPUID leaf of guests", here, there);
        }
        let hash = |of: &Self| format!("{:032x}", u128::from_be_bytes(of.arithmetic));
        refuse(
            "what the CPU computes where the architecture leaves it open (approximations, x87 \
             functions, undefined flags)",
            hash(self),
            hash(other),
        );
        if let (Some(ours), Some(theirs)) = (&self.unmasked, &other.unmasked) {
            refuse(
                "the CPU, which guests see as it is,",
                self.cpu(),
                other.cpu(),
            );
            refuse(
                "XCR0",
                format!("{:#x}", ours.xcr0),
                format!("{:#x}", theirs.xcr0),
            );
            if let Some((here, there)) = first_differing_leaf(&ours.cpuid, &theirs.cpuid) {
                refuse("a CPUID leaf of the host", here, there);
            }
        }
        let mut warn = |what: &str, here: &str, there: &str| {
            if here != there {
                reasons.push(Reason {
                    severity: Severity::Warning,
                    text: format!("{what} differs: {here} here, {there} there"),
                });
            }
        };
        if self.unmasked.is_none() {
            warn("the generation of the CPU", &self.cpu(), &other.cpu());
        }
        warn("microcode", &self.microcode, &other.microcode);
        warn("the kernel", &self.kernel, &other.kernel);
        reasons
    }

    fn cpu(&self) -> String {
        let (family, model, stepping) = self.family_model_stepping();
        format!("family {family} model {model} stepping {stepping}")
    }
}

fn first_differing_leaf(ours: &[Leaf], theirs: &[Leaf]) -> Option<(String, String)> {
    let show = |leaf: Option<&Leaf>| {
        leaf.map_or_else(
            || "absent".to_owned(),
            |l| format!("{:#x}.{} = {:x?}", l.function, l.index, l.values),
        )
    };
    (0..ours.len().max(theirs.len()))
        .map(|i| (ours.get(i), theirs.get(i)))
        .find(|(here, there)| here != there)
        .map(|(here, there)| (show(here), show(there)))
}

/// The fingerprint of this host.
pub fn host_fingerprint() -> Result<HostFingerprint, KvmError> {
    let kvm = vm::open()?;
    let (vendor, signature) = cpuid::host_identity();
    let kind = host_kind();
    Ok(HostFingerprint {
        kvm: kind,
        vendor,
        signature,
        cpu_model: CPU_MODEL.to_owned(),
        cpuid: cpu_model::of_host(&kvm)?,
        arithmetic: arithmetic::fingerprint(),
        unmasked: (kind == KvmKind::Pvm).then(|| Unmasked {
            cpuid: cpuid::host_leaves(),
            xcr0: cpuid::host_xcr0(),
        }),
        msr_filter: kvm.check_extension(Cap::X86MsrFilter),
        msr_exits: kvm.check_extension(Cap::X86UserSpaceMsr),
        microcode: microcode(),
        kernel: kernel(),
    })
}

/// How KVM runs guests on this host.
pub(super) fn host_kind() -> KvmKind {
    match cpuid::host_virtualization() {
        (true, _) => KvmKind::Vmx,
        (_, true) => KvmKind::Svm,
        _ => KvmKind::Pvm,
    }
}

fn microcode() -> String {
    // Some hosts do not say; then there is nothing to warn of.
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("microcode")?.split_once(':'))
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|release| release.trim().to_owned())
        .unwrap_or_default()
}

/// The kernel's name for a capability that must be there, and whether it is.
pub(super) fn required(kvm: &Kvm) -> [(&'static str, bool); 5] {
    [
        ("KVM_CAP_USER_MEMORY", kvm.check_extension(Cap::UserMemory)),
        ("KVM_CAP_EXT_CPUID", kvm.check_extension(Cap::ExtCpuid)),
        (
            "KVM_CAP_IMMEDIATE_EXIT",
            kvm.check_extension(Cap::ImmediateExit),
        ),
        ("KVM_CAP_XSAVE", kvm.check_extension(Cap::Xsave)),
        // Without it the guest could read clocks and counters that no log has.
        (
            "KVM_CAP_X86_MSR_FILTER",
            kvm.check_extension(Cap::X86MsrFilter),
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint() -> HostFingerprint {
        HostFingerprint {
            kvm: KvmKind::Svm,
            vendor: "AuthenticAMD".to_owned(),
            signature: 0x00a1_0f11,
            cpu_model: CPU_MODEL.to_owned(),
            cpuid: cpuid::host_leaves(),
            arithmetic: [7; 16],
            unmasked: None,
            msr_filter: true,
            msr_exits: true,
            microcode: "0xa101148".to_owned(),
            kernel: "6.12.0".to_owned(),
        }
    }

    #[test]
    fn equal_hosts_pair() {
        assert_eq!(fingerprint().compatible_with(&fingerprint()), []);
        assert_eq!(fingerprint().family_model_stepping(), (25, 17, 1));
    }

    #[test]
    fn microcode_and_kernel_only_warn() {
        let mut other = fingerprint();
        other.microcode = "0xa101149".to_owned();
        other.kernel = "6.18.0".to_owned();
        let reasons = fingerprint().compatible_with(&other);
        assert_eq!(reasons.len(), 2);
        assert!(reasons.iter().all(|r| r.severity == Severity::Warning));
    }

    /// What is seen where masking has no effect.
    fn unmasked() -> HostFingerprint {
        HostFingerprint {
            kvm: KvmKind::Pvm,
            unmasked: Some(Unmasked {
                cpuid: cpuid::host_leaves(),
                xcr0: 7,
            }),
            ..fingerprint()
        }
    }

    type Change = fn(&mut HostFingerprint);

    /// The reasons that come of a change.
    fn reasons(
        one: &HostFingerprint,
        change: impl FnOnce(&mut HostFingerprint),
    ) -> Vec<(Severity, String)> {
        let mut other = one.clone();
        change(&mut other);
        let reasons = one.compatible_with(&other);
        reasons.into_iter().map(|r| (r.severity, r.text)).collect()
    }

    #[test]
    fn what_a_guest_would_notice_is_refused() {
        let changes: [(&str, Change); 7] = [
            ("what the CPU computes", |f| f.arithmetic[3] ^= 1),
            ("kind of KVM", |f| f.kvm = KvmKind::Vmx),
            ("vendor", |f| f.vendor = "GenuineIntel".to_owned()),
            ("CPU model", |f| f.cpu_model = "understudy-v2".to_owned()),
            ("MSR protection", |f| f.msr_exits = false),
            ("CPUID leaf", |f| f.cpuid[1].values[2] ^= 1),
            ("CPUID leaf", |f| f.cpuid.truncate(3)),
        ];
        for (what, change) in changes {
            let found = reasons(&fingerprint(), change);
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].0, Severity::Refusal);
            assert!(found[0].1.contains(what), "{found:?}");
        }
    }

    #[test]
    fn another_generation_is_refused_only_where_guests_see_it() {
        let older = |f: &mut HostFingerprint| f.signature = 0x0080_0f12;
        let found = reasons(&fingerprint(), older);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, Severity::Warning);
        let found = reasons(&unmasked(), older);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].0, Severity::Refusal);
        assert_eq!(unmasked().compatible_with(&unmasked()), []);
        let changes: [fn(&mut Unmasked); 3] = [
            |u| u.xcr0 = 3,
            |u| u.cpuid[1].values[2] ^= 1,
            |u| u.cpuid.truncate(3),
        ];
        for change in changes {
            let found = reasons(&unmasked(), |f| f.unmasked.iter_mut().for_each(change));
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].0, Severity::Refusal);
        }
    }
}
