//! The sockets of the service, each with the client that has it, and which of them listens next.

use smoltcp::iface::{SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, State};
use smoltcp::time::Instant;

use crate::connection::Connection;

/// A socket, and the client that has it.
pub struct Slot {
    /// The socket, in the set of all sockets.
    pub handle: SocketHandle,
    /// The client's connection to the service.
    pub connection: Option<Connection>,
    /// Since when we have said all we had to say.
    pub closed_since: Option<Instant>,
}

/// Sees to it that a socket listens, if one can. When none does, the one whose client was done
/// longest ago is taken from its rest (TIME-WAIT): both sides are closed and have acknowledged it,
/// so nothing is lost, and a stray segment of that client meets no new one, which comes from
/// another port. Says how many sockets listen.
pub fn keep_listening(slots: &mut [Slot], sockets: &mut SocketSet<'_>, port: u16) -> usize {
    let in_state = |slot: &Slot, sockets: &SocketSet<'_>, state: State| {
        sockets.get::<Socket<'_>>(slot.handle).state() == state
    };
    let listening = slots
        .iter()
        .filter(|slot| in_state(slot, sockets, State::Listen))
        .count();
    if listening > 0 {
        return listening;
    }
    let resting = slots
        .iter_mut()
        .filter(|slot| slot.connection.is_none() && in_state(slot, sockets, State::TimeWait))
        .min_by_key(|slot| slot.closed_since);
    let Some(slot) = resting else { return 0 };
    slot.closed_since = None;
    let socket = sockets.get_mut::<Socket<'_>>(slot.handle);
    socket.abort();
    // Only an open socket or port 0 would be refused.
    usize::from(socket.listen(port).is_ok())
}

#[cfg(test)]
mod tests {
    use smoltcp::iface::{Config, Interface};
    use smoltcp::phy::{Loopback, Medium};
    use smoltcp::socket::tcp::SocketBuffer;
    use smoltcp::time::Duration;
    use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

    use crate::connection::ClientId;

    use super::*;

    const PORT: u16 = 6379;
    const SLOTS: usize = 4;

    struct World {
        device: Loopback,
        interface: Interface,
        sockets: SocketSet<'static>,
        slots: Vec<Slot>,
        now: Instant,
    }

    fn socket() -> Socket<'static> {
        let buffer = || SocketBuffer::new(vec![0; 256]);
        Socket::new(buffer(), buffer())
    }

    impl World {
        fn new() -> Self {
            let mut device = Loopback::new(Medium::Ethernet);
            let address = EthernetAddress([2, 0, 0, 0, 0, 1]);
            let mut interface =
                Interface::new(Config::new(address.into()), &mut device, Instant::ZERO);
            interface.update_ip_addrs(|addresses| {
                let ip = IpCidr::new(IpAddress::v4(127, 0, 0, 1), 8);
                addresses.push(ip).expect("one fits");
            });
            let mut sockets = SocketSet::new(Vec::new());
            let slots = (0..SLOTS)
                .map(|_| {
                    let mut socket = socket();
                    socket.listen(PORT).expect("a port");
                    Slot {
                        handle: sockets.add(socket),
                        connection: None,
                        closed_since: None,
                    }
                })
                .collect();
            Self {
                device,
                interface,
                sockets,
                slots,
                now: Instant::ZERO,
            }
        }

        /// What moves, moves; a socket that has a client says goodbye to it first.
        fn settle(&mut self) {
            for _ in 0..20 {
                self.now += Duration::from_millis(1);
                keep_listening(&mut self.slots, &mut self.sockets, PORT);
                self.interface
                    .poll(self.now, &mut self.device, &mut self.sockets);
                for slot in &mut self.slots {
                    let socket = self.sockets.get_mut::<Socket<'_>>(slot.handle);
                    if socket.state() == State::Established {
                        socket.send_slice(b"+OK\r\n").expect("room");
                        socket.close();
                        slot.closed_since = Some(self.now);
                    }
                }
            }
        }

        /// A client that comes, hears the goodbye and leaves. Says what it heard.
        fn client(&mut self, port: u16) -> Vec<u8> {
            let mut client = socket();
            let to = (IpAddress::v4(127, 0, 0, 1), PORT);
            client
                .connect(self.interface.context(), to, port)
                .expect("a connection");
            let handle = self.sockets.add(client);
            self.settle();
            let client = self.sockets.get_mut::<Socket<'_>>(handle);
            let mut heard = vec![0; 16];
            let length = client.recv_slice(&mut heard).unwrap_or(0);
            heard.truncate(length);
            client.close();
            self.settle();
            self.sockets.remove(handle);
            heard
        }
    }

    #[test]
    fn clients_that_are_sent_away_leave_their_sockets_to_others_at_once() {
        let mut world = World::new();
        for port in 0..20 * SLOTS as u16 {
            let heard = world.client(10_000 + port);
            assert_eq!(heard, b"+OK\r\n", "client {port}");
        }
    }

    #[test]
    fn a_socket_that_has_a_client_is_not_taken_from_it() {
        let mut world = World::new();
        for port in 0..SLOTS as u16 {
            world.client(10_000 + port);
        }
        let states = |world: &World, state| {
            let slots = world.slots.iter();
            let of = |slot: &&Slot| world.sockets.get::<Socket<'_>>(slot.handle).state() == state;
            slots.filter(of).count()
        };
        let rest = states(&world, State::TimeWait);
        assert_eq!((rest, states(&world, State::Listen)), (SLOTS - 1, 1));
        // One listens, so nobody is woken from its rest.
        assert_eq!(
            keep_listening(&mut world.slots, &mut world.sockets, PORT),
            1
        );
        assert_eq!(states(&world, State::TimeWait), SLOTS - 1);
        // A client whose answers are still to be told keeps its socket.
        for slot in &mut world.slots {
            let socket = world.sockets.get_mut::<Socket<'_>>(slot.handle);
            if socket.state() == State::Listen {
                socket.abort();
            }
            slot.connection = Some(Connection::new(ClientId(1)));
        }
        assert_eq!(
            keep_listening(&mut world.slots, &mut world.sockets, PORT),
            0
        );
    }
}
