//! The door: packets of strangers come to a socket and a thread of their own.
//!
//! ```text
//!                                     our connection id ──▶ main socket ──▶ the runtime's thread:
//!   datagrams to one port ──▶ kernel ─┤                          ▲          connections, heartbeats
//!                             (BPF)   everything else            │ admitted
//!                                     └──▶ door's socket ──▶ the door's thread: Retry
//! ```
//!
//! Two sockets share the port. The ids of our connections begin with four secret bytes, by which the
//! kernel tells what belongs to a connection from what does not. So a flood of first packets fills
//! another socket's buffer and takes another thread's time than heartbeats do. What may begin a
//! handshake ([`Admission`]) is handed on to the main socket; handshakes themselves, which are bounded in
//! rate, run there.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{setsockopt, sockopt};
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use quinn::{EndpointConfig, ServerConfig};
use quinn_proto::{DatagramEvent, Endpoint as Packets};
use std::os::fd::AsFd as _;
use tokio::sync::mpsc;

use super::admission::{Admission, Bucket, Verdict};
use super::socket::open_udp;
use crate::agent::thread::ordinary;

/// How our connections' ids begin.
pub(super) type Tag = [u8; 4];
/// The length of our connections' ids.
pub(super) const ID_LENGTH: usize = 8;
/// Datagrams that may wait to be taken by the main socket's thread; more are dropped.
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

/// The two sockets of one port.
pub(super) struct Sockets {
    /// For what belongs to connections.
    pub(super) main: UdpSocket,
    /// For the rest; `None` where the kernel cannot tell them apart: then all comes to the main one.
    pub(super) door: Option<UdpSocket>,
}

impl Sockets {
    /// Opens a port that nobody else has.
    pub(super) fn open(address: SocketAddr, tag: Tag) -> io::Result<Self> {
        // Not shared when it is bound: another process on this port is an error.
        let first = open_udp(address)?;
        match second(&first, tag) {
            Ok(main) => Ok(Self {
                main,
                door: Some(first),
            }),
            Err(error) => {
                tracing::warn!(%error, "strangers' packets are not kept apart from heartbeats");
                setsockopt(&first, sockopt::ReusePort, &false)?;
                Ok(Self {
                    main: first,
                    door: None,
                })
            }
        }
    }
}

/// The second socket of the port, for all packets whose connection id begins with the tag.
fn second(first: &UdpSocket, tag: Tag) -> io::Result<UdpSocket> {
    setsockopt(first, sockopt::ReusePort, &true)?;
    let second = super::socket::open_shared_udp(first.local_addr()?)?;
    let mut steps = steering(tag);
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    setsockopt(&second, sockopt::AttachReusePortCbpf, &program)?;
    Ok(second)
}

/// The number of the socket that gets a packet: 1 (bound later) for our connections' ids, 0 for the
/// rest. A packet that is too short to be read ends the program with 0.
fn steering(tag: Tag) -> [libc::sock_filter; 10] {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    };
    let load = |width: u32, at: u32| step(libc::BPF_LD | width | libc::BPF_ABS, 0, 0, at);
    let jump = |test: u32, k: u32, jt: u8, jf: u8| step(libc::BPF_JMP | test, jt, jf, k);
    let answer = |socket: u32| step(libc::BPF_RET | libc::BPF_K, 0, 0, socket);
    [
        // Where the id of the destination is depends on the form of the header.
        load(libc::BPF_B, 0),
        jump(libc::BPF_JSET, 0x80, 0, 4),
        load(libc::BPF_B, 5),
        jump(libc::BPF_JEQ, ID_LENGTH as u32, 0, 5),
        load(libc::BPF_W, 6),
        jump(libc::BPF_JA, 1, 0, 0),
        load(libc::BPF_W, 1),
        jump(libc::BPF_JEQ, u32::from_be_bytes(tag), 0, 1),
        answer(1),
        answer(0),
    ]
}

/// The same in Rust: a piece of several packets was steered by its first.
fn is_ours(packet: &[u8], tag: Tag) -> bool {
    let id = match packet {
        [first, id @ ..] if first & 0x80 == 0 => id,
        [_, _, _, _, _, length, id @ ..] if usize::from(*length) == ID_LENGTH => id,
        _ => return false,
    };
    id.starts_with(&tag)
}

/// The thread behind the door. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Door {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

/// What the door needs of the endpoint it guards.
pub(super) struct Guarded {
    pub(super) tag: Tag,
    pub(super) endpoint: EndpointConfig,
    /// The same as the endpoint's: what is proven here is taken for proven there.
    pub(super) server: ServerConfig,
    pub(super) admission: Arc<Admission>,
}

impl Door {
    /// Opens the door; what it lets in comes by the channel.
    pub(super) fn open(
        socket: UdpSocket,
        guarded: Guarded,
    ) -> io::Result<(Self, mpsc::Receiver<LetIn>)> {
        let (let_in, inlet) = mpsc::channel(WAITING);
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?);
        let state = UdpSocketState::new((&socket).into())?;
        let Guarded {
            tag,
            endpoint,
            server,
            admission,
        } = guarded;
        let now = Instant::now();
        let mut keeper = Keeper {
            tag,
            socket,
            state,
            packets: Packets::new(Arc::new(endpoint), Some(Arc::new(server)), true, None),
            admission,
            let_in,
            first_packets: Bucket::new(LOOKED_INTO.0, LOOKED_INTO.1, now),
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
        Ok((door, inlet))
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
    tag: Tag,
    socket: UdpSocket,
    state: UdpSocketState,
    /// Reads and answers packets; it never has a connection.
    packets: Packets,
    admission: Arc<Admission>,
    let_in: mpsc::Sender<LetIn>,
    first_packets: Bucket,
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
        if is_ours(packet, self.tag) {
            return self.hand_on(packet, from);
        }
        let (bucket, loose) = match kind(packet) {
            Kind::First => (&mut self.first_packets, false),
            Kind::FirstWithProof => (&mut self.with_proof, false),
            Kind::Other if self.admission.is_peer(from.addr) => (&mut self.loose_of_peers, true),
            Kind::Other => (&mut self.loose, true),
        };
        if !bucket.take(now) {
            return;
        }
        if loose {
            // A reset is known by its end, and only by whoever has the connection.
            return self.hand_on(packet, from);
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
                        return self.hand_on(packet, from);
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

    fn hand_on(&self, packet: &[u8], from: RecvMeta) {
        let let_in = LetIn {
            from: RecvMeta {
                len: packet.len(),
                stride: packet.len(),
                ..from
            },
            bytes: Bytes::copy_from_slice(packet),
        };
        // Beyond the limit it is lost, and sent again by whoever sent it.
        let _ = self.let_in.try_send(let_in);
    }
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
    use super::*;

    const TAG: Tag = *b"ours";

    fn short(id: &[u8]) -> Vec<u8> {
        [&[0x40], id, &[0; 30]].concat()
    }

    fn long(first: u8, id: &[u8], token: &[u8]) -> Vec<u8> {
        let lengths = [id.len() as u8];
        let token_length = [token.len() as u8];
        let head = [&[first, 0, 0, 0, 1][..], &lengths, id, &[0]].concat();
        [&head[..], &token_length, token, &[0; 30]].concat()
    }

    #[test]
    fn the_kernel_sends_each_packet_where_it_belongs() {
        let tag = TAG;
        let Sockets { main, door } =
            Sockets::open(([127, 0, 0, 1], 0).into(), tag).expect("a port");
        let door = door.expect("the kernel can tell them apart");
        let to = main.local_addr().expect("bound");
        assert_eq!(door.local_addr().expect("bound"), to);
        let sender = UdpSocket::bind("127.0.0.1:0").expect("a port");
        for socket in [&main, &door] {
            socket.set_nonblocking(false).expect("a socket");
            let patience = std::time::Duration::from_secs(10);
            socket.set_read_timeout(Some(patience)).expect("a socket");
        }
        for (packet, ours) in [
            (short(b"ours1234"), true),
            (short(b"ourz1234"), false),
            (long(0xc0, b"ours1234", b""), true),
            (long(0xe0, b"ours1234", b""), true),
            (long(0xc0, b"ours12345", b""), false),
            (long(0xc0, b"abcd1234", b""), false),
            (vec![0x40, b'o', b'u', b'r'], false),
            (vec![0xc0], false),
            (vec![0xc0, 0, 0, 0, 1, 8, b'o', b'u', b'r'], false),
        ] {
            assert_eq!(is_ours(&packet, tag), ours, "{packet:?}");
            sender.send_to(&packet, to).expect("sent");
            let mut buffer = [0; 100];
            let socket = if ours { &main } else { &door };
            let length = socket.recv(&mut buffer).expect("it came there");
            assert_eq!(buffer[..length], packet);
        }
    }

    #[test]
    fn nobody_else_gets_the_port() {
        let first = Sockets::open(([127, 0, 0, 1], 0).into(), TAG).expect("a port");
        let taken = first.main.local_addr().expect("bound");
        assert!(Sockets::open(taken, TAG).is_err());
        drop(first);
        assert!(Sockets::open(taken, TAG).is_ok());
    }

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
