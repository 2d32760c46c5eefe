//! A gateway, its clients and a small cluster of copies of one guest: primaries die under load, and
//! no client notices.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, LogIndex, Term};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};

use super::guest::{COUNT, Guest, stack_config};
use crate::agent::certs::Name;
use crate::agent::frame_streams::FrameStreams;
use crate::agent::frames::{FrameLimits, FramePort};
use crate::gateway::frames::{Boot, Message as _, Refusal, ToGateway};
use crate::gateway::stream::MessageStream;
use crate::gateway::{Dial, Gateway, GatewayConfig, GatewayMetrics, Publish, Reign};
use crate::protocol::{Time, VmName};

pub(super) const COPIES: usize = 3;

pub(super) fn vm() -> VmName {
    VmName::new("ledger").expect("a name")
}

/// The gateway's name, in its certificate too.
pub(super) fn name() -> Name {
    "gateway".parse().expect("a name")
}

/// What happened to the guest: something arrived, or only time passed.
#[derive(Clone)]
struct Happened {
    at: Time,
    frame: Option<(FrameSource, Bytes)>,
}

struct Copy<S> {
    streams: FrameStreams<S>,
    guest: Guest,
    log: Vec<Happened>,
    executed: usize,
    outputs: u64,
    unreleased: Vec<(FrameNumber, Bytes)>,
}

impl<S: Stream> Copy<S> {
    fn new() -> Self {
        let port = FramePort::new(vm(), Boot([1; 16]), FrameLimits::default());
        Self {
            streams: FrameStreams::new(port),
            guest: Guest::new(),
            log: Vec::new(),
            executed: 0,
            outputs: 0,
            unreleased: Vec::new(),
        }
    }

    fn execute(&mut self) {
        while let Some(next) = self.log.get(self.executed) {
            self.executed += 1;
            let frame = next.frame.as_ref().map(|(_, frame)| frame.clone());
            for frame in self.guest.step(frame, next.at) {
                self.outputs += 1;
                self.unreleased.push((FrameNumber(self.outputs), frame));
            }
        }
    }

    fn release(&mut self) {
        for (number, frame) in self.unreleased.drain(..) {
            self.streams.port.output(number, frame);
        }
    }
}

/// What the agents' end of a stream can do.
pub(super) trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

pub(super) enum Order {
    Kill(oneshot::Sender<()>),
    /// As soon as the primary has something in its log that nobody else has.
    KillBusy(oneshot::Sender<()>),
    Totals(oneshot::Sender<(u64, u64, u64)>),
}

/// Copies of one guest, with an agent's end of the frames each. Whoever reigns is announced.
pub(super) struct Cluster<S> {
    copies: Vec<Copy<S>>,
    primary: usize,
    term: Term,
    started: Instant,
    reigns: mpsc::Sender<Reign<usize>>,
    /// Ships after every arrival instead of every millisecond.
    at_once: bool,
    /// The primary dies when it next has a log that nobody else has.
    doomed: Option<oneshot::Sender<()>>,
}

impl<S: Stream> Cluster<S> {
    pub(super) fn new(copies: usize, at_once: bool, reigns: mpsc::Sender<Reign<usize>>) -> Self {
        Self {
            copies: (0..copies).map(|_| Copy::new()).collect(),
            primary: 0,
            term: Term(1),
            started: Instant::now(),
            reigns,
            at_once,
            doomed: None,
        }
    }

    fn now(&self) -> Time {
        Time::from_nanos(self.started.elapsed().as_nanos() as u64)
    }

    pub(super) async fn run(
        mut self,
        mut opened: mpsc::Receiver<(usize, S)>,
        mut orders: mpsc::Receiver<Order>,
    ) {
        self.lead().await;
        let mut ship = tokio::time::interval(Duration::from_millis(1));
        loop {
            let now = self.now();
            let copies = &mut self.copies;
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    None => return,
                    Some(Order::Kill(done)) => {
                        self.kill().await;
                        let _ = done.send(());
                    }
                    Some(Order::KillBusy(done)) => self.doomed = Some(done),
                    Some(Order::Totals(answer)) => {
                        let primary = &self.copies[self.primary];
                        let totals = (primary.guest.frames, primary.outputs, primary.guest.lines);
                        let _ = answer.send(totals);
                    }
                },
                stream = opened.recv() => {
                    let (host, stream) = stream.expect("the gateway outlives the cluster");
                    self.copies[host].streams.accept(stream, &name(), now);
                }
                () = poll_fn(|cx| {
                    let mut news = Poll::Pending;
                    for copy in copies.iter_mut() {
                        while copy.streams.port.poll_event().is_some() {}
                        if copy.streams.poll(cx, now).is_ready() {
                            news = Poll::Ready(());
                        }
                    }
                    news
                }) => {
                    if self.take_arrivals(now)
                        && let Some(done) = self.doomed.take()
                    {
                        self.kill().await;
                        let _ = done.send(());
                    }
                    if self.at_once {
                        self.ship(now);
                    }
                }
                _ = ship.tick() => self.ship(now),
            }
        }
    }

    /// Says whether there were any.
    fn take_arrivals(&mut self, now: Time) -> bool {
        let primary = &mut self.copies[self.primary];
        let before = primary.log.len();
        while let Some((source, frame)) = primary.streams.port.poll_arrival() {
            primary.log.push(Happened {
                at: now,
                frame: Some((source, frame)),
            });
            let end = LogIndex(primary.log.len() as u64);
            primary.streams.port.logged(source, end);
        }
        primary.execute();
        primary.log.len() > before
    }

    fn ship(&mut self, now: Time) {
        let primary = &mut self.copies[self.primary];
        if primary.guest.wake_at(now).is_some_and(|due| due <= now) {
            primary.log.push(Happened {
                at: now,
                frame: None,
            });
            primary.execute();
        }
        let log = std::mem::take(&mut primary.log);
        let end = LogIndex(log.len() as u64);
        primary.streams.port.committed(end, now);
        primary.release();
        let watermark = primary.streams.port.received_by_all();
        for (index, copy) in self.copies.iter_mut().enumerate() {
            if index != self.primary {
                copy.log.extend_from_slice(&log[copy.log.len()..]);
                copy.execute();
                copy.release();
                copy.streams.port.forget(watermark);
            }
        }
        self.copies[self.primary].log = log;
    }

    /// The primary is gone with all it did not ship; a fresh copy takes its place.
    async fn kill(&mut self) {
        let dead = self.primary;
        self.copies[dead] = Copy::new();
        self.primary = (dead + 1) % self.copies.len();
        self.term = self.term.next();
        self.lead().await;
    }

    async fn lead(&mut self) {
        let (term, now) = (self.term, self.now());
        let primary = &mut self.copies[self.primary];
        let logged: std::collections::BTreeMap<_, _> = primary
            .log
            .iter()
            .filter_map(|happened| happened.frame.as_ref())
            .map(|(source, _)| (source.gateway, source.number))
            .collect();
        primary.streams.port.lead(term, logged, now);
        for (index, copy) in self.copies.iter_mut().enumerate() {
            if index != self.primary {
                copy.streams.port.follow(term);
            }
        }
        let reign = Reign {
            term,
            primary: self.primary,
        };
        self.reigns.send(reign).await.expect("a gateway");
    }
}

/// Opens streams to the cluster in the same process.
struct InProcess {
    opened: mpsc::Sender<(usize, DuplexStream)>,
}

impl Dial for InProcess {
    type Host = usize;
    type Stream = DuplexStream;

    fn open(
        &self,
        host: &usize,
    ) -> impl Future<Output = io::Result<DuplexStream>> + Send + 'static + use<> {
        let (opened, host) = (self.opened.clone(), *host);
        async move {
            let (near, far) = tokio::io::duplex(8 * 1024);
            let accepted = opened.send((host, far)).await;
            accepted.map_err(|_| io::ErrorKind::ConnectionRefused)?;
            Ok(near)
        }
    }
}

struct Setup {
    address: SocketAddr,
    metrics: Arc<GatewayMetrics>,
    orders: mpsc::Sender<Order>,
}

/// A gateway that has bound a port.
async fn gateway() -> Gateway {
    let publish = vec![Publish {
        host: ([127, 0, 0, 1], 0).into(),
        guest_port: COUNT,
    }];
    Gateway::bind(GatewayConfig::new(publish, stack_config()))
        .await
        .expect("a port")
}

async fn start() -> Setup {
    let gateway = gateway().await;
    let (opened, streams) = mpsc::channel(4);
    let (reigns, news) = mpsc::channel(4);
    let (orders, received) = mpsc::channel(4);
    let setup = Setup {
        address: gateway.addresses()[0],
        metrics: gateway.metrics(),
        orders,
    };
    let cluster = Cluster::new(COPIES, false, reigns);
    tokio::spawn(cluster.run(streams, received));
    tokio::spawn(gateway.run(vm(), name(), InProcess { opened }, news));
    setup
}

/// One client: asks, waits for the answer, again and again. Answers must rise.
pub(super) async fn count(address: SocketAddr, questions: usize) -> u64 {
    let socket = TcpStream::connect(address).await.expect("a connection");
    let (reader, mut writer) = socket.into_split();
    let mut answers = BufReader::new(reader).lines();
    let mut last = 0;
    for _ in 0..questions {
        writer.write_all(b"one more\n").await.expect("written");
        let answer = answers.next_line().await.expect("the connection lives");
        let answer: u64 = answer
            .expect("an answer")
            .parse()
            .expect("a number, whole and alone");
        assert!(answer > last, "{answer} came after {last}");
        last = answer;
    }
    last
}

#[tokio::test]
async fn clients_do_not_notice_that_primaries_die() {
    const CLIENTS: usize = 20;
    const QUESTIONS: usize = 300;
    const KILLS: usize = 12;
    let setup = start().await;
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| tokio::spawn(count(setup.address, QUESTIONS)))
        .collect();
    for kill in 1..=KILLS {
        // Each kill comes when some more frames have passed, so all of them come under load.
        let due = (kill * CLIENTS * QUESTIONS / (KILLS + 2)) as u64;
        while setup.metrics.read().frames_from_guest < due {
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
        let (done, killed) = oneshot::channel();
        let busy = Order::KillBusy(done);
        setup.orders.send(busy).await.expect("sent");
        killed.await.expect("killed");
    }
    let mut highest = 0;
    for client in clients {
        let last = tokio::time::timeout(Duration::from_mins(1), client)
            .await
            .expect("it does not hang")
            .expect("a client");
        highest = highest.max(last);
    }
    assert_eq!(highest, (CLIENTS * QUESTIONS) as u64);
    // Both sides agree on every frame: none was lost, none came twice.
    let settle = async {
        loop {
            let (answer, totals) = oneshot::channel();
            setup
                .orders
                .send(Order::Totals(answer))
                .await
                .expect("sent");
            let (frames, outputs, lines) = totals.await.expect("totals");
            assert_eq!(lines, (CLIENTS * QUESTIONS) as u64);
            let counts = setup.metrics.read();
            let settled = counts.clients == 0
                && counts.frames_to_guest == frames
                && counts.frames_from_guest == outputs
                && counts.uncommitted_bytes == 0;
            if settled {
                return (frames, outputs);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (frames, outputs) = tokio::time::timeout(Duration::from_secs(10), settle)
        .await
        .expect("both sides count the same");
    let counts = setup.metrics.read();
    assert_eq!(counts.term, KILLS as u64 + 1);
    assert_eq!(counts.clients_reset, 0);
    assert_eq!(counts.fresh_starts, 0);
    assert!(counts.resent > 0, "no kill hit a frame on its way");
    println!("{frames} frames to the guest, {outputs} from it: {counts:?}");
}

/// The first primary that is asked says that another gateway has the address.
#[tokio::test]
async fn clients_that_are_connecting_do_not_notice_that_the_address_is_taken() {
    let gateway = gateway().await;
    let (address, metrics) = (gateway.addresses()[0], gateway.metrics());
    let (opened, mut asked) = mpsc::channel::<(usize, DuplexStream)>(4);
    let (forward, streams) = mpsc::channel(4);
    let (reigns, news) = mpsc::channel(4);
    let (_orders, received) = mpsc::channel(4);
    tokio::spawn(Cluster::new(COPIES, false, reigns).run(streams, received));
    tokio::spawn(gateway.run(vm(), name(), InProcess { opened }, news));

    let (_, first) = asked.recv().await.expect("the gateway asks");
    let clients: Vec<_> = (0..10).map(|_| tokio::spawn(count(address, 3))).collect();
    let accepted = async {
        while metrics.read().clients_accepted < 10 {
            tokio::task::yield_now().await;
        }
    };
    let accepted = tokio::time::timeout(Duration::from_secs(10), accepted).await;
    accepted.expect("ten clients connect");
    let mut first = MessageStream::new(first);
    let refused = ToGateway::Refused {
        term: Term(1),
        why: Refusal::AddressTaken,
    };
    refused.encode(&mut first.outgoing);
    let flushed = poll_fn(|cx| first.poll_flush(cx)).await;
    flushed.expect("written");
    tokio::spawn(async move {
        while let Some(stream) = asked.recv().await {
            if forward.send(stream).await.is_err() {
                return;
            }
        }
    });
    for client in clients {
        let counted = tokio::time::timeout(Duration::from_mins(1), client).await;
        counted.expect("it does not hang").expect("a client");
    }
    let counts = metrics.read();
    assert_eq!((counts.fresh_starts, counts.clients_reset), (1, 0));
}
