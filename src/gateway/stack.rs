//! The guest-side TCP of a gateway: many connections to one guest over one virtual Ethernet.
//!
//! Pure: frames, bytes and the time come in as arguments, nothing here touches a socket of the
//! host. Each connection has a socket set of its own, so that a frame costs the same with one
//! connection and with a thousand: the set is chosen by the frame's destination port.
//!
//! ```text
//!  connect ──▶ Connecting ──SYN/ACK──▶ Open ──both FIN──▶ Closed
//!                  │                    │
//!                  └──RST, time-out─────┴──RST──▶ Reset      (either is followed by `remove`)
//! ```

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::net::Ipv4Addr;

use bytes::Bytes;
use replay_log::GatewayIncarnation;
use smoltcp::iface::{Config, Interface, PollResult, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpAddress, IpCidr,
    IpProtocol, Ipv4Packet, TcpPacket,
};
use thiserror::Error;

use super::device::FrameDevice;
use super::frames::Mac;
use crate::protocol::{Span, Time};

/// Where the guest is and how it is spoken to.
#[derive(Clone, Debug)]
pub struct StackConfig {
    /// The guest's address.
    pub guest: Ipv4Addr,
    /// The length of the subnet's prefix, in bits; 8 to 24 leave room for the gateways.
    pub prefix: u8,
    /// The bytes buffered each way for each connection.
    pub buffer: usize,
    /// How long an acknowledgement may wait for data to travel with. `None`: not at all.
    pub ack_delay: Option<Span>,
    /// How long the guest may take to answer a connection's first frame.
    pub connect_timeout: Span,
}

impl StackConfig {
    /// The usual settings for a guest at this address.
    pub fn new(guest: Ipv4Addr, prefix: u8) -> Self {
        Self {
            guest,
            prefix,
            buffer: 32 * 1024,
            ack_delay: Some(Span::from_millis(10)),
            connect_timeout: Span::from_millis(30_000),
        }
    }
}

/// The guest-side addresses of one incarnation of a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestSideAddress {
    /// Locally administered, unicast.
    pub mac: EthernetAddress,
    /// Inside the guest's subnet; neither the guest's, nor the subnet's first or last address.
    pub ip: Ipv4Addr,
    /// Where local ports start.
    pub first_port: u16,
}

/// The lowest local port of a connection to the guest.
const LOWEST_PORT: u16 = 1_024;

impl GuestSideAddress {
    /// Derives the addresses from the incarnation: equal for equal incarnations, and seldom equal for
    /// different ones. An agent that knows of another gateway with this address refuses it.
    pub fn derive(
        incarnation: GatewayIncarnation,
        config: &StackConfig,
    ) -> Result<Self, StackError> {
        if !(8..=24).contains(&config.prefix) {
            return Err(StackError::Prefix {
                prefix: config.prefix,
            });
        }
        let digest = blake3::hash(&incarnation.0.to_le_bytes());
        let (for_host, rest) = digest.as_bytes().split_at(4);
        let number = |bytes: &[u8]| {
            let fold = |number, byte: &u8| number << 8 | u32::from(*byte);
            bytes.iter().fold(0u32, fold)
        };
        let host_bits = 32 - u32::from(config.prefix);
        let base = u32::from(config.guest) >> host_bits << host_bits;
        // 254 or more addresses are left: neither all zeroes, nor all ones, nor the guest's.
        let hosts = (1u32 << host_bits) - 2;
        let mut host = number(for_host) % hosts + 1;
        if base + host == u32::from(config.guest) {
            host = host % hosts + 1;
        }
        let ports = u16::MAX - LOWEST_PORT;
        Ok(Self {
            mac: EthernetAddress(Mac::of(incarnation).0),
            ip: Ipv4Addr::from(base + host),
            first_port: LOWEST_PORT + (number(&rest[..4]) % u32::from(ports)) as u16,
        })
    }
}

/// One connection to the guest, named by its local port. Names come back after some 64,000 others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(u16);

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The guest has not answered yet.
    Connecting,
    /// Bytes flow, or can still flow one way.
    Open,
    /// Both sides have finished and everything is delivered.
    Closed,
    /// The guest refused, reset, or did not answer in time.
    Reset,
}

#[allow(
    clippy::struct_excessive_bools,
    reason = "four independent facts, two of them for lists of names"
)]
struct Connection {
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    guest_port: u16,
    opened: Time,
    progress: Progress,
    /// The guest's FIN has arrived.
    guest_finished: bool,
    /// The client has nothing more to say.
    client_finished: bool,
    /// Listed in `touched`.
    touched: bool,
    /// Listed in `to_poll`.
    to_poll: bool,
    /// The earliest entry in the heap of timers.
    timer: Option<Time>,
}

impl Connection {
    fn socket(&self) -> &tcp::Socket<'static> {
        self.sockets.get(self.handle)
    }

    fn socket_mut(&mut self) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    /// Reads the state that smoltcp is in.
    fn update(&mut self) {
        use tcp::State;
        let state = self.socket().state();
        self.guest_finished |= matches!(
            state,
            State::CloseWait | State::LastAck | State::Closing | State::TimeWait
        );
        self.progress = match (self.progress, state) {
            (ended @ (Progress::Closed | Progress::Reset), _) => ended,
            (progress, State::SynSent | State::SynReceived) => progress,
            // Frames do not get lost on the way, so nobody needs the quiet time.
            (_, State::TimeWait) => Progress::Closed,
            (Progress::Open, State::Closed) if self.guest_finished && self.client_finished => {
                Progress::Closed
            }
            (_, State::Closed | State::Listen) => Progress::Reset,
            _ => Progress::Open,
        };
    }
}

/// Why a stack or a connection cannot be made.
#[derive(Debug, Error)]
pub enum StackError {
    /// The guest's subnet leaves no room, or is absurdly large.
    #[error("the guest's network prefix is {prefix} bits: give one between 8 and 24")]
    Prefix {
        /// What was given.
        prefix: u8,
    },
    /// Every local port is taken.
    #[error("every local port of the gateway is in use: close some connections first")]
    NoPort,
    /// smoltcp refused.
    #[error("no connection to port {port} of the guest can be opened")]
    Connect {
        /// The guest's port.
        port: u16,
        /// What smoltcp said.
        #[source]
        source: tcp::ConnectError,
    },
}

/// The stack. Every method that needs the time takes it from one clock.
pub struct Stack {
    config: StackConfig,
    address: GuestSideAddress,
    device: FrameDevice,
    interface: Interface,
    /// What the frames meet that belong to no connection (ARP, stray segments).
    nobody: SocketSet<'static>,
    connections: HashMap<ConnectionId, Connection>,
    next_port: u16,
    touched: Vec<ConnectionId>,
    to_poll: Vec<ConnectionId>,
    timers: BinaryHeap<Reverse<(Time, ConnectionId)>>,
}

impl Stack {
    /// A stack with no connections. Nothing is sent before [`Stack::set_room`].
    pub fn new(
        incarnation: GatewayIncarnation,
        config: StackConfig,
        now: Time,
    ) -> Result<Self, StackError> {
        let address = GuestSideAddress::derive(incarnation, &config)?;
        let mut device = FrameDevice::new();
        let mut settings = Config::new(HardwareAddress::Ethernet(address.mac));
        settings.random_seed = incarnation.0;
        let mut interface = Interface::new(settings, &mut device, at(now));
        interface.update_ip_addrs(|addresses| {
            // The list is empty and holds at least one.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(address.ip), config.prefix));
        });
        Ok(Self {
            config,
            address,
            device,
            interface,
            nobody: SocketSet::new(Vec::new()),
            connections: HashMap::new(),
            next_port: address.first_port,
            touched: Vec::new(),
            to_poll: Vec::new(),
            timers: BinaryHeap::new(),
        })
    }

    /// The addresses this stack has towards the guest.
    pub const fn address(&self) -> GuestSideAddress {
        self.address
    }

    /// How many connections there are.
    pub fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there is no connection.
    pub fn is_empty(&self) -> bool {
        self.connections.is_empty()
    }

    /// Opens a connection to a TCP port of the guest.
    pub fn connect(&mut self, port: u16, now: Time) -> Result<ConnectionId, StackError> {
        let id = self.free_port()?;
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; self.config.buffer]),
            tcp::SocketBuffer::new(vec![0; self.config.buffer]),
        );
        // What a client writes at once arrives here at once, and clients that wait for an answer
        // gain nothing from waiting for an acknowledgement.
        socket.set_nagle_enabled(false);
        // No keep-alive and no time-out: no frame to or from the guest gets lost, so a guest that is
        // silent has nothing to say or stands still, and what it has lost, its reboot says. A guest
        // that stands still for hours goes on with the connections it had.
        let ack_delay = self.config.ack_delay.map(|span| span.as_nanos() / 1_000);
        socket.set_ack_delay(ack_delay.map(smoltcp::time::Duration::from_micros));
        socket
            .connect(
                self.interface.context(),
                (IpAddress::Ipv4(self.config.guest), port),
                id.0,
            )
            .map_err(|source| StackError::Connect { port, source })?;
        let mut sockets = SocketSet::new(Vec::with_capacity(1));
        let handle = sockets.add(socket);
        self.connections.insert(
            id,
            Connection {
                sockets,
                handle,
                guest_port: port,
                opened: now,
                progress: Progress::Connecting,
                guest_finished: false,
                client_finished: false,
                touched: false,
                to_poll: false,
                timer: None,
            },
        );
        self.schedule(id);
        self.set_timer(id, now.plus(self.config.connect_timeout));
        Ok(id)
    }

    fn free_port(&mut self) -> Result<ConnectionId, StackError> {
        for _ in LOWEST_PORT..=u16::MAX {
            let id = ConnectionId(self.next_port);
            self.next_port = self.next_port.checked_add(1).unwrap_or(LOWEST_PORT);
            if !self.connections.contains_key(&id) {
                return Ok(id);
            }
        }
        Err(StackError::NoPort)
    }

    /// Takes a frame from the guest. Frames that make no sense are dropped.
    pub fn handle_frame(&mut self, frame: Bytes, now: Time) {
        let (is_arp, id) = destination(&frame);
        self.device.offer(frame);
        let connection = id.and_then(|id| self.connections.get_mut(&id));
        let sockets = match connection {
            Some(connection) => &mut connection.sockets,
            None => &mut self.nobody,
        };
        self.interface
            .poll_ingress_single(at(now), &mut self.device, sockets);
        if is_arp {
            // The guest's address may have become known: whoever waited for it can go on.
            let all: Vec<_> = self.connections.keys().copied().collect();
            for id in all {
                self.schedule(id);
            }
        } else if let Some(id) = id {
            self.after_ingress(id);
        }
    }

    fn after_ingress(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        connection.update();
        if !connection.touched {
            connection.touched = true;
            self.touched.push(id);
        }
        self.schedule(id);
    }

    /// Marks a connection for the next [`Stack::egress`].
    fn schedule(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id)
            && !connection.to_poll
        {
            connection.to_poll = true;
            self.to_poll.push(id);
        }
    }

    /// How many frames may wait to be taken by [`Stack::poll_transmit`] before connections have to
    /// keep their bytes. They go on at the first [`Stack::egress`] after there is room again.
    pub fn set_room(&mut self, frames: usize) {
        self.device.set_room(frames);
    }

    /// Lets every connection that has something to send make its frames.
    pub fn egress(&mut self, now: Time) {
        let mut waiting = Vec::new();
        for id in std::mem::take(&mut self.to_poll) {
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            connection.to_poll = false;
            if self.device.is_full() {
                waiting.push(id);
                continue;
            }
            // One call makes one segment.
            while self
                .interface
                .poll_egress(at(now), &mut self.device, &mut connection.sockets)
                == PollResult::SocketStateChanged
            {}
            let due = self.interface.poll_at(at(now), &connection.sockets);
            let before = connection.progress;
            connection.update();
            if connection.progress != before && !connection.touched {
                connection.touched = true;
                self.touched.push(id);
            }
            if let Some(due) = due {
                if self.device.is_full() {
                    waiting.push(id);
                } else {
                    let micros = u64::try_from(due.total_micros()).unwrap_or(0);
                    // Never now: what could be sent now has been.
                    let soonest = now.plus(Span::from_millis(1));
                    let due = Time::from_nanos(micros.saturating_mul(1_000));
                    self.set_timer(id, due.max(soonest));
                }
            }
        }
        for id in waiting {
            self.schedule(id);
        }
    }

    /// Makes sure that the connection is looked at by then. An earlier look costs little; so a
    /// timer that moves to a later time, as they mostly do, costs nothing before it is due.
    fn set_timer(&mut self, id: ConnectionId, due: Time) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.timer.is_none_or(|timer| due < timer)
        {
            connection.timer = Some(due);
            self.timers.push(Reverse((due, id)));
        }
    }

    /// When [`Stack::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.peek().map(|Reverse((due, _))| *due)
    }

    /// Does what has become due; [`Stack::egress`] then sends it.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(&Reverse((due, id))) = self.timers.peek() {
            if due > now {
                break;
            }
            self.timers.pop();
            let Some(connection) = self.connections.get_mut(&id) else {
                continue;
            };
            if connection.timer != Some(due) {
                continue;
            }
            connection.timer = None;
            let give_up = connection.opened.plus(self.config.connect_timeout);
            if connection.progress == Progress::Connecting {
                if now >= give_up {
                    connection.progress = Progress::Reset;
                    connection.socket_mut().abort();
                    connection.touched = true;
                    self.touched.push(id);
                } else {
                    self.set_timer(id, give_up);
                }
            }
            self.schedule(id);
        }
    }

    /// The next frame for the guest.
    pub fn poll_transmit(&mut self) -> Option<Bytes> {
        self.device.take()
    }

    /// The next connection that something has happened to.
    pub fn poll_touched(&mut self) -> Option<ConnectionId> {
        while let Some(id) = self.touched.pop() {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.touched = false;
                return Some(id);
            }
        }
        None
    }

    /// Where a connection stands; `None` when there is none of that name.
    pub fn progress(&self, id: ConnectionId) -> Option<Progress> {
        Some(self.connections.get(&id)?.progress)
    }

    /// The guest's port of a connection that the guest has not answered yet.
    pub fn connecting_to(&self, id: ConnectionId) -> Option<u16> {
        let connection = self.connections.get(&id)?;
        (connection.progress == Progress::Connecting).then_some(connection.guest_port)
    }

    /// Hands the bytes that have arrived to `take`, which says how many of them it took, until it
    /// takes none or nothing is left.
    pub fn receive(&mut self, id: ConnectionId, mut take: impl FnMut(&[u8]) -> usize) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let socket = connection.socket_mut();
        let mut took_any = false;
        while socket.can_recv() {
            let taken = socket.recv(|bytes| {
                let taken = take(bytes).min(bytes.len());
                (taken, taken)
            });
            if !taken.is_ok_and(|taken| taken > 0) {
                break;
            }
            took_any = true;
        }
        if took_any {
            self.schedule(id);
        }
    }

    /// Whether the guest will send nothing more and everything it sent has been taken.
    pub fn is_drained(&self, id: ConnectionId) -> bool {
        self.connections.get(&id).is_some_and(|connection| {
            connection.guest_finished && connection.socket().recv_queue() == 0
        })
    }

    /// How many bytes [`Stack::send`] would take.
    pub fn send_room(&self, id: ConnectionId) -> usize {
        self.connections.get(&id).map_or(0, |connection| {
            let socket = connection.socket();
            if socket.may_send() {
                socket.send_capacity() - socket.send_queue()
            } else {
                0
            }
        })
    }

    /// Lets `fill` write into the free part of the send buffer and say how much it wrote, until it
    /// writes nothing or the buffer is full.
    pub fn send(&mut self, id: ConnectionId, mut fill: impl FnMut(&mut [u8]) -> usize) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        let socket = connection.socket_mut();
        let mut filled_any = false;
        while socket.can_send() {
            let filled = socket.send(|room| {
                let filled = fill(room).min(room.len());
                (filled, filled)
            });
            if !filled.is_ok_and(|filled| filled > 0) {
                break;
            }
            filled_any = true;
        }
        if filled_any {
            self.schedule(id);
        }
    }

    /// The client will send nothing more: the guest gets a FIN after what is buffered. Only for a
    /// connection that is open: one that is not takes no bytes either, so nobody knows yet.
    pub fn finish(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.client_finished = true;
            connection.socket_mut().close();
            self.after_ingress(id);
        }
    }

    /// Resets a connection at once. The guest hears of it, and the connection is forgotten.
    pub fn abort(&mut self, id: ConnectionId, now: Time) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.socket_mut().abort();
        }
        self.remove(id, now);
    }

    /// Forgets a connection that has ended. Its last segment goes out first: without our
    /// acknowledgement of its FIN the guest would keep its end for a second.
    pub fn remove(&mut self, id: ConnectionId, now: Time) {
        let Some(mut connection) = self.connections.remove(&id) else {
            return;
        };
        // That acknowledgement may wait for data that will not come: it is late already. And one
        // frame goes out whatever room there is: a connection ends once.
        let late = now.plus(self.config.ack_delay.unwrap_or(Span::ZERO));
        let room = self.device.open();
        let sockets = &mut connection.sockets;
        let _ = self
            .interface
            .poll_egress(at(late), &mut self.device, sockets);
        self.device.set_room(room);
    }
}

fn at(now: Time) -> Instant {
    Instant::from_micros(i64::try_from(now.as_nanos() / 1_000).unwrap_or(i64::MAX))
}

/// Whether a frame is ARP, and which connection it is for if it is TCP.
fn destination(frame: &[u8]) -> (bool, Option<ConnectionId>) {
    let Ok(frame) = EthernetFrame::new_checked(frame) else {
        return (false, None);
    };
    match frame.ethertype() {
        EthernetProtocol::Arp => (true, None),
        EthernetProtocol::Ipv4 => {
            let id = Ipv4Packet::new_checked(frame.payload())
                .ok()
                .filter(|packet| packet.next_header() == IpProtocol::Tcp)
                .and_then(|packet| {
                    let segment = TcpPacket::new_checked(packet.payload()).ok()?;
                    Some(ConnectionId(segment.dst_port()))
                });
            (false, id)
        }
        _ => (false, None),
    }
}
