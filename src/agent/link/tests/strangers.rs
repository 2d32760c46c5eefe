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

/// Whole first packets, each with a connection id and a ClientHello of its own.
fn first_packets(credentials: &Credentials, to: SocketAddr, count: usize) -> Vec<Vec<u8>> {
    let crypto = tls::client(credentials, Purpose::Lanes).expect("a configuration");
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &[7; 32]);
    let ours = Arc::new(quinn::EndpointConfig::new(Arc::new(key)));
    let mut endpoint = quinn_proto::Endpoint::new(ours, None, true, None);
    let packet = |_| {
        let now = Instant::now();
        let (_, mut connection) = endpoint
            .connect(now, config.clone(), to, "b.host.understudy")
            .expect("a connection");
        let mut packet = Vec::new();
        let transmit = connection.poll_transmit(now, 1, &mut packet);
        assert!(transmit.is_some(), "a first packet");
        packet
    };
    (0..count).map(packet).collect()
}

/// Sends the packets from many addresses until it is told to stop; says how many it has sent.
fn flood(packets: &[Vec<u8>], to: SocketAddr, stop: &AtomicBool) -> u32 {
    let sources: Vec<_> = (0..=250u8)
        .map(|n| UdpSocket::bind((Ipv4Addr::new(127, 1, n, 1), 0)).expect("a port"))
        .collect();
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
#[test]
fn a_flood_of_first_packets_neither_delays_heartbeats_nor_takes_memory() {
    let child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "--ignored", "--nocapture"])
        .arg("agent::link::tests::strangers::under_a_flood")
        .output()
        .expect("a process");
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success(), "{said}");
    assert!(said.contains("1 passed"), "{said}");
}

#[tokio::test]
#[ignore = "the test above starts it, in a process of its own"]
async fn under_a_flood() {
    let authority = Authority::generate().expect("an authority");
    let (one, two) = (host(&authority, "a"), host(&authority, "b"));
    let (_a, mut from_b) = Link::<Said>::start(&one, vec![peer(&two)]);
    let (b, mut from_a) = Link::<Said>::start(&two, vec![peer(&one)]);
    until_up(&mut from_a, "a").await;
    until_up(&mut from_b, "b").await;
    let to = two.local_address().expect("bound");
    // They have no certificate of the cluster. The longest way is until ours is signed for them.
    let strangers = Authority::generate().expect("an authority");
    let packets = first_packets(&issue(&strangers, Role::Host, "a"), to, 3_000);
    let before = memory();

    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let flooding = std::thread::spawn(move || flood(&packets, to, &stopped));
    let mut beats = tokio::time::interval(BEAT);
    let (mut sent, mut heard, mut worst) = (0u64, 0u64, Duration::ZERO);
    let began = Instant::now();
    let mut last = began;
    while began.elapsed() < FLOOD {
        tokio::select! {
            _ = beats.tick() => {
                sent += 1;
                b.send("a", &Said::Beat(sent)).expect("the link lives");
            }
            event = from_b.recv() => match event.expect("the link lives") {
                LinkEvent::Message { .. } => {
                    heard += 1;
                    worst = worst.max(last.elapsed());
                    last = Instant::now();
                }
                other => panic!("{other:?} after {heard} beats"),
            },
        }
    }
    // Whoever belongs to the cluster gets in, although others make noise.
    let server = two.serve(StreamKind::Operator, 8);
    tokio::spawn(serve_requests(
        server,
        |_, number: u32, mut reply: Reply| async move {
            // An asker that is gone needs no answer.
            let _ = reply.send(&number).await;
        },
    ));
    let operator = Endpoint::client(&issue(&authority, Role::Operator, "ann")).expect("ours");
    let channel = Channel::new(&operator, peer(&two));
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
    stop.store(true, Ordering::Relaxed);
    let flooded = flooding.join().expect("it ends");
    let grown = memory().saturating_sub(before);
    println!("{flooded} packets; {heard} of {sent} beats, {worst:?} at most apart; {grown} bytes");
    assert!(flooded > 10_000, "{flooded} packets are no flood");
    assert!(heard * 10 > sent * 9, "{heard} of {sent} beats");
    assert!(worst < Duration::from_secs(1), "{worst:?}");
    assert!(grown < MEMORY, "{grown} bytes");
}

#[tokio::test]
async fn a_certificate_has_so_many_connections_and_others_are_not_kept_out() {
    let authority = Authority::generate().expect("an authority");
    let server = host(&authority, "b");
    let streams = server.serve(StreamKind::Witness, 8);
    tokio::spawn(serve_requests(
        streams,
        |_, number: u32, mut reply: Reply| async move {
            // An asker that is gone needs no answer.
            let _ = reply.send(&number).await;
        },
    ));
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
    let streams = server.serve(StreamKind::Witness, 64);
    tokio::spawn(serve_requests(
        streams,
        |_, number: u32, mut reply: Reply| async move {
            // An asker that is gone needs no answer.
            let _ = reply.send(&number).await;
        },
    ));
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
