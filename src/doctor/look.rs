//! What `doctor` looks at with guests, one finding or a few for each.

use vmm::kvm::trial;
use vmm::kvm::{HostFingerprint, KvmKind};
use vmm::machine::MachineError;
use vmm::tape::TapeError;

use super::guest::Ring;
use super::probe::{self, ProbeError, SelfTest};
use super::trials::{self, Branches, Fate, Rings, Trick};
use super::{Report, Verdict};
use crate::sentence::sentence;

pub(super) fn at_kvm(report: &mut Report, host: &HostFingerprint) {
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
    report.add("CPU model", Verdict::Good, host.cpu_model.clone());
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

pub(super) fn at_masking(report: &mut Report, host: &HostFingerprint) {
    match probe::masking(&host.cpuid) {
        Ok(masking) => {
            if masking.holds() {
                report.add("CPUID masking", Verdict::Good, "holds in both rings");
            } else {
                report.add_with(
                    "CPUID masking",
                    Verdict::Note,
                    format!(
                        "does not hold: {} bits differ in ring 0, {} in ring 3{}",
                        masking.wrong_bits_ring_0,
                        masking.wrong_bits_ring_3,
                        masking.first.map_or_else(String::new, first_wrong_bit)
                    ),
                    "an image must not use what CPUID offers; pair only with equal CPUs",
                );
            }
            report.measured.masking = Some(masking);
        }
        Err(error) => failed(report, "CPUID masking", &error),
    }
}

pub(super) fn at_exits(report: &mut Report) {
    match probe::exit_costs() {
        Ok(costs) => {
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

/// Whether a replay is exact. `Err` says what differed; a test that came to no result is neither.
pub(super) fn at_replay(report: &mut Report, ring: Ring) -> Result<Option<SelfTest>, String> {
    let what = match ring {
        Ring::Zero => "replay, ring 0",
        Ring::Three => "replay, ring 3",
    };
    match probe::self_test(ring) {
        Ok(test) => {
            let found = format!(
                "exact: {} digests equal over {} landmarks, {} kicks",
                test.marks, test.landmarks, test.kicks
            );
            report.add(what, Verdict::Good, found);
            Ok(Some(test))
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
            Err(error.to_string())
        }
        Err(error) => {
            failed(report, what, &error);
            Ok(None)
        }
    }
}

fn failed(report: &mut Report, what: &'static str, error: &ProbeError) {
    report.add_with(
        what,
        Verdict::Lacking,
        sentence(error),
        "this KVM does not run what every guest needs: try another kernel",
    );
}

fn first_wrong_bit((function, register, bit): (u32, usize, u32)) -> String {
    let register = ["EAX", "EBX", "ECX", "EDX"][register];
    format!(", first of all bit {bit} of {register} in leaf {function:#x}")
}

/// What no guest needs could not be looked at.
fn missed(report: &mut Report, what: &'static str, error: &ProbeError) {
    let found = format!("cannot be tried: {}", sentence(error));
    report.add(what, Verdict::Note, found);
}

fn micros(nanos: u64) -> String {
    format!("{}.{} µs", nanos / 1000, nanos % 1000 / 100)
}

pub(super) fn at_speed(report: &mut Report) {
    let speed = match trials::speed() {
        Ok(speed) => speed,
        Err(error) => return failed(report, "speed", &error),
    };
    let nanos = |picos: u64| format!("{}.{:02} ns", picos / 1000, picos % 1000 / 10);
    let found = format!(
        "{} an instruction, {} in ring 3",
        nanos(speed.ring_0),
        nanos(speed.ring_3)
    );
    if speed.ring_0_is_native() {
        report.add("ring 0", Verdict::Good, format!("native: {found}"));
    } else {
        report.add_with(
            "ring 0",
            Verdict::Note,
            format!("emulated: {found}"),
            "guests that compute in ring 0, as every kernel does, are slow or do not run at all",
        );
    }
    report.measured.speed = Some(speed);
}

pub(super) fn at_tricks(report: &mut Report) {
    let mut odd = Vec::new();
    for trick in Trick::ALL {
        match trials::fate(trick) {
            Ok(fate) => {
                if fate != trick.expected() {
                    let verb = match fate {
                        Fate::Works => "goes through",
                        Fate::Faults => "faults",
                        Fate::Fails => "stops the guest",
                    };
                    odd.push(format!("{} {verb}", trick.words()));
                }
                report.measured.tricks.push((trick, fate));
            }
            Err(error) => missed(report, trick.words(), &error),
        }
    }
    if odd.is_empty() {
        report.add("instructions", Verdict::Good, "all that were tried work");
    } else {
        report.add_with(
            "instructions",
            Verdict::Note,
            odd.join(", "),
            "an image must get by without",
        );
    }
}

pub(super) fn at_injection(report: &mut Report) {
    match trials::injection() {
        Ok(times) => {
            let found = format!(
                "{} in ring 0, {} in ring 3",
                micros(times.ring_0),
                micros(times.ring_3)
            );
            report.add("kick to handler", Verdict::Good, found);
            report.measured.injection = Some(times);
        }
        Err(error) => failed(report, "kick to handler", &error),
    }
}

pub(super) fn at_debugging(report: &mut Report) {
    let found = match trials::debugging() {
        Ok(found) => found,
        Err(error) => return missed(report, "debuggers", &error),
    };
    for (what, rings) in [
        ("single steps", found.steps),
        ("breakpoints", found.breakpoints),
    ] {
        report.add(what, note_unless(rings == Rings::Both), rings.to_string());
    }
    report.measured.debugging = Some(found);
}

const fn note_unless(good: bool) -> Verdict {
    if good { Verdict::Good } else { Verdict::Note }
}

pub(super) fn at_branches(report: &mut Report) {
    let what = "branch counter";
    let found = match trials::branches() {
        Ok(found) => found,
        Err(error) => return missed(report, what, &error),
    };
    match &found {
        Branches::Exact => report.add(what, Verdict::Good, "exact"),
        Branches::Inexact { taken, counted } => {
            let found = format!("not exact: {counted:?} for {taken} branches");
            report.add(what, Verdict::Note, found);
        }
        Branches::None { why } => report.add(what, Verdict::Note, format!("none ({why})")),
    }
    report.measured.branches = Some(found);
}

pub(super) fn at_dirty_pages(report: &mut Report) {
    match trials::dirty_log() {
        Ok(works) => {
            let found = if works {
                "works"
            } else {
                "misses what guests write"
            };
            report.add("dirty log", note_unless(works), found);
            report.measured.dirty_log = Some(works);
        }
        Err(error) => missed(report, "dirty log", &error),
    }
    match trial::extras() {
        Ok(extras) => {
            let ring = extras.dirty_ring;
            let found = match ring {
                0 => "none".to_owned(),
                _ => format!("up to {ring} bytes"),
            };
            report.add("dirty ring", note_unless(ring > 0), found);
            let scaling = extras.tsc_scaling;
            let found = if scaling { "offered" } else { "not offered" };
            report.add("TSC scaling", note_unless(scaling), found);
            report.measured.dirty_ring = Some(ring);
            report.measured.tsc_scaling = Some(scaling);
        }
        Err(error) => missed(report, "dirty ring", &error.into()),
    }
}
