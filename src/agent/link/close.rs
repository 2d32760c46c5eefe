//! Why a connection or a stream is closed: the numbers that travel in QUIC's close frames.

use std::fmt;

use quinn::VarInt;

/// A reason, the same number on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// The process ends or nobody needs the connection any more.
    Done,
    /// The same peer has connected again; the older connection goes.
    Replaced,
    /// The certificate is of this cluster, but the configuration names no such peer.
    UnknownPeer,
    /// A valid certificate of a role that may not do this.
    WrongRole,
    /// The peer claims to be somebody its certificate does not name.
    WrongName,
    /// The peer speaks another version of the protocol.
    WrongVersion,
    /// Bytes that cannot be what they should be.
    Garbage,
    /// A length beyond the limit.
    TooLong,
    /// The peer did not take what was sent until the queue's limit was reached: the connection is
    /// made anew and both sides resume from what they hold.
    QueueFull,
    /// The peer connected and then said nothing.
    Silent,
    /// Nobody here serves this kind of stream.
    NoService,
    /// The peer has as many connections or requests as one may have.
    TooMany,
}

impl CloseReason {
    /// Every reason.
    pub const ALL: [Self; 12] = [
        Self::Done,
        Self::Replaced,
        Self::UnknownPeer,
        Self::WrongRole,
        Self::WrongName,
        Self::WrongVersion,
        Self::Garbage,
        Self::TooLong,
        Self::QueueFull,
        Self::Silent,
        Self::NoService,
        Self::TooMany,
    ];

    /// The number on the wire. Never reuse one.
    pub const fn number(self) -> u32 {
        match self {
            Self::Done => 0,
            Self::Replaced => 1,
            Self::UnknownPeer => 2,
            Self::WrongRole => 3,
            Self::WrongName => 4,
            Self::WrongVersion => 5,
            Self::Garbage => 6,
            Self::TooLong => 7,
            Self::QueueFull => 8,
            Self::Silent => 9,
            Self::NoService => 10,
            Self::TooMany => 11,
        }
    }

    /// The word for journals and metrics.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Replaced => "replaced",
            Self::UnknownPeer => "unknown-peer",
            Self::WrongRole => "wrong-role",
            Self::WrongName => "wrong-name",
            Self::WrongVersion => "wrong-version",
            Self::Garbage => "garbage",
            Self::TooLong => "too-long",
            Self::QueueFull => "queue-full",
            Self::Silent => "silent",
            Self::NoService => "no-service",
            Self::TooMany => "too-many",
        }
    }

    /// The reason with this number.
    pub fn from_number(number: u64) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|reason| u64::from(reason.number()) == number)
    }

    /// Closes a connection for this reason.
    pub fn close(self, connection: &quinn::Connection) {
        connection.close(self.code(), self.word().as_bytes());
    }

    /// Whether the same attempt may succeed a moment later, without anybody changing anything. A process
    /// that has just begun serves nothing yet.
    pub const fn may_pass(self) -> bool {
        match self {
            Self::Done
            | Self::Replaced
            | Self::QueueFull
            | Self::Silent
            | Self::NoService
            | Self::TooMany => true,
            Self::UnknownPeer
            | Self::WrongRole
            | Self::WrongName
            | Self::WrongVersion
            | Self::Garbage
            | Self::TooLong => false,
        }
    }

    /// The number as QUIC wants it.
    pub fn code(self) -> VarInt {
        VarInt::from_u32(self.number())
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How a connection or a stream ended, seen from here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// We closed it.
    ByUs(CloseReason),
    /// The peer closed it.
    ByPeer(CloseReason),
    /// TLS refused one side's certificate: another cluster's, expired, or of another name.
    Certificate,
    /// Nothing was heard for the idle timeout.
    TimedOut,
    /// The peer's process restarted: it knows the connection no more.
    Reset,
    /// Anything else, as QUIC says it.
    Other(String),
}

impl Ended {
    /// The word for journals and metrics.
    pub fn word(&self) -> &'static str {
        match self {
            Self::ByUs(reason) | Self::ByPeer(reason) => reason.word(),
            Self::Certificate => "certificate",
            Self::TimedOut => "timed-out",
            Self::Reset => "reset",
            Self::Other(_) => "transport",
        }
    }

    /// Whether the same attempt may succeed a moment later.
    pub const fn may_pass(&self) -> bool {
        match self {
            Self::ByUs(reason) | Self::ByPeer(reason) => reason.may_pass(),
            Self::Certificate => false,
            Self::TimedOut | Self::Reset | Self::Other(_) => true,
        }
    }

    /// With this number the peer closed the connection, or its end of a stream.
    fn by_peer(number: VarInt) -> Self {
        match CloseReason::from_number(number.into_inner()) {
            Some(reason) => Self::ByPeer(reason),
            None => Self::Other(format!("closed by the peer with {number}")),
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ByUs(reason) => write!(f, "closed here: {reason}"),
            Self::ByPeer(reason) => write!(f, "closed by the peer: {reason}"),
            Self::Certificate => f.write_str("a certificate was refused"),
            Self::TimedOut => f.write_str("nothing heard for too long"),
            Self::Reset => f.write_str("the peer has restarted"),
            Self::Other(reason) => f.write_str(reason),
        }
    }
}

/// TLS alerts travel as QUIC errors 0x100 to 0x1ff (RFC 9001, section 4.8).
const CRYPTO_ERRORS: std::ops::RangeInclusive<u64> = 0x100..=0x1ff;

impl From<&quinn::ConnectionError> for Ended {
    fn from(error: &quinn::ConnectionError) -> Self {
        use quinn::ConnectionError as E;
        let crypto = |code: quinn::TransportErrorCode| CRYPTO_ERRORS.contains(&u64::from(code));
        match error {
            E::ApplicationClosed(close) => Self::by_peer(close.error_code),
            E::TransportError(error) if crypto(error.code) => Self::Certificate,
            E::ConnectionClosed(close) if crypto(close.error_code) => Self::Certificate,
            E::TimedOut => Self::TimedOut,
            E::Reset => Self::Reset,
            other => Self::Other(other.to_string()),
        }
    }
}

impl From<quinn::ReadError> for Ended {
    fn from(error: quinn::ReadError) -> Self {
        match error {
            quinn::ReadError::Reset(number) => Self::by_peer(number),
            quinn::ReadError::ConnectionLost(error) => Self::from(&error),
            other => Self::Other(other.to_string()),
        }
    }
}

impl From<quinn::WriteError> for Ended {
    fn from(error: quinn::WriteError) -> Self {
        match error {
            quinn::WriteError::Stopped(number) => Self::by_peer(number),
            quinn::WriteError::ConnectionLost(error) => Self::from(&error),
            other => Self::Other(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_number() {
        for reason in CloseReason::ALL {
            assert_eq!(
                CloseReason::from_number(u64::from(reason.number())),
                Some(reason)
            );
        }
        assert_eq!(CloseReason::from_number(1 << 40), None);
    }
}
