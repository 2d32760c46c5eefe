//! Connections to `/metrics`: bounded in number, for each address and in all, and in time. The descriptors
//! they have are not there for logs and disks.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::agent::link::lock;

/// Connections at the same time.
const MOST: usize = 64;
/// Connections of one address at the same time.
const MOST_OF_ONE: usize = 8;
/// How long a connection may say nothing.
const SILENCE: Duration = Duration::from_secs(5);
/// How long a connection may be there.
const LIFE: Duration = Duration::from_mins(1);

/// Accepts as many connections as there are places for, and closes the others.
pub(super) struct Bounded {
    listener: TcpListener,
    places: Arc<Places>,
}

#[derive(Debug, Default)]
struct Places(Mutex<HashMap<IpAddr, usize>>);

/// One connection's place.
struct Place {
    places: Arc<Places>,
    of: IpAddr,
}

impl Place {
    fn take(places: &Arc<Places>, of: IpAddr) -> Option<Self> {
        let mut taken = lock(&places.0);
        if taken.values().sum::<usize>() >= MOST {
            return None;
        }
        let count = taken.entry(of).or_default();
        if *count >= MOST_OF_ONE {
            return None;
        }
        *count += 1;
        Some(Self {
            places: Arc::clone(places),
            of,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.0);
        if let Some(count) = taken.get_mut(&self.of) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                taken.remove(&self.of);
            }
        }
    }
}

impl Bounded {
    pub(super) fn new(listener: TcpListener) -> Self {
        Self {
            listener,
            places: Arc::default(),
        }
    }
}

impl Listener for Bounded {
    type Io = Timed;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Timed, SocketAddr) {
        loop {
            let (stream, from) = Listener::accept(&mut self.listener).await;
            if let Some(place) = Place::take(&self.places, from.ip().to_canonical()) {
                return (Timed::new(stream, place), from);
            }
            tracing::debug!(%from, "too many connections for metrics");
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends when its time is over.
pub(super) struct Timed {
    stream: TcpStream,
    end: Instant,
    silent: Pin<Box<Sleep>>,
    _place: Place,
}

impl Timed {
    fn new(stream: TcpStream, place: Place) -> Self {
        let now = Instant::now();
        Self {
            stream,
            end: now + LIFE,
            silent: Box::pin(sleep_until(now + SILENCE)),
            _place: place,
        }
    }

    /// What a read or a write comes to: time over when nothing was done for too long.
    fn timed<T>(
        &mut self,
        done: Poll<io::Result<T>>,
        context: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if done.is_ready() {
            let until = self.end.min(Instant::now() + SILENCE);
            self.silent.as_mut().reset(until);
            return done;
        }
        match self.silent.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Timed {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let done = Pin::new(&mut this.stream).poll_read(context, buffer);
        this.timed(done, context)
    }
}

impl AsyncWrite for Timed {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let done = Pin::new(&mut this.stream).poll_write(context, bytes);
        this.timed(done, context)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpSocket;
    use tokio::time::timeout;

    use super::super::serve;
    use super::*;

    /// Only keeps a broken test from hanging.
    const PATIENCE: Duration = Duration::from_secs(30);

    async fn connect(from: [u8; 4], to: SocketAddr) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((from, 0).into()).expect("an address");
        socket.connect(to).await.expect("a connection")
    }

    async fn get(from: [u8; 4], at: SocketAddr) -> String {
        let mut stream = connect(from, at).await;
        let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        stream.write_all(request).await.expect("asked");
        let mut answer = String::new();
        let read = timeout(PATIENCE, stream.read_to_string(&mut answer)).await;
        read.expect("in time").expect("an answer");
        answer
    }

    async fn ended(stream: &mut TcpStream) {
        let mut byte = [0];
        let read = timeout(PATIENCE, stream.read(&mut byte)).await;
        // Closed or reset.
        assert!(!matches!(read.expect("in time"), Ok(1..)));
    }

    #[tokio::test]
    async fn connections_that_say_nothing_are_few_and_end_and_keep_nobody_else_out() {
        // Taken at first: it is served when it is free.
        let taken = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let at = taken.local_addr().expect("bound");
        let (tell, mut told) = tokio::sync::watch::channel(None);
        let again = Duration::from_millis(10);
        tokio::spawn(async move {
            let tell = |trouble: Option<&super::super::ServeMetricsError>| {
                tell.send_replace(trouble.map(ToString::to_string));
            };
            serve(at, again, tell, || async { "one 1\n".to_owned() }).await
        });
        let trouble = told.wait_for(Option::is_some).await.expect("said").clone();
        let trouble = trouble.expect("waited for");
        assert!(trouble.contains(&format!("TCP {at}")), "{trouble}");
        drop(taken);
        told.wait_for(Option::is_none).await.expect("it serves");

        let began = Instant::now();
        let mut idle = Vec::new();
        for _ in 0..100 {
            idle.push(connect([127, 0, 0, 1], at).await);
        }
        // All but eight are closed at once.
        let mut last = idle.split_off(MOST_OF_ONE);
        for stream in &mut last {
            ended(stream).await;
        }
        let answer = get([127, 0, 0, 2], at).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.ends_with("one 1\n"), "{answer}");
        assert!(
            began.elapsed() < SILENCE,
            "it waited for those that are idle"
        );
        for stream in &mut idle {
            ended(stream).await;
        }
        let answer = get([127, 0, 0, 1], at).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }

    #[test]
    fn all_addresses_together_have_so_many_places() {
        let places = Arc::default();
        let of = |n: u8| IpAddr::from([10, 0, 0, n]);
        let all: Vec<_> = (0..200)
            .filter_map(|n| Place::take(&places, of(n % 100)))
            .collect();
        assert_eq!(all.len(), MOST);
        drop(all);
        assert!(lock(&places.0).is_empty());
    }
}
