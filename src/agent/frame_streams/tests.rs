//! Tests of the streams of many gateways on one task.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use replay_log::{FrameNumber, Term};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

use super::*;
use crate::agent::frames::FrameLimits;
use crate::gateway::frames::{Boot, Hello, ToGateway, incarnation_of};
use crate::protocol::Span;

const START: Time = Time::from_nanos(0);

fn vm() -> VmName {
    VmName::new("vm").expect("a name")
}

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// A stream that counts how often it is polled for reading.
struct Counted {
    stream: DuplexStream,
    reads: Arc<AtomicUsize>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

struct Setup {
    streams: FrameStreams<Counted>,
    reads: Arc<AtomicUsize>,
}

impl Setup {
    fn new(limits: FrameLimits) -> Self {
        let mut port = FramePort::new(vm(), Boot([1; 16]), limits);
        port.follow(Term(1));
        Self {
            streams: FrameStreams::new(port),
            reads: Arc::default(),
        }
    }

    fn open(&mut self, who: &Name) -> MessageStream<DuplexStream> {
        let (near, far) = tokio::io::duplex(1_024);
        let reads = Arc::clone(&self.reads);
        let stream = Counted { stream: far, reads };
        self.streams.accept(stream, who, START);
        MessageStream::new(near)
    }

    /// Everything that can be done is done.
    async fn turn(&mut self, now: Time) {
        let turn = std::future::poll_fn(|cx| {
            while self.streams.poll(cx, now).is_ready() {
                while self.streams.port.poll_event().is_some() {}
            }
            Poll::Ready(())
        });
        tokio::task::unconstrained(turn).await;
    }
}

fn hello(who: &Name, term: u64) -> ToAgent {
    ToAgent::Hello(Hello {
        vm: vm(),
        gateway: incarnation_of(who, 1),
        address: [10, 0, 0, who.as_str().len() as u8].into(),
        term: Term(term),
        received: FrameNumber(0),
    })
}

async fn said(stream: &mut MessageStream<DuplexStream>) -> Option<ToGateway> {
    let heard = std::future::poll_fn(|cx| stream.poll_message(cx));
    let heard = tokio::time::timeout(Duration::from_secs(10), heard).await;
    heard.expect("it answers").expect("a message")
}

#[tokio::test]
async fn sessions_that_wait_cost_no_turn_and_starve_nobody() {
    const SESSIONS: usize = 400;
    let mut setup = Setup::new(FrameLimits {
        sessions_each: SESSIONS,
        ..FrameLimits::default()
    });
    let hog = name("hog");
    let mut waiting = Vec::new();
    for _ in 0..SESSIONS {
        let mut stream = setup.open(&hog);
        hello(&hog, 2).encode(&mut stream.outgoing);
        let flushed = std::future::poll_fn(|cx| stream.poll_flush(cx)).await;
        flushed.expect("written");
        waiting.push(stream);
    }
    setup.turn(START).await;
    let before = setup.reads.load(Ordering::Relaxed);
    assert!(before >= SESSIONS, "every hello is read");
    for _ in 0..1_000 {
        setup.turn(START).await;
    }
    assert_eq!(setup.reads.load(Ordering::Relaxed), before);

    // Another gateway is served as soon as this agent reigns.
    let good = name("good");
    let mut stream = setup.open(&good);
    hello(&good, 2).encode(&mut stream.outgoing);
    let flushed = std::future::poll_fn(|cx| stream.poll_flush(cx)).await;
    flushed.expect("written");
    setup.turn(START).await;
    setup.streams.port.lead(Term(2), [], START);
    setup.turn(START).await;
    let welcome = said(&mut stream).await;
    assert!(matches!(welcome, Some(ToGateway::Welcome { .. })));
}

#[tokio::test]
async fn ten_thousand_idle_sessions_are_bounded_and_end() {
    let mut setup = Setup::new(FrameLimits::default());
    let hog = name("hog");
    let mut idle = Vec::new();
    for _ in 0..10_000 {
        idle.push(setup.open(&hog));
        setup.turn(START).await;
    }
    assert_eq!(setup.streams.len(), FrameLimits::default().sessions_each);
    setup.turn(START.plus(Span::from_millis(3_000))).await;
    assert!(setup.streams.is_empty());
    let mut last = idle.pop().expect("many");
    assert_eq!(said(&mut last).await, None);
}

#[tokio::test]
async fn a_refusal_reaches_the_gateway_before_the_stream_ends() {
    let mut setup = Setup::new(FrameLimits::default());
    let who = name("gateway");
    let mut stream = setup.open(&who);
    hello(&who, 2).encode(&mut stream.outgoing);
    let flushed = std::future::poll_fn(|cx| stream.poll_flush(cx)).await;
    flushed.expect("written");
    setup.turn(START).await;
    setup.turn(START.plus(Span::from_millis(3_000))).await;
    let refused = said(&mut stream).await;
    assert!(matches!(refused, Some(ToGateway::Refused { .. })));
    assert_eq!(said(&mut stream).await, None);
    assert!(setup.streams.is_empty());
}

#[tokio::test]
async fn a_hello_is_read_whole_and_nothing_else_is_one() {
    let mut written = BytesMut::new();
    hello(&name("gateway"), 1).encode(&mut written);
    let written = written.freeze();
    let mut reader = &written[..];
    assert_eq!(read_hello(&mut reader).await, Some((vm(), written.clone())));
    for length in 0..written.len() {
        let mut reader = &written[..length];
        assert_eq!(read_hello(&mut reader).await, None, "{length} bytes");
    }
    let mut nonsense = &[1; 2 * HELLO_MAX][..];
    assert_eq!(read_hello(&mut nonsense).await, None);
}
