//! Messages on a stream: four bytes of length, little endian, and postcard.

use bytes::{Buf as _, Bytes, BytesMut};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;

use super::close::CloseReason;

const LENGTH: usize = 4;
/// How much is taken from a stream at once.
const READ_MAX: usize = 256 * 1024;

/// A message that must not be sent: the peer would refuse its length.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "a message of {length} bytes is more than the {limit} that the peer takes: send it in parts"
)]
pub struct TooLong {
    /// Its length.
    pub length: usize,
    /// The limit.
    pub limit: usize,
}

/// A stream that cannot be read on.
#[derive(Clone, Debug, Error)]
pub enum FrameError {
    /// The stream ended or its connection did.
    #[error("the stream broke off")]
    Read(#[from] ReadError),
    /// A length beyond the limit.
    #[error("the peer announced {length} bytes where at most {limit} are allowed")]
    TooLong {
        /// What was announced.
        length: usize,
        /// The limit.
        limit: usize,
    },
    /// The stream ended within a message.
    #[error("the stream ended within a message")]
    Torn,
    /// Bytes that are no message.
    #[error("the peer sent what is no message")]
    Garbage,
}

impl FrameError {
    /// The reason to close for, where the peer is at fault.
    pub fn blame(&self) -> Option<CloseReason> {
        match self {
            Self::Read(_) => None,
            Self::TooLong { .. } => Some(CloseReason::TooLong),
            Self::Torn | Self::Garbage => Some(CloseReason::Garbage),
        }
    }
}

/// A message with its length in front.
pub fn encode<T: Serialize + ?Sized>(message: &T, limit: usize) -> Result<Bytes, TooLong> {
    let start = vec![0; LENGTH];
    // Fails only for types that postcard cannot describe (maps of unknown length): a programmer's
    // error, not an input's.
    let mut bytes = postcard::to_extend(message, start).expect("messages can be serialised");
    let length = bytes.len() - LENGTH;
    match u32::try_from(length) {
        Ok(announced) if length <= limit => {
            bytes[..LENGTH].copy_from_slice(&announced.to_le_bytes());
            Ok(bytes.into())
        }
        _ => Err(TooLong { length, limit }),
    }
}

/// Takes one whole message off the front of a buffer, if there is one.
pub fn split(buffer: &mut BytesMut, limit: usize) -> Result<Option<BytesMut>, FrameError> {
    let Some(announced) = buffer.first_chunk::<LENGTH>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*announced) as usize;
    if length > limit {
        return Err(FrameError::TooLong { length, limit });
    }
    if buffer.len() < LENGTH + length {
        return Ok(None);
    }
    buffer.advance(LENGTH);
    Ok(Some(buffer.split_to(length)))
}

/// Reads a message; all of its bytes must belong to it.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, FrameError> {
    match postcard::take_from_bytes(bytes) {
        Ok((message, [])) => Ok(message),
        _ => Err(FrameError::Garbage),
    }
}

/// Writes one message.
pub async fn write<T: Serialize>(
    send: &mut SendStream,
    message: &T,
    limit: usize,
) -> Result<(), WriteFrameError> {
    Ok(send.write_chunk(encode(message, limit)?).await?)
}

/// Why a message could not be written.
#[derive(Clone, Debug, Error)]
pub enum WriteFrameError {
    /// It is too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The stream is gone.
    #[error("the stream broke off")]
    Write(#[from] WriteError),
}

/// Reads messages from a stream. Memory grows with what has arrived, never with what is announced.
#[derive(Debug)]
pub struct FrameReader {
    recv: RecvStream,
    buffer: BytesMut,
}

impl FrameReader {
    /// Reads from here.
    pub fn new(recv: RecvStream) -> Self {
        Self {
            recv,
            buffer: BytesMut::new(),
        }
    }

    /// The next message; `None` at the end of the stream.
    ///
    /// Cancel safe: what has arrived stays.
    pub async fn next<T: DeserializeOwned>(
        &mut self,
        limit: usize,
    ) -> Result<Option<T>, FrameError> {
        loop {
            if let Some(bytes) = split(&mut self.buffer, limit)? {
                return decode(&bytes).map(Some);
            }
            match self.recv.read_chunk(READ_MAX, true).await? {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.bytes),
                None if self.buffer.is_empty() => return Ok(None),
                None => return Err(FrameError::Torn),
            }
        }
    }

    /// The stream, for raw bytes after the last message; with what was read beyond it.
    pub fn into_parts(self) -> (RecvStream, Bytes) {
        (self.recv, self.buffer.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_whole_and_in_order() {
        let mut buffer = BytesMut::new();
        for text in ["one", "", "three"] {
            buffer.extend_from_slice(&encode(text, 100).expect("short"));
        }
        let last = buffer.split_off(buffer.len() - 2);
        let mut texts = Vec::new();
        while let Some(bytes) = split(&mut buffer, 100).expect("good") {
            texts.push(decode::<String>(&bytes).expect("text"));
        }
        assert_eq!(texts, ["one", ""]);
        buffer.unsplit(last);
        let bytes = split(&mut buffer, 100).expect("good").expect("whole");
        assert_eq!(decode::<String>(&bytes).expect("text"), "three");
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_on_both_sides() {
        assert!(encode("four", 4).is_err());
        assert!(encode("four", 5).is_ok());
        let mut buffer = BytesMut::from(&u32::MAX.to_le_bytes()[..]);
        assert!(matches!(
            split(&mut buffer, 1 << 20),
            Err(FrameError::TooLong { .. })
        ));
    }

    #[test]
    fn trailing_bytes_are_garbage() {
        assert!(decode::<u8>(&[1]).is_ok());
        assert!(matches!(decode::<u8>(&[1, 2]), Err(FrameError::Garbage)));
        assert!(matches!(
            decode::<String>(&[9, b'a']),
            Err(FrameError::Garbage)
        ));
    }
}
