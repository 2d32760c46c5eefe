//! Connects a [`FramePort`] to the byte streams that gateways open. Polled by the driver's task,
//! which owns it; no task and no channel of its own.
//!
//! ```ignore
//! loop {
//!     tokio::select! {
//!         stream = incoming.recv() => frames.accept(stream),
//!         () = poll_fn(|cx| frames.poll(cx, now())) => {}
//!         output = vmm.recv() => frames.port.output(number, bytes),
//!     }
//!     while let Some((source, bytes)) = frames.port.poll_arrival() { vmm.deliver(source, bytes) }
//! }
//! ```
//!
//! What the port has to say is written when [`FrameStreams::poll`] runs next, so a loop that comes
//! back to it after every input sends everything at once.

use std::collections::HashMap;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Sleep;

use super::frames::FramePort;
use crate::gateway::frames::{SessionId, ToAgent};
use crate::gateway::stream::{MessageStream, WRITE_BUDGET};
use crate::protocol::Time;

struct Stream<S> {
    messages: MessageStream<S>,
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
    timer: Option<(Time, Pin<Box<Sleep>>)>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> FrameStreams<S> {
    /// No streams yet.
    pub fn new(port: FramePort) -> Self {
        Self {
            port,
            streams: HashMap::new(),
            next_session: 1,
            timer: None,
        }
    }

    /// A gateway has opened a stream.
    pub fn accept(&mut self, stream: S) {
        let session = SessionId(self.next_session);
        self.next_session += 1;
        self.port.connected(session);
        self.streams.insert(
            session,
            Stream {
                messages: MessageStream::new(stream),
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
        loop {
            if self.port.poll_timeout().is_some_and(|due| due <= now) {
                self.port.handle_timeout(now);
            }
            let port = &mut self.port;
            self.streams.retain(|session, stream| {
                let lives = stream.read(*session, port, cx) && stream.write(*session, port, cx);
                if !lives {
                    port.disconnected(*session, now);
                }
                lives
            });
            if self.port.has_news() {
                return Poll::Ready(());
            }
            if !self.timer_is_due(cx, now) {
                return Poll::Pending;
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
