//! What a gateway and an agent say to each other about frames, and how it is written down.
//!
//! One byte stream carries one *session*: the gateway says [`ToAgent::Hello`], the agent answers
//! [`ToGateway::Welcome`] once it reigns (or [`ToGateway::Refused`]), and from then on frames run
//! both ways, numbered and in order. A session belongs to the term of its welcome; another term
//! needs another session.
//!
//! ```text
//!   gateway                                              agent of the primary
//!      │ Hello{vm, gateway, address, term, received} ─────▶ │
//!      │ ◀─────────────────────── Welcome{term, boot, logged}
//!      │ Frame{number = logged+1 …}          ─────────────▶ │   to the guest, then to the log
//!      │ ◀──────────────────────────────  Committed{through}    may be forgotten by the gateway
//!      │ ◀──────────── Frame{number > received …}           │   outputs, committed before
//!      │ Received{through}                   ─────────────▶ │   may be forgotten by all copies
//! ```
//!
//! Numbers are LEB128 varints. Every length is checked before anything is allocated for it.

use std::net::Ipv4Addr;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use replay_log::{FrameNumber, GatewayIncarnation, Term};
use thiserror::Error;

use crate::agent::certs::Name;
use crate::protocol::VmName;
use crate::protocol::name::MAX_NAME;

/// The version of what is written here. It is the first byte after the kind of a `Hello`.
pub const FRAMES_VERSION: u8 = 2;

/// The longest frame that is accepted, in bytes: an Ethernet frame with tags to spare.
pub const MAX_FRAME: usize = 2_048;

/// Which network device of which VM a frame is for, on a network between VMs. A gateway speaks to
/// one VM and leaves both at 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct NetworkPort {
    /// The VM's number on its network.
    pub vm: u32,
    /// The index of its network device.
    pub index: u32,
}

/// Which start of the machine this is: the `boot` of the log's header. Numbers mean nothing across
/// boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Boot(pub [u8; 16]);

/// The incarnation of the gateway of this name in its run number `run`. Its upper half says whose
/// it is, so that every agent can check that, after a change of primary too.
pub fn incarnation_of(name: &Name, run: u32) -> GatewayIncarnation {
    GatewayIncarnation(u64::from(mark_of(name)) << 32 | u64::from(run))
}

/// Whether an incarnation is one of the gateway of this name.
pub fn is_incarnation_of(incarnation: GatewayIncarnation, name: &Name) -> bool {
    mark(incarnation) == mark_of(name)
}

/// What all incarnations of one gateway have in common.
pub const fn mark(incarnation: GatewayIncarnation) -> u32 {
    (incarnation.0 >> 32) as u32
}

fn mark_of(name: &Name) -> u32 {
    let digest = blake3::hash(name.as_str().as_bytes());
    let [a, b, c, d, ..] = *digest.as_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The guest-side address of a gateway: locally administered, unicast, and derived from the
    /// incarnation alone, so that every copy knows whom an output is for.
    pub fn of(gateway: GatewayIncarnation) -> Self {
        // The finalizer of SplitMix64: every bit of the incarnation reaches every bit kept.
        let mut mixed = gateway.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let mut address = [0; 6];
        address.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..6]);
        // Locally administered, and one station.
        address[0] = 0x02;
        Self(address)
    }

    /// To whom a frame goes; `None` when it is no frame.
    pub fn destination(frame: &[u8]) -> Option<Self> {
        Some(Self(frame.get(..6)?.try_into().ok()?))
    }

    /// From whom a frame comes; `None` when it is no frame.
    pub fn source(frame: &[u8]) -> Option<Self> {
        Some(Self(frame.get(6..12)?.try_into().ok()?))
    }

    /// Whether it stands for several stations (multicast, broadcast).
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }
}

/// The name of one session, unique within a gateway or an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// How a gateway introduces itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The VM it serves.
    pub vm: VmName,
    /// Which run of which gateway it is.
    pub gateway: GatewayIncarnation,
    /// Its address in the guest's network, its own for as long as this incarnation lives.
    pub address: Ipv4Addr,
    /// The term that the record's keeper told it.
    pub term: Term,
    /// The last output it has.
    pub received: FrameNumber,
}

/// What a gateway says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// The first message of a session.
    Hello(Hello),
    /// A frame for the guest.
    Frame {
        /// For which device.
        port: NetworkPort,
        /// Its number; each is one more than the one before.
        number: FrameNumber,
        /// The frame.
        bytes: Bytes,
    },
    /// Every output up to here that was for this gateway has been passed on.
    Received {
        /// The last one.
        through: FrameNumber,
    },
}

/// What an agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToGateway {
    /// The agent's VMM is the primary of this term.
    Welcome {
        /// Its term.
        term: Term,
        /// Which start of the machine it runs.
        boot: Boot,
        /// The last frame of this gateway that the machine has or will get: send what follows it.
        logged: FrameNumber,
    },
    /// No session: the stream ends after this.
    Refused {
        /// The highest term the agent knows of.
        term: Term,
        /// Why.
        why: Refusal,
    },
    /// An output of the guest. Numbers rise, with gaps.
    Frame {
        /// From which device.
        port: NetworkPort,
        /// Its number among all outputs of the machine.
        number: FrameNumber,
        /// The frame.
        bytes: Bytes,
    },
    /// The arrival of every frame up to here is in a committed log.
    Committed {
        /// The last one.
        through: FrameNumber,
    },
}

/// Why an agent takes no frames from a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The agent runs no VM of that name.
    UnknownVm,
    /// The agent knows of a later term than the gateway does, or its reign has ended.
    OtherTerm,
    /// The gateway was away for so long that outputs it needs are forgotten.
    TooLate,
    /// There are as many gateways as the agent takes.
    TooMany,
    /// The guest knows another gateway by its address.
    AddressTaken,
}

impl Refusal {
    const fn code(self) -> u8 {
        match self {
            Self::UnknownVm => 1,
            Self::OtherTerm => 2,
            Self::TooLate => 3,
            Self::TooMany => 4,
            Self::AddressTaken => 5,
        }
    }

    const fn from_code(code: u8) -> Option<Self> {
        match code {
            1 => Some(Self::UnknownVm),
            2 => Some(Self::OtherTerm),
            3 => Some(Self::TooLate),
            4 => Some(Self::TooMany),
            5 => Some(Self::AddressTaken),
            _ => None,
        }
    }

    /// The reason in words.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::UnknownVm => "it runs no VM of that name",
            Self::OtherTerm => "it does not reign in that term",
            Self::TooLate => "the outputs this gateway lacks are forgotten",
            Self::TooMany => "it serves as many gateways as it can",
            Self::AddressTaken => "the guest knows another gateway by its address",
        }
    }
}

/// What a peer wrote makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// The kind of message is unknown.
    #[error("a message of unknown kind {kind}: the peer is of another version")]
    Kind {
        /// What was read.
        kind: u8,
    },
    /// The other side speaks another version.
    #[error("the peer speaks version {theirs} of the frame protocol, this side {FRAMES_VERSION}")]
    Version {
        /// What was read.
        theirs: u8,
    },
    /// Longer than allowed.
    #[error("a {what} of {length} bytes: at most {most} are allowed")]
    Length {
        /// A length of what.
        what: &'static str,
        /// What was read.
        length: u64,
        /// The bound.
        most: usize,
    },
    /// A number does not fit its type.
    #[error("a number is too large for its field")]
    Number,
    /// A name is none.
    #[error("the name of the VM is not a name")]
    Name,
}

/// A message that can be written to and read from a byte stream.
pub trait Message: Sized {
    /// Appends the message.
    fn encode(&self, out: &mut BytesMut);

    /// Takes the first message off the front; `None` when there is not a whole one yet.
    fn decode(from: &mut BytesMut) -> Result<Option<Self>, WireError>;
}

const HELLO: u8 = 1;
const FRAME: u8 = 2;
const RECEIVED: u8 = 3;
const WELCOME: u8 = 4;
const REFUSED: u8 = 5;
const COMMITTED: u8 = 6;

impl Message for ToAgent {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Hello(hello) => {
                out.put_slice(&[HELLO, FRAMES_VERSION]);
                put_varint(out, hello.vm.as_str().len() as u64);
                out.put_slice(hello.vm.as_str().as_bytes());
                put_varint(out, hello.gateway.0);
                out.put_slice(&hello.address.octets());
                put_varint(out, hello.term.0);
                put_varint(out, hello.received.0);
            }
            Self::Frame {
                port,
                number,
                bytes,
            } => put_frame(out, *port, *number, bytes),
            Self::Received { through } => put_number(out, RECEIVED, *through),
        }
    }

    fn decode(from: &mut BytesMut) -> Result<Option<Self>, WireError> {
        let mut cursor = Cursor::new(from);
        let Some(kind) = cursor.byte() else {
            return Ok(None);
        };
        match kind {
            HELLO => {
                let Some(theirs) = cursor.byte() else {
                    return Ok(None);
                };
                if theirs != FRAMES_VERSION {
                    return Err(WireError::Version { theirs });
                }
                let Some(length) = cursor.length("VM name", MAX_NAME)? else {
                    return Ok(None);
                };
                let Some(name) = cursor.take(length) else {
                    return Ok(None);
                };
                let vm = std::str::from_utf8(name)
                    .ok()
                    .and_then(|name| VmName::new(name).ok())
                    .ok_or(WireError::Name)?;
                let (Some(gateway), Some(&[a, b, c, d])) = (cursor.varint()?, cursor.take(4))
                else {
                    return Ok(None);
                };
                let (Some(term), Some(received)) = (cursor.varint()?, cursor.varint()?) else {
                    return Ok(None);
                };
                let used = cursor.used();
                from.advance(used);
                Ok(Some(Self::Hello(Hello {
                    vm,
                    gateway: GatewayIncarnation(gateway),
                    address: Ipv4Addr::new(a, b, c, d),
                    term: Term(term),
                    received: FrameNumber(received),
                })))
            }
            FRAME => Ok(take_frame(from)?.map(|(port, number, bytes)| Self::Frame {
                port,
                number,
                bytes,
            })),
            RECEIVED => Ok(take_number(from)?.map(|through| Self::Received { through })),
            kind => Err(WireError::Kind { kind }),
        }
    }
}

impl Message for ToGateway {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            Self::Welcome { term, boot, logged } => {
                out.put_u8(WELCOME);
                out.put_slice(&boot.0);
                put_varint(out, term.0);
                put_varint(out, logged.0);
            }
            Self::Refused { term, why } => {
                out.put_slice(&[REFUSED, why.code()]);
                put_varint(out, term.0);
            }
            Self::Frame {
                port,
                number,
                bytes,
            } => put_frame(out, *port, *number, bytes),
            Self::Committed { through } => put_number(out, COMMITTED, *through),
        }
    }

    fn decode(from: &mut BytesMut) -> Result<Option<Self>, WireError> {
        let mut cursor = Cursor::new(from);
        let Some(kind) = cursor.byte() else {
            return Ok(None);
        };
        match kind {
            WELCOME => {
                let Some(boot) = cursor.take(16).and_then(|boot| boot.try_into().ok()) else {
                    return Ok(None);
                };
                let (Some(term), Some(logged)) = (cursor.varint()?, cursor.varint()?) else {
                    return Ok(None);
                };
                let used = cursor.used();
                from.advance(used);
                Ok(Some(Self::Welcome {
                    term: Term(term),
                    boot: Boot(boot),
                    logged: FrameNumber(logged),
                }))
            }
            REFUSED => {
                let (Some(code), Some(term)) = (cursor.byte(), cursor.varint()?) else {
                    return Ok(None);
                };
                let why = Refusal::from_code(code).ok_or(WireError::Kind { kind: code })?;
                let used = cursor.used();
                from.advance(used);
                Ok(Some(Self::Refused {
                    term: Term(term),
                    why,
                }))
            }
            FRAME => Ok(take_frame(from)?.map(|(port, number, bytes)| Self::Frame {
                port,
                number,
                bytes,
            })),
            COMMITTED => Ok(take_number(from)?.map(|through| Self::Committed { through })),
            kind => Err(WireError::Kind { kind }),
        }
    }
}

/// Appends a frame of either direction; both are written alike.
pub(crate) fn put_frame(out: &mut BytesMut, port: NetworkPort, number: FrameNumber, bytes: &Bytes) {
    out.reserve(bytes.len() + 32);
    out.put_u8(FRAME);
    put_varint(out, u64::from(port.vm));
    put_varint(out, u64::from(port.index));
    put_varint(out, number.0);
    put_varint(out, bytes.len() as u64);
    out.put_slice(bytes);
}

fn take_frame(from: &mut BytesMut) -> Result<Option<(NetworkPort, FrameNumber, Bytes)>, WireError> {
    let mut cursor = Cursor::new(from);
    cursor.byte();
    let (Some(vm), Some(index), Some(number)) =
        (cursor.varint()?, cursor.varint()?, cursor.varint()?)
    else {
        return Ok(None);
    };
    let Some(length) = cursor.length("frame", MAX_FRAME)? else {
        return Ok(None);
    };
    let port = NetworkPort {
        vm: u32::try_from(vm).map_err(|_| WireError::Number)?,
        index: u32::try_from(index).map_err(|_| WireError::Number)?,
    };
    let used = cursor.used();
    if from.len() - used < length {
        return Ok(None);
    }
    from.advance(used);
    Ok(Some((
        port,
        FrameNumber(number),
        from.split_to(length).freeze(),
    )))
}

fn put_number(out: &mut BytesMut, kind: u8, number: FrameNumber) {
    out.put_u8(kind);
    put_varint(out, number.0);
}

fn take_number(from: &mut BytesMut) -> Result<Option<FrameNumber>, WireError> {
    let mut cursor = Cursor::new(from);
    cursor.byte();
    let Some(number) = cursor.varint()? else {
        return Ok(None);
    };
    let used = cursor.used();
    from.advance(used);
    Ok(Some(FrameNumber(number)))
}

fn put_varint(out: &mut BytesMut, mut value: u64) {
    while value >= 0x80 {
        out.put_u8(value as u8 | 0x80);
        value >>= 7;
    }
    out.put_u8(value as u8);
}

/// Reads a message that may not be there wholly yet.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    const fn used(&self) -> usize {
        self.at
    }

    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..)?.get(..length)?;
        self.at += length;
        Some(taken)
    }

    fn varint(&mut self) -> Result<Option<u64>, WireError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let Some(byte) = self.byte() else {
                return Ok(None);
            };
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && byte > 1 {
                return Err(WireError::Number);
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(Some(value));
            }
        }
        Err(WireError::Number)
    }

    fn length(&mut self, what: &'static str, most: usize) -> Result<Option<usize>, WireError> {
        let Some(length) = self.varint()? else {
            return Ok(None);
        };
        match usize::try_from(length) {
            Ok(fits) if fits <= most => Ok(Some(fits)),
            _ => Err(WireError::Length { what, length, most }),
        }
    }
}

#[cfg(test)]
mod tests;
