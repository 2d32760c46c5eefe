//! A client's side of the network: smoltcp over the frames that a guest sends and gets.

use std::collections::VecDeque;

use bytes::Bytes;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr, Ipv4Address};

/// The address and the port of the guest.
const GUEST: (Ipv4Address, u16) = (Ipv4Address::new(10, 77, 0, 2), 6379);

/// Frames in both directions.
#[derive(Default)]
struct Wire {
    from_guest: VecDeque<Bytes>,
    to_guest: VecDeque<Bytes>,
}

/// Clients on one interface.
pub struct Clients {
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    opened: u16,
}

/// One client: what it has yet to send, and what it was answered.
pub struct Client {
    handle: SocketHandle,
    to_send: VecDeque<u8>,
    pub answers: Vec<u8>,
}

impl Clients {
    pub fn new(now: Instant) -> Self {
        let mut wire = Wire::default();
        let mac = EthernetAddress([2, 0, 0, 0, 0, 1]);
        let mut interface = Interface::new(Config::new(mac.into()), &mut wire, now);
        interface.update_ip_addrs(|addresses| {
            let address = IpAddress::v4(10, 77, 0, 1);
            addresses
                .push(IpCidr::new(address, 8))
                .expect("there is room");
        });
        Self {
            wire,
            interface,
            sockets: SocketSet::new(Vec::new()),
            opened: 0,
        }
    }

    pub fn connect(&mut self) -> Client {
        let buffer = || SocketBuffer::new(vec![0; 64 * 1024]);
        let mut socket = Socket::new(buffer(), buffer());
        self.opened += 1;
        let local = 40_000 + self.opened;
        socket
            .connect(self.interface.context(), GUEST, local)
            .expect("the addresses are good");
        Client {
            handle: self.sockets.add(socket),
            to_send: VecDeque::new(),
            answers: Vec::new(),
        }
    }

    /// A frame of the guest.
    pub fn frame(&mut self, frame: Bytes) {
        self.wire.from_guest.push_back(frame);
    }

    /// Lets the clients work; returns the frames for the guest.
    pub fn work(&mut self, now: Instant, clients: &mut [Client]) -> Vec<Bytes> {
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        for client in clients {
            let socket = self.sockets.get_mut::<Socket<'_>>(client.handle);
            let (part, _) = client.to_send.as_slices();
            if socket.can_send() && !part.is_empty() {
                let sent = socket.send_slice(part).expect("it can send");
                client.to_send.drain(..sent);
            }
            while socket.can_recv() {
                let answers = &mut client.answers;
                let taken = socket.recv(|bytes| {
                    answers.extend_from_slice(bytes);
                    (bytes.len(), ())
                });
                taken.expect("it can receive");
            }
        }
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        self.wire.to_guest.drain(..).collect()
    }

    /// Whether the guest has closed its side, or reset the connection.
    pub fn closed_by_guest(&self, client: &Client) -> bool {
        let state = self.sockets.get::<Socket<'_>>(client.handle).state();
        !matches!(state, State::SynSent | State::Established)
    }

    /// Closes a client's side.
    pub fn close(&mut self, client: &Client) {
        self.sockets.get_mut::<Socket<'_>>(client.handle).close();
    }
}

impl Client {
    /// Sends a request as an inline command.
    pub fn ask(&mut self, request: &str) {
        self.to_send.extend(request.as_bytes());
        self.to_send.extend(b"\r\n");
    }

    /// What it was answered so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.answers).into_owned()
    }
}

pub struct Received(Bytes);

pub struct Sending<'a>(&'a mut VecDeque<Bytes>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let mut frame = vec![0; len];
        let result = write(&mut frame);
        self.0.push_back(frame.into());
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let frame = self.from_guest.pop_front()?;
        Some((Received(frame), Sending(&mut self.to_guest)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        Some(Sending(&mut self.to_guest))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}
