//! Programs of this machine on the lab's network.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::process::{Pid, PidfdFlags, Signal as RawSignal, pidfd_open, pidfd_send_signal};

use super::exec;

/// Waits for the end of a process.
pub fn wait_for(handle: &impl AsFd) -> io::Result<()> {
    ready(&[handle.as_fd()]).map(drop)
}

/// Which of these can be read, once any can.
fn ready(handles: &[BorrowedFd<'_>]) -> io::Result<Vec<bool>> {
    let mut polled: Vec<_> = handles
        .iter()
        .map(|handle| PollFd::new(*handle, PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut polled, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => break,
        }
    }
    Ok(polled
        .iter()
        .map(|one| one.any().unwrap_or(false))
        .collect())
}

/// Runs a program on the network of the keeper at the other end of this connection; its exit code.
/// It ends when the keeper does. This process stays on that network.
pub fn run(keeper: &UnixStream, words: &[String]) -> io::Result<u8> {
    let pid = getsockopt(keeper, PeerCredentials)?.pid();
    enter(pid)?;
    let mut child = Command::new(exec::OWN_PROGRAM)
        .args(exec::arguments())
        .args(words)
        .spawn()?;
    let status = attend(&mut child, keeper)?;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .and_then(|code| u8::try_from(code).ok());
    Ok(code.unwrap_or(u8::MAX))
}

fn enter(keeper: i32) -> io::Result<()> {
    let space = |of: &str, kind: &str| format!("/proc/{of}/ns/{kind}");
    let keeper = keeper.to_string();
    // A user has a namespace of users around that of the network; root has none.
    let users = fs::read_link(space(&keeper, "user"))?;
    if users != fs::read_link(space("self", "user"))? {
        let users = File::open(space(&keeper, "user"))?;
        let network = File::open(space(&keeper, "net"))?;
        setns(users, CloneFlags::CLONE_NEWUSER)?;
        return Ok(setns(network, CloneFlags::CLONE_NEWNET)?);
    }
    let network = File::open(space(&keeper, "net"))?;
    Ok(setns(network, CloneFlags::CLONE_NEWNET)?)
}

/// Waits for a program's end, and brings it about when the keeper goes. Ctrl-C reaches the program
/// by itself; a signal that asks this process to end is passed on.
fn attend(child: &mut Child, keeper: &UnixStream) -> io::Result<ExitStatus> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    let mut heard = SigSet::empty();
    heard.add(Signal::SIGINT);
    heard.add(Signal::SIGTERM);
    heard.thread_block()?;
    let signals = SignalFd::with_flags(&heard, SfdFlags::SFD_CLOEXEC)?;
    loop {
        let ready = ready(&[process.as_fd(), keeper.as_fd(), signals.as_fd()])?;
        if ready[0] {
            return child.wait();
        }
        if ready[1] {
            eprintln!("understudy: the lab has ended, and the program with it");
            child.kill()?;
            return child.wait();
        }
        if ready[2]
            && let Some(signal) = signals.read_signal()?
            && signal.ssi_signo == Signal::SIGTERM as u32
        {
            pidfd_send_signal(&process, RawSignal::TERM)?;
        }
    }
}
