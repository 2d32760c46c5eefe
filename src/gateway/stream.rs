//! Messages over a byte stream, polled: no task and no channel of its own.

use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

use super::frames::{Message, WireError};

/// How much is allocated at once for what is read. Frames are cut from it without copying, so it
/// lives as long as the last of them.
const READ_BLOCK: usize = 16 * 1024;

/// Below this much room the next block is allocated: a whole frame with its header fits.
const READ_ROOM: usize = 4 * 1024;

/// How many bytes may wait to be written before nothing is added.
pub const WRITE_BUDGET: usize = 64 * 1024;

/// Why a stream ended, other than by its end.
#[derive(Debug, Error)]
pub enum StreamError {
    /// The connection failed.
    #[error("the stream failed")]
    Io(#[from] io::Error),
    /// The peer wrote nonsense.
    #[error("the peer wrote what no peer of this version writes")]
    Wire(#[from] WireError),
}

/// A byte stream that carries messages both ways.
#[derive(Debug)]
pub struct MessageStream<S> {
    stream: S,
    incoming: BytesMut,
    /// What is to be written; append here, up to [`WRITE_BUDGET`].
    pub outgoing: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> MessageStream<S> {
    /// Wraps a stream on which nothing was said yet.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            incoming: BytesMut::new(),
            outgoing: BytesMut::new(),
        }
    }

    /// The next message; `None` at the end of the stream.
    pub fn poll_message<M: Message>(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<M>, StreamError>> {
        loop {
            if let Some(message) = M::decode(&mut self.incoming)? {
                return Poll::Ready(Ok(Some(message)));
            }
            if self.incoming.capacity() - self.incoming.len() < READ_ROOM {
                self.incoming.reserve(READ_BLOCK);
            }
            let read = pin!(self.stream.read_buf(&mut self.incoming));
            if ready!(read.poll(cx))? == 0 {
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Writes what waits. Ready when nothing does any more.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outgoing.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.outgoing))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Tells the peer that nothing more will be written.
    pub fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use bytes::Bytes;
    use replay_log::FrameNumber;

    use super::*;
    use crate::gateway::frames::{NetworkPort, ToAgent};

    #[tokio::test]
    async fn a_slow_reader_gets_everything_and_the_end() {
        let (near, far) = tokio::io::duplex(100);
        let mut near = MessageStream::new(near);
        let mut far = MessageStream::new(far);
        let sent: Vec<_> = (1..=50)
            .map(|number| ToAgent::Frame {
                port: NetworkPort::default(),
                number: FrameNumber(number),
                bytes: Bytes::from(vec![number as u8; 700]),
            })
            .collect();
        for message in &sent {
            message.encode(&mut near.outgoing);
        }
        let writer = async {
            poll_fn(|cx| near.poll_flush(cx)).await.expect("written");
            poll_fn(|cx| near.poll_finish(cx)).await.expect("finished");
        };
        let reader = async {
            let mut got = Vec::new();
            while let Some(message) = poll_fn(|cx| far.poll_message::<ToAgent>(cx))
                .await
                .expect("messages")
            {
                got.push(message);
            }
            got
        };
        let ((), got) = tokio::join!(writer, reader);
        assert_eq!(got, sent);
    }
}
