//! The link: QUIC with mutual TLS between the processes of a cluster.
//!
//! An [`Endpoint`] is one UDP socket. Between hosts a [`Link`] keeps one connection for each pair and
//! carries messages on three lanes; everybody else (gateways, operators, clients of the witness, bulk)
//! opens streams of a [`StreamKind`] on connections of their own ([`Channel`], [`Endpoint::serve`]).
//! See README.md in the folder above.

mod accept;
mod address;
mod admission;
mod close;
mod compress;
mod counters;
mod door;
mod endpoint;
pub mod frame;
mod hall;
mod kind;
mod lanes;
mod request;
mod session;
mod socket;
mod steering;
mod tls;

#[cfg(test)]
mod tests;

use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

pub use accept::IncomingStream;
pub use address::{Address, Peer, Tried};
pub use close::{CloseReason, Ended};
pub use counters::{Counter, LinkCounters};
pub(crate) use endpoint::lock;
pub use endpoint::{BindError, DialError, Endpoint};
pub use kind::StreamKind;
pub use lanes::Link;
pub use request::{Answers, Channel, Reply, RequestError, serve_requests};
pub use session::{CONTROL_MESSAGE_MAX, LOG_MESSAGE_MAX};
pub use tls::{Purpose, TlsError};

use crate::agent::certs::Name;

/// How a message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// In order with the other control messages, before log and bulk; at most
    /// [`CONTROL_MESSAGE_MAX`] bytes.
    Control,
    /// In order with the other log messages, compressed; at most [`LOG_MESSAGE_MAX`] bytes.
    Log,
    /// At once or never: may be lost, overtaken or repeated. Too large for a packet: by control.
    Datagram,
}

/// What a [`Link`] carries.
pub trait LinkMessage: Serialize + DeserializeOwned + Send + 'static {
    /// The lane this message takes.
    fn lane(&self) -> Lane;
}

/// The number of one unbroken connection with a peer, counted here; messages of an earlier one never
/// arrive after the next one's `PeerUp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// What happens on a link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent<M> {
    /// A peer is connected: messages can be sent to it.
    PeerUp {
        /// Which.
        peer: Name,
        /// The connection that begins.
        session: SessionId,
    },
    /// The connection has ended: what was sent and has not been answered may be lost.
    PeerDown {
        /// Which.
        peer: Name,
        /// The connection that ended.
        session: SessionId,
        /// How.
        ended: Ended,
    },
    /// A peer has not been connected for some seconds. Said again for another reason.
    Unreachable {
        /// Which.
        peer: Name,
        /// Where it was looked for and what came of it, in a sentence.
        why: String,
    },
    /// A peer said something.
    Message {
        /// Which.
        peer: Name,
        /// On which connection.
        session: SessionId,
        /// What.
        message: M,
    },
}

/// Why a message was not queued.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum SendRefused {
    /// There is no connection; one is being made.
    #[error("the peer is not connected: send again when it is up")]
    NotConnected,
    /// The queue's limit is reached: the connection is closed and made anew.
    #[error("the peer does not take what is sent: the connection is made anew")]
    QueueFull,
    /// The message is too long for its lane.
    #[error(transparent)]
    TooLong(#[from] frame::TooLong),
}
