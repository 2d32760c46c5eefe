//! What the link costs: round trips on its lanes between two agents' threads on loopback, on an idle
//! machine and with every core kept busy by other threads. Prints the figures.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use understudy::agent::certs::authority::Authority;
use understudy::agent::certs::{Credentials, Identity, Name};
use understudy::agent::link::{Endpoint, Lane, Link, LinkEvent, LinkMessage, Peer};
use understudy::agent::thread::on_own_thread;

const ROUNDS: usize = 5_000;
const BUSY_ROUNDS: usize = 200;
/// Between two heartbeats.
const BEAT: Duration = Duration::from_millis(20);

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Said {
    Control(u64),
    Log(Vec<u8>),
    Beat(u64),
}

impl LinkMessage for Said {
    fn lane(&self) -> Lane {
        match self {
            Self::Control(_) => Lane::Control,
            Self::Log(_) => Lane::Log,
            Self::Beat(_) => Lane::Datagram,
        }
    }
}

fn bind(credentials: &Credentials) -> Endpoint {
    Endpoint::bind(credentials, ([127, 0, 0, 1], 0).into()).expect("an endpoint")
}

fn peer(endpoint: &Endpoint) -> Peer {
    Peer {
        identity: endpoint.identity().clone(),
        address: endpoint.local_address().expect("bound").into(),
    }
}

/// Answers everything: a log message with a control message, as acknowledgements are.
async fn echo(credentials: Credentials, other: Identity, tell: oneshot::Sender<Peer>) {
    let endpoint = bind(&credentials);
    let nowhere = Peer {
        identity: other.clone(),
        address: std::net::SocketAddr::from(([127, 0, 0, 1], 9)).into(),
    };
    let (link, mut events) = Link::<Said>::start(&endpoint, vec![nowhere]);
    tell.send(peer(&endpoint)).expect("somebody waits");
    while let Some(event) = events.recv().await {
        match event {
            LinkEvent::Message { message, .. } => {
                let answer = match message {
                    Said::Log(_) => Said::Control(0),
                    other => other,
                };
                let _ = link.send(other.name.as_str(), &answer);
            }
            LinkEvent::PeerDown { .. } => return,
            LinkEvent::PeerUp { .. } | LinkEvent::Unreachable { .. } => {}
        }
    }
}

type Events = mpsc::Receiver<LinkEvent<Said>>;

async fn answered(events: &mut Events) {
    loop {
        match events.recv().await.expect("the link lives") {
            LinkEvent::Message { .. } => return,
            LinkEvent::PeerUp { .. } | LinkEvent::Unreachable { .. } => {}
            LinkEvent::PeerDown { ended, .. } => panic!("the link ended: {ended}"),
        }
    }
}

async fn round_trips(
    what: &str,
    rounds: usize,
    pause: Option<Duration>,
    link: &Link<Said>,
    events: &mut Events,
    say: impl Fn(u64) -> Said,
) {
    let mut times = Vec::with_capacity(rounds);
    for number in 0..rounds {
        if let Some(pause) = pause {
            tokio::time::sleep(pause).await;
        }
        let began = Instant::now();
        link.send("b", &say(number as u64)).expect("sent");
        answered(events).await;
        times.push(began.elapsed());
    }
    times.sort();
    let at = |share: usize| times[(times.len() - 1) * share / 100];
    println!(
        "{what:<44} median {:>10.1?}  p99 {:>10.1?}  worst {:>10.1?}",
        at(50),
        at(99),
        at(100)
    );
}

async fn measure(credentials: Credentials, other: Peer) {
    let endpoint = bind(&credentials);
    let (link, mut events) = Link::<Said>::start(&endpoint, vec![other]);
    while !matches!(events.recv().await, Some(LinkEvent::PeerUp { .. })) {}
    let events = &mut events;
    let batch =
        |size: usize| move |n: u64| Said::Log((0..size as u64).map(|i| (i * n) as u8).collect());
    round_trips(
        "control there, control back",
        ROUNDS,
        None,
        &link,
        events,
        Said::Control,
    )
    .await;
    round_trips(
        "log of 200 bytes there, control back",
        ROUNDS,
        None,
        &link,
        events,
        batch(200),
    )
    .await;
    round_trips(
        "log of 64 KiB there, control back",
        ROUNDS / 5,
        None,
        &link,
        events,
        batch(65_536),
    )
    .await;
    round_trips(
        "datagram there and back",
        ROUNDS,
        None,
        &link,
        events,
        Said::Beat,
    )
    .await;

    let stop = Arc::new(AtomicBool::new(false));
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let busy: Vec<_> = (0..cores * 2)
        .map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                understudy::agent::thread::ordinary(0);
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            })
        })
        .collect();
    let what = format!("heartbeats, {} busy threads on {cores} cores", busy.len());
    round_trips(&what, BUSY_ROUNDS, Some(BEAT), &link, events, Said::Beat).await;
    stop.store(true, Ordering::Relaxed);
    for thread in busy {
        thread.join().expect("it only spins");
    }
    endpoint.close().await;
}

fn main() {
    let authority = Authority::generate().expect("an authority");
    let issue = |name: &str| {
        let name: Name = name.parse().expect("a name");
        authority.issue(&Identity::host(&name)).expect("issued")
    };
    let (a, b) = (issue("a"), issue("b"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let (tell, told) = oneshot::channel();
        let us = a.identity.clone();
        let echoing = on_own_thread("echo", move || echo(b, us, tell));
        let measuring = async {
            let other = told.await.expect("it listens");
            on_own_thread("measure", move || measure(a, other)).await
        };
        let (echoed, measured) = tokio::join!(echoing, measuring);
        echoed.expect("it ran");
        measured.expect("it ran");
    });
}
