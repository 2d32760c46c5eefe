//! The UDP socket under QUIC, woken only by what it waits for.
//!
//! It listens for datagrams, and for room to send only after the kernel had none: see
//! [`crate::agent::listen`].

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::door::LetIn;
use super::endpoint::lock;
use crate::agent::listen::listen;

/// What the socket's buffers should hold (the kernel may grant less).
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;

/// A UDP socket at an address that nobody else has. At `[::]` it is for IPv4 too, whatever the system's
/// default is.
pub(super) fn open_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    open(address, false)
}

/// The same at an address that a socket of ours has already, and shares.
pub(super) fn open_shared_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    open(address, true)
}

fn open(address: SocketAddr, shared: bool) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let fd = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        setsockopt(&fd, sockopt::Ipv6V6Only, &false)?;
    }
    if shared {
        setsockopt(&fd, sockopt::ReusePort, &true)?;
    }
    // A smaller buffer than asked for is no error: the kernel's limit holds.
    let _ = setsockopt(&fd, sockopt::RcvBuf, &SOCKET_BUFFER);
    let _ = setsockopt(&fd, sockopt::SndBuf, &SOCKET_BUFFER);
    bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
    Ok(UdpSocket::from(fd))
}

/// A socket for quinn; what comes by `inlet` is received as if it had come by the socket. Call it on a
/// tokio runtime.
pub(super) fn quiet(
    socket: UdpSocket,
    inlet: Option<mpsc::Receiver<LetIn>>,
) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    // Sets the socket's options; without blocking among them.
    let state = UdpSocketState::new((&socket).into())?;
    Ok(Arc::new(Socket {
        state,
        io: listen(socket, Interest::READABLE)?,
        full: AtomicBool::new(false),
        inlet: inlet.map(Mutex::new),
    }))
}

/// quinn on tokio, but for the socket.
#[derive(Debug)]
pub(super) struct QuietRuntime;

impl Runtime for QuietRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        TokioRuntime.spawn(future);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        quiet(socket, None)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[derive(Debug)]
struct Socket {
    state: UdpSocketState,
    io: AsyncFd<UdpSocket>,
    /// The kernel had no room when it was last asked to send.
    full: AtomicBool,
    /// Datagrams that came by another socket and were let in.
    inlet: Option<Mutex<mpsc::Receiver<LetIn>>>,
}

impl Socket {
    /// Takes what was let in; 0 when there is nothing, and then the task is woken for it.
    fn take_let_in(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> usize {
        let Some(inlet) = &self.inlet else {
            return 0;
        };
        let mut inlet = lock(inlet);
        let mut count = 0;
        for (buffer, meta) in buffers.iter_mut().zip(meta) {
            let Poll::Ready(Some(LetIn { from, bytes })) = inlet.poll_recv(context) else {
                break;
            };
            // What is longer than any packet of ours is cut, and then is none.
            let length = bytes.len().min(buffer.len());
            buffer[..length].copy_from_slice(&bytes[..length]);
            *meta = RecvMeta {
                len: length,
                stride: length,
                ..from
            };
            count += 1;
        }
        count
    }
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Room {
            socket: self,
            waiting: None,
        })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.send(self.io.get_ref().into(), transmit);
        if let Err(error) = &sent
            && error.kind() == io::ErrorKind::WouldBlock
        {
            self.full.store(true, Ordering::Release);
        }
        sent
    }

    fn poll_recv(
        &self,
        context: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let let_in = self.take_let_in(context, buffers, meta);
        if let_in > 0 {
            return Poll::Ready(Ok(let_in));
        }
        loop {
            let mut ready = ready!(self.io.poll_read_ready(context))?;
            let received = ready.try_io(|io| self.state.recv(io.get_ref().into(), buffers, meta));
            // An outer error says that there is nothing to read.
            let Ok(received) = received else { continue };
            if received.as_ref().is_ok_and(|count| *count < meta.len()) {
                // These were all. The next one is an event of its own, and looking again now would
                // cost another call for nothing.
                ready.clear_ready();
            }
            return Poll::Ready(received);
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.get_ref().local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }
}

/// Somebody who may have to wait for room.
#[derive(Debug)]
struct Room {
    socket: Arc<Socket>,
    /// While they wait: a descriptor of its own for the same socket.
    waiting: Option<AsyncFd<UdpSocket>>,
}

impl UdpPoller for Room {
    fn poll_writable(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        // It is asked before everything that is sent.
        if !this.socket.full.load(Ordering::Acquire) {
            this.waiting = None;
            return Poll::Ready(Ok(()));
        }
        let waiting = match &this.waiting {
            Some(waiting) => waiting,
            None => this.waiting.insert(listen(
                this.socket.io.get_ref().try_clone()?,
                Interest::WRITABLE,
            )?),
        };
        ready!(waiting.poll_write_ready(context))?.retain_ready();
        this.waiting = None;
        this.socket.full.store(false, Ordering::Release);
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    fn transmit(to: SocketAddr, contents: &[u8]) -> Transmit<'_> {
        Transmit {
            destination: to,
            ecn: None,
            contents,
            segment_size: None,
            src_ip: None,
        }
    }

    fn bound() -> Arc<dyn AsyncUdpSocket> {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        QuietRuntime.wrap_udp_socket(socket).expect("a socket")
    }

    async fn receive(socket: &dyn AsyncUdpSocket, into: &mut [u8]) -> RecvMeta {
        let mut meta = [RecvMeta::default()];
        poll_fn(|context| socket.poll_recv(context, &mut [IoSliceMut::new(into)], &mut meta))
            .await
            .expect("a datagram");
        meta[0]
    }

    #[tokio::test]
    async fn datagrams_come_to_whoever_waits_for_them() {
        let (near, far) = (bound(), bound());
        let to = far.local_addr().expect("bound");
        let reader = tokio::spawn(async move {
            let mut buffer = [0; 1_500];
            let mut got = Vec::new();
            for _ in 0..3 {
                let meta = receive(&*far, &mut buffer).await;
                got.push(buffer[..meta.len].to_vec());
            }
            got
        });
        for word in [&b"one"[..], b"two", b"three"] {
            tokio::task::yield_now().await;
            near.try_send(&transmit(to, word)).expect("room");
        }
        let got = reader.await.expect("three datagrams");
        assert_eq!(got, [&b"one"[..], b"two", b"three"]);
    }

    /// On loopback there is always room, so the kernel's refusal is only remembered here.
    #[tokio::test]
    async fn who_found_no_room_is_woken_when_there_is_some() {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
        let socket = Arc::new(Socket {
            state: UdpSocketState::new((&socket).into()).expect("options"),
            io: listen(socket, Interest::READABLE).expect("a runtime"),
            full: AtomicBool::new(true),
            inlet: None,
        });
        let mut room = Arc::clone(&socket).create_io_poller();
        let mut polls = 0;
        let patience = std::time::Duration::from_secs(10);
        let waiting = poll_fn(|context| {
            polls += 1;
            room.as_mut().poll_writable(context)
        });
        let found = tokio::time::timeout(patience, waiting).await;
        found.expect("it is woken").expect("room");
        assert!(polls > 1, "it did not wait");
        assert!(!socket.full.load(Ordering::Acquire));
        let again = poll_fn(|context| Poll::Ready(room.as_mut().poll_writable(context))).await;
        assert!(again.is_ready(), "nobody waits while there is room");
    }
}
