//! Becomes another program that ends with the process that started it: the kernel sees to that.

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode};

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "lab-exec";
/// This program, even when its file has been replaced.
pub const OWN_PROGRAM: &str = "/proc/self/exe";

/// What the program is told, before the words of the other one. The thread that starts it must live
/// as long as it shall: it is the thread's end that the kernel looks for.
pub fn arguments() -> [String; 3] {
    let parent = std::process::id().to_string();
    [SUBCOMMAND.into(), parent, "--".into()]
}

/// Does it; returns only if that fails.
pub fn run(parent: u32, words: &[String]) -> ExitCode {
    let orphaned = |()| getppid().as_raw().unsigned_abs() != parent;
    match set_pdeathsig(Signal::SIGKILL).map(orphaned) {
        Ok(false) => {}
        Ok(true) => return ExitCode::FAILURE,
        Err(error) => {
            eprintln!("understudy: the end of the lab cannot be awaited: {error}");
            return ExitCode::FAILURE;
        }
    }
    let Some((program, arguments)) = words.split_first() else {
        eprintln!("understudy: no program was named");
        return ExitCode::from(2);
    };
    let error = Command::new(program).args(arguments).exec();
    eprintln!("understudy: {program} cannot be started: {error}");
    // As shells do.
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound {
        127
    } else {
        126
    })
}
