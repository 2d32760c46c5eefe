//! The load against a small RESP server that can be told to misbehave.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use super::{Load, LoadConfig, LoadReport};

/// What the server does wrong, once, at its n-th increment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sin {
    None,
    /// Answers and forgets it.
    Forget,
    /// Goes back to zero.
    Undo,
    /// Executes it twice.
    Repeat,
    /// Executes it, then closes instead of answering.
    BreakAfter,
    /// Closes before it executes it.
    BreakBefore,
    /// Answers with an error.
    Error,
    /// Loses everything when the last client has stopped.
    LoseAtEnd,
    /// Rests for a while.
    Rest,
}

const REST: Duration = Duration::from_millis(120);
const AT: u64 = 100;

#[derive(Default)]
struct Store {
    values: HashMap<String, u64>,
    increments: u64,
    reading_back: bool,
}

async fn serve(stream: TcpStream, store: Arc<Mutex<Store>>, sin: Sin) -> std::io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let count: usize = line[1..].trim().parse().expect("an array");
        let mut words = Vec::new();
        for _ in 0..count {
            line.clear();
            reader.read_line(&mut line).await?;
            let length: usize = line[1..].trim().parse().expect("a string");
            let mut word = vec![0; length + 2];
            reader.read_exact(&mut word).await?;
            words.push(String::from_utf8_lossy(&word[..length]).into_owned());
        }
        let mut rest = false;
        let answer = {
            let mut store = store.lock().expect("the store");
            let key = words[1].clone();
            if words[0] == "GET" {
                if store.increments > 0 && sin == Sin::LoseAtEnd && !store.reading_back {
                    store.reading_back = true;
                    store.values.values_mut().for_each(|value| *value -= 1);
                }
                match store.values.get(&key) {
                    Some(value) => {
                        let text = value.to_string();
                        Some(format!("${}\r\n{text}\r\n", text.len()))
                    }
                    None => Some("$-1\r\n".into()),
                }
            } else {
                store.increments += 1;
                let now = store.increments == AT;
                let value = store.values.entry(key).or_default();
                let before = *value;
                if now && sin == Sin::BreakBefore {
                    return Ok(());
                }
                *value += 1;
                let mut answer = Some(format!(":{value}\r\n"));
                if now {
                    match sin {
                        Sin::Forget => *value = before,
                        Sin::Undo => *value = 0,
                        Sin::Repeat => *value += 1,
                        Sin::BreakAfter => return Ok(()),
                        Sin::Error => answer = Some("-ERR no\r\n".into()),
                        Sin::Rest => rest = true,
                        Sin::None | Sin::BreakBefore | Sin::LoseAtEnd => {}
                    }
                }
                answer
            }
        };
        if rest {
            tokio::time::sleep(REST).await;
        }
        if let Some(answer) = answer {
            writer.write_all(answer.as_bytes()).await?;
        }
    }
}

async fn server(sin: Sin) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let store = Arc::new(Mutex::new(Store::default()));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).expect("a socket");
            tokio::spawn(serve(stream, Arc::clone(&store), sin));
        }
    });
    address
}

async fn load(sin: Sin, connections: usize, pipeline: usize) -> (LoadReport, Duration) {
    let mut config = LoadConfig::new(server(sin).await);
    config.connections = connections;
    config.keys = 3;
    config.pipeline = pipeline;
    let started = Instant::now();
    let load = Load::start(config).await.expect("a load");
    while load.acknowledged() < 10 * AT {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(load.first_answer_after(started).is_some());
    let gap = load.longest_gap_between(started, Instant::now());
    let gap = gap.map_or(Duration::ZERO, |gap| gap.length());
    let report = tokio::time::timeout(Duration::from_secs(30), load.finish())
        .await
        .expect("it ends");
    assert!(report.acknowledged >= 10 * AT);
    assert_eq!(report.latencies.count(), report.acknowledged);
    (report, gap)
}

#[tokio::test]
async fn an_honest_server_is_found_flawless() {
    for (connections, pipeline) in [(1, 1), (4, 1), (4, 16), (2, 3)] {
        let (report, _) = load(Sin::None, connections, pipeline).await;
        assert!(report.is_flawless(), "{report:?}");
        assert!(report.longest_gap.is_some());
    }
}

#[tokio::test]
async fn every_sin_is_found() {
    for pipeline in [1, 8] {
        let (report, _) = load(Sin::Forget, 4, pipeline).await;
        assert_eq!((report.undone, report.lost), (1, 0), "{report:?}");
        let (report, _) = load(Sin::Undo, 4, pipeline).await;
        assert!(report.undone > 0, "{report:?}");
        let (report, _) = load(Sin::Repeat, 4, pipeline).await;
        assert_eq!(report.repeated, 1, "{report:?}");
        let (report, _) = load(Sin::LoseAtEnd, 4, pipeline).await;
        assert_eq!((report.undone, report.lost), (0, 12), "{report:?}");
        let (report, _) = load(Sin::Error, 4, pipeline).await;
        assert_eq!(report.broken.len(), 1, "{report:?}");
        for report in [
            load(Sin::BreakAfter, 4, pipeline).await.0,
            load(Sin::BreakBefore, 4, pipeline).await.0,
        ] {
            // A broken connection leaves doubt, and is no proof of a loss.
            assert_eq!(report.broken.len(), 1, "{report:?}");
            assert_eq!((report.lost, report.undone, report.repeated), (0, 0, 0));
            assert!(!report.is_flawless());
        }
    }
}

#[tokio::test]
async fn a_rest_is_seen_as_a_gap() {
    let (report, all) = load(Sin::Rest, 1, 1).await;
    let longest = report.longest_gap.expect("a gap").length();
    assert!(longest >= REST && all >= REST, "{longest:?}, {all:?}");
    assert!(report.latencies.longest() >= REST);
}

#[tokio::test]
async fn a_load_on_counters_that_exist_goes_on_from_there() {
    let address = server(Sin::None).await;
    for _ in 0..2 {
        let load = Load::start(LoadConfig::new(address)).await.expect("a load");
        while load.acknowledged() < AT {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(load.finish().await.is_flawless());
    }
}

#[tokio::test]
async fn nobody_there_is_an_error() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    drop(listener);
    let error = Load::start(LoadConfig::new(address))
        .await
        .expect_err("nobody");
    assert!(error.to_string().contains("client 0"));
}
