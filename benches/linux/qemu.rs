//! QEMU without us: the same kernel as a plain PC guest, emulated, and QEMU's own record and replay.
//!
//! The machine has what the script needs and no more. Everything of it is recorded as it stands:
//! disks would want `blkreplay` and a network `filter-replay`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use understudy::lab::{exec, needs::QEMU};

use crate::lab::program;
use crate::linux::parameter;

/// The machine, as images/linux/README.md has it.
const MACHINE: &str = "microvm,acpi=off,pic=on,pit=on,rtc=off";
/// In MiB, as the image's manifest has it.
const MEMORY: &str = "128";

/// How QEMU executes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As fast as it can: time is the host's.
    Plain,
    /// Time follows the number of executed instructions, which record and replay are built on.
    Counted,
    /// Recorded into the file.
    Record,
    /// Replayed from it.
    Replay,
}

/// The kernel, the RAM disk and the script.
pub struct Qemu<'a> {
    image: &'a Path,
    script: &'a str,
    /// What it has recorded last.
    pub log: PathBuf,
}

impl<'a> Qemu<'a> {
    /// A guest of this image that runs this script; the log is a file in the folder.
    pub fn new(image: &'a Path, script: &'a str, folder: &Path) -> Self {
        let log = folder.join("qemu.log");
        Self { image, script, log }
    }

    /// Runs the guest from power-on to its end; how long that took, and what it said.
    pub fn run(&self, way: Way) -> (f64, String) {
        let began = Instant::now();
        let ran = self.command(way).output().expect("QEMU starts");
        let seconds = began.elapsed().as_secs_f64();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned();
        let complaint = String::from_utf8_lossy(&ran.stderr);
        assert!(ran.status.success(), "{way:?}: {said}{complaint}");
        (seconds, said)
    }

    /// How many bytes the log has, and how many compressed as ours are.
    pub fn log_bytes(&self) -> (f64, f64) {
        let log = fs::read(&self.log).expect("a log");
        let compressed = zstd::encode_all(&log[..], zstd::DEFAULT_COMPRESSION_LEVEL);
        let compressed = compressed.expect("compresses").len();
        (log.len() as f64, compressed as f64)
    }

    /// QEMU ends with this thread, whatever becomes of it.
    fn command(&self, way: Way) -> Command {
        let mut command = Command::new(program());
        command.args(exec::arguments()).arg(QEMU);
        command.args([
            "-nographic",
            "-no-reboot",
            "-nodefaults",
            "-serial",
            "stdio",
        ]);
        command.args(["-M", MACHINE, "-accel", "tcg", "-cpu", "max", "-m", MEMORY]);
        command.args(["-device", "virtio-rng-device"]);
        command.arg("-kernel").arg(self.image.join("bzImage"));
        command.arg("-initrd").arg(self.image.join("initrd.img"));
        let run = parameter(self.script);
        command.args(["-append", &format!("console=ttyS0 reboot=t {run}")]);
        let log = self.log.display();
        let icount = match way {
            Way::Plain => None,
            Way::Counted => Some("shift=auto".to_owned()),
            Way::Record => Some(format!("shift=auto,rr=record,rrfile={log}")),
            Way::Replay => Some(format!("shift=auto,rr=replay,rrfile={log}")),
        };
        command.args(icount.iter().flat_map(|icount| ["-icount", icount]));
        command.stdin(Stdio::null());
        command
    }
}
