//! A guest for tests: smoltcp behind the same virtual Ethernet, with a few services. It is a pure
//! function of the frames and times it is given, so copies of it can replay one another.

use std::net::Ipv4Addr;

use bytes::Bytes;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpAddress, IpCidr};

use crate::gateway::device::FrameDevice;
use crate::gateway::stack::StackConfig;
use crate::protocol::Time;

pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
pub(super) const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// Sends back what it gets; finishes when the client does.
pub(super) const ECHO: u16 = 7;
/// Never reads.
pub(super) const DEAF: u16 = 9;
/// Says "bye" and finishes.
pub(super) const BYE: u16 = 10;
/// Resets at the first byte.
pub(super) const RESET: u16 = 11;
/// Answers every line with the number of lines it has seen on all connections.
pub(super) const COUNT: u16 = 12;
/// Nobody listens here.
pub(super) const NOBODY: u16 = 13;

/// Listening sockets for each service.
const BACKLOG: usize = 64;

pub(super) fn stack_config() -> StackConfig {
    StackConfig::new(ADDRESS, 16)
}

#[derive(Clone, Copy)]
struct Service {
    port: u16,
    handle: SocketHandle,
}

pub(super) struct Guest {
    device: FrameDevice,
    interface: Interface,
    sockets: SocketSet<'static>,
    services: Vec<Service>,
    pub(super) lines: u64,
    pub(super) frames: u64,
}

impl Guest {
    pub(super) fn new() -> Self {
        let mut device = FrameDevice::new();
        device.set_room(usize::MAX);
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(MAC)));
        config.random_seed = 1;
        let mut interface = Interface::new(config, &mut device, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            let address = IpCidr::new(IpAddress::Ipv4(ADDRESS), 16);
            addresses.push(address).expect("one address fits");
        });
        let mut sockets = SocketSet::new(Vec::new());
        let mut services = Vec::new();
        for port in [ECHO, DEAF, BYE, RESET, COUNT] {
            for _ in 0..BACKLOG {
                let buffer = || tcp::SocketBuffer::new(vec![0; 16 * 1024]);
                let mut socket = tcp::Socket::new(buffer(), buffer());
                socket.set_nagle_enabled(false);
                socket.listen(port).expect("a port to listen on");
                services.push(Service {
                    port,
                    handle: sockets.add(socket),
                });
            }
        }
        Self {
            device,
            interface,
            sockets,
            services,
            lines: 0,
            frames: 0,
        }
    }

    /// Takes a frame if there is one, and gives what the guest sends.
    pub(super) fn step(&mut self, frame: Option<Bytes>, now: Time) -> Vec<Bytes> {
        let at = instant(now);
        if let Some(frame) = frame {
            self.frames += 1;
            self.device.offer(frame);
        }
        self.interface.poll(at, &mut self.device, &mut self.sockets);
        for index in 0..self.services.len() {
            self.serve(index);
        }
        self.interface.poll(at, &mut self.device, &mut self.sockets);
        std::iter::from_fn(|| self.device.take()).collect()
    }

    pub(super) fn wake_at(&mut self, now: Time) -> Option<Time> {
        let at = instant(now);
        let due = self.interface.poll_at(at, &self.sockets)?;
        let micros = u64::try_from(due.total_micros()).expect("after the start");
        Some(Time::from_nanos(micros * 1_000))
    }

    /// How many of its sockets are not free for another connection.
    pub(super) fn busy(&self) -> usize {
        self.services
            .iter()
            .map(|service| self.sockets.get::<tcp::Socket>(service.handle))
            .filter(|socket| !matches!(socket.state(), tcp::State::Listen | tcp::State::Closed))
            .count()
    }

    fn serve(&mut self, index: usize) {
        let Service { port, handle } = self.services[index];
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        if !socket.is_open() {
            socket.listen(port).expect("a port to listen on");
            return;
        }
        match port {
            ECHO => {
                while socket.can_recv() && socket.can_send() {
                    let room = socket.send_capacity() - socket.send_queue();
                    let bytes = socket
                        .recv(|bytes| {
                            let taken = bytes.len().min(room);
                            (taken, bytes[..taken].to_vec())
                        })
                        .expect("bytes");
                    socket.send_slice(&bytes).expect("room");
                }
                if !socket.may_recv() && socket.state() == tcp::State::CloseWait {
                    socket.close();
                }
            }
            BYE if socket.state() == tcp::State::Established => {
                socket.send_slice(b"bye").expect("room");
                socket.close();
            }
            RESET if socket.can_recv() => socket.abort(),
            COUNT => {
                while socket.can_recv() {
                    let lines = socket
                        .recv(|bytes| {
                            let lines = bytes.split(|byte| *byte == b'\n').count() - 1;
                            (bytes.len(), lines)
                        })
                        .expect("bytes");
                    for _ in 0..lines {
                        self.lines += 1;
                        let answer = format!("{}\n", self.lines);
                        socket.send_slice(answer.as_bytes()).expect("room");
                    }
                }
                if socket.state() == tcp::State::CloseWait {
                    socket.close();
                }
            }
            _ => {}
        }
    }
}

fn instant(now: Time) -> Instant {
    Instant::from_micros(i64::try_from(now.as_nanos() / 1_000).expect("a test is short"))
}
