//! The UDP socket under QUIC, woken only by what it waits for.
//!
//! It listens for datagrams, and for room to send only after the kernel had none: see
//! [`crate::agent::listen`].

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::agent::listen::listen;

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
        // Sets the socket's options; without blocking among them.
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Arc::new(Socket {
            state,
            io: listen(socket, Interest::READABLE)?,
            full: AtomicBool::new(false),
        }))
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
