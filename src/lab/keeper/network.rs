//! The lab's network: a namespace that only the keeper holds, and in it a bridge, a tap for each
//! host and a veth pair for the machine itself. It vanishes with the keeper.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getgid, getuid};
use thiserror::Error;

use crate::lab::state::{End, HostId, LinkName, PREFIX};

/// The bridge.
const BRIDGE: &str = "lab";
/// The machine's end of its veth pair; the other one is a port of the bridge.
const MACHINE: &str = "machine";

/// Why there is no network, or it cannot be changed.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// No namespace.
    #[error(
        "a network namespace cannot be made ({0}): run this as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
    )]
    Namespace(io::Error),
    /// A program that is not there.
    #[error("{program} cannot be started: {source}")]
    Start {
        /// Which.
        program: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A program that failed.
    #[error("{program} failed: {said}")]
    Failed {
        /// Which.
        program: &'static str,
        /// What it said.
        said: String,
    },
}

/// Leaves the network of the machine for an empty one, which others can enter. The process must
/// have one thread. Without root it becomes root of a user namespace, and only of that.
pub fn leave() -> Result<(), NetworkError> {
    let failed = |error: nix::Error| NetworkError::Namespace(error.into());
    let (uid, gid) = (getuid(), getgid());
    if uid.is_root() {
        return unshare(CloneFlags::CLONE_NEWNET).map_err(failed);
    }
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(failed)?;
    let maps = [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {uid} 1")),
        ("gid_map", format!("0 {gid} 1")),
    ];
    for (file, map) in maps {
        fs::write(format!("/proc/self/{file}"), map).map_err(NetworkError::Namespace)?;
    }
    Ok(())
}

/// The bridge's port of an end.
pub fn port(end: End) -> String {
    format!("{BRIDGE}-{end}")
}

/// Makes the network in the namespace that this process has.
pub fn make(hosts: impl Iterator<Item = HostId>) -> Result<(), NetworkError> {
    let machine = port(End::Machine);
    let mut ip = format!(
        "link set lo up\n\
         link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
         link set {BRIDGE} up\n\
         link add {MACHINE} type veth peer name {machine}\n\
         link set {machine} master {BRIDGE} up\n\
         addr add {}/{PREFIX} dev {MACHINE}\n\
         link set {MACHINE} up\n",
        End::Machine.address(),
    );
    for host in hosts {
        let port = port(End::Host(host));
        // Writing to a string cannot fail.
        let _ = writeln!(ip, "tuntap add dev {port} mode tap");
        let _ = writeln!(ip, "link set {port} master {BRIDGE} up");
    }
    feed("ip", &["-batch", "-"], &ip)?;
    feed(
        "nft",
        &["-f", "-"],
        "table bridge lab {
            set cut { type ifname . ifname; }
            chain forward {
                type filter hook forward priority 0;
                meta iifname . meta oifname @cut drop;
            }
        }",
    )
}

/// Cuts a link, so that no frame passes any more, or mends it.
pub fn set_cut(link: LinkName, cut: bool) -> Result<(), NetworkError> {
    let LinkName(a, b) = link;
    let (a, b) = (port(a), port(b));
    let what = if cut { "add" } else { "delete" };
    let rule = format!("{what} element bridge lab cut {{ \"{a}\" . \"{b}\", \"{b}\" . \"{a}\" }}");
    feed("nft", &["-f", "-"], &rule)
}

fn feed(program: &'static str, arguments: &[&str], input: &str) -> Result<(), NetworkError> {
    let start = |source| NetworkError::Start { program, source };
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", crate::lab::needs::search_path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let Output { status, stderr, .. } = child.wait_with_output().map_err(start)?;
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&stderr).trim().replace('\n', "; ");
    Err(NetworkError::Failed { program, said })
}

/// Kills every process in this namespace but this one: what was run on the lab's network.
pub fn kill_all() {
    let net = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let Some(own) = net("self") else { return };
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let ours = pid.unsigned_abs() != std::process::id();
        if ours && net(&pid.to_string()).as_ref() == Some(&own) {
            // It may have ended in the meantime.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}
