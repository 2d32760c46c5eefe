//! The network: smoltcp over the network device, and a fixed number of sockets that listen on the
//! service's port until a client takes them.
//!
//! ```text
//!   Listening ──SYN, ACK──▶ Open (a Connection) ──both sides closed──▶ Listening
//!                            │ peer closes: what it sent is executed and answered first
//!                            │ QUIT or protocol error: answered, then closed
//! ```

use alloc::vec::Vec;

use ledger::command_line;
use ledger::connection::Connection;
use ledger::limits::OUTPUT_BUDGET;
use ledger::service::Service;
use ledger::slot::{Slot, keep_listening};
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use super::virtio::net::Net;

/// The port of the Redis protocol.
const PORT: u16 = 6379;
/// How many clients there can be at a time.
const SOCKETS: usize = 128;
/// Bytes of a socket's receive and send buffer.
const BUFFER: usize = 16 * 1024;
/// Acknowledgements wait this long for an answer to travel with: longer than a disk flush.
const ACK_DELAY: Duration = Duration::from_millis(40);
/// A peer that is silent is asked whether it lives this often.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A peer is given up after that long. Output may wait for its commit, or this machine stand still,
/// for much longer than a peer takes to answer; and a gateway that is gone has its connections reset
/// by the host. So this is for what nobody has thought of.
const GIVE_UP: Duration = Duration::from_secs(2 * 60 * 60);

/// The buffers of all sockets. They lie in zeroed memory that nobody has touched: touching 4
/// MiB would be most of the time it takes to boot.
pub type Buffers = [u8; SOCKETS * 2 * BUFFER];

/// A connection that we have closed is reset when its client has not closed it after that long.
const LINGER: Duration = Duration::from_secs(10);
/// When both sides are closed, a socket waits so long for stray segments, unless it is needed before
/// that ([`keep_listening`]): the next client comes from another port, so it is enough that the last
/// acknowledgement has left.
const TIME_WAIT: Duration = Duration::from_secs(1);

/// The network.
pub struct Network {
    device: Net,
    interface: Interface,
    sockets: SocketSet<'static>,
    slots: Vec<Slot>,
    /// So many sockets listen, or more.
    listening: usize,
}

impl Network {
    /// All sockets listen, with `buffers` as theirs. `seed` is real entropy.
    pub fn new(
        mut device: Net,
        config: command_line::Network,
        buffers: &'static mut Buffers,
        seed: u64,
        now: Instant,
    ) -> Self {
        let mut hardware = Config::new(EthernetAddress(device.mac()).into());
        hardware.random_seed = seed;
        let mut interface = Interface::new(hardware, &mut device, now);
        let [a, b, c, d] = config.address;
        interface.update_ip_addrs(|addresses| {
            let address = Ipv4Address::new(a, b, c, d);
            // There is room for one address.
            let _ = addresses.push(IpCidr::new(address.into(), config.prefix));
        });
        if let Some([a, b, c, d]) = config.gateway {
            let gateway = Ipv4Address::new(a, b, c, d);
            // There is room for one route.
            let _ = interface.routes_mut().add_default_ipv4_route(gateway);
        }
        let mut sockets = SocketSet::new(Vec::with_capacity(SOCKETS));
        let slots = buffers
            .as_chunks_mut::<BUFFER>()
            .0
            .chunks_exact_mut(2)
            .filter_map(|pair| match pair {
                [receive, send] => Some(socket(&mut receive[..], &mut send[..])),
                _ => None,
            })
            .map(|socket| Slot {
                handle: sockets.add(socket),
                connection: None,
                closed_since: None,
            })
            .collect();
        Self {
            device,
            interface,
            sockets,
            slots,
            listening: SOCKETS,
        }
    }

    /// Takes the frames that have arrived. Says whether there were any.
    pub fn receive(&mut self, now: Instant) -> bool {
        self.device.reclaim();
        self.take_back(now);
        self.interface.poll_maintenance(now);
        let mut any = false;
        loop {
            if self.listening == 0 {
                self.listening = keep_listening(&mut self.slots, &mut self.sockets, PORT);
            }
            let taken =
                self.interface
                    .poll_ingress_single(now, &mut self.device, &mut self.sockets);
            if taken == PollIngressSingleResult::None {
                return any;
            }
            any = true;
            // A frame brings one client at most.
            self.listening = self.listening.saturating_sub(1);
        }
    }

    /// Takes sockets back that we have closed some time ago.
    fn take_back(&mut self, now: Instant) {
        for slot in &mut self.slots {
            let Some(since) = slot.closed_since else {
                continue;
            };
            let socket = self.sockets.get_mut::<Socket<'_>>(slot.handle);
            let over = socket.state() == State::TimeWait;
            if since + if over { TIME_WAIT } else { LINGER } <= now {
                socket.abort();
                slot.closed_since = None;
                if over {
                    // Listening at once, it forgets the reset that the other case sends.
                    listen(socket);
                }
            }
        }
    }

    /// Hands what clients sent to the service, and has it executed.
    pub fn serve(&mut self, service: &mut Service) {
        for slot in &mut self.slots {
            let socket = self.sockets.get_mut::<Socket<'_>>(slot.handle);
            open_or_listen(slot, socket, service);
            if let Some(connection) = &mut slot.connection {
                take_requests(socket, connection, service);
            }
        }
    }

    /// Sends the answers that may be sent, and closes what is finished. True if a client has
    /// requests that can be executed now.
    pub fn answer(&mut self, service: &mut Service, now: Instant) -> bool {
        let mut unsent = 0;
        let mut more = false;
        for slot in &mut self.slots {
            let socket = self.sockets.get_mut::<Socket<'_>>(slot.handle);
            let Some(connection) = &mut slot.connection else {
                continue;
            };
            let sent = socket.send_slice(connection.sendable(service.durable()));
            connection.mark_sent(sent.unwrap_or(0));
            more |= sent.is_ok_and(|sent| sent > 0) && service.unserved(connection);
            unsent += connection.unsent();
            let heard_all = !socket.may_recv() && !service.unserved(connection);
            if connection.finished() || (heard_all && connection.unsent() == 0) {
                socket.close();
                slot.closed_since.get_or_insert(now);
            }
            if matches!(socket.state(), State::Closed | State::TimeWait) {
                service.disconnect(connection);
                slot.connection = None;
            }
        }
        if unsent > OUTPUT_BUDGET {
            self.drop_greediest();
        }
        more
    }

    /// Builds the frames to send; they leave when the machine goes idle.
    pub fn send(&mut self, now: Instant) {
        while self
            .interface
            .poll_egress(now, &mut self.device, &mut self.sockets)
            != PollResult::None
        {}
    }

    /// When something is to be done although nothing arrives.
    pub fn deadline(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
    }

    /// Breaks the connection with the most unsent answers: its client asks and does not read.
    fn drop_greediest(&mut self) {
        let unsent = |slot: &&Slot| slot.connection.as_ref().map_or(0, Connection::unsent);
        if let Some(slot) = self.slots.iter().max_by_key(unsent) {
            self.sockets.get_mut::<Socket<'_>>(slot.handle).abort();
        }
    }
}

fn open_or_listen(slot: &mut Slot, socket: &mut Socket<'_>, service: &mut Service) {
    match socket.state() {
        State::Closed => {
            if let Some(connection) = slot.connection.take() {
                service.disconnect(&connection);
            }
            slot.closed_since = None;
            listen(socket);
        }
        State::Established | State::CloseWait if slot.connection.is_none() => {
            slot.connection = Some(service.connect());
        }
        _ => {}
    }
}

fn socket(receive: &'static mut [u8], send: &'static mut [u8]) -> Socket<'static> {
    let mut socket = Socket::new(SocketBuffer::new(receive), SocketBuffer::new(send));
    socket.set_nagle_enabled(false);
    socket.set_ack_delay(Some(ACK_DELAY));
    socket.set_keep_alive(Some(KEEP_ALIVE));
    socket.set_timeout(Some(GIVE_UP));
    listen(&mut socket);
    socket
}

fn listen(socket: &mut Socket<'_>) {
    // Only an open socket or port 0 would be refused.
    let _ = socket.listen(PORT);
}

/// Moves bytes from a socket to the service while there is room and something to execute.
fn take_requests(socket: &mut Socket<'_>, connection: &mut Connection, service: &mut Service) {
    while socket.can_recv() {
        let room = service.room(connection);
        let taken = socket.recv(|bytes| {
            let taken = bytes.len().min(room);
            service.receive(connection, &bytes[..taken]);
            (taken, taken)
        });
        service.serve(connection);
        if !taken.is_ok_and(|taken| taken > 0) {
            return;
        }
    }
    if service.unserved(connection) {
        service.serve(connection);
    }
}
