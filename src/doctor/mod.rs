//! `understudy doctor`: what this host can do, measured, and what it lacks.
//!
//! Nothing here trusts a table: the CPU model, the exits and the exactness of a replay are tried
//! with small guests ([`probe`]) on the KVM that is there.

pub mod guest;
pub mod offer;
pub mod probe;

use std::fs;

use serde::Serialize;
use vmm::kvm::{HostFingerprint, KvmError, KvmKind, host_fingerprint};
use vmm::machine::MachineError;
use vmm::tape::TapeError;

use guest::Ring;
use probe::{ExitCosts, Masking, ProbeError, SelfTest};

/// Memory that a guest of 64 MB, its VMM and its agent may take, in bytes.
const COMFORTABLE_MEMORY: u64 = (64 + 48) << 20;
/// What a host without KVM still can do.
pub const WITHOUT_KVM: &str = "without it this host can be a witness, a gateway or an operator's \
    seat, and log, simulate and the tests without guests work";

/// How a finding is to be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Worth knowing; guests run.
    Note,
    /// No guest can be protected here.
    Lacking,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// How it is to be taken.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do about it, or what it means.
    pub advice: Option<String>,
}

/// What was measured, for tools.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Measured {
    /// What pairing compares.
    pub fingerprint: Option<HostFingerprint>,
    /// Whether CPUID masking holds.
    pub masking: Option<Masking>,
    /// What exits cost, in nanoseconds.
    pub exit_costs: Option<ExitCosts>,
    /// The self-test in ring 0.
    pub self_test_ring_0: Option<SelfTest>,
    /// The self-test in ring 3.
    pub self_test_ring_3: Option<SelfTest>,
}

/// What `doctor` says.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// In the order of the table.
    pub findings: Vec<Finding>,
    /// The figures behind them.
    pub measured: Measured,
}

impl Report {
    /// Whether this host can run and protect guests.
    pub fn can_run_guests(&self) -> bool {
        self.findings.iter().all(|f| f.verdict != Verdict::Lacking)
    }

    fn add(&mut self, what: &'static str, verdict: Verdict, found: impl Into<String>) {
        self.findings.push(Finding {
            what,
            verdict,
            found: found.into(),
            advice: None,
        });
    }

    fn add_with(
        &mut self,
        what: &'static str,
        verdict: Verdict,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) {
        self.add(what, verdict, found);
        if let Some(finding) = self.findings.last_mut() {
            finding.advice = Some(advice.into());
        }
    }
}

/// Why guests cannot run on this host; `None` if they can.
pub fn missing_kvm() -> Option<KvmError> {
    host_fingerprint().err()
}

/// Looks at everything. `progress` is told what is looked at next.
pub fn examine(mut progress: impl FnMut(&'static str)) -> Report {
    let mut report = Report::default();
    progress("/dev/kvm");
    match host_fingerprint() {
        Ok(fingerprint) => {
            look_at_kvm(&mut report, &fingerprint);
            progress("CPUID masking");
            look_at_masking(&mut report, &fingerprint);
            progress("the cost of exits");
            look_at_exits(&mut report);
            progress("replays under a storm of kicks");
            report.measured.self_test_ring_3 = look_at_replay(&mut report, Ring::Three);
            report.measured.self_test_ring_0 = look_at_replay(&mut report, Ring::Zero);
            report.measured.fingerprint = Some(fingerprint);
        }
        Err(error) => report.add_with(
            "KVM",
            Verdict::Lacking,
            crate::cli::failure::sentence(&error),
            WITHOUT_KVM,
        ),
    }
    progress("clock and memory");
    look_at_clock(&mut report);
    look_at_memory(&mut report);
    report
}

fn look_at_kvm(report: &mut Report, host: &HostFingerprint) {
    let (family, model, stepping) = host.family_model_stepping();
    report.add("KVM", Verdict::Good, "/dev/kvm opens");
    match host.kvm {
        KvmKind::Vmx | KvmKind::Svm => report.add("kind", Verdict::Good, host.kvm.to_string()),
        KvmKind::Pvm => report.add_with(
            "kind",
            Verdict::Note,
            "pvm: KVM without VMX or SVM",
            "ring 0 is emulated: guests that live in ring 3, like the ledger, run; Linux does not",
        ),
    }
    let microcode = if host.microcode.is_empty() {
        "unknown"
    } else {
        &host.microcode
    };
    report.add(
        "CPU",
        Verdict::Good,
        format!(
            "{}, family {family} model {model} stepping {stepping}, microcode {microcode}",
            host.vendor
        ),
    );
    report.add("kernel", Verdict::Good, host.kernel.clone());
    if host.msr_filter && host.msr_exits {
        report.add("MSRs", Verdict::Good, "unlisted ones are denied, and seen");
    } else {
        report.add_with(
            "MSRs",
            Verdict::Note,
            format!(
                "KVM_CAP_X86_MSR_FILTER: {}, KVM_CAP_X86_USER_SPACE_MSR: {}",
                host.msr_filter, host.msr_exits
            ),
            "a guest may read MSRs that differ between hosts: use a kernel of 5.10 or newer for \
             guests that are not made for Understudy",
        );
    }
}

fn look_at_masking(report: &mut Report, host: &HostFingerprint) {
    match probe::masking(&host.cpuid) {
        Ok(masking) => {
            if masking.holds() {
                report.add("CPUID masking", Verdict::Good, "holds in both rings");
            } else {
                report.add_with(
                    "CPUID masking",
                    Verdict::Note,
                    format!(
                        "does not hold: {} bits differ in ring 0, {} in ring 3",
                        masking.wrong_bits_ring_0, masking.wrong_bits_ring_3
                    ),
                    "an image must not use what CPUID offers; pair only with equal CPUs",
                );
            }
            report.measured.masking = Some(masking);
        }
        Err(error) => failed(report, "CPUID masking", &error),
    }
}

fn look_at_exits(report: &mut Report) {
    match probe::exit_costs() {
        Ok(costs) => {
            let micros = |nanos: u64| format!("{}.{} µs", nanos / 1000, nanos % 1000 / 100);
            report.add(
                "port exit",
                Verdict::Good,
                format!(
                    "{} in ring 0, {} in ring 3",
                    micros(costs.port_ring_0),
                    micros(costs.port_ring_3)
                ),
            );
            report.add(
                "MMIO exit",
                Verdict::Good,
                format!(
                    "{} in ring 0, {} in ring 3",
                    micros(costs.mmio_ring_0),
                    micros(costs.mmio_ring_3)
                ),
            );
            report.measured.exit_costs = Some(costs);
        }
        Err(error) => failed(report, "exits", &error),
    }
}

fn look_at_replay(report: &mut Report, ring: Ring) -> Option<SelfTest> {
    let what = match ring {
        Ring::Zero => "replay, ring 0",
        Ring::Three => "replay, ring 3",
    };
    match probe::self_test(ring) {
        Ok(test) => {
            report.add(
                what,
                Verdict::Good,
                format!(
                    "exact: {} digests equal over {} landmarks, {} kicks",
                    test.marks, test.landmarks, test.kicks
                ),
            );
            Some(test)
        }
        Err(ProbeError::Machine(MachineError::Tape(
            error @ (TapeError::Diverged { .. } | TapeError::DiskDiffers { .. }),
        ))) => {
            report.add_with(
                what,
                Verdict::Lacking,
                error.to_string(),
                "this host cannot repeat a guest exactly: protect nothing here, and report it \
                 with the output of 'understudy doctor --json'",
            );
            None
        }
        Err(error) => {
            failed(report, what, &error);
            None
        }
    }
}

fn failed(report: &mut Report, what: &'static str, error: &ProbeError) {
    report.add_with(
        what,
        Verdict::Lacking,
        crate::cli::failure::sentence(error),
        "this KVM does not run what every guest needs: try another kernel",
    );
}

fn look_at_clock(report: &mut Report) {
    let source =
        fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    match nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) {
        Ok(_) => report.add(
            "clock",
            Verdict::Good,
            match source {
                Ok(source) => format!("CLOCK_BOOTTIME on {}", source.trim()),
                Err(_) => "CLOCK_BOOTTIME".to_owned(),
            },
        ),
        Err(error) => report.add_with(
            "clock",
            Verdict::Lacking,
            format!("CLOCK_BOOTTIME cannot be read: {error}"),
            "use a kernel of 2.6.39 or newer",
        ),
    }
}

fn look_at_memory(report: &mut Report) {
    let Some(available) = available_memory() else {
        report.add("memory", Verdict::Note, "/proc/meminfo does not say");
        return;
    };
    let found = format!("{} MB available", available >> 20);
    if available >= COMFORTABLE_MEMORY {
        report.add("memory", Verdict::Good, found);
    } else {
        report.add_with(
            "memory",
            Verdict::Note,
            found,
            "a guest of 64 MB with its VMM and agent takes up to 112 MB",
        );
    }
}

fn available_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kilobytes.checked_mul(1024)
}
