//! One connection between two hosts: the lanes on it, from hello to the end.
//!
//! ```text
//!  dialler                                   accepter
//!     │ ── bi stream: Control, Hello ──────────▶ │   both check the other's name and version
//!     │ ◀───────────────────────────── Hello ─── │
//!     │ ── uni stream: Log, zstd(messages…) ───▶ │
//!     │ ◀──── uni stream: Log, zstd(messages…) ─ │
//!     │ ◀═══════════ datagrams ════════════════▶ │
//! ```

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use quinn::{Connection, RecvStream, SendStream};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::close::{CloseReason, Ended};
use super::compress::{Compressor, Decompressor};
use super::counters::LinkCounters;
use super::endpoint::lock;
use super::frame::{self, FrameError, FrameReader};
use super::kind::StreamKind;
use super::{Lane, LinkEvent, LinkMessage, SendRefused, SessionId};
use crate::agent::certs::{Identity, Name};

/// The version of what travels on the lanes.
pub(super) const VERSION: u32 = 3;
/// The longest hello.
const HELLO_MAX: usize = 1024;
/// How long the other side may take for its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest message on the control lane.
pub const CONTROL_MESSAGE_MAX: usize = 1024 * 1024;
/// The longest message on the log lane.
pub const LOG_MESSAGE_MAX: usize = 4 * 1024 * 1024;
/// What may wait for the control stream.
const CONTROL_QUEUE_MAX: usize = 8 * 1024 * 1024;
/// What may wait for the log stream.
const LOG_QUEUE_MAX: usize = 32 * 1024 * 1024;
/// How much is taken from a stream at once.
const READ_MAX: usize = 256 * 1024;

/// The first message of each side.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
    name: Name,
}

/// Which side of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Dialled,
    Accepted,
}

/// What waits to be written to a stream, bounded in bytes.
struct Outgoing {
    limit: usize,
    waiting: Mutex<Waiting>,
    ready: Notify,
}

#[derive(Default)]
struct Waiting {
    frames: VecDeque<Bytes>,
    bytes: usize,
}

impl Outgoing {
    fn new(limit: usize) -> Self {
        Self {
            limit,
            waiting: Mutex::default(),
            ready: Notify::new(),
        }
    }

    /// Whether there was room.
    fn push(&self, frame: Bytes) -> bool {
        let mut waiting = lock(&self.waiting);
        if waiting.bytes + frame.len() > self.limit {
            return false;
        }
        waiting.bytes += frame.len();
        waiting.frames.push_back(frame);
        drop(waiting);
        self.ready.notify_one();
        true
    }

    /// Everything that waits, at least one frame.
    async fn take(&self) -> Vec<Bytes> {
        loop {
            let waiting = mem::take(&mut *lock(&self.waiting));
            if !waiting.frames.is_empty() {
                return waiting.frames.into();
            }
            self.ready.notified().await;
        }
    }
}

/// A live connection between two hosts, as senders see it.
pub(super) struct Session {
    pub(super) id: SessionId,
    connection: Connection,
    control: Outgoing,
    log: Outgoing,
    counters: Arc<LinkCounters>,
}

impl Session {
    /// A round trip to the peer, as measured lately.
    pub(super) fn round_trip(&self) -> Duration {
        self.connection.rtt()
    }

    /// Queues a message; never waits.
    pub(super) fn send<M: LinkMessage>(&self, message: &M) -> Result<(), SendRefused> {
        match message.lane() {
            Lane::Control => {
                self.queue(&self.control, frame::encode(message, CONTROL_MESSAGE_MAX)?)
            }
            Lane::Log => self.queue(&self.log, frame::encode(message, LOG_MESSAGE_MAX)?),
            Lane::Datagram => self.send_datagram(message),
        }
    }

    fn queue(&self, outgoing: &Outgoing, frame: Bytes) -> Result<(), SendRefused> {
        if outgoing.push(frame) {
            return Ok(());
        }
        self.counters.closed_for_full_queue.add(1);
        CloseReason::QueueFull.close(&self.connection);
        Err(SendRefused::QueueFull)
    }

    fn send_datagram<M: LinkMessage>(&self, message: &M) -> Result<(), SendRefused> {
        let framed = frame::encode(message, CONTROL_MESSAGE_MAX)?;
        let body = framed.slice(4..);
        let fits = self
            .connection
            .max_datagram_size()
            .is_some_and(|limit| body.len() <= limit);
        if fits && self.connection.send_datagram(body).is_ok() {
            self.counters.datagrams.add(1);
            return Ok(());
        }
        self.counters.datagrams_too_large.add(1);
        self.queue(&self.control, framed)
    }
}

/// The streams of a connection whose both sides have said hello.
pub(super) struct Greeted {
    connection: Connection,
    control_send: SendStream,
    control_recv: FrameReader,
    log_send: SendStream,
}

impl Greeted {
    pub(super) const fn connection(&self) -> &Connection {
        &self.connection
    }
}

/// Exchanges hellos, or closes the connection.
pub(super) async fn greet(
    connection: Connection,
    side: Side,
    us: &Identity,
    peer: &Identity,
    counters: &LinkCounters,
) -> Result<Greeted, Ended> {
    let greeting = exchange(&connection, side, us, peer);
    let refused = match timeout(HELLO_TIMEOUT, greeting).await {
        Ok(Ok((control_send, control_recv, log_send))) => {
            return Ok(Greeted {
                connection,
                control_send,
                control_recv,
                log_send,
            });
        }
        Ok(Err(reason)) => reason,
        Err(_) => Some(CloseReason::Silent),
    };
    Err(match refused {
        Some(reason) => {
            counters.refused_peers.add(1);
            reason.close(&connection);
            Ended::ByUs(reason)
        }
        None => Ended::from(&connection.closed().await),
    })
}

type Streams = (SendStream, FrameReader, SendStream);

/// `Err(Some)` when the peer is at fault, `Err(None)` when the connection is gone.
async fn exchange(
    connection: &Connection,
    side: Side,
    us: &Identity,
    peer: &Identity,
) -> Result<Streams, Option<CloseReason>> {
    let gone = |_| None;
    let (mut send, mut recv) = match side {
        Side::Dialled => connection.open_bi().await.map_err(gone)?,
        Side::Accepted => connection.accept_bi().await.map_err(gone)?,
    };
    // Fails only when the stream is gone, which the next write shows.
    let _ = send.set_priority(StreamKind::Control.priority());
    match side {
        Side::Dialled => {
            let kind = [StreamKind::Control.byte()];
            send.write_all(&kind).await.map_err(|_| None)?;
        }
        Side::Accepted => expect_kind(&mut recv, StreamKind::Control).await?,
    }
    let mut recv = FrameReader::new(recv);
    let hello = Hello {
        version: VERSION,
        name: us.name.clone(),
    };
    let say = frame::encode(&hello, HELLO_MAX).map_err(|_| None)?;
    if side == Side::Dialled {
        send.write_chunk(say.clone()).await.map_err(|_| None)?;
    }
    match recv.next::<Hello>(HELLO_MAX).await {
        Ok(Some(hello)) if hello.version != VERSION => return Err(Some(CloseReason::WrongVersion)),
        Ok(Some(hello)) if hello.name != peer.name => return Err(Some(CloseReason::WrongName)),
        Ok(Some(_)) => {}
        Ok(None) => return Err(Some(CloseReason::Garbage)),
        Err(error) => return Err(error.blame()),
    }
    if side == Side::Accepted {
        send.write_chunk(say).await.map_err(|_| None)?;
    }
    let mut log_send = connection.open_uni().await.map_err(gone)?;
    let _ = log_send.set_priority(StreamKind::Log.priority());
    let kind = [StreamKind::Log.byte()];
    log_send.write_all(&kind).await.map_err(|_| None)?;
    Ok((send, recv, log_send))
}

async fn expect_kind(recv: &mut RecvStream, kind: StreamKind) -> Result<(), Option<CloseReason>> {
    let mut first = [0];
    recv.read_exact(&mut first).await.map_err(|_| None)?;
    if first == [kind.byte()] {
        Ok(())
    } else {
        Err(Some(CloseReason::Garbage))
    }
}

/// Starts the tasks of the lanes. They end, all together, with the returned set.
pub(super) fn start<M: LinkMessage>(
    greeted: Greeted,
    id: SessionId,
    peer: &Name,
    events: &mpsc::Sender<LinkEvent<M>>,
    counters: &Arc<LinkCounters>,
) -> (Arc<Session>, JoinSet<Option<CloseReason>>) {
    let Greeted {
        connection,
        control_send,
        control_recv,
        log_send,
    } = greeted;
    let session = Arc::new(Session {
        id,
        connection: connection.clone(),
        control: Outgoing::new(CONTROL_QUEUE_MAX),
        log: Outgoing::new(LOG_QUEUE_MAX),
        counters: Arc::clone(counters),
    });
    let inlet = Inlet {
        peer: peer.clone(),
        id,
        events: events.clone(),
        counters: Arc::clone(counters),
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(write_control(Arc::clone(&session), control_send));
    tasks.spawn(write_log(Arc::clone(&session), log_send));
    tasks.spawn(read_control(inlet.clone(), control_recv));
    tasks.spawn(read_log(inlet.clone(), connection.clone()));
    tasks.spawn(read_datagrams(inlet, connection));
    (session, tasks)
}

async fn write_control(session: Arc<Session>, mut send: SendStream) -> Option<CloseReason> {
    loop {
        let mut frames = session.control.take().await;
        let bytes = frames.iter().map(Bytes::len).sum();
        session.counters.control_bytes.add(bytes);
        if send.write_all_chunks(&mut frames).await.is_err() {
            return None;
        }
    }
}

async fn write_log(session: Arc<Session>, mut send: SendStream) -> Option<CloseReason> {
    let mut compressor = match Compressor::new() {
        Ok(compressor) => compressor,
        Err(error) => {
            tracing::error!(%error, "zstd cannot be started");
            return Some(CloseReason::Done);
        }
    };
    loop {
        let frames = session.log.take().await;
        let raw = frames.iter().map(Bytes::len).sum();
        let chunk = match compressor.write(&frames) {
            Ok(chunk) => chunk,
            Err(error) => {
                tracing::error!(%error, "zstd failed");
                return Some(CloseReason::Done);
            }
        };
        session.counters.log_bytes_raw.add(raw);
        session.counters.log_bytes_sent.add(chunk.len());
        if send.write_chunk(chunk).await.is_err() {
            return None;
        }
    }
}

/// Where what was received goes.
struct Inlet<M> {
    peer: Name,
    id: SessionId,
    events: mpsc::Sender<LinkEvent<M>>,
    counters: Arc<LinkCounters>,
}

impl<M> Clone for Inlet<M> {
    fn clone(&self) -> Self {
        Self {
            peer: self.peer.clone(),
            id: self.id,
            events: self.events.clone(),
            counters: Arc::clone(&self.counters),
        }
    }
}

impl<M: LinkMessage> Inlet<M> {
    /// Hands a message on; fails when nobody listens any more.
    async fn deliver(&self, message: M) -> Result<(), Option<CloseReason>> {
        let event = LinkEvent::Message {
            peer: self.peer.clone(),
            session: self.id,
            message,
        };
        self.events
            .send(event)
            .await
            .map_err(|_| Some(CloseReason::Done))
    }
}

/// What to close for after a failed read.
fn blame(error: &FrameError) -> Option<CloseReason> {
    error.blame()
}

async fn read_control<M: LinkMessage>(
    inlet: Inlet<M>,
    mut recv: FrameReader,
) -> Option<CloseReason> {
    loop {
        match recv.next::<M>(CONTROL_MESSAGE_MAX).await {
            Ok(Some(message)) => {
                if let Err(reason) = inlet.deliver(message).await {
                    return reason;
                }
            }
            Ok(None) => return Some(CloseReason::Done),
            Err(error) => return blame(&error),
        }
    }
}

async fn read_log<M: LinkMessage>(inlet: Inlet<M>, connection: Connection) -> Option<CloseReason> {
    match read_log_stream(&inlet, &connection).await {
        Ok(()) => Some(CloseReason::Done),
        Err(reason) => reason,
    }
}

async fn read_log_stream<M: LinkMessage>(
    inlet: &Inlet<M>,
    connection: &Connection,
) -> Result<(), Option<CloseReason>> {
    let mut recv = connection.accept_uni().await.map_err(|_| None)?;
    expect_kind(&mut recv, StreamKind::Log).await?;
    let mut decompressor = Decompressor::new().map_err(|_| Some(CloseReason::Done))?;
    let mut plain = BytesMut::new();
    while let Some(chunk) = recv.read_chunk(READ_MAX, true).await.map_err(|_| None)? {
        inlet.counters.log_bytes_received.add(chunk.bytes.len());
        let mut input = &chunk.bytes[..];
        loop {
            let (used, made) = decompressor
                .read(input, &mut plain)
                .map_err(|_| Some(CloseReason::Garbage))?;
            input = input.get(used..).unwrap_or_default();
            // After every block, so that a small input cannot fill the memory.
            while let Some(bytes) =
                frame::split(&mut plain, LOG_MESSAGE_MAX).map_err(|e| blame(&e))?
            {
                let message = frame::decode(&bytes).map_err(|e| blame(&e))?;
                inlet.deliver(message).await?;
            }
            if input.is_empty() && made == 0 {
                break;
            }
        }
    }
    Ok(())
}

async fn read_datagrams<M: LinkMessage>(
    inlet: Inlet<M>,
    connection: Connection,
) -> Option<CloseReason> {
    while let Ok(bytes) = connection.read_datagram().await {
        match frame::decode(&bytes) {
            Ok(message) => {
                if let Err(reason) = inlet.deliver(message).await {
                    return reason;
                }
            }
            Err(error) => return blame(&error),
        }
    }
    None
}
