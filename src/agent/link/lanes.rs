//! The link between hosts: keeps one connection to every peer and carries messages on its lanes.
//!
//! ```text
//!             dials (the lower name at once, the higher after 2 s) or is dialled
//!   Apart ──────────────────────────────────────────▶ Greeting
//!     ▲  ◀── backoff: 20 ms, doubling to 500 ms ─────────│ hello refused, silent
//!     │                                                  ▼ hellos agree
//!     └──── PeerDown: closed, timed out, reset, ────── Together (PeerUp, Message…)
//!           replaced by a newer connection
//! ```
//!
//! Whichever of two hosts can reach the other makes the connection. Where both make one at the same
//! time, both keep the one that the lower name has made.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use quinn::Connection;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::accept::IncomingLanes;
use super::address::Peer;
use super::close::{CloseReason, Ended};
use super::endpoint::{Endpoint, lock};
use super::session::{self, Greeted, Session, Side};
use super::tls::Purpose;
use super::{LinkEvent, LinkMessage, SendRefused, SessionId};
use crate::agent::certs::{Identity, Name};

/// The pause after the first failed attempt.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// The longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);
/// A session that lived this long starts the pauses from the beginning.
const LIVED_WELL: Duration = Duration::from_secs(1);
/// How long a host that is not the one to dial first leaves it to the other.
const GIVE_WAY: Duration = Duration::from_secs(2);
/// How long a host whose own dialling is under way keeps the other's connection for it.
const OURS_MAY_COME: Duration = Duration::from_millis(300);
/// A peer that has not been connected for so long is said to be unreachable.
const SAID_AFTER: Duration = Duration::from_secs(5);
/// So many reasons are said of one outage.
const REASONS_SAID: usize = 8;
/// How many events may wait to be taken; then the peers wait.
const EVENTS_WAITING: usize = 1024;

struct Shared<M> {
    endpoint: Endpoint,
    events: mpsc::Sender<LinkEvent<M>>,
    sessions: Mutex<HashMap<Name, Arc<Session>>>,
    next_session: AtomicU64,
    give_way: Duration,
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
        Self::start_with(endpoint, peers, GIVE_WAY)
    }

    /// The same with another patience for peers that are to dial first.
    pub(super) fn start_with(
        endpoint: &Endpoint,
        peers: Vec<Peer>,
        give_way: Duration,
    ) -> (Self, mpsc::Receiver<LinkEvent<M>>) {
        let (events, received) = mpsc::channel(EVENTS_WAITING);
        let shared = Arc::new(Shared {
            endpoint: endpoint.clone(),
            events,
            sessions: Mutex::default(),
            next_session: AtomicU64::new(1),
            give_way,
        });
        let mut tasks = JoinSet::new();
        let mut doors = HashMap::new();
        for peer in peers {
            endpoint.expect(&peer.identity);
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

/// How a connection came to be, or a session on it.
enum Start {
    /// It has still to be greeted.
    Connected(Connection, Side),
    /// The peer has made it anew while we had an older one.
    Greeted(Greeted),
}

/// How long a peer has not been connected, and what was said of it.
struct Apart {
    since: tokio::time::Instant,
    said: HashSet<String>,
}

impl Apart {
    fn now() -> Self {
        Self {
            since: tokio::time::Instant::now(),
            said: HashSet::new(),
        }
    }

    /// Whether this is to be said: nobody has to know of a peer that is just starting, nor twice.
    fn is_news(&mut self, why: &str) -> bool {
        let long = self.since.elapsed() >= SAID_AFTER;
        long && self.said.len() < REASONS_SAID && self.said.insert(why.to_owned())
    }
}

/// What one task knows of its peer.
struct Keeper<M> {
    shared: Arc<Shared<M>>,
    peer: Peer,
    /// Connections that the peer has made.
    accepted: mpsc::Receiver<Connection>,
    /// Whether our name is the lower. A host dials at once if it is, or if its last connection was made
    /// by itself; else it first lets the other dial. Of two connections made at the same time, the
    /// one that the lower name dialled stays.
    lower: bool,
    pause: Duration,
}

/// Stays connected to one peer.
async fn keep<M: LinkMessage>(
    shared: Arc<Shared<M>>,
    peer: Peer,
    accepted: mpsc::Receiver<Connection>,
) {
    let lower = shared.endpoint.identity().name < peer.identity.name;
    let mut keeper = Keeper {
        shared,
        peer,
        accepted,
        lower,
        pause: FIRST_PAUSE,
    };
    // Everybody who is left with nothing to listen to ends.
    let Err(NobodyListens) = keeper.keep().await;
}

impl<M: LinkMessage> Keeper<M> {
    async fn keep(&mut self) -> Result<Infallible, NobodyListens> {
        let mut apart = Apart::now();
        let mut dials_first = self.lower;
        let mut next = None;
        let mut again = false;
        loop {
            let start = match next.take() {
                Some(start) => start,
                None => self.connect(&mut apart, dials_first, again).await?,
            };
            again = true;
            let began = tokio::time::Instant::now();
            let (greeted, side) = match start {
                Start::Greeted(greeted) => (greeted, Side::Accepted),
                Start::Connected(connection, side) => match self.greet(connection, side).await? {
                    Ok(greeted) => (greeted, side),
                    Err(newer) => {
                        next = newer;
                        continue;
                    }
                },
            };
            dials_first = self.lower || side == Side::Dialled;
            next = self.together(greeted, side).await?.map(Start::Greeted);
            apart = Apart::now();
            if began.elapsed() >= LIVED_WELL {
                self.pause = FIRST_PAUSE;
            }
        }
    }

    /// Waits for a connection, whoever makes it.
    async fn connect(
        &mut self,
        apart: &mut Apart,
        dials_first: bool,
        again: bool,
    ) -> Result<Start, NobodyListens> {
        let Self {
            shared,
            peer,
            accepted,
            lower,
            pause,
        } = self;
        let dialling = async {
            if !dials_first {
                // Where it cannot be found, it is not known by its address, and dialling says why.
                let _ = shared.endpoint.locate(peer).await;
                tokio::time::sleep(shared.give_way).await;
            } else if again {
                rest(pause).await;
            }
            loop {
                let error = match shared.endpoint.dial(peer, Purpose::Lanes).await {
                    Ok(connection) => return Ok(Start::Connected(connection, Side::Dialled)),
                    Err(error) => error,
                };
                tracing::debug!(%error, "not connected");
                let why = error.to_string();
                if apart.is_news(&why) {
                    let peer = peer.identity.name.clone();
                    let unreachable = LinkEvent::Unreachable { peer, why };
                    let told = shared.events.send(unreachable).await;
                    told.map_err(|_| NobodyListens)?;
                }
                rest(pause).await;
            }
        };
        let mut dialling = pin!(dialling);
        loop {
            let connection = tokio::select! {
                biased;
                connection = next_alive(accepted) => connection?,
                dialled = dialling.as_mut() => return dialled,
            };
            // The peer waits for ours, too, if it comes to be.
            if *lower && let Ok(dialled) = timeout(OURS_MAY_COME, dialling.as_mut()).await {
                CloseReason::Replaced.close(&connection);
                return dialled;
            }
            if connection.close_reason().is_none() {
                return Ok(Start::Connected(connection, Side::Accepted));
            }
        }
    }

    /// Exchanges hellos. `Err`: with no success; perhaps there is another connection to be greeted.
    async fn greet(
        &mut self,
        connection: Connection,
        side: Side,
    ) -> Result<Result<Greeted, Option<Start>>, NobodyListens> {
        let greeting = greet(
            &self.shared.endpoint,
            &self.peer.identity,
            connection.clone(),
            side,
        );
        // Both have dialled: ours goes, and the other waits for no answer on it.
        let yields = side == Side::Dialled && !self.lower;
        tokio::select! {
            greeted = greeting => Ok(greeted.ok_or(None)),
            newer = next_alive(&mut self.accepted), if yields => {
                CloseReason::Replaced.close(&connection);
                Ok(Err(Some(Start::Connected(newer?, Side::Accepted))))
            }
        }
    }

    /// One session, from the hellos to the end. Returns the newer connection that replaced it, if one
    /// did.
    async fn together(
        &mut self,
        greeted: Greeted,
        side: Side,
    ) -> Result<Option<Greeted>, NobodyListens> {
        let (shared, name) = (&self.shared, &self.peer.identity.name);
        let counters = shared.endpoint.counters();
        let connection = greeted.connection().clone();
        // Whatever way this is left, the peer learns of it.
        let guard = CloseOnDrop(Some(connection.clone()));
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

        let ours_stays = self.lower && side == Side::Dialled;
        let mut newcomer = None;
        let (reason, mut newer) = loop {
            tokio::select! {
                done = tasks.join_next() => break (done.and_then(Result::ok).flatten(), None),
                connection = next_alive(&mut self.accepted), if newcomer.is_none() => {
                    match connection {
                        Err(NobodyListens) => break (Some(CloseReason::Done), None),
                        // The peer dialled without knowing of ours, and gives up.
                        Ok(connection) if ours_stays => CloseReason::Replaced.close(&connection),
                        // Greeted first: what the peer has given up meanwhile replaces nothing.
                        Ok(connection) => {
                            let (endpoint, peer) = (shared.endpoint.clone(), self.peer.identity.clone());
                            newcomer = Some(tokio::spawn(async move {
                                greet(&endpoint, &peer, connection, Side::Accepted).await
                            }));
                        }
                    }
                }
                greeted = outcome_of(&mut newcomer) => {
                    newcomer = None;
                    if greeted.is_some() {
                        break (Some(CloseReason::Replaced), greeted);
                    }
                }
            }
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
        if newcomer.is_some() {
            newer = outcome_of(&mut newcomer).await;
        }
        Ok(newer)
    }
}

/// The next connection that the peer has made and not given up again.
async fn next_alive(
    accepted: &mut mpsc::Receiver<Connection>,
) -> Result<Connection, NobodyListens> {
    loop {
        let connection = accepted.recv().await.ok_or(NobodyListens)?;
        if connection.close_reason().is_none() {
            return Ok(connection);
        }
    }
}

/// Exchanges hellos on a connection; `None`, and it is closed, when they do not agree.
async fn greet(
    endpoint: &Endpoint,
    peer: &Identity,
    connection: Connection,
    side: Side,
) -> Option<Greeted> {
    let guard = CloseOnDrop(Some(connection.clone()));
    let (us, counters) = (endpoint.identity(), endpoint.counters());
    match session::greet(connection, side, us, peer, counters).await {
        Ok(greeted) => {
            guard.keep();
            Some(greeted)
        }
        Err(ended) => {
            tracing::info!(name = %peer.name, %ended, "no session");
            None
        }
    }
}

/// The outcome of a greeting that is under way; never, if there is none.
async fn outcome_of(greeting: &mut Option<JoinHandle<Option<Greeted>>>) -> Option<Greeted> {
    match greeting {
        Some(greeting) => greeting.await.ok().flatten(),
        None => std::future::pending().await,
    }
}

async fn rest(pause: &mut Duration) {
    tokio::time::sleep(*pause).await;
    *pause = (*pause * 2).min(LONGEST_PAUSE);
}

/// The receiver of events is gone: the link ends.
struct NobodyListens;

/// Whatever way a session is left, the peer learns of it.
struct CloseOnDrop(Option<Connection>);

impl CloseOnDrop {
    /// The connection goes on.
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        if let Some(connection) = &self.0 {
            // Does nothing when the connection is closed already.
            CloseReason::Done.close(connection);
        }
    }
}
