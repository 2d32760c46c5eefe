//! What the guest's outputs tell about those it speaks to: which of them lack outputs that are
//! forgotten, and which connections they have. Every copy sees all outputs, so a copy that begins to
//! reign knows what the one before it knew.
//!
//! The guest chooses whom it speaks to, so all of it is bounded, and who was spoken to last is
//! remembered longest.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use bytes::Bytes;
use replay_log::FrameNumber;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, IpProtocol, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
};

use crate::gateway::frames::Mac;

/// How many addresses are remembered, of those that the guest has spoken to.
const MOST_DESTINATIONS: usize = 8_192;

/// How many connections are remembered, of all destinations together.
const MOST_CONNECTIONS: usize = 65_536;

/// How many connections of one destination are reset: more than a gateway usually serves. The
/// oldest of more are mostly such as have ended without the guest's saying so.
const MOST_RESETS: usize = 4_096;

/// Those the guest speaks to, by their Ethernet addresses.
#[derive(Debug, Default)]
pub(super) struct Destinations {
    known: HashMap<Mac, Destination>,
    /// Whom the guest has spoken to last by each address; none that is not in `known`.
    owners: HashMap<Ipv4Addr, Mac>,
    /// The connections of all of them.
    connections: usize,
    /// For destinations that are not remembered any more, no output after this one was forgotten.
    floor: FrameNumber,
}

#[derive(Debug, Default)]
struct Destination {
    /// The last output to it.
    last: FrameNumber,
    /// The last output to it that is not kept any more.
    forgotten: FrameNumber,
    /// Its address by the last output that had one.
    address: Option<Ipv4Addr>,
    connections: HashMap<Ports, Connection>,
}

/// The two ends of a TCP connection: the gateway's port and the guest's.
type Ports = (u16, u16);

/// The guest's end of a TCP connection, as its latest segment shows it.
#[derive(Clone, Copy, Debug)]
struct Connection {
    gateway: Ipv4Addr,
    guest: (Mac, Ipv4Addr),
    /// The byte of the stream that the guest expects next.
    expects: TcpSeqNumber,
    last: FrameNumber,
}

/// What a frame says about a TCP connection.
struct Segment {
    from: (Mac, Ipv4Addr, u16),
    to: (Mac, Ipv4Addr, u16),
    /// The acknowledgement, if it is one.
    expects: Option<TcpSeqNumber>,
    /// Its sender has ended the connection, or its half of it.
    ends: bool,
    resets: bool,
}

impl Segment {
    fn read(frame: &[u8]) -> Option<Self> {
        let frame = EthernetFrame::new_checked(frame).ok()?;
        if frame.ethertype() != EthernetProtocol::Ipv4 {
            return None;
        }
        let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
        if packet.next_header() != IpProtocol::Tcp || packet.frag_offset() != 0 {
            return None;
        }
        let segment = TcpPacket::new_checked(packet.payload()).ok()?;
        let (from, to) = (frame.src_addr(), frame.dst_addr());
        Some(Self {
            from: (Mac(from.0), packet.src_addr(), segment.src_port()),
            to: (Mac(to.0), packet.dst_addr(), segment.dst_port()),
            expects: segment.ack().then(|| segment.ack_number()),
            ends: segment.fin() || segment.rst(),
            resets: segment.rst(),
        })
    }
}

impl Destinations {
    /// The guest has made an output. `protects` says who is remembered in any case.
    pub(super) fn note(
        &mut self,
        number: FrameNumber,
        frame: &Bytes,
        protects: impl Fn(&Mac) -> bool,
    ) {
        let Some(to) = Mac::destination(frame).filter(|to| !to.is_group()) else {
            return;
        };
        let known = self.known.entry(to).or_default();
        known.last = number;
        if let Some(segment) = Segment::read(frame) {
            let ports = (segment.to.2, segment.from.2);
            let address = segment.to.1;
            let address_before = known.address.replace(address);
            if address_before != Some(address) {
                if let Some(before) = address_before
                    && self.owners.get(&before) == Some(&to)
                {
                    self.owners.remove(&before);
                }
                self.owners.insert(address, to);
            }
            let before = known.connections.len();
            if segment.ends {
                // What is left of it ends by the guest's own clock.
                known.connections.remove(&ports);
            } else if let Some(expects) = segment.expects {
                let connection = Connection {
                    gateway: segment.to.1,
                    guest: (segment.from.0, segment.from.1),
                    expects,
                    last: number,
                };
                known.connections.insert(ports, connection);
            }
            self.connections += known.connections.len();
            self.connections -= before;
        }
        if self.connections > MOST_CONNECTIONS {
            self.forget_connections();
        }
        if self.known.len() > MOST_DESTINATIONS {
            self.forget_destinations(protects);
        }
    }

    /// A gateway has sent a frame: a connection that it resets is none any more.
    pub(super) fn hear(&mut self, frame: &[u8]) {
        if let Some(segment) = Segment::read(frame).filter(|segment| segment.resets)
            && let Some(known) = self.known.get_mut(&segment.from.0)
            && let ports = (segment.from.2, segment.to.2)
            && known.connections.remove(&ports).is_some()
        {
            self.connections -= 1;
        }
    }

    /// An output is not kept any more. Copies differ about who was there for a broadcast, so a
    /// forgotten one binds nobody.
    pub(super) fn forget(&mut self, to: Mac, number: FrameNumber) {
        if !to.is_group()
            && let Some(known) = self.known.get_mut(&to)
        {
            known.forgotten = known.forgotten.max(number);
        } else if !to.is_group() {
            self.floor = self.floor.max(number);
        }
    }

    /// Whom the guest has spoken TCP to last by this address.
    pub(super) fn owner(&self, address: Ipv4Addr) -> Option<Mac> {
        self.owners.get(&address).copied()
    }

    /// Whether one that has outputs through `received` lacks one that is forgotten. Of one that is
    /// not remembered it is not known; so it does, unless it `is_new`: the guest had no reason to
    /// speak to it yet.
    pub(super) fn lacks(&self, mac: Mac, received: FrameNumber, is_new: bool) -> bool {
        match self.known.get(&mac) {
            Some(known) => received < known.forgotten,
            None => !is_new && received < self.floor,
        }
    }

    /// Forgets all about a destination.
    pub(super) fn remove(&mut self, mac: Mac) {
        if let Some(known) = self.known.remove(&mac) {
            self.connections -= known.connections.len();
            self.owners.retain(|_, owner| *owner != mac);
        }
    }

    /// Frames that end all connections the guest has with a destination, as if that had reset them.
    pub(super) fn resets(&mut self, mac: Mac) -> Vec<Bytes> {
        let Some(known) = self.known.get_mut(&mac) else {
            return Vec::new();
        };
        let connections = std::mem::take(&mut known.connections);
        self.connections -= connections.len();
        let mut connections: Vec<_> = connections.into_iter().collect();
        connections.sort_unstable_by_key(|(_, connection)| connection.last);
        let surplus = connections.len().saturating_sub(MOST_RESETS);
        connections
            .drain(surplus..)
            .map(|(ports, connection)| connection.reset(mac, ports))
            .collect()
    }

    /// How many destinations and connections are remembered.
    #[cfg(test)]
    pub(super) fn remembered(&self) -> usize {
        self.known.len() + self.owners.len() + self.connections
    }

    /// Forgets the half that was spoken to longest ago.
    fn forget_destinations(&mut self, protects: impl Fn(&Mac) -> bool) {
        let lasts = self.known.values().map(|known| known.last).collect();
        let Some(newest) = median(lasts) else { return };
        let (connections, floor) = (&mut self.connections, &mut self.floor);
        self.known.retain(|mac, known| {
            let stays = known.last >= newest || protects(mac);
            if !stays {
                *connections -= known.connections.len();
                *floor = (*floor).max(known.forgotten);
            }
            stays
        });
        let known = &self.known;
        self.owners.retain(|_, owner| known.contains_key(owner));
    }

    /// Forgets the half of the connections that has been silent longest.
    fn forget_connections(&mut self) {
        let all = self.known.values().flat_map(|k| k.connections.values());
        let Some(newest) = median(all.map(|connection| connection.last).collect()) else {
            return;
        };
        for known in self.known.values_mut() {
            known.connections.retain(|_, c| c.last >= newest);
        }
        self.connections = self.known.values().map(|k| k.connections.len()).sum();
    }
}

fn median(mut numbers: Vec<FrameNumber>) -> Option<FrameNumber> {
    let half = numbers.len() / 2;
    if numbers.is_empty() {
        return None;
    }
    Some(*numbers.select_nth_unstable(half).1)
}

impl Connection {
    /// The segment with which the gateway would reset this connection. The guest takes it because
    /// it has the number that the guest expects.
    fn reset(&self, gateway: Mac, (gateway_port, guest_port): Ports) -> Bytes {
        let segment = TcpRepr {
            src_port: gateway_port,
            dst_port: guest_port,
            control: TcpControl::Rst,
            seq_number: self.expects,
            ack_number: None,
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let (guest_mac, guest) = self.guest;
        let packet = Ipv4Repr {
            src_addr: self.gateway,
            dst_addr: guest,
            next_header: IpProtocol::Tcp,
            payload_len: segment.buffer_len(),
            hop_limit: 64,
        };
        let frame = EthernetRepr {
            src_addr: EthernetAddress(gateway.0),
            dst_addr: EthernetAddress(guest_mac.0),
            ethertype: EthernetProtocol::Ipv4,
        };
        let checksums = ChecksumCapabilities::default();
        let (for_frame, for_packet) = (frame.buffer_len(), packet.buffer_len());
        let mut bytes = vec![0; for_frame + for_packet + segment.buffer_len()];
        frame.emit(&mut EthernetFrame::new_unchecked(&mut bytes));
        let (_, rest) = bytes.split_at_mut(for_frame);
        packet.emit(&mut Ipv4Packet::new_unchecked(&mut *rest), &checksums);
        let (_, rest) = rest.split_at_mut(for_packet);
        segment.emit(
            &mut TcpPacket::new_unchecked(rest),
            &self.gateway.into(),
            &guest.into(),
            &checksums,
        );
        bytes.into()
    }
}
