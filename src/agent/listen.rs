//! Descriptors that are listened to for one thing only.
//!
//! tokio's own sockets listen for room to write at all times, and the kernel has some to report
//! whenever the other side has taken what was sent: on a busy host every message would wake its
//! sender once more, for nothing.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What has one descriptor for as long as it lives.
pub trait Socket: AsRawFd {}

impl Socket for UdpSocket {}
impl Socket for UnixStream {}

/// Listens to a socket that does not block. Call it on a tokio runtime.
pub fn listen<S: Socket>(socket: S, to: Interest) -> io::Result<AsyncFd<S>> {
    #[allow(
        deprecated,
        reason = "what takes its place is unsafe for types that change their descriptor; no Socket does"
    )]
    AsyncFd::with_interest(socket, to)
}
