//! Floods, and certificates that take more than their share.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::super::accept::CONNECTIONS_EACH;
use super::super::tls;
use super::*;

/// 100 Mbit/s of the smallest first packets.
const FLOOD_PER_SECOND: u32 = 10_400;
const FLOOD: Duration = Duration::from_secs(4);
/// Between two heartbeats.
const BEAT: Duration = Duration::from_millis(20);
/// What a flood may cost in memory, in bytes.
const MEMORY: usize = 32 << 20;

/// Dials as quinn does, but leaves sending and receiving to us.
struct Dialler {
    endpoint: quinn_proto::Endpoint,
    config: quinn::ClientConfig,
}

impl Dialler {
    fn new(credentials: &Credentials) -> Self {
        let crypto = tls::client(credentials, Purpose::Lanes).expect("a configuration");
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[7; 32]);
        let ours = Arc::new(quinn::EndpointConfig::new(Arc::new(key)));
        Self {
            endpoint: quinn_proto::Endpoint::new(ours, None, true, None),
            config: quinn::ClientConfig::new(Arc::new(crypto)),
        }
    }

    fn dial(&mut self, to: SocketAddr) -> Dialled {
        let config = self.config.clone();
        let dialled = self
            .endpoint
            .connect(Instant::now(), config, to, "b.host.understudy");
        let (handle, connection) = dialled.expect("a connection");
        Dialled { handle, connection }
    }
}

struct Dialled {
    handle: quinn_proto::ConnectionHandle,
    connection: quinn_proto::Connection,
}

impl Dialled {
    /// The next packet to be sent.
    fn packet(&mut self) -> Option<Vec<u8>> {
        let mut packet = Vec::new();
        let sent = self
            .connection
            .poll_transmit(Instant::now(), 1, &mut packet);
        sent.map(|_| packet)
    }

    /// Takes the answer to the first packet. The next packet, if the answer wants an address to be
    /// proven.
    fn prove(&mut self, dialler: &mut Dialler, from: SocketAddr, answer: &[u8]) -> Option<Vec<u8>> {
        const RETRY: u8 = 0xf0;
        if answer.first()? & 0xf0 != RETRY {
            return None;
        }
        let (now, data) = (Instant::now(), bytes::BytesMut::from(answer));
        let event = dialler
            .endpoint
            .handle(now, from, None, None, data, &mut Vec::new())?;
        let quinn_proto::DatagramEvent::ConnectionEvent(handle, event) = event else {
            return None;
        };
        assert_eq!(handle, self.handle);
        self.connection.handle_event(event);
        self.packet()
    }

    /// It is gone, and nobody is told.
    fn forget(self, dialler: &mut Dialler) {
        let drained = quinn_proto::EndpointEvent::drained();
        let _ = dialler.endpoint.handle_event(self.handle, drained);
    }
}

/// Whole first packets, each with a connection id and a ClientHello of its own.
fn first_packets(credentials: &Credentials, to: SocketAddr, count: usize) -> Vec<Vec<u8>> {
    let mut dialler = Dialler::new(credentials);
    let packet = |_| dialler.dial(to).packet().expect("a first packet");
    (0..count).map(packet).collect()
}

/// Sockets of so many prefixes of addresses.
fn sources(count: u8) -> Vec<UdpSocket> {
    (0..count)
        .map(|n| UdpSocket::bind((Ipv4Addr::new(127, 1, n, 1), 0)).expect("a port"))
        .collect()
}

/// Begins handshakes, proves the address where that is wanted, and says nothing more, until it is told to
/// stop. Says how many it has begun, and how many of them with a proof.
fn stop_half_way(credentials: &Credentials, to: SocketAddr, stop: &AtomicBool) -> (u32, u32) {
    let mut dialler = Dialler::new(credentials);
    let (sources, mut answer) = (sources(250), vec![0; 2_000]);
    let (mut begun, mut proven) = (0, 0);
    for source in sources.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // An answer that comes later is taken for the next one's, and is no good to it.
        let patience = Some(Duration::from_millis(20));
        source.set_read_timeout(patience).expect("a socket");
        let mut dialled = dialler.dial(to);
        let first = dialled.packet().expect("a first packet");
        // What finds no room is lost, as on any network.
        let _ = source.send_to(&first, to);
        begun += 1;
        let answered = source.recv(&mut answer).ok();
        let answer = answered.and_then(|length| answer.get(..length));
        let next = answer.and_then(|answer| dialled.prove(&mut dialler, to, answer));
        if let Some(next) = next {
            let _ = source.send_to(&next, to);
            proven += 1;
        }
        dialled.forget(&mut dialler);
    }
    (begun, proven)
}

/// Sends the packets from many addresses until it is told to stop; says how many it has sent.
fn flood(packets: &[Vec<u8>], to: SocketAddr, stop: &AtomicBool) -> u32 {
    let sources = sources(250);
    let began = Instant::now();
    let mut sent = 0u32;
    let pairs = packets.iter().cycle().zip(sources.iter().cycle());
    for (packet, source) in pairs {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        // What finds no room is lost, as on any network.
        let _ = source.send_to(packet, to);
        sent += 1;
        let due = began + Duration::from_secs(1) / FLOOD_PER_SECOND * sent;
        if let Some(early) = due.checked_duration_since(Instant::now()) {
            std::thread::sleep(early);
        }
    }
    sent
}

/// The bytes of memory that this process has.
fn memory() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("readable");
    let pages = statm.split(' ').nth(1).expect("the resident pages");
    pages.parse::<usize>().expect("a number") * 4096
}

/// In a process of its own, because other tests need memory, too.
fn in_own_process(test: &str) {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "--ignored", "--nocapture"])
        .arg(format!("agent::link::tests::strangers::{test}"))
        .output()
        .expect("a process");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

#[test]
fn a_flood_of_first_packets_neither_delays_heartbeats_nor_takes_memory() {
    in_own_process("under_a_flood");
}

#[test]
fn handshakes_that_stop_half_way_keep_nobody_out_and_delay_no_heartbeats() {
    in_own_process("among_those_that_stop_half_way");
}

#[test]
fn sessions_that_idle_are_as_many_as_may_be_and_delay_no_heartbeats() {
    in_own_process("among_idlers");
}

/// Two hosts with a link between them.
struct Beating {
    authority: Arc<Authority>,
    two: Endpoint,
    b: Link<Said>,
    from_b: Events,
    _kept: (Endpoint, Link<Said>, Events),
    memory: usize,
}

impl Beating {
    async fn start() -> Self {
        let authority = Arc::new(Authority::generate().expect("an authority"));
        let (one, two) = (host(&authority, "a"), host(&authority, "b"));
        let (a, mut from_b) = Link::<Said>::start(&one, vec![peer(&two)]);
        let (b, mut from_a) = Link::<Said>::start(&two, vec![peer(&one)]);
        until_up(&mut from_a, "a").await;
        until_up(&mut from_b, "b").await;
        Self {
            authority,
            two,
            b,
            from_b,
            _kept: (one, a, from_a),
            memory: memory(),
        }
    }

    fn at(&self) -> SocketAddr {
        self.two.local_address().expect("bound")
    }

    /// Heartbeats go on, by `b`, which is bothered, for as long as something else goes on.
    async fn while_beating<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut beats = tokio::time::interval(BEAT);
        let (mut sent, mut heard, mut worst) = (0u64, 0u64, Duration::ZERO);
        let mut last = Instant::now();
        let mut other = std::pin::pin!(other);
        let outcome = loop {
            tokio::select! {
                outcome = &mut other => break outcome,
                _ = beats.tick() => {
                    sent += 1;
                    self.b.send("a", &Said::Beat(sent)).expect("the link lives");
                }
                event = self.from_b.recv() => match event.expect("the link lives") {
                    LinkEvent::Message { .. } => {
                        heard += 1;
                        worst = worst.max(last.elapsed());
                        last = Instant::now();
                    }
                    other => panic!("{other:?} after {heard} beats"),
                },
            }
        };
        println!("{heard} of {sent} beats, {worst:?} at most apart");
        assert!(heard * 10 > sent * 9, "{heard} of {sent} beats");
        assert!(worst < Duration::from_secs(1), "{worst:?}");
        outcome
    }

    /// Whoever belongs to the cluster gets in, although others make noise.
    async fn lets_in(two: &Endpoint, authority: &Authority) {
        serve_numbers(two, StreamKind::Operator);
        let operator = Endpoint::client(&issue(authority, Role::Operator, "ann")).expect("ours");
        let channel = Channel::new(&operator, peer(two));
        let asking = async {
            loop {
                match channel.request(StreamKind::Operator, &5u32, PATIENCE).await {
                    Ok(answer) => break answer,
                    Err(error) => println!("{error}"),
                }
            }
        };
        let answer: u32 = timeout(PATIENCE, asking).await.expect("an answer");
        assert_eq!(answer, 5);
    }

    /// Those who make noise have their side of it in this process, too.
    fn costs_no_memory(&self) {
        let grown = memory().saturating_sub(self.memory);
        println!("{grown} bytes");
        assert!(grown < MEMORY, "{grown} bytes");
    }
}

/// Answers every number with itself.
fn serve_numbers(server: &Endpoint, kind: StreamKind) {
    let streams = server.serve(kind, 64);
    tokio::spawn(serve_requests(
        streams,
        |_, number: u32, mut reply: Reply| async move {
            // An asker that is gone needs no answer.
            let _ = reply.send(&number).await;
        },
    ));
}

/// Runs a flood beside heartbeats, and lets somebody in before it ends; says what came of it.
async fn beside_heartbeats<T: Send + 'static>(
    beating: &mut Beating,
    flood: impl FnOnce(&AtomicBool) -> T + Send + 'static,
) -> T {
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let flooding = std::thread::spawn(move || flood(&stopped));
    let (two, authority) = (beating.two.clone(), Arc::clone(&beating.authority));
    beating
        .while_beating(async {
            tokio::time::sleep(FLOOD).await;
            Beating::lets_in(&two, &authority).await;
        })
        .await;
    stop.store(true, Ordering::Relaxed);
    flooding.join().expect("it ends")
}

#[tokio::test]
#[ignore = "a test above starts it, in a process of its own"]
async fn under_a_flood() {
    let mut beating = Beating::start().await;
    let to = beating.at();
    // They have no certificate of the cluster. The longest way is until ours is signed for them.
    let strangers = Authority::generate().expect("an authority");
    let packets = first_packets(&issue(&strangers, Role::Host, "a"), to, 3_000);
    beating.memory = memory();
    let flooded = beside_heartbeats(&mut beating, move |stop| flood(&packets, to, stop)).await;
    println!("{flooded} packets");
    assert!(flooded > 10_000, "{flooded} packets are no flood");
    beating.costs_no_memory();
}

#[tokio::test]
#[ignore = "a test above starts it, in a process of its own"]
async fn among_those_that_stop_half_way() {
    let mut beating = Beating::start().await;
    let to = beating.at();
    let strangers = Authority::generate().expect("an authority");
    let stranger = issue(&strangers, Role::Host, "a");
    let flood = move |stop: &AtomicBool| stop_half_way(&stranger, to, stop);
    let (begun, proven) = beside_heartbeats(&mut beating, flood).await;
    println!("{begun} begun, {proven} with a proof");
    assert!(proven > 200, "{proven} of {begun} have shown their address");
    let (on_main, _) = beating.two.connections();
    assert_eq!(on_main, 1, "strangers come to the thread of heartbeats");
    beating.costs_no_memory();
}

/// Requests of one certificate that are served or wait, while it says nothing more.
const KEPT_EACH: usize = 16 + 256;

/// How many streams of idlers ended how.
#[derive(Debug, Default)]
struct Idled {
    too_many: usize,
    silent: usize,
    other: usize,
}

/// What idles for as long as this lives.
type Idlers = (
    Vec<quinn::Connection>,
    tokio::task::JoinSet<Option<CloseReason>>,
);

/// As many connections as one certificate may have, and one more; then streams on them that say nothing,
/// until no more of them are kept than may be.
async fn idle(hog: Endpoint, target: Peer, streams: usize) -> (Idled, Idlers) {
    let mut connections = Vec::new();
    while connections.len() <= CONNECTIONS_EACH {
        // Those that come too fast are let in later.
        if let Ok(connection) = hog.dial(&target, Purpose::Services).await {
            connections.push(connection);
        }
    }
    let more = connections.pop().expect("one too many");
    let ended = timeout(PATIENCE, more.closed()).await.expect("closed");
    assert_eq!(Ended::from(&ended), Ended::ByPeer(CloseReason::TooMany));
    let mut idling = tokio::task::JoinSet::new();
    let mut idled = Idled::default();
    let mut more = connections.iter().cycle().take(streams);
    loop {
        while idling.len() < 2 * KEPT_EACH
            && let Some(connection) = more.next()
        {
            idling.spawn(say_nothing(connection.clone()));
        }
        if idling.len() <= KEPT_EACH {
            break;
        }
        let ended = idling.join_next().await.expect("some are left");
        match ended.expect("it ends") {
            Some(CloseReason::TooMany) => idled.too_many += 1,
            Some(CloseReason::Silent) => idled.silent += 1,
            _ => idled.other += 1,
        }
    }
    (idled, (connections, idling))
}

/// Opens a stream and says no more than what kind it is; how it ended.
async fn say_nothing(connection: quinn::Connection) -> Option<CloseReason> {
    let (mut send, mut recv) = connection.open_bi().await.ok()?;
    send.write_all(&[StreamKind::Witness.byte()]).await.ok()?;
    match recv.read_to_end(100).await {
        Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(code))) => {
            CloseReason::from_number(code.into_inner())
        }
        _ => None,
    }
}

#[tokio::test]
#[ignore = "a test above starts it, in a process of its own"]
async fn among_idlers() {
    const HOGS: usize = 2;
    const STREAMS_EACH: usize = 5_000;
    let mut beating = Beating::start().await;
    serve_numbers(&beating.two, StreamKind::Witness);
    let target = peer(&beating.two);
    let credentials: Vec<_> = (0..HOGS)
        .map(|n| issue(&beating.authority, Role::Gateway, &format!("hog-{n}")))
        .collect();
    let (tell, told) = tokio::sync::oneshot::channel();
    let (over, is_over) = tokio::sync::oneshot::channel::<()>();
    // Their own work is not to delay heartbeats.
    let hogging = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let idling = credentials.iter().map(|credentials| {
                let hog = Endpoint::client(credentials).expect("an endpoint");
                tokio::spawn(idle(hog, target.clone(), STREAMS_EACH))
            });
            let idling: Vec<_> = idling.collect();
            let (mut idled, mut kept) = (Vec::new(), Vec::new());
            for one in idling {
                let (one, idlers) = one.await.expect("it ends");
                idled.push(one);
                kept.push(idlers);
            }
            // Whoever waited may have gone.
            let _ = tell.send(idled);
            let _ = is_over.await;
            drop(kept);
        });
    });
    let (two, authority) = (beating.two.clone(), Arc::clone(&beating.authority));
    let idled = beating
        .while_beating(async {
            let idled = timeout(PATIENCE, told).await;
            Beating::lets_in(&two, &authority).await;
            idled.expect("in time").expect("an outcome")
        })
        .await;
    println!("{idled:?}");
    for Idled {
        too_many,
        silent,
        other,
    } in idled
    {
        assert_eq!((too_many + silent, other), (STREAMS_EACH - KEPT_EACH, 0));
        assert!(too_many > silent, "{silent} were kept");
    }
    beating.costs_no_memory();
    drop(over);
    hogging.join().expect("it ends");
}

#[tokio::test]
async fn a_certificate_has_so_many_connections_and_others_are_not_kept_out() {
    let authority = Authority::generate().expect("an authority");
    let server = host(&authority, "b");
    serve_numbers(&server, StreamKind::Witness);
    let hog = Endpoint::client(&issue(&authority, Role::Gateway, "hog")).expect("an endpoint");
    let target = peer(&server);
    let mut kept = Vec::new();
    while kept.len() < CONNECTIONS_EACH {
        // Those that come too fast are let in later.
        if let Ok(connection) = hog.dial(&target, Purpose::Services).await {
            kept.push(connection);
        }
    }
    let more = loop {
        if let Ok(connection) = hog.dial(&target, Purpose::Services).await {
            break connection;
        }
    };
    let ended = timeout(PATIENCE, more.closed()).await.expect("closed");
    assert_eq!(Ended::from(&ended), Ended::ByPeer(CloseReason::TooMany));
    assert!(kept.iter().all(|kept| kept.close_reason().is_none()));
    let friend = host(&authority, "a");
    let channel = Channel::new(&friend, target.clone());
    let answer: u32 = channel
        .request(StreamKind::Witness, &7u32, PATIENCE)
        .await
        .expect("an answer");
    assert_eq!(answer, 7);
    // A place that is given back is had again.
    if let Some(one) = kept.pop() {
        CloseReason::Done.close(&one);
    }
    let again = async {
        loop {
            let Ok(connection) = hog.dial(&target, Purpose::Services).await else {
                continue;
            };
            let asked = async {
                let (mut send, mut recv) = connection.open_bi().await.ok()?;
                let kind = [StreamKind::Witness.byte()];
                let question = frame::encode(&8u32, 100).ok()?;
                send.write_all(&[&kind, &question[..]].concat())
                    .await
                    .ok()?;
                recv.read_to_end(100).await.ok()
            };
            if asked.await.is_some() {
                return;
            }
        }
    };
    timeout(PATIENCE, again).await.expect("let in again");
}

#[tokio::test]
async fn requests_that_say_nothing_keep_only_their_own_sender_waiting() {
    let authority = Authority::generate().expect("an authority");
    let server = host(&authority, "b");
    serve_numbers(&server, StreamKind::Witness);
    let target = peer(&server);
    let gateway = Endpoint::client(&issue(&authority, Role::Gateway, "hog")).expect("an endpoint");
    let mut idle = Vec::new();
    for _ in 0..2 {
        let connection = gateway.dial(&target, Purpose::Services).await;
        let connection = connection.expect("a connection");
        for _ in 0..90 {
            let (mut send, recv) = connection.open_bi().await.expect("a stream");
            let kind = [StreamKind::Witness.byte()];
            send.write_all(&kind).await.expect("written");
            idle.push((connection.clone(), send, recv));
        }
    }
    // Another request of the same sender comes after those, when the first of them are given up.
    let waits = async {
        let (connection, ..) = idle.first().expect("some");
        let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
        let question = frame::encode(&1u32, 100).expect("short");
        let kind = [StreamKind::Witness.byte()];
        let said = [&kind, &question[..]].concat();
        send.write_all(&said).await.expect("written");
        recv.read_to_end(100).await.expect("an answer")
    };
    let friend = host(&authority, "a");
    let channel = Channel::new(&friend, target);
    let asked = channel.request::<_, u32>(StreamKind::Witness, &7u32, PATIENCE);
    tokio::select! {
        biased;
        answer = asked => assert_eq!(answer.expect("an answer"), 7),
        _ = waits => panic!("a host waited for a gateway"),
    }
    let (_, _, first) = idle.first_mut().expect("some");
    let given_up = timeout(PATIENCE, first.read_to_end(100)).await;
    let reset = given_up.expect("in time").expect_err("nothing was asked");
    let silent = CloseReason::Silent.code();
    assert_eq!(
        reset,
        quinn::ReadToEndError::Read(quinn::ReadError::Reset(silent))
    );
}
