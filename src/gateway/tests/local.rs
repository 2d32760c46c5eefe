//! Real clients on real sockets, through a gateway that is connected to a guest by channels.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use super::guest::{BYE, DEAF, ECHO, Guest, NOBODY, RESET, stack_config};
use crate::gateway::{Gateway, GatewayConfig, GatewayMetrics, LocalGateway, Publish};
use crate::protocol::{Span, Time};

/// Runs a guest on channels until they close.
async fn run_guest(
    mut frames: mpsc::Receiver<(FrameSource, Bytes)>,
    outputs: mpsc::Sender<(FrameNumber, Bytes)>,
    mut paused: watch::Receiver<bool>,
) {
    let started = Instant::now();
    let now = || Time::from_nanos(started.elapsed().as_nanos() as u64);
    let mut guest = Guest::new();
    let mut number = 0;
    let mut arrived = 0;
    loop {
        if paused.wait_for(|paused| !paused).await.is_err() {
            return;
        }
        let wait = guest.wake_at(now()).map_or(Duration::from_mins(1), |at| {
            Duration::from_nanos(at.since(now()).as_nanos())
        });
        let frame = tokio::select! {
            biased;
            _ = paused.wait_for(|paused| *paused) => continue,
            frame = frames.recv() => match frame {
                None => return,
                Some((source, frame)) => {
                    arrived += 1;
                    assert_eq!(source.number.0, arrived, "frames are counted");
                    Some(frame)
                }
            },
            () = tokio::time::sleep(wait) => None,
        };
        for frame in guest.step(frame, now()) {
            number += 1;
            if outputs.send((FrameNumber(number), frame)).await.is_err() {
                return;
            }
        }
    }
}

struct Setup {
    addresses: Vec<SocketAddr>,
    metrics: std::sync::Arc<GatewayMetrics>,
    /// While true the guest stands still.
    paused: watch::Sender<bool>,
}

async fn start(ports: &[u16], most_clients: usize) -> Setup {
    start_with(ports, |config| config.most_clients = most_clients).await
}

async fn start_with(ports: &[u16], change: impl FnOnce(&mut GatewayConfig)) -> Setup {
    let publish = ports
        .iter()
        .map(|port| Publish {
            host: ([127, 0, 0, 1], 0).into(),
            guest_port: *port,
        })
        .collect();
    let mut config = GatewayConfig::new(publish, stack_config());
    change(&mut config);
    let gateway = Gateway::bind(config).await.expect("ports");
    let (to_vmm, frames) = mpsc::channel(16);
    let (outputs, from_vmm) = mpsc::channel(16);
    let local = LocalGateway::new(gateway, to_vmm, from_vmm);
    let (paused, is_paused) = watch::channel(false);
    let setup = Setup {
        addresses: local.addresses(),
        metrics: local.metrics(),
        paused,
    };
    tokio::spawn(run_guest(frames, outputs, is_paused));
    tokio::spawn(async move { local.run().await.expect("it ends with the guest") });
    setup
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future)
        .await
        .expect("it does not hang")
}

#[tokio::test]
async fn many_clients_get_their_own_bytes_back() {
    let setup = start(&[ECHO], 100).await;
    let clients = (0..50u8).map(|index| {
        let address = setup.addresses[0];
        tokio::spawn(async move {
            let socket = TcpStream::connect(address).await.expect("a connection");
            let (mut reader, mut writer) = socket.into_split();
            let sent: Vec<u8> = (0..100_000u32)
                .map(|n| (n as u8).wrapping_mul(index | 1))
                .collect();
            let all = sent.clone();
            let writing = tokio::spawn(async move {
                writer.write_all(&all).await.expect("written");
                writer.shutdown().await.expect("half closed");
            });
            let mut back = Vec::new();
            reader.read_to_end(&mut back).await.expect("read");
            writing.await.expect("writer");
            assert!(back == sent, "client {index} got something else back");
        })
    });
    for client in clients.collect::<Vec<_>>() {
        within(client).await.expect("a client");
    }
    let counts = setup.metrics.read();
    assert_eq!(counts.clients_accepted, 50);
    assert_eq!(counts.clients_reset, 0);
}

#[tokio::test]
async fn ends_and_resets_reach_the_client() {
    let setup = start(&[BYE, RESET, NOBODY], 100).await;
    let connect = async |index: usize| {
        TcpStream::connect(setup.addresses[index])
            .await
            .expect("a connection")
    };
    let mut words = String::new();
    let mut bye = connect(0).await;
    within(bye.read_to_string(&mut words)).await.expect("words");
    assert_eq!(words, "bye");

    let mut reset = connect(1).await;
    reset.write_all(b"x").await.expect("written");
    let error = within(reset.read_u8()).await.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let mut refused = connect(2).await;
    let error = within(refused.read_u8()).await.expect_err("a reset");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert_eq!(setup.metrics.read().clients_reset, 2);
}

#[tokio::test]
async fn a_deaf_guest_stops_the_client() {
    let setup = start(&[DEAF], 100).await;
    let client = TcpStream::connect(setup.addresses[0])
        .await
        .expect("a connection");
    // Until the kernel's buffers are full too and stay so.
    let mut sent = 0usize;
    let full = async {
        loop {
            client.writable().await.expect("a socket");
            match client.try_write(&[0; 8_192]) {
                Ok(written) => sent += written,
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    };
    let stuck = tokio::time::timeout(Duration::from_millis(700), full).await;
    assert!(stuck.is_err());
    let carried = setup.metrics.read().bytes_to_guest as usize;
    assert!(
        carried < 100_000,
        "{carried} bytes went to a guest with 16 KiB"
    );
    assert!(sent > carried, "the rest waits in the kernel");
}

#[tokio::test]
async fn clients_beyond_the_bound_wait_for_others_to_leave() {
    let setup = start(&[ECHO], 1).await;
    let mut first = TcpStream::connect(setup.addresses[0])
        .await
        .expect("a connection");
    first.write_all(b"1").await.expect("written");
    assert_eq!(within(first.read_u8()).await.expect("echo"), b'1');
    let mut second = TcpStream::connect(setup.addresses[0])
        .await
        .expect("the kernel accepts");
    second.write_all(b"2").await.expect("written");
    assert_eq!(setup.metrics.read().clients_accepted, 1);
    drop(first);
    assert_eq!(within(second.read_u8()).await.expect("echo"), b'2');
    assert_eq!(setup.metrics.read().clients_accepted, 2);
}

#[tokio::test]
async fn a_guest_that_stands_still_stops_reading_from_clients_and_loses_nothing() {
    const CLIENTS: usize = 40;
    const BYTES: usize = 10_000;
    let setup = start(&[ECHO], 100).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        let mut client = TcpStream::connect(setup.addresses[0])
            .await
            .expect("a connection");
        client.write_all(b"x").await.expect("written");
        within(client.read_u8()).await.expect("echo");
        clients.push(client);
    }
    setup.paused.send(true).expect("a guest");
    let mut written = 0;
    let stopped = async {
        // What is read in one turn is bounded by the buffers; what comes after it waits outside.
        while setup.metrics.read().stops_reading == 0 {
            for client in &mut clients {
                client.write_all(&[1; BYTES]).await.expect("written");
            }
            written += BYTES;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    within(stopped).await;
    setup.paused.send(false).expect("a guest");
    for client in &mut clients {
        let mut back = vec![0; written];
        within(client.read_exact(&mut back)).await.expect("echo");
        assert!(back.iter().all(|byte| *byte == 1));
    }
    assert_eq!(setup.metrics.read().clients_reset, 0);
}

#[tokio::test]
async fn clients_that_are_too_many_of_one_address_are_turned_away() {
    let setup = start_with(&[ECHO], |config| config.most_clients_each = 2).await;
    let connect = || TcpStream::connect(setup.addresses[0]);
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut client = connect().await.expect("a connection");
        client.write_all(b"x").await.expect("written");
        within(client.read_u8()).await.expect("echo");
        clients.push(client);
    }
    let mut third = connect().await.expect("the kernel accepts");
    within(third.read_u8()).await.expect_err("a reset");
    assert_eq!(setup.metrics.read().clients_turned_away, 1);
    // The place of one who leaves is free again.
    clients.pop();
    let again = async {
        loop {
            let mut next = connect().await.expect("the kernel accepts");
            let said = next.write_all(b"y").await;
            if said.is_ok() && next.read_u8().await.is_ok() {
                return;
            }
        }
    };
    within(again).await;
}

/// It has half closed its connection, so nothing is read of it; the guest says nothing, so nothing
/// is written to it either.
#[tokio::test]
async fn a_client_that_is_gone_is_let_go_although_nothing_is_read_or_written() {
    let every = Span::from_millis(20);
    let setup = start_with(&[DEAF], |config| config.look_after_every = every).await;
    let mut client = TcpStream::connect(setup.addresses[0])
        .await
        .expect("a connection");
    client.write_all(b"last words").await.expect("written");
    client.shutdown().await.expect("half closed");
    let carried = async {
        // A question for the guest's address, a SYN, its acknowledgement, and the words with a FIN.
        while setup.metrics.read().frames_to_guest < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    within(carried).await;
    client.set_zero_linger().expect("an option");
    drop(client);
    let gone = async {
        while setup.metrics.read().clients > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    within(gone).await;
}
