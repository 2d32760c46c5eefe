//! One UDP socket: accepts and dials connections, and hands out the streams that arrive.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use quinn::congestion::CubicConfig;
use quinn::{
    AckFrequencyConfig, ClientConfig, ConnectionId, ConnectionIdGenerator, EndpointConfig,
    IdleTimeout, MtuDiscoveryConfig, RecvStream, SendStream, ServerConfig, TransportConfig, VarInt,
};
use ring::rand::SecureRandom as _;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::close::{CloseReason, Ended};
use super::counters::LinkCounters;
use super::socket::QuietRuntime;
use super::tls::{self, Purpose, TlsError};
use crate::agent::certs::{Credentials, Identity};

/// A connection on which nothing is heard for this long is gone. Switchover does not wait for it:
/// suspicion comes from heartbeats.
const IDLE_TIMEOUT: Duration = Duration::from_secs(3);
/// Keeps connections that carry no heartbeats.
const KEEP_ALIVE: Duration = Duration::from_millis(700);
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// QUIC's own acknowledgements: after so many packets, or after so long.
const ACKNOWLEDGE_AFTER: u32 = 16;
const ACKNOWLEDGE_WITHIN: Duration = Duration::from_millis(5);
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
/// The largest UDP payload worth trying: jumbo frames and loopback.
const MTU_MAX: u16 = 8_900;
/// What the socket's buffers should hold (the kernel may grant less).
const SOCKET_BUFFER: usize = 4 * 1024 * 1024;
/// Handshakes under way at the same time; more are refused.
const HANDSHAKES_MAX: usize = 256;
/// How long the opener of a stream may take to say what kind it is.
const KIND_TIMEOUT: Duration = Duration::from_secs(3);

/// What a stream is for: its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StreamKind {
    /// The control lane between two hosts.
    Control,
    /// The log lane between two hosts.
    Log,
    /// Numbered frames between a gateway and a host.
    Frames,
    /// An operator's request to a host.
    Operator,
    /// A request to the keeper of the records.
    Witness,
    /// Bulk between hosts: disk bases.
    Bulk,
}

impl StreamKind {
    const ALL: [Self; 6] = [
        Self::Control,
        Self::Log,
        Self::Frames,
        Self::Operator,
        Self::Witness,
        Self::Bulk,
    ];

    /// The byte on the wire. Never reuse one.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Control => 1,
            Self::Log => 2,
            Self::Frames => 3,
            Self::Operator => 4,
            Self::Witness => 5,
            Self::Bulk => 6,
        }
    }

    /// The kind with this byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.byte() == byte)
    }

    /// Which stream goes first when the network is the limit; higher first.
    pub const fn priority(self) -> i32 {
        match self {
            Self::Control | Self::Witness => 3,
            Self::Log | Self::Frames => 2,
            Self::Operator => 1,
            Self::Bulk => 0,
        }
    }
}

/// A stream that a peer has opened; the byte of its kind is read already.
#[derive(Debug)]
pub struct IncomingStream {
    /// Who opened it, by its certificate.
    pub from: Identity,
    /// The connection it is on.
    pub connection: quinn::Connection,
    /// Towards the peer.
    pub send: SendStream,
    /// From the peer.
    pub recv: RecvStream,
}

/// An accepted connection for lanes.
#[derive(Debug)]
pub(super) struct IncomingLanes {
    pub from: Identity,
    pub connection: quinn::Connection,
}

/// Where a peer can be reached: `host:port`, looked up each time it is dialled.
#[derive(Clone, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Address(pub String);

impl Address {
    async fn resolve(&self) -> io::Result<SocketAddr> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        tokio::net::lookup_host(self.0.as_str())
            .await?
            .next()
            .ok_or_else(missing)
    }
}

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self(address.to_string())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A peer with its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who must answer there.
    pub identity: Identity,
    /// Where.
    pub address: Address,
}

type Services = Mutex<HashMap<StreamKind, mpsc::Sender<IncomingStream>>>;
type LanesSender = Mutex<Option<mpsc::Sender<IncomingLanes>>>;

struct Shared {
    identity: Identity,
    socket: quinn::Endpoint,
    lanes_client: ClientConfig,
    services_client: ClientConfig,
    counters: Arc<LinkCounters>,
    services: Services,
    lanes: LanesSender,
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
    /// Nothing answered in time.
    #[error("{peer} does not answer at {address}: start it, or correct the address")]
    NoAnswer {
        /// Who was dialled.
        peer: Identity,
        /// Where.
        address: Address,
    },
    /// It answered, and the connection was refused by one side.
    #[error("{peer} at {address} and we do not accept each other: {ended}")]
    Refused {
        /// Who was dialled.
        peer: Identity,
        /// Where.
        address: Address,
        /// How it ended.
        ended: Ended,
    },
}

impl Endpoint {
    /// Listens on `address`, and dials from there. Call it on the runtime that is to run the
    /// connections.
    pub fn bind(credentials: &Credentials, address: SocketAddr) -> Result<Self, BindError> {
        let mut server = ServerConfig::with_crypto(Arc::new(tls::server(credentials)?));
        server.transport_config(transport());
        server.max_incoming(HANDSHAKES_MAX);
        server.migration(false);
        Self::open(credentials, address, Some(server))
    }

    /// Only dials: for gateways and operators.
    pub fn client(credentials: &Credentials) -> Result<Self, BindError> {
        // One socket for IPv6 and IPv4 where the machine has IPv6.
        let both = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
        Self::open(credentials, both, None)
            .or_else(|_| Self::open(credentials, (Ipv4Addr::UNSPECIFIED, 0).into(), None))
    }

    fn open(
        credentials: &Credentials,
        address: SocketAddr,
        server: Option<ServerConfig>,
    ) -> Result<Self, BindError> {
        let accepts = server.is_some();
        let client = |purpose| -> Result<ClientConfig, TlsError> {
            let mut config = ClientConfig::new(Arc::new(tls::client(credentials, purpose)?));
            config.transport_config(transport());
            Ok(config)
        };
        let (lanes_client, services_client) = (client(Purpose::Lanes)?, client(Purpose::Services)?);
        let socket = open_socket(address, server, credentials)
            .map_err(|source| BindError::Socket { address, source })?;
        let shared = Arc::new(Shared {
            identity: credentials.identity.clone(),
            socket,
            lanes_client,
            services_client,
            counters: Arc::default(),
            services: Mutex::default(),
            lanes: Mutex::default(),
        });
        if accepts {
            tokio::spawn(accept_all(Arc::clone(&shared)));
        }
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
        &self.shared.counters
    }

    /// From now on streams of this kind arrive here; at most `waiting` wait to be taken, then their
    /// openers wait. Streams of kinds that nobody serves are refused.
    pub fn serve(&self, kind: StreamKind, waiting: usize) -> mpsc::Receiver<IncomingStream> {
        let (sender, receiver) = mpsc::channel(waiting);
        lock(&self.shared.services).insert(kind, sender);
        receiver
    }

    /// From now on connections for lanes arrive here.
    pub(super) fn serve_lanes(&self) -> mpsc::Receiver<IncomingLanes> {
        let (sender, receiver) = mpsc::channel(16);
        *lock(&self.shared.lanes) = Some(sender);
        receiver
    }

    /// Connects, once.
    pub async fn dial(
        &self,
        peer: &Peer,
        purpose: Purpose,
    ) -> Result<quinn::Connection, DialError> {
        let Peer { identity, address } = peer;
        let lookup = |reason: String| DialError::Lookup {
            address: address.clone(),
            reason,
        };
        let mut target = address.resolve().await.map_err(|e| lookup(e.to_string()))?;
        if let (Ok(SocketAddr::V6(_)), SocketAddr::V4(v4)) = (self.local_address(), target) {
            target = (v4.ip().to_ipv6_mapped(), v4.port()).into();
        }
        let config = match purpose {
            Purpose::Lanes => &self.shared.lanes_client,
            Purpose::Services => &self.shared.services_client,
        };
        let connecting = self
            .shared
            .socket
            .connect_with(config.clone(), target, &identity.dns_name())
            .map_err(|e| lookup(e.to_string()))?;
        let no_answer = || DialError::NoAnswer {
            peer: identity.clone(),
            address: address.clone(),
        };
        match timeout(HANDSHAKE_TIMEOUT, connecting).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(quinn::ConnectionError::TimedOut)) | Err(_) => Err(no_answer()),
            Ok(Err(error)) => {
                let ended = Ended::from(&error);
                if ended == Ended::Certificate {
                    self.shared.counters.refused_certificates.add(1);
                }
                Err(DialError::Refused {
                    peer: identity.clone(),
                    address: address.clone(),
                    ended,
                })
            }
        }
    }

    /// Closes every connection and takes no more; returns when the peers have been told.
    pub async fn close(&self) {
        let done = CloseReason::Done;
        self.shared
            .socket
            .close(done.code(), done.word().as_bytes());
        self.shared.socket.wait_idle().await;
    }
}

/// A lock whose holders never panic half-way through a change.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn transport() -> Arc<TransportConfig> {
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
        .max_ack_delay(Some(ACKNOWLEDGE_WITHIN));
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

fn open_socket(
    address: SocketAddr,
    server: Option<ServerConfig>,
    credentials: &Credentials,
) -> io::Result<quinn::Endpoint> {
    let socket = UdpSocket::bind(address)?;
    // A smaller buffer than asked for is no error: the kernel's limit holds.
    let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER);
    let _ = setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER);
    let config = endpoint_config(credentials)?;
    quinn::Endpoint::new(config, server, socket, Arc::new(QuietRuntime))
}

/// A key that is the same after a restart lets our new process tell peers at once that their
/// connections to the old one are gone (a stateless reset), instead of leaving them to time out.
fn endpoint_config(credentials: &Credentials) -> io::Result<EndpointConfig> {
    let reset_key = blake3::derive_key(
        "understudy 2025 quic stateless reset",
        credentials.key.secret_der(),
    );
    let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &reset_key);
    let mut seed = [0; 32];
    ring::rand::SystemRandom::new()
        .fill(&mut seed)
        .map_err(|_| io::Error::other("the system has no random numbers"))?;
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config
        .cid_generator(move || Box::new(ConnectionIds { seed, made: 0 }))
        .max_udp_payload_size(MTU_MAX)
        .map_err(io::Error::other)?;
    Ok(config)
}

/// Connection ids that nobody can foresee. Quinn's own generator takes only ids of the running
/// process for its own, and would never reset a connection of the process before.
struct ConnectionIds {
    seed: [u8; 32],
    made: u64,
}

impl ConnectionIds {
    const LENGTH: usize = 8;
}

impl ConnectionIdGenerator for ConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        self.made = self.made.wrapping_add(1);
        let hash = blake3::keyed_hash(&self.seed, &self.made.to_le_bytes());
        ConnectionId::new(&hash.as_bytes()[..Self::LENGTH])
    }

    fn cid_len(&self) -> usize {
        Self::LENGTH
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

async fn accept_all(shared: Arc<Shared>) {
    while let Some(incoming) = shared.socket.accept().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let connecting = match incoming.accept() {
                Ok(connecting) => connecting,
                Err(error) => return tracing::debug!(%error, "a connection attempt was no good"),
            };
            match timeout(HANDSHAKE_TIMEOUT, connecting).await {
                Ok(Ok(connection)) => accepted(&shared, connection).await,
                Ok(Err(error)) => {
                    let ended = Ended::from(&error);
                    if ended == Ended::Certificate {
                        shared.counters.refused_certificates.add(1);
                    }
                    tracing::info!(%ended, "a connection was refused");
                }
                Err(_) => tracing::debug!("a handshake took too long"),
            }
        });
    }
}

async fn accepted(shared: &Arc<Shared>, connection: quinn::Connection) {
    let (Some(from), Some(purpose)) = (tls::peer_of(&connection), Purpose::of(&connection)) else {
        shared.counters.refused_peers.add(1);
        return CloseReason::WrongName.close(&connection);
    };
    tracing::debug!(%from, ?purpose, "connected");
    match purpose {
        Purpose::Services => serve_streams(Arc::clone(shared), from, connection).await,
        Purpose::Lanes => {
            let lanes = lock(&shared.lanes).clone();
            match lanes {
                Some(lanes) => drop(lanes.send(IncomingLanes { from, connection }).await),
                None => CloseReason::NoService.close(&connection),
            }
        }
    }
}

/// Hands out the streams of one connection until it ends.
async fn serve_streams(shared: Arc<Shared>, from: Identity, connection: quinn::Connection) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (shared, from) = (Arc::clone(&shared), from.clone());
        let connection = connection.clone();
        tokio::spawn(async move {
            let stream = IncomingStream {
                from,
                connection,
                send,
                recv,
            };
            hand_out(&shared, stream).await;
        });
    }
}

async fn hand_out(shared: &Shared, mut stream: IncomingStream) {
    let mut first = [0];
    let refuse = |mut stream: IncomingStream, reason: CloseReason| {
        // Both fail only when the stream is gone, which is what is wanted.
        let _ = stream.send.reset(reason.code());
        let _ = stream.recv.stop(reason.code());
    };
    match timeout(KIND_TIMEOUT, stream.recv.read_exact(&mut first)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return,
        Err(_) => return refuse(stream, CloseReason::Silent),
    }
    let [byte] = first;
    let Some(kind) = StreamKind::from_byte(byte) else {
        shared.counters.closed_for_garbage.add(1);
        return CloseReason::Garbage.close(&stream.connection);
    };
    // Fails only when the stream is gone, which its reader will see.
    let _ = stream.send.set_priority(kind.priority());
    let service = lock(&shared.services).get(&kind).cloned();
    match service {
        Some(service) => {
            if let Err(mpsc::error::SendError(stream)) = service.send(stream).await {
                refuse(stream, CloseReason::NoService);
            }
        }
        None => refuse(stream, CloseReason::NoService),
    }
}
