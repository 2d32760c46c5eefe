//! One UDP socket: accepts and dials connections, and hands out the streams that arrive.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{
    AckFrequencyConfig, ClientConfig, ConnectionId, ConnectionIdGenerator, EndpointConfig,
    IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::accept::{Acceptor, At, IncomingLanes, IncomingStream, accept_all};
use super::address::{Address, AddressBook, Peer, Tried};
use super::close::{CloseReason, Ended};
use super::counters::LinkCounters;
use super::door::{Door, Guarded, LetIn};
use super::hall::{Furnishing, Hall};
use super::kind::StreamKind;
use super::socket::{self, QuietRuntime};
use super::steering::{self, ID_LENGTH, Sockets, Tag, Tags, fresh_tag, random};
use super::tls::{self, Purpose, TlsError};
use crate::agent::certs::{Credentials, Identity};

/// A connection on which nothing is heard for this long is gone. Switchover does not wait for it:
/// suspicion comes from heartbeats.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Keeps connections that carry no heartbeats.
const KEEP_ALIVE: Duration = Duration::from_millis(700);
/// How long a handshake may take.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// A peer's next address is dialled while this one has not answered for so long.
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// QUIC's own acknowledgements: after so many packets, or after so long.
const ACKNOWLEDGE_AFTER: u32 = 16;
const ACKNOWLEDGE_WITHIN: Duration = Duration::from_millis(5);
/// Between hosts that exchange heartbeats: a little longer than from one (20 ms) to the next, which
/// carries the acknowledgement of the last one's answer. A packet of its own for it was half of what a
/// primary sends to a replica of an idle guest. What is lost is noticed no later: the next heartbeat is
/// acknowledged, and what was sent before it is not.
const LANES_ACKNOWLEDGE_WITHIN: Duration = Duration::from_millis(25);
/// The guess before the first measurement; the first retransmission of a handshake comes after
/// three times this.
const FIRST_RTT_GUESS: Duration = Duration::from_millis(50);
/// The congestion window to begin with: a switchover cannot wait for slow start.
const FIRST_WINDOW: u64 = 256 * 1024;
/// What a peer may have under way to us on one stream.
const STREAM_WINDOW: u32 = 8 * 1024 * 1024;
/// What a peer may have under way to us on one connection.
const CONNECTION_WINDOW: u32 = 32 * 1024 * 1024;
/// Old datagrams are thrown away beyond this: a heartbeat is worth nothing later.
const DATAGRAM_BUFFER: usize = 64 * 1024;
/// What the keys of stateless resets are for.
const MAIN: &str = "understudy 2025 quic stateless reset";
const HALL: &str = "understudy 2026 quic stateless reset in the hall";
const DOOR: &str = "understudy 2026 quic stateless reset at the door";
/// The largest UDP payload worth trying: jumbo frames and loopback.
pub(super) const MTU_MAX: u16 = 8_900;

struct Shared {
    identity: Identity,
    socket: quinn::Endpoint,
    lanes_client: ClientConfig,
    services_client: ClientConfig,
    acceptor: Arc<Acceptor>,
    /// Where the kernel can tell whose packets are whose.
    apart: Mutex<Option<Apart>>,
    addresses: AddressBook,
    /// Dials addresses of the family that the socket is not of, when there is one to be dialled.
    other_family: Mutex<Option<quinn::Endpoint>>,
    credentials: Credentials,
}

/// The threads that strangers come to, and everybody who is no configured peer. They end with this.
struct Apart {
    /// Before the hall, into which it leads.
    _door: Door,
    hall: Hall,
}

impl Apart {
    /// Opens both; what the door lets in to the main endpoint comes by the channel.
    fn open(
        sockets: steering::Apart,
        tags: Tags,
        credentials: &Credentials,
        server: &ServerConfig,
        acceptor: &Arc<Acceptor>,
    ) -> io::Result<(Self, mpsc::Receiver<LetIn>)> {
        let guarded = Guarded {
            tags,
            endpoint: endpoint_config(credentials, tags.door, DOOR)?,
            server: server.clone(),
            admission: Arc::clone(&acceptor.admission),
        };
        let (door, inlets) = Door::open(sockets.door, guarded)?;
        let hall = Hall::open(Furnishing {
            socket: sockets.hall,
            inlet: inlets.hall,
            endpoint: endpoint_config(credentials, tags.hall, HALL)?,
            server: server.clone(),
            acceptor: Arc::clone(acceptor),
        })?;
        Ok((Self { _door: door, hall }, inlets.main))
    }
}

impl Shared {
    /// The socket that can dial this address.
    fn socket_for(&self, address: SocketAddr) -> io::Result<quinn::Endpoint> {
        let own = self.socket.local_addr()?;
        let both = own.ip().is_unspecified() || own.ip().to_canonical().is_ipv4();
        if own.is_ipv4() == address.is_ipv4() || own.is_ipv6() && both {
            return Ok(self.socket.clone());
        }
        let mut other = lock(&self.other_family);
        if let Some(other) = &*other {
            return Ok(other.clone());
        }
        let any = match address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = dialler(&self.credentials, any)?;
        Ok(other.insert(socket).clone())
    }
}

async fn dial_one(
    shared: Arc<Shared>,
    address: SocketAddr,
    peer: Identity,
    purpose: Purpose,
) -> Result<quinn::Connection, Attempt> {
    let config = match purpose {
        Purpose::Lanes => &shared.lanes_client,
        Purpose::Services => &shared.services_client,
    };
    let undialable = |reason: String| Attempt::Undialable(reason);
    let socket = shared.socket_for(address);
    let socket = socket.map_err(|error| undialable(error.to_string()))?;
    let connecting = socket
        .connect_with(config.clone(), address, &peer.dns_name())
        .map_err(|error| undialable(error.to_string()))?;
    match timeout(HANDSHAKE_TIMEOUT, connecting).await {
        Ok(Ok(connection)) => Ok(connection),
        Ok(Err(quinn::ConnectionError::TimedOut)) | Err(_) => Err(Attempt::NoAnswer),
        Ok(Err(error)) => {
            let ended = Ended::from(&error);
            if ended == Ended::Certificate {
                shared.acceptor.counters.refused_certificates.add(1);
            }
            Err(Attempt::Refused(ended))
        }
    }
}

/// One UDP socket with our certificate. Cheap to clone; clones are the same endpoint.
#[derive(Clone)]
pub struct Endpoint {
    shared: Arc<Shared>,
}

/// Why an endpoint could not be opened.
#[derive(Debug, Error)]
pub enum BindError {
    /// The certificates are no good.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address is taken or not ours.
    #[error(
        "cannot listen on UDP {address}: choose an address of this machine and a port that nothing else uses"
    )]
    Socket {
        /// Which address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a peer could not be reached.
#[derive(Clone, Debug, Error)]
pub enum DialError {
    /// Its address cannot be looked up.
    #[error(
        "cannot look up {address}: correct the address in the configuration, or the name service ({reason})"
    )]
    Lookup {
        /// What was looked up.
        address: Address,
        /// What came of it.
        reason: String,
    },
    /// An address that cannot be dialled from here.
    #[error(
        "{peer} cannot be dialled at {at}: correct the address in the configuration ({reason})"
    )]
    Undialable {
        /// Who was dialled.
        peer: Identity,
        /// Where.
        at: Tried,
        /// What the system said.
        reason: String,
    },
    /// Nothing answered in time.
    #[error("{peer} does not answer at {at}: start it, or correct the address")]
    NoAnswer {
        /// Who was dialled.
        peer: Identity,
        /// Where.
        at: Tried,
    },
    /// It answered, and the connection was refused by one side.
    #[error("{peer} at {at} and we do not accept each other: {ended}")]
    Refused {
        /// Who was dialled.
        peer: Identity,
        /// Where.
        at: Tried,
        /// How it ended.
        ended: Ended,
    },
}

impl DialError {
    /// Whether the same peer may be reached a moment later, without anybody changing anything.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::NoAnswer { .. } => true,
            Self::Refused { ended, .. } => ended.may_pass(),
            Self::Lookup { .. } | Self::Undialable { .. } => false,
        }
    }
}

/// What came of dialling one address.
#[derive(Debug)]
pub(super) enum Attempt {
    Undialable(String),
    NoAnswer,
    Refused(Ended),
}

impl Endpoint {
    /// Listens on `address`, and dials from there. Call it on the runtime that is to run the
    /// connections.
    pub fn bind(credentials: &Credentials, address: SocketAddr) -> Result<Self, BindError> {
        let mut server = ServerConfig::with_crypto(Arc::new(tls::server(credentials)?));
        server.transport_config(transport(LANES_ACKNOWLEDGE_WITHIN));
        server.migration(false);
        let failed = |source| BindError::Socket { address, source };
        let tags = Tags::fresh().map_err(failed)?;
        let Sockets { main, apart } = Sockets::open(address, &tags).map_err(failed)?;
        let acceptor = Arc::new(Acceptor::new(apart.is_some().then_some(tags)));
        let (apart, inlet) = match apart {
            None => (None, None),
            Some(sockets) => {
                let mut server = server.clone();
                server.transport_config(transport(ACKNOWLEDGE_WITHIN));
                let (apart, inlet) =
                    Apart::open(sockets, tags, credentials, &server, &acceptor).map_err(failed)?;
                (Some(apart), Some(inlet))
            }
        };
        let config = endpoint_config(credentials, tags.main, MAIN).map_err(failed)?;
        let main = socket::quiet(main, inlet).map_err(failed)?;
        let socket = quinn::Endpoint::new_with_abstract_socket(
            config,
            Some(server),
            main,
            Arc::new(QuietRuntime),
        );
        let endpoint = Self::with(credentials, socket.map_err(failed)?, acceptor, apart)?;
        let shared = &endpoint.shared;
        tokio::spawn(accept_all(
            shared.socket.clone(),
            At::Main,
            Arc::clone(&shared.acceptor),
            Arc::clone(shared),
        ));
        Ok(endpoint)
    }

    /// Only dials: for gateways and operators.
    pub fn client(credentials: &Credentials) -> Result<Self, BindError> {
        // One socket for IPv6 and IPv4 where the machine has IPv6.
        let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        let ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let socket = dialler(credentials, both).or_else(|_| dialler(credentials, ipv4));
        let socket = socket.map_err(|source| BindError::Socket {
            address: ipv4,
            source,
        })?;
        let acceptor = Arc::new(Acceptor::new(None));
        Self::with(credentials, socket, acceptor, None)
    }

    fn with(
        credentials: &Credentials,
        socket: quinn::Endpoint,
        acceptor: Arc<Acceptor>,
        apart: Option<Apart>,
    ) -> Result<Self, BindError> {
        let client = |purpose, acknowledge_within| -> Result<ClientConfig, TlsError> {
            let mut config = ClientConfig::new(Arc::new(tls::client(credentials, purpose)?));
            config.transport_config(transport(acknowledge_within));
            Ok(config)
        };
        let lanes_client = client(Purpose::Lanes, LANES_ACKNOWLEDGE_WITHIN)?;
        let services_client = client(Purpose::Services, ACKNOWLEDGE_WITHIN)?;
        let shared = Arc::new(Shared {
            identity: credentials.identity.clone(),
            socket,
            lanes_client,
            services_client,
            acceptor,
            apart: Mutex::new(apart),
            addresses: AddressBook::default(),
            other_family: Mutex::default(),
            credentials: credentials.clone(),
        });
        Ok(Self { shared })
    }

    /// Who we are.
    pub fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    /// Where we listen.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.shared.socket.local_addr()
    }

    /// What was counted.
    pub fn counters(&self) -> &Arc<LinkCounters> {
        &self.shared.acceptor.counters
    }

    /// From now on streams of this kind arrive here; at most `waiting` wait to be taken, then their
    /// openers wait. Streams of kinds that nobody serves are refused.
    pub fn serve(&self, kind: StreamKind, waiting: usize) -> mpsc::Receiver<IncomingStream> {
        let (sender, receiver) = mpsc::channel(waiting);
        lock(&self.shared.acceptor.services).insert(kind, sender);
        receiver
    }

    /// From now on connections for lanes arrive here.
    pub(super) fn serve_lanes(&self) -> mpsc::Receiver<IncomingLanes> {
        let (sender, receiver) = mpsc::channel(16);
        *lock(&self.shared.acceptor.lanes) = Some(sender);
        receiver
    }

    /// Connects, once, by whatever address of the peer answers first.
    pub async fn dial(
        &self,
        peer: &Peer,
        purpose: Purpose,
    ) -> Result<quinn::Connection, DialError> {
        let Peer { identity, address } = peer;
        let found = match purpose {
            Purpose::Lanes => self.locate(peer).await,
            Purpose::Services => self.shared.addresses.find(address).await,
        };
        let found = found.map_err(|error| DialError::Lookup {
            address: address.clone(),
            reason: error.to_string(),
        })?;
        let failed = match self.dial_first(&found, identity, purpose).await {
            Ok(connection) => return Ok(connection),
            Err(failed) => failed,
        };
        let (peer, address) = (identity.clone(), address.clone());
        let at = Tried { address, found };
        Err(match failed {
            Attempt::Undialable(reason) => DialError::Undialable { peer, at, reason },
            Attempt::NoAnswer => DialError::NoAnswer { peer, at },
            Attempt::Refused(ended) => DialError::Refused { peer, at, ended },
        })
    }

    /// Dials one address after the other, each a little later than the one before, and takes the first
    /// that answers. Of the failures it returns the one that says most.
    pub(super) async fn dial_first(
        &self,
        addresses: &[SocketAddr],
        peer: &Identity,
        purpose: Purpose,
    ) -> Result<quinn::Connection, Attempt> {
        let mut attempts = JoinSet::new();
        let mut waiting = addresses.iter();
        let mut worst = Attempt::NoAnswer;
        loop {
            let more = match waiting.next() {
                Some(address) => {
                    attempts.spawn(dial_one(
                        Arc::clone(&self.shared),
                        *address,
                        peer.clone(),
                        purpose,
                    ));
                    true
                }
                None if attempts.is_empty() => return Err(worst),
                None => false,
            };
            tokio::select! {
                Some(outcome) = attempts.join_next() => match outcome {
                    Ok(Ok(connection)) => return Ok(connection),
                    Ok(Err(refused @ Attempt::Refused(_))) => worst = refused,
                    Ok(Err(failed)) if matches!(worst, Attempt::NoAnswer) => worst = failed,
                    // Only a runtime that ends aborts an attempt.
                    Ok(Err(_)) | Err(_) => {}
                },
                () = tokio::time::sleep(NEXT_ADDRESS_AFTER), if more => {}
            }
        }
    }

    /// Closes every connection and takes no more; returns when the peers have been told.
    pub async fn close(&self) {
        let apart = lock(&self.shared.apart).take();
        let other = lock(&self.shared.other_family).take();
        let hall = apart.as_ref().map(|apart| apart.hall.endpoint());
        let done = CloseReason::Done;
        let all = [Some(&self.shared.socket), other.as_ref(), hall];
        for endpoint in all.into_iter().flatten() {
            endpoint.close(done.code(), done.word().as_bytes());
        }
        for endpoint in all.into_iter().flatten() {
            endpoint.wait_idle().await;
        }
        // The port is free when this is done.
        drop(apart);
    }

    /// From now on connections for lanes with this peer are expected.
    pub(super) fn expect(&self, peer: &Identity) {
        self.shared.acceptor.admission.peer_is_at(&peer.name, &[]);
    }

    /// Looks up where a peer is, so that it is known by its address when it dials.
    pub(super) async fn locate(&self, peer: &Peer) -> io::Result<Vec<SocketAddr>> {
        let found = self.shared.addresses.find(&peer.address).await?;
        let admission = &self.shared.acceptor.admission;
        admission.peer_is_at(&peer.identity.name, &found);
        Ok(found)
    }

    /// How many connections live on the thread that heartbeats live on, and how many in the hall.
    #[cfg(test)]
    pub(super) fn connections(&self) -> (usize, usize) {
        let apart = lock(&self.shared.apart);
        let in_hall = apart.as_ref().map(|apart| apart.hall.endpoint());
        (
            self.shared.socket.open_connections(),
            in_hall.map_or(0, quinn::Endpoint::open_connections),
        )
    }
}

/// A lock whose holders never panic half-way through a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `acknowledge_within` is what the peer is asked for.
fn transport(acknowledge_within: Duration) -> Arc<TransportConfig> {
    let mut cubic = CubicConfig::default();
    cubic.initial_window(FIRST_WINDOW);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MTU_MAX);
    let idle = IdleTimeout::try_from(IDLE_TIMEOUT).ok();
    // What is said in answer carries the acknowledgement: packets with nothing else in them would
    // wake both ends for nothing.
    let mut acknowledgements = AckFrequencyConfig::default();
    acknowledgements
        .ack_eliciting_threshold(VarInt::from_u32(ACKNOWLEDGE_AFTER))
        .max_ack_delay(Some(acknowledge_within));
    let mut transport = TransportConfig::default();
    transport
        .ack_frequency_config(Some(acknowledgements))
        .max_idle_timeout(idle)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(FIRST_RTT_GUESS)
        .congestion_controller_factory(Arc::new(cubic))
        .mtu_discovery_config(Some(mtu))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(STREAM_WINDOW))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER);
    Arc::new(transport)
}

/// A socket that only dials.
fn dialler(credentials: &Credentials, address: SocketAddr) -> io::Result<quinn::Endpoint> {
    let config = endpoint_config(credentials, fresh_tag()?, MAIN)?;
    let socket = socket::quiet(socket::open_udp(address)?, None)?;
    quinn::Endpoint::new_with_abstract_socket(config, None, socket, Arc::new(QuietRuntime))
}

/// A key that is the same after a restart lets our new process tell peers at once that their
/// connections to the old one are gone (a stateless reset), instead of leaving them to time out. Each part
/// of an endpoint has its own (`of`): what is said for one resets no connection of another.
fn endpoint_config(
    credentials: &Credentials,
    tag: Tag,
    of: &'static str,
) -> io::Result<EndpointConfig> {
    let reset_key = blake3::derive_key(of, credentials.key.secret_der());
    let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &reset_key);
    let seed = random()?;
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config
        .cid_generator(move || Box::new(ConnectionIds { tag, seed, made: 0 }))
        .max_udp_payload_size(MTU_MAX)
        .map_err(io::Error::other)?;
    Ok(config)
}

/// Connection ids that nobody can foresee, with a beginning in common (see [`super::steering`]). Quinn's own generator takes only ids of the running
/// process for its own, and would never reset a connection of the process before.
struct ConnectionIds {
    tag: Tag,
    seed: [u8; 32],
    made: u64,
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        self.made = self.made.wrapping_add(1);
        let hash = blake3::keyed_hash(&self.seed, &self.made.to_le_bytes());
        let mut id = [0; ID_LENGTH];
        let (tag, rest) = id.split_at_mut(self.tag.len());
        tag.copy_from_slice(&self.tag);
        rest.copy_from_slice(&hash.as_bytes()[..rest.len()]);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_LENGTH
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
