//! What recording a Linux guest costs, each as a ratio within one run: of times and rates that were
//! measured one right after the other, and the median of these. The guests run in one host of the
//! lab; QEMU's own record and replay, with the same kernel and work, on this machine.
//!
//! `cargo bench --bench linux` prints, with their bounds: what guests get done while they are
//! recorded, against the recorder off, for four kinds of work; the log of an idle guest, and that
//! of Redis under load; what a recording, its replay and its log cost here and with QEMU's own.
//! `ROUNDS` (default 9) sets how often each kind of work is compared, `SCRIPTS` (default 3) how
//! often the two recorders are; 0 leaves it out. `UNDERSTUDY_LINUX_IMAGE` names a folder that has the
//! image; without it, it is built.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures for people; none comes near 2^52"
)]

mod common;
#[path = "linux/guest.rs"]
mod guest;
#[path = "../tests/common/lab.rs"]
mod lab;
#[path = "../tests/common/linux.rs"]
mod linux;
#[path = "linux/qemu.rs"]
mod qemu;
#[path = "linux/recorders.rs"]
mod recorders;
#[path = "../tests/common/skip.rs"]
mod skip;
#[path = "linux/stage.rs"]
mod stage;
#[path = "linux/work.rs"]
mod work;

use common::{Figures, has_tools, setting};
use linux::soak;
use stage::Stage;

fn main() {
    if !has_tools(&["redis-benchmark"]) {
        return;
    }
    let Some(stage) = Stage::new() else {
        // In the soak a bench that cannot run has not passed.
        std::process::exit(i32::from(soak()));
    };
    let mut figures = Figures::default();
    let (rounds, scripts) = (setting("ROUNDS", 9), setting("SCRIPTS", 3));
    if rounds > 0 {
        work::compare(&stage, rounds, &mut figures);
    }
    if scripts > 0 {
        recorders::compare(&stage, scripts, &mut figures);
    }
    // Ends the process when a figure was missed, and would leave the lab to the end of its lifeline.
    drop(stage);
    figures.end();
}
