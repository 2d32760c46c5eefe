//! The link between hosts: keeps one connection to every peer and carries messages on its lanes.
//!
//! ```text
//!             dials (the lower name) or is dialled
//!   Apart ──────────────────────────────────────────▶ Greeting
//!     ▲  ◀── backoff: 20 ms, doubling to 500 ms ─────────│ hello refused, silent
//!     │                                                  ▼ hellos agree
//!     └──── PeerDown: closed, timed out, reset, ────── Together (PeerUp, Message…)
//!           replaced by a newer connection
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::accept::IncomingLanes;
use super::address::Peer;
use super::close::{CloseReason, Ended};
use super::endpoint::{Endpoint, lock};
use super::session::{self, Session, Side};
use super::tls::Purpose;
use super::{LinkEvent, LinkMessage, SendRefused, SessionId};
use crate::agent::certs::{Identity, Name};

/// The pause after the first failed attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// A session that lived this long starts the pauses from the beginning.
const LIVED_WELL: Duration = Duration::from_secs(1);
/// How many events may wait to be taken; then the peers wait.
const EVENTS_WAITING: usize = 1024;

struct Shared<M> {
    endpoint: Endpoint,
    events: mpsc::Sender<LinkEvent<M>>,
    sessions: Mutex<HashMap<Name, Arc<Session>>>,
    next_session: AtomicU64,
}

/// The connections to all peers. Dropping it closes them.
pub struct Link<M> {
    shared: Arc<Shared<M>>,
    /// Ends with the link.
    _tasks: JoinSet<()>,
}

impl<M: LinkMessage> Link<M> {
    /// Connects to every peer and stays connected. Events come in order for each peer:
    /// `PeerUp (Message)* PeerDown`, and again. Call it on the runtime that is to run the lanes.
    pub fn start(endpoint: &Endpoint, peers: Vec<Peer>) -> (Self, mpsc::Receiver<LinkEvent<M>>) {
        let (events, received) = mpsc::channel(EVENTS_WAITING);
        let shared = Arc::new(Shared {
            endpoint: endpoint.clone(),
            events,
            sessions: Mutex::default(),
            next_session: AtomicU64::new(1),
        });
        let mut tasks = JoinSet::new();
        let mut doors = HashMap::new();
        for peer in peers {
            let (door, accepted) = mpsc::channel(4);
            doors.insert(peer.identity.clone(), door);
            tasks.spawn(keep(Arc::clone(&shared), peer, accepted));
        }
        let incoming = endpoint.serve_lanes();
        tasks.spawn(distribute(Arc::clone(&shared), incoming, doors));
        (
            Self {
                shared,
                _tasks: tasks,
            },
            received,
        )
    }

    /// Queues a message for a peer; never waits. A message is lost when the connection ends before
    /// it has arrived: whoever sends resumes at the next `PeerUp` from what the peer says it holds.
    pub fn send(&self, to: &str, message: &M) -> Result<(), SendRefused> {
        let session = lock(&self.shared.sessions).get(to).map(Arc::clone);
        let Some(session) = session else {
            self.shared.endpoint.counters().not_connected.add(1);
            return Err(SendRefused::NotConnected);
        };
        session.send(message)
    }

    /// The session with a peer, if it is connected.
    pub fn session(&self, peer: &str) -> Option<SessionId> {
        lock(&self.shared.sessions)
            .get(peer)
            .map(|session| session.id)
    }

    /// A round trip to a connected peer, as measured lately.
    pub fn round_trip(&self, peer: &str) -> Option<Duration> {
        let sessions = lock(&self.shared.sessions);
        sessions.get(peer).map(|session| session.round_trip())
    }
}

/// Brings accepted connections to the tasks of their peers.
async fn distribute<M>(
    shared: Arc<Shared<M>>,
    mut incoming: mpsc::Receiver<IncomingLanes>,
    doors: HashMap<Identity, mpsc::Sender<Connection>>,
) {
    while let Some(IncomingLanes { from, connection }) = incoming.recv().await {
        if let Some(door) = doors.get(&from) {
            // A full door means that the peer dials faster than it is greeted: it will dial again.
            if let Err(error) = door.try_send(connection) {
                let connection = match error {
                    mpsc::error::TrySendError::Full(connection)
                    | mpsc::error::TrySendError::Closed(connection) => connection,
                };
                CloseReason::Replaced.close(&connection);
            }
        } else {
            tracing::warn!(%from, "refused: the configuration names no such host");
            shared.endpoint.counters().refused_peers.add(1);
            CloseReason::UnknownPeer.close(&connection);
        }
    }
}

/// Stays connected to one peer.
async fn keep<M: LinkMessage>(
    shared: Arc<Shared<M>>,
    peer: Peer,
    mut accepted: mpsc::Receiver<Connection>,
) {
    let dials = shared.endpoint.identity().name < peer.identity.name;
    let side = if dials { Side::Dialled } else { Side::Accepted };
    let mut pause = FIRST_PAUSE;
    let mut waiting = None;
    loop {
        let connection = match waiting.take() {
            Some(connection) => connection,
            None if dials => match shared.endpoint.dial(&peer, Purpose::Lanes).await {
                Ok(connection) => connection,
                Err(error) => {
                    tracing::debug!(%error, "not connected");
                    rest(&mut pause).await;
                    continue;
                }
            },
            None => match accepted.recv().await {
                Some(connection) => connection,
                None => return,
            },
        };
        let began = tokio::time::Instant::now();
        let ended = together(&shared, &peer, side, connection, &mut accepted).await;
        match ended {
            Ok(newer) => waiting = newer,
            Err(NobodyListens) => return,
        }
        if began.elapsed() >= LIVED_WELL {
            pause = FIRST_PAUSE;
        }
        if dials {
            rest(&mut pause).await;
        }
    }
}

async fn rest(pause: &mut Duration) {
    tokio::time::sleep(*pause).await;
    *pause = (*pause * 2).min(LONGEST_PAUSE);
}

/// The receiver of events is gone: the link ends.
struct NobodyListens;

/// One session, from hello to the end. Returns the newer connection that replaced it, if one did.
async fn together<M: LinkMessage>(
    shared: &Arc<Shared<M>>,
    peer: &Peer,
    side: Side,
    connection: Connection,
    accepted: &mut mpsc::Receiver<Connection>,
) -> Result<Option<Connection>, NobodyListens> {
    let name = &peer.identity.name;
    let counters = shared.endpoint.counters();
    let us = shared.endpoint.identity();
    let guard = CloseOnDrop(connection.clone());
    let greeted = match session::greet(connection.clone(), side, us, &peer.identity, counters).await
    {
        Ok(greeted) => greeted,
        Err(ended) => {
            tracing::info!(%name, %ended, "no session");
            return Ok(None);
        }
    };
    let id = SessionId(shared.next_session.fetch_add(1, Ordering::Relaxed));
    let up = LinkEvent::PeerUp {
        peer: name.clone(),
        session: id,
    };
    // Registered before the event, so that whoever hears of the peer can send to it; the tasks
    // start after it, so that no message comes before it.
    counters.sessions.add(1);
    let permit = shared.events.reserve().await.map_err(|_| NobodyListens)?;
    let (session, mut tasks) = session::start(greeted, id, name, &shared.events, counters);
    lock(&shared.sessions).insert(name.clone(), session);
    permit.send(up);

    let (reason, newer) = tokio::select! {
        done = tasks.join_next() => (done.and_then(Result::ok).flatten(), None),
        newer = accepted.recv() => (Some(CloseReason::Replaced), newer),
    };
    // A connection that is gone already tells better why than whoever noticed first.
    let gone = connection.close_reason();
    if let (None, Some(reason)) = (&gone, reason) {
        if matches!(reason, CloseReason::Garbage | CloseReason::TooLong) {
            tracing::warn!(%name, %reason, "closing the connection");
            counters.closed_for_garbage.add(1);
        }
        reason.close(&connection);
    }
    lock(&shared.sessions).remove(name);
    tasks.shutdown().await;
    let ended = match (gone, reason) {
        // Only a full queue closes a connection from outside this function.
        (Some(quinn::ConnectionError::LocallyClosed), _) => Ended::ByUs(CloseReason::QueueFull),
        (Some(error), _) => Ended::from(&error),
        (None, Some(reason)) => Ended::ByUs(reason),
        (None, None) => Ended::Other("a stream ended".to_owned()),
    };
    drop(guard);
    let down = LinkEvent::PeerDown {
        peer: name.clone(),
        session: id,
        ended,
    };
    shared.events.send(down).await.map_err(|_| NobodyListens)?;
    Ok(newer)
}

/// Whatever way a session is left, the peer learns of it.
struct CloseOnDrop(Connection);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        // Does nothing when the connection is closed already.
        CloseReason::Done.close(&self.0);
    }
}
