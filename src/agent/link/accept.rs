//! The accepting side of an endpoint: from a first packet to the streams that arrive.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use quinn::{RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::admission::{Admission, UnderWay, Verdict};
use super::close::{CloseReason, Ended};
use super::counters::LinkCounters;
use super::endpoint::{HANDSHAKE_TIMEOUT, lock};
use super::kind::StreamKind;
use super::steering::{Tags, Whose};
use super::tls::{self, Purpose};
use crate::agent::certs::{Identity, Role};

/// How long the opener of a stream may take to say what kind it is.
const KIND_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections for services that one certificate may have at the same time; more are closed.
pub(super) const CONNECTIONS_EACH: usize = 64;

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

/// What accepts, and where what it accepted goes.
pub(super) struct Acceptor {
    pub(super) services: Mutex<HashMap<StreamKind, mpsc::Sender<IncomingStream>>>,
    pub(super) lanes: Mutex<Option<mpsc::Sender<IncomingLanes>>>,
    pub(super) counters: Arc<LinkCounters>,
    pub(super) admission: Arc<Admission>,
    /// First packets have come through the door, which has judged them: to ids that are not ours.
    behind_door: Option<Tags>,
    /// How many connections for services each certificate has.
    open: Mutex<HashMap<Identity, usize>>,
}

impl Acceptor {
    pub(super) fn new(behind_door: Option<Tags>) -> Self {
        Self {
            services: Mutex::default(),
            lanes: Mutex::default(),
            counters: Arc::default(),
            admission: Arc::new(Admission::new()),
            behind_door,
            open: Mutex::default(),
        }
    }

    /// Begins a handshake, unless there are too many.
    fn begin(&self, incoming: quinn::Incoming) -> Option<(quinn::Connecting, UnderWay)> {
        let now = Instant::now();
        let from = incoming.remote_address();
        match self.judge(&incoming, now) {
            Verdict::Admit => {}
            Verdict::Prove => {
                // What may not be asked for a proof again has shown one.
                if let Err(again) = incoming.retry() {
                    again.into_incoming().ignore();
                }
                return None;
            }
            Verdict::Drop => {
                incoming.ignore();
                return None;
            }
        }
        let Some(under_way) = self.admission.begin(from, now) else {
            incoming.ignore();
            return None;
        };
        match incoming.accept() {
            Ok(connecting) => Some((connecting, under_way)),
            Err(error) => {
                tracing::debug!(%error, "a connection attempt was no good");
                None
            }
        }
    }

    fn judge(&self, incoming: &quinn::Incoming, now: Instant) -> Verdict {
        let proven = incoming.remote_address_validated();
        match &self.behind_door {
            None => self.admission.judge(incoming.remote_address(), proven, now),
            // Whoever has learned how our ids begin goes past the door with no address of its own.
            Some(tags) if !proven && tags.of_id(&incoming.orig_dst_cid()) != Whose::Stranger => {
                Verdict::Drop
            }
            Some(_) => Verdict::Admit,
        }
    }
}

/// Which of an endpoint's two threads accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum At {
    /// The one that heartbeats live on: configured peers come here.
    Main,
    /// The other one.
    Hall,
}

/// Accepts until the endpoint is closed. `keep`: what must live as long.
pub(super) async fn accept_all<K>(
    socket: quinn::Endpoint,
    at: At,
    acceptor: Arc<Acceptor>,
    keep: K,
) {
    while let Some(incoming) = socket.accept().await {
        let Some((connecting, mut under_way)) = acceptor.begin(incoming) else {
            continue;
        };
        let acceptor = Arc::clone(&acceptor);
        tokio::spawn(async move {
            let shaken = tokio::select! {
                shaken = timeout(HANDSHAKE_TIMEOUT, connecting) => shaken.ok(),
                () = under_way.gives_way() => None,
            };
            drop(under_way);
            match shaken {
                Some(Ok(connection)) => accepted(&acceptor, at, connection).await,
                Some(Err(error)) => {
                    let ended = Ended::from(&error);
                    if ended == Ended::Certificate {
                        acceptor.counters.refused_certificates.add(1);
                    }
                    tracing::info!(%ended, "a connection was refused");
                }
                None => tracing::debug!("a handshake took too long"),
            }
        });
    }
    drop(keep);
}

async fn accepted(acceptor: &Arc<Acceptor>, at: At, connection: quinn::Connection) {
    let (Some(from), Some(purpose)) = (tls::peer_of(&connection), Purpose::of(&connection)) else {
        acceptor.counters.refused_peers.add(1);
        return CloseReason::WrongName.close(&connection);
    };
    tracing::debug!(%from, ?purpose, "connected");
    match purpose {
        Purpose::Services => {
            let Some(place) = Place::take(acceptor, &from) else {
                tracing::warn!(%from, "refused: it has {CONNECTIONS_EACH} connections already");
                acceptor.counters.refused_peers.add(1);
                return CloseReason::TooMany.close(&connection);
            };
            serve_streams(acceptor, from, connection).await;
            drop(place);
        }
        // Heartbeats live on the other thread. Now that its address is known, it is let in there.
        Purpose::Lanes if at == At::Hall && comes_again(acceptor, &from, &connection) => {
            tracing::info!(%from, at = %connection.remote_address(), "a host comes from another address");
            CloseReason::Replaced.close(&connection);
        }
        Purpose::Lanes => {
            let lanes = lock(&acceptor.lanes).clone();
            match lanes {
                Some(lanes) => drop(lanes.send(IncomingLanes { from, connection }).await),
                None => CloseReason::NoService.close(&connection),
            }
        }
    }
}

fn comes_again(acceptor: &Acceptor, from: &Identity, connection: &quinn::Connection) -> bool {
    let at = connection.remote_address();
    let admission = &acceptor.admission;
    from.role == Role::Host && admission.comes_again(&from.name, at, Instant::now())
}

/// One of the connections that a certificate may have.
struct Place {
    acceptor: Arc<Acceptor>,
    of: Identity,
}

impl Place {
    fn take(acceptor: &Arc<Acceptor>, of: &Identity) -> Option<Self> {
        let mut open = lock(&acceptor.open);
        let count = open.entry(of.clone()).or_default();
        if *count >= CONNECTIONS_EACH {
            return None;
        }
        *count += 1;
        Some(Self {
            acceptor: Arc::clone(acceptor),
            of: of.clone(),
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = lock(&self.acceptor.open);
        if let Some(count) = open.get_mut(&self.of) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.remove(&self.of);
            }
        }
    }
}

/// Hands out the streams of one connection until it ends.
async fn serve_streams(acceptor: &Arc<Acceptor>, from: Identity, connection: quinn::Connection) {
    while let Ok((send, recv)) = connection.accept_bi().await {
        let (acceptor, from) = (Arc::clone(acceptor), from.clone());
        let connection = connection.clone();
        tokio::spawn(async move {
            let stream = IncomingStream {
                from,
                connection,
                send,
                recv,
            };
            hand_out(&acceptor, stream).await;
        });
    }
}

async fn hand_out(acceptor: &Acceptor, mut stream: IncomingStream) {
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
        acceptor.counters.closed_for_garbage.add(1);
        return CloseReason::Garbage.close(&stream.connection);
    };
    // Fails only when the stream is gone, which its reader will see.
    let _ = stream.send.set_priority(kind.priority());
    let service = lock(&acceptor.services).get(&kind).cloned();
    match service {
        Some(service) => {
            if let Err(mpsc::error::SendError(stream)) = service.send(stream).await {
                refuse(stream, CloseReason::NoService);
            }
        }
        None => refuse(stream, CloseReason::NoService),
    }
}
