//! Requests: one stream for each, a message there and one or more back.

use std::collections::HashMap;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, RecvStream, SendStream};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio::time::timeout;

use super::accept::IncomingStream;
use super::address::Peer;
use super::endpoint::{DialError, Endpoint};
use super::frame::{self, FrameError, FrameReader, WriteFrameError};
use super::kind::StreamKind;
use super::tls::Purpose;
use super::{CONTROL_MESSAGE_MAX, CloseReason, Ended};
use crate::agent::certs::{Identity, Role};

/// Requests of one kind that may wait to be served, of one certificate; more are refused.
const WAITING_EACH: usize = 256;
/// How long the opener of a stream may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection for services to one peer, made when it is needed and made anew when it is gone.
/// Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Channel {
    endpoint: Endpoint,
    peer: Arc<Peer>,
    current: Arc<Mutex<Option<Connection>>>,
}

/// Why a request was not answered.
#[derive(Clone, Debug, Error)]
pub enum RequestError {
    /// The peer cannot be reached.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The peer closed or reset the stream.
    #[error("{peer} refused the request: {reason}")]
    Refused {
        /// Who.
        peer: Identity,
        /// With which reason.
        reason: Ended,
    },
    /// No answer in time.
    #[error("{peer} did not answer within {} ms: see whether it is overloaded or cut off", after.as_millis())]
    TimedOut {
        /// Who.
        peer: Identity,
        /// How long it had.
        after: Duration,
    },
    /// The answer makes no sense.
    #[error(
        "{peer} answered with what cannot be read: use the same version of Understudy on both sides"
    )]
    Garbage {
        /// Who.
        peer: Identity,
    },
    /// The question is too long to be sent.
    #[error(transparent)]
    TooLong(#[from] frame::TooLong),
}

impl RequestError {
    /// Whether the same request may be answered a moment later: the peer was silent, busy or cut off.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::Refused { reason, .. } => reason.may_pass(),
            Self::TimedOut { .. } => true,
            Self::Dial(error) => error.may_pass(),
            Self::Garbage { .. } | Self::TooLong(_) => false,
        }
    }
}

impl Channel {
    /// To this peer, by this endpoint. Nothing is dialled yet.
    pub fn new(endpoint: &Endpoint, peer: Peer) -> Self {
        Self {
            endpoint: endpoint.clone(),
            peer: Arc::new(peer),
            current: Arc::default(),
        }
    }

    /// Who is on the other side.
    pub fn peer(&self) -> &Identity {
        &self.peer.identity
    }

    /// The connection, made if there is none.
    pub async fn connection(&self) -> Result<Connection, DialError> {
        let mut current = self.current.lock().await;
        if let Some(connection) = current.as_ref()
            && connection.close_reason().is_none()
        {
            return Ok(connection.clone());
        }
        let connection = self.endpoint.dial(&self.peer, Purpose::Services).await?;
        *current = Some(connection.clone());
        Ok(connection)
    }

    /// Opens a stream of this kind. Its first byte is queued; the peer hears of the stream with it.
    pub async fn open(&self, kind: StreamKind) -> Result<(SendStream, RecvStream), RequestError> {
        let connection = self.connection().await?;
        let opened = connection.open_bi().await;
        let (mut send, recv) = opened.map_err(|error| self.refused(Ended::from(&error)))?;
        // Fails only when the stream is gone, which the next write shows.
        let _ = send.set_priority(kind.priority());
        let first = [kind.byte()];
        let written = send.write_all(&first).await;
        written.map_err(|error| self.refused(Ended::from(error)))?;
        Ok((send, recv))
    }

    /// Asks and waits for one answer.
    pub async fn request<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: StreamKind,
        question: &Q,
        patience: Duration,
    ) -> Result<A, RequestError> {
        let asking = async {
            let mut answers = self.ask(kind, question).await?;
            answers.next().await?.ok_or_else(|| RequestError::Garbage {
                peer: self.peer().clone(),
            })
        };
        match timeout(patience, asking).await {
            Ok(answer) => answer,
            Err(_) => Err(RequestError::TimedOut {
                peer: self.peer().clone(),
                after: patience,
            }),
        }
    }

    /// Asks and hands out the answers one by one.
    pub async fn ask<Q: Serialize, A: DeserializeOwned>(
        &self,
        kind: StreamKind,
        question: &Q,
    ) -> Result<Answers<A>, RequestError> {
        let question = frame::encode(question, CONTROL_MESSAGE_MAX)?;
        let (mut send, recv) = self.open(kind).await?;
        let written = send.write_chunk(question).await;
        written.map_err(|error| self.refused(Ended::from(error)))?;
        Ok(Answers {
            peer: self.peer().clone(),
            reader: FrameReader::new(recv),
            _open: send,
            answer: PhantomData,
        })
    }

    fn refused(&self, reason: Ended) -> RequestError {
        RequestError::Refused {
            peer: self.peer().clone(),
            reason,
        }
    }
}

/// The answers to one question. Dropping it tells the peer that no more are wanted.
#[derive(Debug)]
pub struct Answers<A> {
    peer: Identity,
    reader: FrameReader,
    /// The question's side stays open for as long as answers are wanted.
    _open: SendStream,
    answer: PhantomData<fn() -> A>,
}

impl<A: DeserializeOwned> Answers<A> {
    /// The next answer; `None` when there are no more. Cancel safe.
    pub async fn next(&mut self) -> Result<Option<A>, RequestError> {
        let read = self.reader.next(CONTROL_MESSAGE_MAX).await;
        read.map_err(|error| match error {
            FrameError::Read(error) => RequestError::Refused {
                peer: self.peer.clone(),
                reason: Ended::from(error),
            },
            _ => RequestError::Garbage {
                peer: self.peer.clone(),
            },
        })
    }
}

/// Where the answers of one request go.
#[derive(Debug)]
pub struct Reply {
    send: SendStream,
}

impl Reply {
    /// Sends one answer.
    pub async fn send<A: Serialize>(&mut self, answer: &A) -> Result<(), WriteFrameError> {
        frame::write(&mut self.send, answer, CONTROL_MESSAGE_MAX).await
    }

    /// Resolves when the asker wants no more answers or is gone.
    pub async fn unwanted(&mut self) {
        // Every outcome means the same: nobody reads.
        let _ = self.send.stopped().await;
    }
}

/// Serves the requests that arrive at `streams`, each in a task of its own, until the endpoint ends.
/// `answer` gets who asks, the question, and where the answers go; the stream is finished after it.
///
/// Every certificate has places of its own, so that none keeps another's requests waiting, whatever it
/// opens and does not say.
pub async fn serve_requests<Q, H, F>(mut streams: mpsc::Receiver<IncomingStream>, answer: H)
where
    Q: DeserializeOwned + Send + 'static,
    H: Fn(Identity, Q, Reply) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let mut quotas = HashMap::<Identity, Quota>::new();
    while let Some(mut stream) = streams.recv().await {
        if !quotas.contains_key(&stream.from) {
            quotas.retain(|_, quota| quota.is_used());
        }
        let quota = quotas
            .entry(stream.from.clone())
            .or_insert_with(|| Quota::of(stream.from.role));
        let Ok(counted) = Arc::clone(&quota.waiting).try_acquire_owned() else {
            // Both fail only when the stream is gone, which is what is wanted.
            let _ = stream.send.reset(CloseReason::TooMany.code());
            let _ = stream.recv.stop(CloseReason::TooMany.code());
            continue;
        };
        let (places, answer) = (Arc::clone(&quota.places), answer.clone());
        tokio::spawn(async move {
            if let Ok(place) = places.acquire_owned().await {
                serve_one(stream, answer).await;
                drop(place);
            }
            drop(counted);
        });
    }
}

/// What one certificate may have.
struct Quota {
    /// Served and waiting together.
    waiting: Arc<Semaphore>,
    /// Served.
    places: Arc<Semaphore>,
}

impl Quota {
    fn of(role: Role) -> Self {
        // A host asks for all its VMs.
        let places = match role {
            Role::Host => 32,
            Role::Witness | Role::Gateway | Role::Operator => 16,
        };
        Self {
            waiting: Arc::new(Semaphore::new(places + WAITING_EACH)),
            places: Arc::new(Semaphore::new(places)),
        }
    }

    fn is_used(&self) -> bool {
        Arc::strong_count(&self.waiting) > 1
    }
}

async fn serve_one<Q, H, F>(stream: IncomingStream, answer: H)
where
    Q: DeserializeOwned,
    H: Fn(Identity, Q, Reply) -> F,
    F: Future<Output = ()>,
{
    let IncomingStream {
        from,
        connection,
        mut send,
        recv,
    } = stream;
    let mut reader = FrameReader::new(recv);
    let reason = match timeout(REQUEST_TIMEOUT, reader.next::<Q>(CONTROL_MESSAGE_MAX)).await {
        Ok(Ok(Some(question))) => return answer(from, question, Reply { send }).await,
        Ok(Ok(None)) => CloseReason::Garbage,
        Ok(Err(error)) => match error.blame() {
            Some(reason) => {
                tracing::warn!(%from, %reason, "closing the connection");
                return reason.close(&connection);
            }
            None => return,
        },
        Err(_) => CloseReason::Silent,
    };
    // Fails only when the stream is gone, which is what is wanted.
    let _ = send.reset(reason.code());
}
