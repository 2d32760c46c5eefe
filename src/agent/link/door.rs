//! The door: packets of strangers come to a socket and a thread of their own.
//!
//! ```text
//!                               main's ids ──────────▶ main socket ──▶ the thread that heartbeats live on
//!                                                          ▲ configured peers, proven
//!   datagrams to one port ──▶ kernel ── the rest ──▶ door's socket ──▶ the door's thread: Retry
//!                             (BPF)                        ▼ everybody else who is admitted
//!                               hall's ids ──────────▶ hall's socket ──▶ the hall's thread: handshakes
//! ```
//!
//! Three sockets share the port. The ids of our connections begin with four secret bytes, by which the
//! kernel tells what belongs to a connection from what does not ([`super::steering`]). So a flood of
//! first packets fills another socket's buffer and takes another thread's time than connections do.
//! What may begin a handshake ([`Admission`]) is handed on: to the main endpoint, where heartbeats are
//! sent and heard, if a configured peer has proven its address; else to the hall ([`super::hall`]).

use std::io::{self, IoSliceMut};
use std::net::UdpSocket;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use quinn::{EndpointConfig, ServerConfig};
use quinn_proto::{DatagramEvent, Endpoint as Packets};
use std::os::fd::AsFd as _;
use tokio::sync::mpsc;

use super::admission::{Admission, Bucket, Verdict};
use super::steering::{Tags, Whose};
use crate::agent::thread::ordinary;

/// Datagrams that may wait to be taken by another thread; more are dropped.
const WAITING: usize = 256;
/// Datagrams taken from the kernel at once.
const AT_ONCE: usize = 16;
/// The most that the kernel hands out in one piece.
const PIECE_MAX: usize = 64 * 1024;
/// Packets of strangers that are looked into in a second, and at once after a pause; the others cost a
/// look at their first bytes.
const LOOKED_INTO: (u32, u32) = (2_000, 400);
/// The same for packets that are of no connection we know and begin none: resets of ours by processes
/// that know them no more, and what makes us send such resets.
const LOOSE: (u32, u32) = (500, 100);

/// A datagram that was let in.
#[derive(Debug)]
pub(super) struct LetIn {
    pub(super) from: RecvMeta,
    pub(super) bytes: Bytes,
}

/// What was let in, on its way to the threads that take it.
#[derive(Debug)]
struct Outlets {
    main: mpsc::Sender<LetIn>,
    hall: mpsc::Sender<LetIn>,
}

/// The other ends.
pub(super) struct Inlets {
    pub(super) main: mpsc::Receiver<LetIn>,
    pub(super) hall: mpsc::Receiver<LetIn>,
}

impl Outlets {
    fn new() -> (Self, Inlets) {
        let ((main, to_main), (hall, to_hall)) = (mpsc::channel(WAITING), mpsc::channel(WAITING));
        let inlets = Inlets {
            main: to_main,
            hall: to_hall,
        };
        (Self { main, hall }, inlets)
    }
}

/// The thread behind the door. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Door {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the door needs of the endpoints it guards.
pub(super) struct Guarded {
    pub(super) tags: Tags,
    /// With ids that are the door's.
    pub(super) endpoint: EndpointConfig,
    /// The same as the endpoints': what is proven here is taken for proven there.
    pub(super) server: ServerConfig,
    pub(super) admission: Arc<Admission>,
}

impl Door {
    /// Opens the door; what it lets in comes by the channels.
    pub(super) fn open(socket: UdpSocket, guarded: Guarded) -> io::Result<(Self, Inlets)> {
        let (outlets, inlets) = Outlets::new();
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?);
        let state = UdpSocketState::new((&socket).into())?;
        let Guarded {
            tags,
            endpoint,
            server,
            admission,
        } = guarded;
        let now = Instant::now();
        let mut keeper = Keeper {
            tags,
            socket,
            state,
            packets: Packets::new(Arc::new(endpoint), Some(Arc::new(server)), true, None),
            admission,
            outlets,
            first_packets: Bucket::new(LOOKED_INTO.0, LOOKED_INTO.1, now),
            first_of_peers: Bucket::new(LOOKED_INTO.0, LOOKED_INTO.1, now),
            with_proof: Bucket::new(LOOKED_INTO.0, LOOKED_INTO.1, now),
            loose: Bucket::new(LOOSE.0, LOOSE.1, now),
            loose_of_peers: Bucket::new(LOOSE.0, LOOSE.1, now),
        };
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("door".to_owned())
            .spawn(move || {
                // Heartbeats go before strangers.
                ordinary(0);
                keeper.keep(&stopped);
            })?;
        let door = Self {
            stop,
            thread: Some(thread),
        };
        Ok((door, inlets))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // Fails only when it was told so often already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but this; the port is free when it has ended.
            let _ = thread.join();
        }
    }
}

struct Keeper {
    tags: Tags,
    socket: UdpSocket,
    state: UdpSocketState,
    /// Reads and answers packets; it never has a connection.
    packets: Packets,
    admission: Arc<Admission>,
    outlets: Outlets,
    first_packets: Bucket,
    first_of_peers: Bucket,
    with_proof: Bucket,
    loose: Bucket,
    loose_of_peers: Bucket,
}

impl Keeper {
    fn keep(&mut self, stop: &EventFd) {
        let mut memory = vec![0; AT_ONCE * PIECE_MAX];
        loop {
            let mut waited = [
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(stop.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut waited, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, "strangers are not heard any more"),
            }
            let [_, stopped] = waited;
            if stopped.any().unwrap_or(true) {
                return;
            }
            if let Err(error) = self.take(&mut memory) {
                tracing::debug!(%error, "a stranger's packet cannot be read");
            }
        }
    }

    /// Takes what the kernel has, once.
    fn take(&mut self, memory: &mut [u8]) -> io::Result<()> {
        let mut meta = [RecvMeta::default(); AT_ONCE];
        let mut buffers: Vec<_> = memory.chunks_mut(PIECE_MAX).map(IoSliceMut::new).collect();
        let received = self
            .state
            .recv((&self.socket).into(), &mut buffers, &mut meta);
        let count = match received {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let now = Instant::now();
        for (meta, buffer) in meta.iter().zip(&buffers).take(count) {
            let piece = buffer.get(..meta.len).unwrap_or_default();
            for packet in piece.chunks(meta.stride.max(1)) {
                self.packet(packet, *meta, now);
            }
        }
        Ok(())
    }

    fn packet(&mut self, packet: &[u8], from: RecvMeta, now: Instant) {
        match self.tags.whose(packet) {
            Whose::Main => return hand_on(&self.outlets.main, packet, from),
            Whose::Hall => return hand_on(&self.outlets.hall, packet, from),
            Whose::Stranger => {}
        }
        let kind = kind(packet);
        let peer = self.admission.is_peer(from.addr);
        let bucket = match (&kind, peer) {
            (Kind::First, false) => &mut self.first_packets,
            (Kind::First, true) => &mut self.first_of_peers,
            (Kind::FirstWithProof, _) => &mut self.with_proof,
            (Kind::Other, false) => &mut self.loose,
            (Kind::Other, true) => &mut self.loose_of_peers,
        };
        if !bucket.take(now) {
            return;
        }
        if matches!(kind, Kind::Other) {
            // A reset is known by its end, and only by whoever has the connection. Who has had one
            // answers with a reset of its own, which nobody takes for the other's.
            hand_on(&self.outlets.main, packet, from);
            return hand_on(&self.outlets.hall, packet, from);
        }
        let mut answer = Vec::new();
        let ecn = from
            .ecn
            .and_then(|ecn| quinn_proto::EcnCodepoint::from_bits(ecn as u8));
        let data = BytesMut::from(packet);
        let event = self
            .packets
            .handle(now, from.addr, from.dst_ip, ecn, data, &mut answer);
        let transmit = match event {
            Some(DatagramEvent::NewConnection(incoming)) => {
                let proven = incoming.remote_address_validated();
                let mut verdict = self.admission.judge(from.addr, proven, now);
                if verdict == Verdict::Prove && !incoming.may_retry() {
                    verdict = Verdict::Drop;
                }
                match verdict {
                    Verdict::Admit => {
                        self.packets.ignore(incoming);
                        let outlet = if peer {
                            &self.outlets.main
                        } else {
                            &self.outlets.hall
                        };
                        return hand_on(outlet, packet, from);
                    }
                    Verdict::Drop => return self.packets.ignore(incoming),
                    Verdict::Prove => match self.packets.retry(incoming, &mut answer) {
                        Ok(transmit) => transmit,
                        Err(error) => return self.packets.ignore(error.into_incoming()),
                    },
                }
            }
            Some(DatagramEvent::Response(transmit)) => transmit,
            // There are no connections here.
            Some(DatagramEvent::ConnectionEvent(..)) | None => return,
        };
        let contents = answer.get(..transmit.size).unwrap_or_default();
        let transmit = Transmit {
            destination: transmit.destination,
            ecn: transmit
                .ecn
                .and_then(|ecn| EcnCodepoint::from_bits(ecn as u8)),
            contents,
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        // An answer that finds no room is lost, as on any network.
        let _ = self.state.try_send((&self.socket).into(), &transmit);
    }
}

fn hand_on(outlet: &mpsc::Sender<LetIn>, packet: &[u8], from: RecvMeta) {
    let let_in = LetIn {
        from: RecvMeta {
            len: packet.len(),
            stride: packet.len(),
            ..from
        },
        bytes: Bytes::copy_from_slice(packet),
    };
    // Beyond the limit it is lost, and sent again by whoever sent it.
    let _ = outlet.try_send(let_in);
}

enum Kind {
    First,
    FirstWithProof,
    Other,
}

/// What a packet looks like, by its header alone (RFC 9000, section 17.2.2).
fn kind(packet: &[u8]) -> Kind {
    let token = || {
        let [first, _, _, _, _, rest @ ..] = packet else {
            return None;
        };
        if first & 0xf0 != 0xc0 {
            return None;
        }
        let (to, rest) = rest.split_first()?;
        let rest = rest.get(usize::from(*to)..)?;
        let (from, rest) = rest.split_first()?;
        rest.get(usize::from(*from)..)?.first().copied()
    };
    match token() {
        None => Kind::Other,
        Some(0) => Kind::First,
        Some(_) => Kind::FirstWithProof,
    }
}

#[cfg(test)]
mod tests {
    use super::super::steering::tests::long;
    use super::*;

    #[test]
    fn first_packets_are_told_by_their_headers() {
        assert!(matches!(kind(&long(0xc3, b"12345678", b"")), Kind::First));
        let with_proof = kind(&long(0xc3, b"12345678", b"token"));
        assert!(matches!(with_proof, Kind::FirstWithProof));
        assert!(matches!(kind(&long(0xe3, b"12345678", b"")), Kind::Other));
        for cut in [&[][..], &[0xc0], &[0xc0, 0, 0, 0, 1, 20, 1, 2]] {
            assert!(matches!(kind(cut), Kind::Other));
        }
    }
}
