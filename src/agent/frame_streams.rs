//! Connects a [`FramePort`] to the byte streams that gateways open. Polled by the driver's task,
//! which owns it; no task and no channel of its own.
//!
//! ```ignore
//! loop {
//!     tokio::select! {
//!         (stream, who) = incoming.recv() => frames.accept(stream, &who, now()),
//!         () = poll_fn(|cx| frames.poll(cx, now())) => {}
//!         output = vmm.recv() => frames.port.output(number, bytes),
//!     }
//!     while let Some((source, bytes)) = frames.port.poll_arrival() { vmm.deliver(source, bytes) }
//! }
//! ```
//!
//! What the port has to say is written when [`FrameStreams::poll`] runs next, so a loop that comes
//! back to it after every input sends everything at once. Sessions that are not served are looked at
//! when something happens on them and never else: however many there are, they cost no turn.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake as _, Waker};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::time::Sleep;

use super::certs::{Name, Role};
use super::frames::FramePort;
use super::link::{CloseReason, IncomingStream};
use crate::gateway::frames::{Message as _, SessionId, ToAgent};
use crate::gateway::ready::{Ready, ReadyWaker};
use crate::gateway::stream::{MessageStream, WRITE_BUDGET};
use crate::protocol::{Time, VmName};

/// How long a gateway may take to say hello on a stream that it has opened.
const HELLO_WITHIN: Duration = Duration::from_secs(3);

/// No hello is longer, in bytes: it holds a name and a few numbers.
const HELLO_MAX: usize = 512;

/// Reads the hello on a stream that a peer has opened, to know which VM it is for. Gives the VM and
/// the stream whole: what was read comes again. `None` when no hello comes in time or it is none;
/// a peer that is no gateway loses its connection.
pub async fn greet(stream: IncomingStream) -> Option<(VmName, Name, GatewayStream)> {
    if stream.from.role != Role::Gateway {
        tracing::warn!(from = %stream.from, "opens a stream for frames, and is no gateway");
        CloseReason::WrongRole.close(&stream.connection);
        return None;
    }
    let IncomingStream {
        from,
        send,
        mut recv,
        ..
    } = stream;
    let hello = tokio::time::timeout(HELLO_WITHIN, read_hello(&mut recv)).await;
    let Ok(Some((vm, head))) = hello else {
        tracing::debug!(%from, "a stream for frames is closed: it does not begin with a hello");
        return None;
    };
    let recv = AsyncReadExt::chain(std::io::Cursor::new(head), recv);
    Some((vm, from.name, tokio::io::join(recv, send)))
}

/// The VM of a hello, and the bytes that were read to know it.
async fn read_hello(stream: &mut (impl AsyncRead + Unpin)) -> Option<(VmName, Bytes)> {
    let mut head = BytesMut::new();
    loop {
        match ToAgent::decode(&mut head.clone()) {
            Ok(Some(ToAgent::Hello(hello))) => return Some((hello.vm, head.freeze())),
            Ok(None) if head.len() < HELLO_MAX => {}
            _ => return None,
        }
        if !stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {
            return None;
        }
    }
}

/// A gateway's stream, whole: what was read of it to know the VM comes again.
pub type GatewayStream =
    tokio::io::Join<tokio::io::Chain<std::io::Cursor<Bytes>, quinn::RecvStream>, quinn::SendStream>;

struct Stream<S> {
    messages: MessageStream<S>,
    waker: Arc<ReadyWaker<SessionId>>,
    /// Nothing more is read; it ends when everything is written.
    ending: bool,
}

/// The streams of all gateways of one VM.
pub struct FrameStreams<S> {
    /// The state that is served. Whatever is done to it takes effect on the streams at the next
    /// [`FrameStreams::poll`].
    pub port: FramePort,
    streams: HashMap<SessionId, Stream<S>>,
    next_session: u64,
    ready: Arc<Ready<SessionId>>,
    timer: Option<(Time, Pin<Box<Sleep>>)>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> FrameStreams<S> {
    /// No streams yet.
    pub fn new(port: FramePort) -> Self {
        Self {
            port,
            streams: HashMap::new(),
            next_session: 1,
            ready: Arc::default(),
            timer: None,
        }
    }

    /// The gateway of this name, by its certificate, has opened a stream.
    pub fn accept(&mut self, stream: S, who: &Name, now: Time) {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        self.port.connected(session, who, now);
        let waker = ReadyWaker::new(session, &self.ready);
        // It is looked at for the first time in the next turn.
        waker.wake_by_ref();
        self.streams.insert(
            session,
            Stream {
                messages: MessageStream::new(stream),
                waker,
                ending: false,
            },
        );
    }

    /// How many streams there are.
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether there is no stream.
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Reads and writes what can be read and written. Ready when there is an arrival or an event to
    /// be taken from the port; pending (and woken later) when there is not.
    pub fn poll(&mut self, cx: &mut Context<'_>, now: Time) -> Poll<()> {
        self.port.tell_time(now);
        loop {
            if self.port.poll_timeout().is_some_and(|due| due <= now) {
                self.port.handle_timeout(now);
            }
            self.ready.listen(cx.waker());
            let mut turn: Vec<_> = self.port.welcomed().collect();
            self.ready.take(&mut turn);
            self.look_at(turn, now);
            // What was heard may have changed other sessions.
            while let Some(session) = self.port.poll_changed() {
                self.look_at(vec![session], now);
            }
            if self.port.has_news() {
                return Poll::Ready(());
            }
            if !self.timer_is_due(cx, now) {
                return Poll::Pending;
            }
        }
    }

    fn look_at(&mut self, sessions: Vec<SessionId>, now: Time) {
        for session in sessions {
            let Some(stream) = self.streams.get_mut(&session) else {
                continue;
            };
            if !stream.look(session, &mut self.port) {
                self.streams.remove(&session);
                self.port.disconnected(session, now);
            }
        }
    }

    fn timer_is_due(&mut self, cx: &mut Context<'_>, now: Time) -> bool {
        let Some(at) = self.port.poll_timeout() else {
            self.timer = None;
            return false;
        };
        if at <= now {
            return true;
        }
        let wait = std::time::Duration::from_nanos(at.since(now).as_nanos());
        let deadline = tokio::time::Instant::now() + wait;
        let (set, timer) = self
            .timer
            .get_or_insert_with(|| (at, Box::pin(tokio::time::sleep_until(deadline))));
        if *set != at {
            *set = at;
            timer.as_mut().reset(deadline);
        }
        // The caller's clock decides: it is asked again when this one says so.
        if timer.as_mut().poll(cx).is_ready() {
            self.timer = None;
            cx.waker().wake_by_ref();
        }
        false
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Stream<S> {
    /// Reads and writes what can be. Says whether the stream lives.
    fn look(&mut self, session: SessionId, port: &mut FramePort) -> bool {
        self.waker.unlist();
        let waker = Waker::from(Arc::clone(&self.waker));
        let mut cx = Context::from_waker(&waker);
        !port.is_over(session)
            && self.read(session, port, &mut cx)
            && !port.is_over(session)
            && self.write(session, port, &mut cx)
    }

    /// Says whether the stream lives.
    fn read(&mut self, session: SessionId, port: &mut FramePort, cx: &mut Context<'_>) -> bool {
        while !self.ending && port.wants_input(session) {
            match self.messages.poll_message::<ToAgent>(cx) {
                Poll::Pending => break,
                Poll::Ready(Ok(Some(message))) => {
                    if let Err(error) = port.message(session, message) {
                        tracing::warn!(%error, "a gateway's stream is closed");
                        return false;
                    }
                }
                Poll::Ready(Ok(None)) => return false,
                Poll::Ready(Err(error)) => {
                    tracing::info!(%error, "a gateway's stream has ended");
                    return false;
                }
            }
        }
        true
    }

    /// Says whether the stream lives.
    fn write(&mut self, session: SessionId, port: &mut FramePort, cx: &mut Context<'_>) -> bool {
        loop {
            let outgoing = &mut self.messages.outgoing;
            self.ending |= port.transmit(session, outgoing, WRITE_BUDGET);
            if outgoing.is_empty() {
                break;
            }
            match self.messages.poll_flush(cx) {
                Poll::Pending => return true,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => {
                    tracing::info!(%error, "a gateway's stream has ended");
                    return false;
                }
            }
        }
        // A stream that ends is shut down before it is dropped, or its last words would be lost.
        !(self.ending && self.messages.poll_finish(cx).is_ready())
    }
}

#[cfg(test)]
mod tests;
