//! One client of the load: increments its own counters and checks every answer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::Shared;
use super::ledger::{Counter, Verdict};
use super::resp::{BadReply, Reply, put_command, take_reply};
use super::timing::{Gap, Histogram};

/// How long a client waits before it connects again.
const RECONNECT_AFTER: Duration = Duration::from_millis(20);

/// Why a connection is of no more use.
#[derive(Debug, Error)]
pub enum Broken {
    /// It was reset or cannot be made.
    #[error("the connection broke")]
    Io(#[from] io::Error),
    /// The server ended it.
    #[error("the server closed the connection")]
    Closed,
    /// The server answered nonsense.
    #[error(transparent)]
    Nonsense(#[from] BadReply),
    /// The server answered with an error, or with something else than was asked for.
    #[error("the server answered {0:?}")]
    Unexpected(Reply),
    /// No answer, or no connection, within the patience of the load.
    #[error("no answer came within {0:?}")]
    Silent(Duration),
}

/// What one client found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) acknowledged: u64,
    pub(super) undone: u64,
    pub(super) repeated: u64,
    pub(super) lost: u64,
    pub(super) broken: Vec<String>,
    pub(super) latencies: Histogram,
    pub(super) longest_gap: Option<Gap>,
}

struct Connection {
    stream: TcpStream,
    incoming: BytesMut,
    outgoing: BytesMut,
}

impl Connection {
    async fn open(address: SocketAddr) -> Result<Self, Broken> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
        })
    }

    async fn flush(&mut self) -> Result<(), Broken> {
        self.stream.write_all(&self.outgoing).await?;
        self.outgoing.clear();
        Ok(())
    }

    async fn reply(&mut self) -> Result<Reply, Broken> {
        loop {
            if let Some(reply) = take_reply(&mut self.incoming)? {
                return Ok(reply);
            }
            if self.stream.read_buf(&mut self.incoming).await? == 0 {
                return Err(Broken::Closed);
            }
        }
    }

    /// Reads counters; those that do not exist count as 0.
    async fn read(&mut self, keys: &[String]) -> Result<Vec<u64>, Broken> {
        let mut values = Vec::with_capacity(keys.len());
        // In parts, so that neither side's buffers fill up with unread answers.
        for part in keys.chunks(64) {
            for key in part {
                put_command(&mut self.outgoing, &[b"GET", key.as_bytes()]);
            }
            self.flush().await?;
            for _ in part {
                values.push(match self.reply().await? {
                    Reply::Nil => 0,
                    Reply::Text(text) => {
                        number(&text).ok_or(Broken::Unexpected(Reply::Text(text)))?
                    }
                    other => return Err(Broken::Unexpected(other)),
                });
            }
        }
        Ok(values)
    }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A client with its counters.
pub(super) struct Client {
    shared: Arc<Shared>,
    keys: Vec<String>,
    counters: Vec<Counter>,
    next: usize,
    findings: Findings,
}

/// A client that is connected and ready.
pub(super) struct Ready {
    client: Client,
    connection: Connection,
}

impl Ready {
    pub(super) async fn prepare(shared: Arc<Shared>, index: usize) -> Result<Self, Broken> {
        let patience = shared.config.patience;
        tokio::time::timeout(patience, Self::prepare_patiently(shared, index))
            .await
            .unwrap_or(Err(Broken::Silent(patience)))
    }

    async fn prepare_patiently(shared: Arc<Shared>, index: usize) -> Result<Self, Broken> {
        let config = &shared.config;
        let keys: Vec<_> = (0..config.keys.max(1))
            .map(|key| format!("{}:{index}:{key}", config.prefix))
            .collect();
        let mut connection = Connection::open(config.address).await?;
        let values = connection.read(&keys).await?;
        let client = Client {
            counters: values.into_iter().map(Counter::starting_at).collect(),
            keys,
            next: 0,
            findings: Findings::default(),
            shared,
        };
        Ok(Self { client, connection })
    }

    /// Increments until the load stops, then reads everything back.
    pub(super) async fn run(self) -> Findings {
        let Self {
            mut client,
            connection,
        } = self;
        let mut connection = Some(connection);
        while !client.shared.stopping() {
            let outcome = match &mut connection {
                Some(open) => client.round(open).await,
                None => match client.reconnect().await {
                    Ok(open) => {
                        connection = Some(open);
                        Ok(())
                    }
                    Err(broken) => Err(broken),
                },
            };
            if let Err(broken) = outcome {
                if connection.take().is_some() {
                    client.note_broken(&broken);
                }
                tokio::time::sleep(RECONNECT_AFTER).await;
            }
        }
        drop(connection);
        client.read_back().await;
        client.findings
    }
}

impl Client {
    async fn reconnect(&self) -> Result<Connection, Broken> {
        let config = &self.shared.config;
        tokio::time::timeout(config.patience, Connection::open(config.address))
            .await
            .unwrap_or(Err(Broken::Silent(config.patience)))
    }

    fn note_broken(&mut self, broken: &Broken) {
        self.shared.count_broken();
        self.findings.broken.push(broken.to_string());
    }

    /// Sends a pipeline's worth of increments and checks the answers.
    async fn round(&mut self, connection: &mut Connection) -> Result<(), Broken> {
        let config = &self.shared.config;
        let first = self.next;
        let requests = config.pipeline.max(1);
        for offset in 0..requests {
            let key = &self.keys[(first + offset) % self.keys.len()];
            put_command(&mut connection.outgoing, &[b"INCR", key.as_bytes()]);
        }
        self.next = (first + requests) % self.keys.len();
        let patience = config.patience;
        let asked = Instant::now();
        let mut answered = 0;
        let outcome = tokio::time::timeout(patience, async {
            connection.flush().await?;
            let mut waiting_since = asked;
            while answered < requests {
                let value = match connection.reply().await? {
                    Reply::Integer(value) => u64::try_from(value)
                        .map_err(|_| Broken::Unexpected(Reply::Integer(value)))?,
                    other => return Err(Broken::Unexpected(other)),
                };
                let now = Instant::now();
                self.answer(first + answered, value, asked, waiting_since, now);
                waiting_since = now;
                answered += 1;
            }
            Ok(())
        })
        .await
        .unwrap_or(Err(Broken::Silent(patience)));
        if outcome.is_err() {
            connection.outgoing.clear();
            for offset in answered..requests {
                let keys = self.keys.len();
                self.counters[(first + offset) % keys].unanswered();
            }
        } else if let Some(pause) = self.shared.pause() {
            tokio::time::sleep(pause).await;
        }
        outcome
    }

    fn answer(&mut self, key: usize, value: u64, asked: Instant, since: Instant, now: Instant) {
        let keys = self.keys.len();
        match self.counters[key % keys].answered(value) {
            Verdict::Right => {}
            Verdict::Undone(by) => self.findings.undone += by,
            Verdict::Repeated(by) => self.findings.repeated += by,
        }
        self.findings.acknowledged += 1;
        self.findings.latencies.record(now - asked);
        let gap = Gap {
            from: since,
            until: now,
        };
        if self
            .findings
            .longest_gap
            .is_none_or(|longest| gap.length() > longest.length())
        {
            self.findings.longest_gap = Some(gap);
        }
        self.shared.count_answer(now);
    }

    /// Compares every counter with what was acknowledged.
    async fn read_back(&mut self) {
        let patience = self.shared.config.patience;
        let reading = async {
            let mut connection = Connection::open(self.shared.config.address).await?;
            connection.read(&self.keys).await
        };
        let read = tokio::time::timeout(patience, reading)
            .await
            .unwrap_or(Err(Broken::Silent(patience)));
        match read {
            Ok(values) => {
                for (counter, value) in self.counters.iter().zip(values) {
                    match counter.read_back(value) {
                        Verdict::Right => {}
                        Verdict::Undone(by) => self.findings.lost += by,
                        Verdict::Repeated(by) => self.findings.repeated += by,
                    }
                }
            }
            Err(broken) => {
                self.note_broken(&broken);
                // What cannot be read is as good as lost.
                self.findings.lost += self.counters.iter().map(Counter::acknowledged).sum::<u64>();
            }
        }
    }
}
