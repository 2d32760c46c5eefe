//! `understudy doctor`: what this host can do, measured, and what it lacks.
//!
//! Nothing here trusts a table: the CPU model, the exits and the exactness of a replay are tried
//! with small guests ([`probe`], [`trials`]) on the KVM that is there. What it comes to is a table
//! of the images and modes that the host can offer ([`offer`]).

pub mod guest;
mod look;
pub mod offer;
pub mod probe;
pub mod trials;

use std::fs;

use serde::Serialize;
use vmm::kvm::{HostFingerprint, KvmError, host_fingerprint};

use crate::images::Image;
use crate::sentence::sentence;
use guest::Ring;
use offer::{Host, Offer};
use probe::{ExitCosts, Masking, SelfTest};
use trials::{Branches, Debugging, Fate, Injection, Speed, Trick};

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
    /// How fast guests compute.
    pub speed: Option<Speed>,
    /// What becomes of instructions that differ between the kinds of KVM.
    pub tricks: Vec<(Trick, Fate)>,
    /// How long a kick and an interrupt take, in nanoseconds.
    pub injection: Option<Injection>,
    /// What a debugger can do.
    pub debugging: Option<Debugging>,
    /// Whether a guest's branches can be counted.
    pub branches: Option<Branches>,
    /// Whether the dirty log tells what guests write.
    pub dirty_log: Option<bool>,
    /// The largest ring of dirty pages in bytes.
    pub dirty_ring: Option<u32>,
    /// Whether the guest's time stamp counter can be scaled.
    pub tsc_scaling: Option<bool>,
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
    /// What can be run here, and what not for which reason.
    pub images: Vec<Offer>,
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

/// Looks at everything, and says of every known image and of `more` whether it can be run.
/// `progress` is told what is looked at next.
pub fn examine(more: &[Image], mut progress: impl FnMut(&'static str)) -> Report {
    let mut report = Report::default();
    progress("/dev/kvm");
    let found = host_fingerprint();
    let mut host = Host {
        kvm: found.as_ref().map(|f| f.kvm).map_err(|e| sentence(e)),
        inexact: None,
    };
    match found {
        Ok(fingerprint) => {
            examine_guests(&mut report, &fingerprint, &mut progress);
            host.inexact = look_at_replays(&mut report, &mut progress);
            report.measured.fingerprint = Some(fingerprint);
        }
        Err(error) => look_at_no_kvm(&mut report, &error),
    }
    progress("clock and memory");
    look_at_clock(&mut report);
    look_at_memory(&mut report);
    report.images = offer::offers(&host, more);
    report
}

fn examine_guests(
    report: &mut Report,
    host: &HostFingerprint,
    progress: &mut impl FnMut(&'static str),
) {
    look::at_kvm(report, host);
    progress("CPUID masking");
    look::at_masking(report, host);
    progress("how fast guests compute");
    look::at_speed(report);
    progress("single instructions");
    look::at_tricks(report);
    progress("the cost of exits");
    look::at_exits(report);
    progress("kicks and interrupts");
    look::at_injection(report);
    progress("debuggers and counters");
    look::at_debugging(report);
    look::at_branches(report);
    look::at_dirty_pages(report);
}

/// What differed, if anything did.
fn look_at_replays(report: &mut Report, progress: &mut impl FnMut(&'static str)) -> Option<String> {
    progress("replays under a storm of kicks");
    let ring_3 = look::at_replay(report, Ring::Three);
    let ring_0 = look::at_replay(report, Ring::Zero);
    let inexact = ring_3.as_ref().err().or(ring_0.as_ref().err()).cloned();
    report.measured.self_test_ring_3 = ring_3.ok().flatten();
    report.measured.self_test_ring_0 = ring_0.ok().flatten();
    inexact
}

fn look_at_no_kvm(report: &mut Report, error: &KvmError) {
    let what = match error {
        KvmError::CpuModel(_) => "CPU model",
        _ => "KVM",
    };
    report.add_with(what, Verdict::Lacking, sentence(error), WITHOUT_KVM);
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
