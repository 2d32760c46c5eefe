//! What pairing compares of two hosts: a machine recorded on one must behave the same on the other.

use std::fmt;

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

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
    /// The CPUID leaves a guest gets; where masking has no effect, the host's own as well.
    pub cpuid: Vec<Leaf>,
    /// The XSAVE components.
    pub xcr0: u64,
    /// Whether unlisted MSRs are denied, and whether that is an exit.
    pub msr_filter: bool,
    /// Whether denied MSR accesses are exits.
    pub msr_exits: bool,
    /// The CPU's microcode, empty if the host does not say.
    pub microcode: String,
    /// The host's kernel.
    pub kernel: String,
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
        refuse("the CPU's model", self.cpu(), other.cpu());
        refuse(
            "XCR0",
            format!("{:#x}", self.xcr0),
            format!("{:#x}", other.xcr0),
        );
        refuse(
            "MSR protection",
            format!("filter {}, exits {}", self.msr_filter, self.msr_exits),
            format!("filter {}, exits {}", other.msr_filter, other.msr_exits),
        );
        if let Some((here, there)) = self.first_differing_leaf(other) {
            refuse("a CPUID leaf", here, there);
        }
        let mut warn = |what: &str, here: &str, there: &str| {
            if here != there {
                reasons.push(Reason {
                    severity: Severity::Warning,
                    text: format!("{what} differs: {here} here, {there} there"),
                });
            }
        };
        warn("microcode", &self.microcode, &other.microcode);
        warn("the kernel", &self.kernel, &other.kernel);
        reasons
    }

    fn cpu(&self) -> String {
        let (family, model, stepping) = self.family_model_stepping();
        format!("family {family} model {model} stepping {stepping}")
    }

    fn first_differing_leaf(&self, other: &Self) -> Option<(String, String)> {
        let show = |leaf: Option<&Leaf>| {
            leaf.map_or_else(
                || "absent".to_owned(),
                |l| format!("{:#x}.{} = {:x?}", l.function, l.index, l.values),
            )
        };
        let longest = self.cpuid.len().max(other.cpuid.len());
        (0..longest)
            .map(|i| (self.cpuid.get(i), other.cpuid.get(i)))
            .find(|(here, there)| here != there)
            .map(|(here, there)| (show(here), show(there)))
    }
}

/// The fingerprint of this host.
pub fn host_fingerprint() -> Result<HostFingerprint, KvmError> {
    let kvm = vm::open()?;
    let (vendor, signature) = cpuid::host_identity();
    let kind = host_kind();
    let mut leaves = cpuid::leaves(&cpuid::model(&kvm)?);
    if kind == KvmKind::Pvm {
        leaves.extend(cpuid::host_leaves());
    }
    Ok(HostFingerprint {
        kvm: kind,
        vendor,
        signature,
        cpuid: leaves,
        xcr0: cpuid::host_xcr0(),
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
            cpuid: cpuid::host_leaves(),
            xcr0: 7,
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

    #[test]
    fn what_a_guest_would_notice_is_refused() {
        let changes: [fn(&mut HostFingerprint); 6] = [
            |f| f.kvm = KvmKind::Pvm,
            |f| f.vendor = "GenuineIntel".to_owned(),
            |f| f.signature += 1,
            |f| f.xcr0 = 3,
            |f| f.msr_exits = false,
            |f| f.cpuid[1].values[2] ^= 1,
        ];
        for change in changes {
            let mut other = fingerprint();
            change(&mut other);
            let reasons = fingerprint().compatible_with(&other);
            assert_eq!(reasons.len(), 1, "{reasons:?}");
            assert_eq!(reasons[0].severity, Severity::Refusal);
        }
        let mut shorter = fingerprint();
        shorter.cpuid.pop();
        assert_eq!(fingerprint().compatible_with(&shorter).len(), 1);
    }
}
