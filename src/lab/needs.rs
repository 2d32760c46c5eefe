//! What the machine must have for a lab.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::unistd::getuid;
use thiserror::Error;

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";
/// Programs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 5] = [
    (QEMU, "qemu-system-x86"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("mkfs.ext4", "e2fsprogs"),
    ("unshare", "util-linux"),
];
/// Where taps come from.
const TUN: &str = "/dev/net/tun";
/// Folders that the PATH of a user may lack.
const SYSTEM_FOLDERS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// What is missing.
#[derive(Debug, Error)]
pub enum Missing {
    /// Programs.
    #[error("a lab needs {}: install the packages {}", programs.join(", "), packages.join(" "))]
    Programs {
        /// Which.
        programs: Vec<&'static str>,
        /// Whose.
        packages: Vec<&'static str>,
    },
    /// Taps.
    #[error("a lab needs {TUN}: load the module tun, or run this as root")]
    Tun(#[source] io::Error),
    /// A network apart.
    #[error(
        "a lab needs a network namespace, and this user may make none: run this as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
    )]
    Namespace,
}

/// The user's PATH, and where the system's own programs are.
pub fn search_path() -> OsString {
    let given = std::env::var_os("PATH").unwrap_or_default();
    let given = std::env::split_paths(&given);
    let all = given.chain(SYSTEM_FOLDERS.map(PathBuf::from));
    // Fails for paths with colons, which none of these has.
    std::env::join_paths(all).unwrap_or_default()
}

fn there(program: &str) -> bool {
    std::env::split_paths(&search_path()).any(|folder| folder.join(program).is_file())
}

/// Says what is missing, if anything is.
pub fn check() -> Result<(), Missing> {
    let missing = PROGRAMS.into_iter().filter(|(program, _)| !there(program));
    let (programs, packages): (Vec<_>, Vec<_>) = missing.unzip();
    if !programs.is_empty() {
        return Err(Missing::Programs { programs, packages });
    }
    let tun = File::options().read(true).write(true).open(TUN);
    tun.map_err(Missing::Tun)?;
    if namespaces() {
        Ok(())
    } else {
        Err(Missing::Namespace)
    }
}

/// Whether this user may make what the keeper makes.
fn namespaces() -> bool {
    let kinds: &[&str] = if getuid().is_root() {
        &["--net"]
    } else {
        &["--user", "--map-root-user", "--net"]
    };
    let made = Command::new("unshare")
        .args(kinds)
        .arg("true")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    made.is_ok_and(|status| status.success())
}
