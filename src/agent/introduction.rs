//! What two hosts tell each other of themselves before they speak of any VM, and whether a machine
//! that is recorded on one can be replayed on the other.
//!
//! Both say it as the first thing on the control lane. Until it is heard, and for as long as
//! [`judge`] refuses, the drivers do not learn that the other host is there: it can be no copy.

use serde::{Deserialize, Serialize};
use vmm::kvm::{HostFingerprint, Severity, host_fingerprint};

/// What a host tells of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// The version of the machine model that its VMM builds and replays.
    pub machine_model: u32,
    /// Its CPU and KVM; or, in a sentence, why it can run no guest.
    pub fingerprint: Result<HostFingerprint, String>,
}

/// What comes of comparing two hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Why they can share no VM; empty if they can.
    pub refusals: Vec<String>,
    /// What differs and should not matter.
    pub warnings: Vec<String>,
}

impl Introduction {
    /// Of this host. Asks KVM and the CPU, so it takes some milliseconds.
    pub fn of_this_host() -> Self {
        Self {
            machine_model: vmm::MACHINE_MODEL,
            fingerprint: host_fingerprint().map_err(|error| error.to_string()),
        }
    }
}

/// Compares this host with another (DESIGN section 4, Compatibility).
pub fn judge(here: &Introduction, there: &Introduction) -> Verdict {
    let mut verdict = Verdict::default();
    if here.machine_model != there.machine_model {
        verdict.refusals.push(format!(
            "the machine model is version {} here and {} there: use the same version of \
             Understudy on both",
            here.machine_model, there.machine_model
        ));
    }
    match (&here.fingerprint, &there.fingerprint) {
        (Ok(ours), Ok(theirs)) => {
            for reason in ours.compatible_with(theirs) {
                match reason.severity {
                    Severity::Refusal => verdict.refusals.push(reason.text),
                    Severity::Warning => verdict.warnings.push(reason.text),
                }
            }
        }
        (Err(why), _) => verdict
            .refusals
            .push(format!("no guest can run here: {why}")),
        (_, Err(why)) => verdict
            .refusals
            .push(format!("no guest can run there: {why}")),
    }
    verdict
}

#[cfg(test)]
mod tests {
    use vmm::kvm::{CPU_MODEL, KvmKind};

    use super::*;

    fn introduction() -> Introduction {
        Introduction {
            machine_model: 1,
            fingerprint: Ok(HostFingerprint {
                kvm: KvmKind::Svm,
                vendor: "AuthenticAMD".to_owned(),
                signature: 0x00a1_0f11,
                cpu_model: CPU_MODEL.to_owned(),
                cpuid: Vec::new(),
                arithmetic: [7; 16],
                unmasked: None,
                msr_filter: true,
                msr_exits: true,
                microcode: "0xa101148".to_owned(),
                kernel: "6.12.0".to_owned(),
            }),
        }
    }

    #[test]
    fn equal_hosts_share_vms() {
        assert_eq!(judge(&introduction(), &introduction()), Verdict::default());
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_reason() {
        let mut other = introduction();
        other.machine_model = 2;
        other.fingerprint.as_mut().expect("a fingerprint").vendor = "GenuineIntel".to_owned();
        let verdict = judge(&introduction(), &other);
        assert_eq!(verdict.refusals.len(), 2, "{verdict:?}");
        assert!(verdict.refusals[0].contains("machine model"), "{verdict:?}");
        assert!(verdict.refusals[1].contains("GenuineIntel"), "{verdict:?}");
        let without = Introduction {
            fingerprint: Err("there is no /dev/kvm".to_owned()),
            ..introduction()
        };
        let verdict = judge(&introduction(), &without);
        assert_eq!(
            verdict.refusals,
            ["no guest can run there: there is no /dev/kvm"]
        );
    }

    #[test]
    fn another_kernel_is_a_warning() {
        let mut other = introduction();
        other.fingerprint.as_mut().expect("a fingerprint").kernel = "6.18.0".to_owned();
        let verdict = judge(&introduction(), &other);
        assert_eq!(verdict.refusals, [""; 0]);
        assert_eq!(verdict.warnings.len(), 1, "{verdict:?}");
    }
}
