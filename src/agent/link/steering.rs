//! One port with three sockets, and how the kernel tells which of them gets a packet: by the secret
//! beginning of our connections' ids.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use ring::rand::SecureRandom as _;

use super::socket::{open_shared_udp, open_udp};

/// How the ids of one endpoint's connections begin.
pub(super) type Tag = [u8; 4];
/// The length of our connections' ids.
pub(super) const ID_LENGTH: usize = 8;

/// Who is to get a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Whose {
    /// The endpoint on the thread that heartbeats live on.
    Main,
    /// The endpoint of everybody else.
    Hall,
    /// It belongs to no connection that we know of: the door looks into it.
    Stranger,
}

/// The tags of one port. None tells anything of another: whoever begins a handshake in the hall learns
/// the hall's, and with it no way to the main socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tags {
    pub(super) main: Tag,
    pub(super) hall: Tag,
    /// Of the ids that the door gives out while addresses are proven.
    pub(super) door: Tag,
}

impl Tags {
    pub(super) fn fresh() -> io::Result<Self> {
        loop {
            let (main, hall, door) = (fresh_tag()?, fresh_tag()?, fresh_tag()?);
            if main != hall && main != door && hall != door {
                return Ok(Self { main, hall, door });
            }
        }
    }

    /// What the kernel is told, in Rust: a piece of several packets was steered by its first.
    pub(super) fn whose(&self, packet: &[u8]) -> Whose {
        match packet {
            [first, id @ ..] if first & 0x80 == 0 => self.of_id(id),
            [_, _, _, _, _, length, id @ ..] if usize::from(*length) == ID_LENGTH => self.of_id(id),
            _ => Whose::Stranger,
        }
    }

    /// Whose connection has this id.
    pub(super) fn of_id(&self, id: &[u8]) -> Whose {
        if id.starts_with(&self.main) {
            Whose::Main
        } else if id.starts_with(&self.hall) {
            Whose::Hall
        } else {
            Whose::Stranger
        }
    }
}

pub(super) fn fresh_tag() -> io::Result<Tag> {
    random()
}

pub(super) fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| io::Error::other("the system has no random numbers"))?;
    Ok(bytes)
}

/// The sockets of one port.
pub(super) struct Sockets {
    pub(super) main: UdpSocket,
    /// `None` where the kernel cannot tell packets apart: then all come to the main one.
    pub(super) apart: Option<Apart>,
}

/// The sockets that are not heard by the thread that heartbeats live on.
pub(super) struct Apart {
    pub(super) hall: UdpSocket,
    pub(super) door: UdpSocket,
}

impl Sockets {
    /// Opens a port that nobody else has.
    pub(super) fn open(address: SocketAddr, tags: &Tags) -> io::Result<Self> {
        // Not shared when it is bound: another process on this port is an error.
        let first = open_udp(address)?;
        match more(&first, tags) {
            Ok((main, hall)) => Ok(Self {
                main,
                apart: Some(Apart { hall, door: first }),
            }),
            Err(error) => {
                tracing::warn!(%error, "strangers' packets are not kept apart from heartbeats");
                setsockopt(&first, sockopt::ReusePort, &false)?;
                Ok(Self {
                    main: first,
                    apart: None,
                })
            }
        }
    }
}

/// The second and the third socket of the port.
fn more(first: &UdpSocket, tags: &Tags) -> io::Result<(UdpSocket, UdpSocket)> {
    setsockopt(first, sockopt::ReusePort, &true)?;
    let at = first.local_addr()?;
    let (second, third) = (open_shared_udp(at)?, open_shared_udp(at)?);
    let mut steps = steering(tags);
    let program = libc::sock_fprog {
        len: steps.len() as u16,
        filter: steps.as_mut_ptr(),
    };
    setsockopt(&third, sockopt::AttachReusePortCbpf, &program)?;
    Ok((second, third))
}

/// The number of the socket that gets a packet, in the order in which they were bound: 1 for ids of the
/// main endpoint's, 2 for the hall's, 0 for the rest. A packet that is too short to be read ends the
/// program with 0.
fn steering(tags: &Tags) -> [libc::sock_filter; 12] {
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
        jump(libc::BPF_JEQ, u32::from_be_bytes(tags.main), 2, 0),
        jump(libc::BPF_JEQ, u32::from_be_bytes(tags.hall), 2, 0),
        answer(0),
        answer(1),
        answer(2),
    ]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const TAGS: Tags = Tags {
        main: *b"main",
        hall: *b"hall",
        door: *b"door",
    };

    fn short(id: &[u8]) -> Vec<u8> {
        [&[0x40], id, &[0; 30]].concat()
    }

    /// A packet with a long header.
    pub(in super::super) fn long(first: u8, id: &[u8], token: &[u8]) -> Vec<u8> {
        let lengths = [id.len() as u8];
        let token_length = [token.len() as u8];
        let head = [&[first, 0, 0, 0, 1][..], &lengths, id, &[0]].concat();
        [&head[..], &token_length, token, &[0; 30]].concat()
    }

    #[test]
    fn the_kernel_sends_each_packet_where_it_belongs() {
        let Sockets { main, apart } =
            Sockets::open(([127, 0, 0, 1], 0).into(), &TAGS).expect("a port");
        let Apart { hall, door } = apart.expect("the kernel can tell them apart");
        let to = main.local_addr().expect("bound");
        let sender = UdpSocket::bind("127.0.0.1:0").expect("a port");
        for socket in [&main, &hall, &door] {
            assert_eq!(socket.local_addr().expect("bound"), to);
            socket.set_nonblocking(false).expect("a socket");
            let patience = std::time::Duration::from_secs(10);
            socket.set_read_timeout(Some(patience)).expect("a socket");
        }
        for (packet, whose) in [
            (short(b"main1234"), Whose::Main),
            (short(b"hall1234"), Whose::Hall),
            (short(b"door1234"), Whose::Stranger),
            (short(b"maim1234"), Whose::Stranger),
            (long(0xc0, b"main1234", b""), Whose::Main),
            (long(0xe0, b"main1234", b""), Whose::Main),
            (long(0xe0, b"hall1234", b""), Whose::Hall),
            (long(0xc0, b"main12345", b""), Whose::Stranger),
            (long(0xc0, b"hall123", b""), Whose::Stranger),
            (long(0xc0, b"abcd1234", b""), Whose::Stranger),
            (vec![0x40, b'm', b'a', b'i'], Whose::Stranger),
            (vec![0xc0], Whose::Stranger),
            (vec![0xc0, 0, 0, 0, 1, 8, b'm', b'a', b'i'], Whose::Stranger),
        ] {
            assert_eq!(TAGS.whose(&packet), whose, "{packet:?}");
            sender.send_to(&packet, to).expect("sent");
            let mut buffer = [0; 100];
            let socket = match whose {
                Whose::Main => &main,
                Whose::Hall => &hall,
                Whose::Stranger => &door,
            };
            let length = socket.recv(&mut buffer).expect("it came there");
            assert_eq!(buffer[..length], packet);
        }
    }

    #[test]
    fn nobody_else_gets_the_port() {
        let first = Sockets::open(([127, 0, 0, 1], 0).into(), &TAGS).expect("a port");
        let taken = first.main.local_addr().expect("bound");
        assert!(Sockets::open(taken, &TAGS).is_err());
        drop(first);
        assert!(Sockets::open(taken, &TAGS).is_ok());
    }
}
