//! Messages as bytes: postcard, with every length bounded before anything is allocated.

use thiserror::Error;

use super::message::Message;

/// The longest encoded message of any lane: a full batch and its frame.
pub const MAX_MESSAGE: usize = replay_log::batch::MAX_FRAME_LEN + 64;
/// The longest encoded message of the control lane.
pub const MAX_CONTROL: usize = 16 << 10;
/// The longest datagram; fits the smallest packet that QUIC guarantees.
pub const MAX_DATAGRAM: usize = 1_000;

/// Why bytes are no message.
#[derive(Debug, Error)]
pub enum WireError {
    /// More bytes than any message has.
    #[error("a message of {found} bytes is longer than the {MAX_MESSAGE} that are allowed")]
    TooLong {
        /// How many came.
        found: usize,
    },
    /// They mean nothing.
    #[error("the peer sent bytes that are no message of this protocol version")]
    Malformed(#[source] postcard::Error),
    /// They mean something and then go on.
    #[error("the peer sent {extra} bytes behind a message")]
    Trailing {
        /// How many.
        extra: usize,
    },
}

impl Message {
    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Encoding to memory fails only for types that postcard cannot express; the round trip
        // of every variant is tested.
        postcard::to_stdvec(self).expect("every message can be encoded")
    }

    /// The message that these bytes are, all of them.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        if bytes.len() > MAX_MESSAGE {
            return Err(WireError::TooLong { found: bytes.len() });
        }
        let (message, rest) = postcard::take_from_bytes(bytes).map_err(WireError::Malformed)?;
        if rest.is_empty() {
            Ok(message)
        } else {
            Err(WireError::Trailing { extra: rest.len() })
        }
    }
}

/// A batch inside a message: the frame that segments and streams have, checksum included.
pub(super) mod batch {
    use std::fmt;

    use replay_log::Batch;
    use serde::de::{Error, Visitor};
    use serde::{Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(batch: &Batch, to: S) -> Result<S::Ok, S::Error> {
        let mut frame = Vec::new();
        batch.encode_frame(&mut frame);
        to.serialize_bytes(&frame)
    }

    struct Frame;

    impl Visitor<'_> for Frame {
        type Value = Batch;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the frame of a batch")
        }

        fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Batch, E> {
            match Batch::decode_frame(bytes) {
                Ok(Some((batch, used))) if used == bytes.len() => Ok(batch),
                Ok(_) => Err(E::custom("not one whole batch")),
                Err(error) => Err(E::custom(error)),
            }
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Batch, D::Error> {
        from.deserialize_bytes(Frame)
    }
}
