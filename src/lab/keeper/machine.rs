//! One host's power: the QEMU process, which dies with the keeper.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use thiserror::Error;
use tokio::process::{Child, Command};

use super::network::port;
use crate::lab::exec;
use crate::lab::needs::{QEMU, search_path};
use crate::lab::state::{End, HostId, PREFIX, Setup};
use crate::lab::wire::PORT;

/// Why a host has no power.
#[derive(Debug, Error)]
pub enum MachineError {
    /// No socket, file or process.
    #[error("{QEMU} cannot be started for {host}: {source}")]
    Start {
        /// Which host.
        host: HostId,
        /// Why not.
        source: io::Error,
    },
}

/// What a host is made of. Files without names, held by the keeper: they vanish with it.
pub struct Parts<'a> {
    /// What the lab is to be.
    pub setup: &'a Setup,
    /// The initramfs, the program in it.
    pub initramfs: &'a File,
    /// The disk.
    pub disk: &'a File,
    /// Where its console goes.
    pub console: &'a Path,
}

/// Powers a host on: the process, and this end of its serial port.
pub fn start(host: HostId, parts: &Parts<'_>) -> Result<(Child, UnixStream), MachineError> {
    let failed = |source| MachineError::Start { host, source };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    let console = File::options()
        .create(true)
        .append(true)
        .open(parts.console)
        .map_err(failed)?;
    let child = Command::new(exec::OWN_PROGRAM)
        .args(exec::arguments())
        .arg(QEMU)
        .args(arguments(host, parts))
        .env("PATH", search_path())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(console)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    Ok((child, ours))
}

fn arguments(host: HostId, parts: &Parts<'_>) -> Vec<OsString> {
    let kernel = parts.setup.image.join("vmlinuz");
    let command_line = format!(
        "console=ttyS0 quiet panic=-1 understudy.host={host} understudy.address={}/{PREFIX}",
        host.address()
    );
    let mut words: Vec<OsString> = Vec::new();
    let mut option = |name: &str, value: OsString| words.extend([name.into(), value]);
    option("-name", format!("understudy-lab-{host}").into());
    option("-machine", "q35".into());
    option("-accel", "tcg".into());
    option("-cpu", "max".into());
    option("-m", parts.setup.memory_mib.to_string().into());
    option("-kernel", kernel.into());
    option("-initrd", held(parts.initramfs).into());
    option("-append", command_line.into());
    option("-display", "none".into());
    option(
        "-chardev",
        with_path("file,id=console,append=on,path=", parts.console),
    );
    option("-serial", "chardev:console".into());
    let tap = port(End::Host(host));
    option(
        "-netdev",
        format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost=off").into(),
    );
    let number = host.number();
    option(
        "-device",
        format!("virtio-net-pci,netdev=net,mac=52:54:00:88:00:{number:02x},romfile=").into(),
    );
    // Its standard input is the other end of the keeper's socket.
    option("-chardev", "socket,id=port,fd=0".into());
    option("-device", "virtio-serial-pci".into());
    option(
        "-device",
        format!("virtserialport,chardev=port,name={PORT}").into(),
    );
    let disk = held(parts.disk);
    option(
        "-drive",
        with_path("if=none,id=disk,format=raw,cache=writeback,file=", &disk),
    );
    option("-device", "virtio-blk-pci,drive=disk".into());
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(OsString::from));
    words
}

/// The name under which others find a file of this process that has none.
pub fn held(file: &File) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        file.as_raw_fd()
    ))
}

/// An option of QEMU that ends with a path: commas are written twice there.
fn with_path(option: &str, path: &Path) -> OsString {
    let path = path.to_string_lossy().replace(',', ",,");
    format!("{option}{path}").into()
}
