//! Carries frames between the stack and whichever host the record's keeper names as primary.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::Ipv4Addr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use replay_log::{GatewayIncarnation, Term};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::device::MAX_ETHERNET_FRAME;
use super::frames::{Hello, Message, SessionId, ToAgent};
use super::metrics::{GatewayMetrics, set};
use super::port::{GatewayPort, PortAction, PortCounters, PortError};
use super::pump::{Carrier, HistoryLost};
use super::stream::{MessageStream, WRITE_BUDGET};
use crate::protocol::{Time, VmName};

/// How many streams of past terms are still listened to, so that what comes on them is counted.
const MOST_LINGERING: usize = 4;

/// Who reigns, as the record's keeper says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reign<H> {
    /// The term.
    pub term: Term,
    /// The primary's host.
    pub primary: H,
}

/// How streams to hosts are opened.
pub trait Dial: Send + 'static {
    /// What names a host.
    type Host: Clone + PartialEq + std::fmt::Display + Send + 'static;
    /// A byte stream for one session. Its end is told by shutting down and by dropping it.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// Opens a stream to the agent of a host. Quick where a connection is warm.
    fn open(
        &self,
        host: &Self::Host,
    ) -> impl Future<Output = io::Result<Self::Stream>> + Send + 'static + use<Self>;
}

struct Opening<S> {
    session: SessionId,
    hello: Hello,
    stream: Pin<Box<dyn Future<Output = io::Result<S>> + Send>>,
}

pub(super) struct ClusterCarrier<D: Dial> {
    vm: VmName,
    most_bytes: usize,
    port: GatewayPort<D::Host>,
    dial: D,
    reigns: mpsc::Receiver<Reign<D::Host>>,
    opening: Option<Opening<D::Stream>>,
    current: Option<(SessionId, MessageStream<D::Stream>)>,
    lingering: VecDeque<(SessionId, MessageStream<D::Stream>)>,
    /// What the ports of earlier incarnations counted.
    before: PortCounters,
}

impl<D: Dial> ClusterCarrier<D> {
    pub(super) fn new(
        vm: VmName,
        most_bytes: usize,
        dial: D,
        reigns: mpsc::Receiver<Reign<D::Host>>,
    ) -> Self {
        Self {
            port: GatewayPort::new(
                vm.clone(),
                GatewayIncarnation::default(),
                Ipv4Addr::UNSPECIFIED,
                most_bytes,
            ),
            vm,
            most_bytes,
            dial,
            reigns,
            opening: None,
            current: None,
            lingering: VecDeque::new(),
            before: PortCounters::default(),
        }
    }

    fn act(&mut self) {
        while let Some(action) = self.port.poll_action() {
            match action {
                PortAction::Open {
                    session,
                    host,
                    hello,
                } => {
                    tracing::debug!(%host, term = hello.term.0, "asking for frames");
                    self.opening = Some(Opening {
                        session,
                        hello,
                        stream: Box::pin(self.dial.open(&host)),
                    });
                }
                PortAction::Close { session } => self.close(session),
            }
        }
    }

    fn close(&mut self, session: SessionId) {
        if self.opening.as_ref().is_some_and(|o| o.session == session) {
            self.opening = None;
        }
        if let Some((id, mut stream)) = self.current.take_if(|(id, _)| *id == session) {
            stream.outgoing.clear();
            self.lingering.push_back((id, stream));
            if self.lingering.len() > MOST_LINGERING {
                self.lingering.pop_front();
            }
        }
    }

    fn poll_opening(&mut self, cx: &mut Context<'_>, now: Time) {
        let Some(opening) = &mut self.opening else {
            return;
        };
        let Poll::Ready(outcome) = opening.stream.as_mut().poll(cx) else {
            return;
        };
        let Some(Opening { session, hello, .. }) = self.opening.take() else {
            return;
        };
        match outcome {
            Ok(stream) => {
                let mut stream = MessageStream::new(stream);
                ToAgent::Hello(hello).encode(&mut stream.outgoing);
                self.current = Some((session, stream));
            }
            Err(error) => {
                tracing::debug!(%error, "the primary cannot be reached");
                self.port.lost(session, now);
            }
        }
    }

    fn poll_current(
        &mut self,
        cx: &mut Context<'_>,
        now: Time,
        frames: &mut Vec<Bytes>,
    ) -> Result<(), HistoryLost> {
        while let Some((session, stream)) = &mut self.current {
            let session = *session;
            match stream.poll_message(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(Ok(Some(message))) => {
                    match self.port.handle(session, message, now) {
                        Ok(frame) => frames.extend(frame),
                        Err(PortError::HistoryLost { why }) => return Err(HistoryLost(why)),
                        Err(error @ PortError::Broken { .. }) => {
                            tracing::warn!(%error, "the session is closed");
                        }
                    }
                    // It may have closed the session.
                    self.act();
                }
                Poll::Ready(Ok(None)) => self.end_current(now, None),
                Poll::Ready(Err(error)) => self.end_current(now, Some(&error)),
            }
        }
        Ok(())
    }

    fn end_current(&mut self, now: Time, error: Option<&dyn std::fmt::Display>) {
        if let Some((session, _)) = self.current.take() {
            let error = error.map(tracing::field::display);
            tracing::info!(error, "the primary's stream has ended");
            self.port.lost(session, now);
        }
    }

    /// What still comes on streams of past terms is counted and dropped.
    fn poll_lingering(&mut self, cx: &mut Context<'_>, now: Time) {
        let port = &mut self.port;
        self.lingering.retain_mut(|(session, stream)| {
            // The agent is told that this side is done; when does not matter.
            let _ = stream.poll_finish(cx);
            loop {
                match stream.poll_message(cx) {
                    Poll::Pending => return true,
                    Poll::Ready(Ok(Some(message))) => {
                        // Of no current session: neither a frame nor an error comes of it.
                        let _ = port.handle(*session, message, now);
                    }
                    Poll::Ready(Ok(None) | Err(_)) => return false,
                }
            }
        });
    }
}

impl<D: Dial> Carrier for ClusterCarrier<D> {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        now: Time,
        frames: &mut Vec<Bytes>,
    ) -> Result<(), HistoryLost> {
        // When the channel is closed nobody will tell of a new term; the present one goes on.
        while let Poll::Ready(Some(reign)) = self.reigns.poll_recv(cx) {
            self.port.reign(reign.term, reign.primary, now);
        }
        if self.port.poll_timeout().is_some_and(|due| due <= now) {
            self.port.handle_timeout(now);
        }
        self.act();
        self.poll_opening(cx, now);
        let outcome = self.poll_current(cx, now, frames);
        self.poll_lingering(cx, now);
        outcome
    }

    fn gathers(&self) -> bool {
        true
    }

    fn room(&self) -> usize {
        let left = self
            .most_bytes
            .saturating_sub(self.port.unforgotten_bytes());
        left.div_ceil(MAX_ETHERNET_FRAME)
    }

    fn send(&mut self, frame: Bytes) {
        self.port.send(frame);
    }

    fn flush(&mut self, cx: &mut Context<'_>, now: Time) {
        while let Some((session, stream)) = &mut self.current {
            self.port
                .transmit(*session, &mut stream.outgoing, WRITE_BUDGET);
            if stream.outgoing.is_empty() {
                return;
            }
            match stream.poll_flush(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => self.end_current(now, Some(&error)),
            }
        }
    }

    fn poll_timeout(&self) -> Option<Time> {
        self.port.poll_timeout()
    }

    fn begin(&mut self, incarnation: GatewayIncarnation, address: Ipv4Addr, now: Time) {
        self.before = self.before.plus(self.port.counters());
        let reign = self.port.reigning().cloned();
        self.opening = None;
        self.current = None;
        self.lingering.clear();
        self.port = GatewayPort::new(self.vm.clone(), incarnation, address, self.most_bytes);
        if let Some((term, primary)) = reign {
            self.port.go_on_with(term, primary, now);
        }
    }

    fn report(&self, metrics: &GatewayMetrics) {
        let counters = self.before.plus(self.port.counters());
        set(&metrics.frames_to_guest, counters.frames_to_guest);
        set(&metrics.bytes_to_guest, counters.bytes_to_guest);
        set(&metrics.frames_from_guest, counters.frames_from_guest);
        set(&metrics.bytes_from_guest, counters.bytes_from_guest);
        set(&metrics.resent, counters.resent);
        set(&metrics.duplicates, counters.duplicates);
        set(&metrics.dropped_old_term, counters.dropped_old_term);
        set(&metrics.welcomes, counters.welcomes);
        let waiting = self.port.unforgotten_bytes() as u64;
        set(&metrics.uncommitted_bytes, waiting);
        let term = self.port.reigning().map_or(0, |(term, _)| term.0);
        set(&metrics.term, term);
        set(&metrics.welcomed, u64::from(self.port.is_welcomed()));
    }
}
