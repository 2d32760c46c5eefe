//! The link over real QUIC on loopback.

mod addresses;
mod hall;
mod strangers;

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::agent::certs::authority::Authority;
use crate::agent::certs::{Credentials, Identity, Role};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Said {
    Word(String),
    Batch(Vec<u8>),
    Beat(u64),
    BigBeat(Vec<u8>),
}

impl LinkMessage for Said {
    fn lane(&self) -> Lane {
        match self {
            Self::Word(_) => Lane::Control,
            Self::Batch(_) => Lane::Log,
            Self::Beat(_) | Self::BigBeat(_) => Lane::Datagram,
        }
    }
}

type Events = mpsc::Receiver<LinkEvent<Said>>;

/// Only keeps a broken test from hanging.
const PATIENCE: Duration = Duration::from_secs(20);
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

fn issue(authority: &Authority, role: Role, text: &str) -> Credentials {
    let identity = Identity {
        role,
        name: name(text),
    };
    authority.issue(&identity).expect("a certificate")
}

fn host(authority: &Authority, text: &str) -> Endpoint {
    Endpoint::bind(&issue(authority, Role::Host, text), ANY).expect("an endpoint")
}

fn peer(endpoint: &Endpoint) -> Peer {
    Peer {
        identity: endpoint.identity().clone(),
        address: endpoint.local_address().expect("bound").into(),
    }
}

async fn next(events: &mut Events) -> LinkEvent<Said> {
    timeout(PATIENCE, events.recv())
        .await
        .expect("something happens")
        .expect("the link lives")
}

async fn next_message(events: &mut Events) -> Said {
    loop {
        match next(events).await {
            LinkEvent::Message { message, .. } => return message,
            LinkEvent::PeerUp { .. } | LinkEvent::Unreachable { .. } => {}
            down @ LinkEvent::PeerDown { .. } => panic!("unexpected {down:?}"),
        }
    }
}

async fn until_up(events: &mut Events, peer: &str) -> SessionId {
    loop {
        if let LinkEvent::PeerUp { peer: up, session } = next(events).await
            && up == name(peer)
        {
            return session;
        }
    }
}

async fn until_down(events: &mut Events) -> Ended {
    loop {
        if let LinkEvent::PeerDown { ended, .. } = next(events).await {
            return ended;
        }
    }
}

struct Pair {
    endpoints: [Endpoint; 2],
    a: Link<Said>,
    b: Link<Said>,
    from_b: Events,
    from_a: Events,
}

async fn pair() -> Pair {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (host(&authority, "a"), host(&authority, "b"));
    let (a, mut from_b) = Link::start(&one, vec![peer(&two)]);
    let (b, mut from_a) = Link::start(&two, vec![peer(&one)]);
    until_up(&mut from_b, "b").await;
    until_up(&mut from_a, "a").await;
    Pair {
        endpoints: [one, two],
        a,
        b,
        from_b,
        from_a,
    }
}

#[tokio::test]
async fn every_lane_carries_both_ways_in_order() {
    let mut pair = pair().await;
    // On loopback, and measured: whoever is not connected is at no distance.
    let trip = pair.a.round_trip("b").expect("they are connected");
    assert!(trip > Duration::ZERO && trip < PATIENCE, "{trip:?}");
    assert_eq!(pair.a.round_trip("c"), None);
    for number in 0..200u32 {
        let word = Said::Word(number.to_string());
        pair.a.send("b", &word).expect("queued");
        let batch = Said::Batch(vec![number as u8; number as usize * 50]);
        pair.b.send("a", &batch).expect("queued");
    }
    for number in 0..200u32 {
        assert_eq!(
            next_message(&mut pair.from_a).await,
            Said::Word(number.to_string())
        );
        assert_eq!(
            next_message(&mut pair.from_b).await,
            Said::Batch(vec![number as u8; number as usize * 50])
        );
    }
    let counters = pair.endpoints[1].counters();
    assert!(counters.log_bytes_raw.get() > 900_000);
    assert!(counters.log_bytes_sent.get() < 100_000);
}

#[tokio::test]
async fn datagrams_that_do_not_fit_go_by_the_control_stream() {
    let mut pair = pair().await;
    pair.a.send("b", &Said::Beat(7)).expect("sent");
    assert_eq!(next_message(&mut pair.from_a).await, Said::Beat(7));
    let big = Said::BigBeat(vec![1; 100_000]);
    pair.a.send("b", &big).expect("sent");
    assert_eq!(next_message(&mut pair.from_a).await, big);
    let counters = pair.endpoints[0].counters();
    assert_eq!(counters.datagrams.get(), 1);
    assert_eq!(counters.datagrams_too_large.get(), 1);
}

#[tokio::test]
async fn messages_beyond_the_limit_are_refused_at_home_and_nothing_is_disturbed() {
    let mut pair = pair().await;
    let long = Said::Batch(vec![0; LOG_MESSAGE_MAX + 1]);
    assert!(matches!(
        pair.a.send("b", &long),
        Err(SendRefused::TooLong(_))
    ));
    assert_eq!(pair.a.send("nobody", &long), Err(SendRefused::NotConnected));
    pair.a.send("b", &Said::Beat(1)).expect("sent");
    assert_eq!(next_message(&mut pair.from_a).await, Said::Beat(1));
}

/// Stands between a dialler and whoever is the backend at the moment.
struct Switch {
    address: SocketAddr,
    backend: tokio::sync::watch::Sender<SocketAddr>,
    task: tokio::task::JoinHandle<()>,
}

impl Switch {
    async fn to(backend: SocketAddr) -> Self {
        let front = tokio::net::UdpSocket::bind(ANY).await.expect("a socket");
        let back = tokio::net::UdpSocket::bind(ANY).await.expect("a socket");
        let address = front.local_addr().expect("bound");
        let (sender, backend) = tokio::sync::watch::channel(backend);
        let task = tokio::spawn(async move {
            let (mut there, mut here) = (vec![0; 65_536], vec![0; 65_536]);
            let mut dialler = None;
            loop {
                // What cannot be sent is lost, as on any network.
                tokio::select! {
                    Ok((length, from)) = front.recv_from(&mut there) => {
                        dialler = Some(from);
                        let backend = *backend.borrow();
                        let _ = back.send_to(&there[..length], backend).await;
                    }
                    Ok((length, from)) = back.recv_from(&mut here) => {
                        if let Some(dialler) = dialler && from == *backend.borrow() {
                            let _ = front.send_to(&here[..length], dialler).await;
                        }
                    }
                }
            }
        });
        Self {
            address,
            backend: sender,
            task,
        }
    }
}

#[tokio::test]
async fn a_peer_that_restarts_is_noticed_at_once_and_connected_again() {
    let authority = Authority::generate().expect("an authority");
    let one = host(&authority, "a");
    let credentials = issue(&authority, Role::Host, "b");
    let start = || {
        let endpoint = Endpoint::bind(&credentials, ANY).expect("an endpoint");
        let (link, events) = Link::<Said>::start(&endpoint, vec![peer(&one)]);
        let address = endpoint.local_address().expect("bound");
        (address, link, events)
    };
    let (address, _old, mut old_events) = start();
    let switch = Switch::to(address).await;
    let behind = Peer {
        identity: credentials.identity.clone(),
        address: switch.address.into(),
    };
    let (a, mut from_b) = Link::start(&one, vec![behind]);
    let first = until_up(&mut from_b, "b").await;
    until_up(&mut old_events, "a").await;

    // From now on another process with the same key answers; the old one says nothing more.
    let (address, again, mut events) = start();
    switch.backend.send_replace(address);
    a.send("b", &Said::Beat(1)).expect("sent to nobody");
    assert_eq!(until_down(&mut from_b).await, Ended::Reset);
    assert_eq!(a.send("b", &Said::Beat(2)), Err(SendRefused::NotConnected));
    assert!(until_up(&mut from_b, "b").await > first);
    until_up(&mut events, "a").await;
    again.send("a", &Said::Beat(3)).expect("sent");
    assert_eq!(next_message(&mut from_b).await, Said::Beat(3));
    switch.task.abort();
}

#[tokio::test]
async fn a_newer_connection_of_the_same_peer_replaces_the_older() {
    let authority = Authority::generate().expect("an authority");
    let credentials = issue(&authority, Role::Host, "a");
    let two = host(&authority, "b");
    let start = || {
        let endpoint = Endpoint::bind(&credentials, ANY).expect("an endpoint");
        Link::<Said>::start(&endpoint, vec![peer(&two)])
    };
    let (first, mut first_events) = start();
    let nowhere = Peer {
        identity: credentials.identity.clone(),
        address: ANY.into(),
    };
    let (_b, mut from_a) = Link::<Said>::start(&two, vec![nowhere]);
    let old = until_up(&mut from_a, "a").await;
    until_up(&mut first_events, "b").await;
    let (_second, _second_events) = start();
    assert_eq!(
        until_down(&mut from_a).await,
        Ended::ByUs(CloseReason::Replaced)
    );
    assert!(until_up(&mut from_a, "a").await > old);
    assert_eq!(
        until_down(&mut first_events).await,
        Ended::ByPeer(CloseReason::Replaced)
    );
    drop(first);
}

#[tokio::test]
async fn a_foreign_cluster_is_refused_counted_and_disturbs_nobody() {
    let mut pair = pair().await;
    let foreign = Authority::generate().expect("another authority");
    // The same name as a host of ours, certified by somebody else.
    let stranger = host(&foreign, "a");
    let target = peer(&pair.endpoints[1]);
    for purpose in [Purpose::Lanes, Purpose::Services] {
        let dialled = stranger.dial(&target, purpose).await;
        // The dialler refuses first: the host's certificate is foreign to it.
        assert!(
            matches!(
                &dialled,
                Err(DialError::Refused {
                    ended: Ended::Certificate,
                    ..
                })
            ),
            "{dialled:?}"
        );
        let error = dialled.expect_err("refused");
        assert!(
            !error.may_pass(),
            "certificates do not change by themselves"
        );
    }
    assert_eq!(stranger.counters().refused_certificates.get(), 2);
    let refused = &pair.endpoints[1].counters().refused_certificates;
    timeout(PATIENCE, async {
        while refused.get() < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("counted on the other side too");
    pair.a.send("b", &Said::Beat(1)).expect("sent");
    assert_eq!(next_message(&mut pair.from_a).await, Said::Beat(1));
}

#[tokio::test]
async fn a_stranger_that_trusts_us_is_refused_by_its_own_certificate() {
    let ours = Authority::generate().expect("an authority");
    let foreign = Authority::generate().expect("another authority");
    let target = host(&ours, "b");
    // It holds our authority's certificate, which is no secret, and a foreign certificate.
    let mut forged = issue(&foreign, Role::Host, "a");
    forged.authority = issue(&ours, Role::Host, "a").authority;
    let stranger = Endpoint::bind(&forged, ANY).expect("an endpoint");
    // TLS 1.3 lets the client finish first; the refusal comes right after.
    let ended = match stranger.dial(&peer(&target), Purpose::Lanes).await {
        Ok(connection) => Ended::from(&connection.closed().await),
        Err(DialError::Refused { ended, .. }) => ended,
        Err(error) => panic!("{error}"),
    };
    assert_eq!(ended, Ended::Certificate);
    assert_eq!(target.counters().refused_certificates.get(), 1);
}

/// Dials `target` as a host of the cluster that its configuration does not name, or does.
async fn ends_of(text: &str, send: &[u8]) -> (Ended, u64, u64) {
    let authority = Authority::generate().expect("an authority");
    let target = host(&authority, "b");
    let dialler = host(&authority, text);
    let friend = Peer {
        identity: Identity::host(&name("a")),
        address: dialler.local_address().expect("bound").into(),
    };
    let (_link, _events) = Link::<Said>::start(&target, vec![friend]);
    let connection = dialler
        .dial(&peer(&target), Purpose::Lanes)
        .await
        .expect("a connection");
    let (mut stream, _recv) = connection.open_bi().await.expect("a stream");
    // Fails when the connection is refused already, as it should be.
    let _ = stream.write_all(send).await;
    let ended = timeout(PATIENCE, connection.closed()).await;
    let counters = target.counters();
    (
        Ended::from(&ended.expect("closed")),
        counters.refused_peers.get(),
        counters.closed_for_garbage.get(),
    )
}

/// The first byte of a control stream and a hello as the session writes it.
fn hello(version: u32, name: &str) -> Vec<u8> {
    let mut bytes = vec![StreamKind::Control.byte()];
    bytes.extend_from_slice(&frame::encode(&(version, name), 1000).expect("short"));
    bytes
}

#[tokio::test]
async fn peers_that_lie_are_closed_with_a_reason() {
    let by = |reason| Ended::ByPeer(reason);
    assert_eq!(
        ends_of("c", &hello(super::session::VERSION, "c")).await,
        (by(CloseReason::UnknownPeer), 1, 0)
    );
    assert_eq!(
        ends_of("a", &hello(super::session::VERSION, "c")).await,
        (by(CloseReason::WrongName), 1, 0)
    );
    assert_eq!(
        ends_of("a", &hello(99, "a")).await,
        (by(CloseReason::WrongVersion), 1, 0)
    );
    assert_eq!(
        ends_of("a", &[StreamKind::Control.byte(), 255, 255, 255, 255]).await,
        (by(CloseReason::TooLong), 1, 0)
    );
    assert_eq!(
        ends_of("a", &[StreamKind::Frames.byte(), 1]).await,
        (by(CloseReason::Garbage), 1, 0)
    );
    let mut bytes = hello(super::session::VERSION, "a");
    bytes.extend_from_slice(&[3, 0, 0, 0, 77, 77, 77]);
    assert_eq!(ends_of("a", &bytes).await, (by(CloseReason::Garbage), 0, 1));
    let mut bytes = hello(super::session::VERSION, "a");
    bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(ends_of("a", &bytes).await, (by(CloseReason::TooLong), 0, 1));
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_cut_off_and_connected_again() {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (host(&authority, "a"), host(&authority, "b"));
    let (a, mut from_b) = Link::start(&one, vec![peer(&two)]);
    let (_b, mut from_a) = Link::<Said>::start(&two, vec![peer(&one)]);
    until_up(&mut from_b, "b").await;
    until_up(&mut from_a, "a").await;
    // Nobody takes b's events, so its streams fill, then a's queue.
    let noise: Vec<u8> = (0..30_000u32)
        .flat_map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes())
        .collect();
    let batch = Said::Batch(noise);
    let refused = loop {
        match a.send("b", &batch) {
            Ok(()) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert_eq!(refused, SendRefused::QueueFull);
    assert_eq!(
        until_down(&mut from_b).await,
        Ended::ByUs(CloseReason::QueueFull)
    );
    // The word of the closing may be lost in the flood; then the newer connection says it.
    let ended = until_down(&mut from_a).await;
    assert!(
        matches!(
            ended,
            Ended::ByPeer(CloseReason::QueueFull) | Ended::ByUs(CloseReason::Replaced)
        ),
        "{ended:?}"
    );
    until_up(&mut from_b, "b").await;
    until_up(&mut from_a, "a").await;
    a.send("b", &Said::Beat(1)).expect("sent");
    assert_eq!(next_message(&mut from_a).await, Said::Beat(1));
}

#[tokio::test]
async fn requests_are_answered_once_or_many_times_and_unserved_kinds_refused() {
    let authority = Authority::generate().expect("an authority");
    let server = host(&authority, "b");
    let operator =
        Endpoint::client(&issue(&authority, Role::Operator, "ann")).expect("an endpoint");
    let streams = server.serve(StreamKind::Operator, 8);
    tokio::spawn(serve_requests(
        streams,
        |from: Identity, upto: u32, mut reply: Reply| async move {
            for number in 0..upto {
                let answer = (from.to_string(), number);
                if reply.send(&answer).await.is_err() {
                    return;
                }
            }
        },
    ));
    let channel = Channel::new(&operator, peer(&server));
    let (who, number): (String, u32) = channel
        .request(StreamKind::Operator, &1u32, PATIENCE)
        .await
        .expect("an answer");
    assert_eq!((who.as_str(), number), ("operator ann", 0));
    let mut answers = channel
        .ask::<_, (String, u32)>(StreamKind::Operator, &5u32)
        .await
        .expect("asked");
    let mut got = Vec::new();
    while let Some((_, number)) = answers.next().await.expect("an answer") {
        got.push(number);
    }
    assert_eq!(got, [0, 1, 2, 3, 4]);
    let refused = channel
        .request::<_, u32>(StreamKind::Bulk, &1u32, PATIENCE)
        .await;
    let Err(refused) = refused else {
        panic!("{refused:?}");
    };
    let no_service = Ended::ByPeer(CloseReason::NoService);
    assert!(
        matches!(&refused, RequestError::Refused { reason, .. } if *reason == no_service),
        "{refused:?}"
    );
    assert!(refused.may_pass(), "its process may have just begun");
    // A question that cannot be read costs the connection, and the next one makes another.
    let garbage = channel
        .request::<_, u32>(StreamKind::Operator, &"what?", PATIENCE)
        .await;
    let Err(garbage) = garbage else {
        panic!("{garbage:?}");
    };
    assert!(
        matches!(garbage, RequestError::Refused { .. }),
        "{garbage:?}"
    );
    assert!(!garbage.may_pass(), "the same is garbage at any time");
    let again: (String, u32) = channel
        .request(StreamKind::Operator, &1u32, PATIENCE)
        .await
        .expect("an answer");
    assert_eq!(again.1, 0);
}
