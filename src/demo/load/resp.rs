//! As much of the Redis protocol (RESP2) as the load needs: it writes INCR and GET, and reads
//! integers, strings and errors.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use thiserror::Error;

/// The longest reply that is accepted, in bytes.
const MAX_REPLY: usize = 64 * 1024;

/// A server's reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `:1`
    Integer(i64),
    /// `$3 abc`, or `+OK`
    Text(Bytes),
    /// `$-1`
    Nil,
    /// `-ERR …`
    Error(String),
}

/// What came is no reply.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the server's reply is no Redis protocol: {0:?}")]
pub struct BadReply(String);

/// Appends a command.
pub fn put_command(out: &mut BytesMut, words: &[&[u8]]) {
    put_header(out, b'*', words.len());
    for word in words {
        put_header(out, b'$', word.len());
        out.put_slice(word);
        out.put_slice(b"\r\n");
    }
}

fn put_header(out: &mut BytesMut, kind: u8, number: usize) {
    out.put_u8(kind);
    out.put_slice(number.to_string().as_bytes());
    out.put_slice(b"\r\n");
}

/// Takes the first reply off the front; `None` when it is not there wholly yet.
pub fn take_reply(from: &mut BytesMut) -> Result<Option<Reply>, BadReply> {
    let Some(end) = from.iter().position(|byte| *byte == b'\n') else {
        if from.len() > MAX_REPLY {
            return Err(bad(from));
        }
        return Ok(None);
    };
    let line = &from[..end];
    let (Some(kind), Some(b'\r')) = (line.first(), line.last()) else {
        return Err(bad(from));
    };
    let text = line.get(1..end.saturating_sub(1)).unwrap_or_default();
    let number = || {
        std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse::<i64>().ok())
            .ok_or_else(|| bad(from))
    };
    match kind {
        b':' => {
            let reply = Reply::Integer(number()?);
            from.advance(end + 1);
            Ok(Some(reply))
        }
        b'+' => {
            let reply = Reply::Text(Bytes::copy_from_slice(text));
            from.advance(end + 1);
            Ok(Some(reply))
        }
        b'-' => {
            let reply = Reply::Error(String::from_utf8_lossy(text).into_owned());
            from.advance(end + 1);
            Ok(Some(reply))
        }
        b'$' => match number()? {
            -1 => {
                from.advance(end + 1);
                Ok(Some(Reply::Nil))
            }
            length => {
                let length = usize::try_from(length)
                    .ok()
                    .filter(|length| *length <= MAX_REPLY)
                    .ok_or_else(|| bad(from))?;
                if from.len() < end + 1 + length + 2 {
                    return Ok(None);
                }
                from.advance(end + 1);
                let text = from.split_to(length).freeze();
                if from[..2] != *b"\r\n" {
                    return Err(bad(from));
                }
                from.advance(2);
                Ok(Some(Reply::Text(text)))
            }
        },
        _ => Err(bad(from)),
    }
}

fn bad(bytes: &[u8]) -> BadReply {
    let shown = bytes.len().min(40);
    BadReply(String::from_utf8_lossy(&bytes[..shown]).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_come_whole_or_not_yet() {
        let all = b":12\r\n+OK\r\n$5\r\nab\r\nc\r\n$-1\r\n-ERR no\r\n:-3\r\n";
        let mut found = Vec::new();
        let mut read = BytesMut::new();
        for byte in all {
            read.put_u8(*byte);
            while let Some(reply) = take_reply(&mut read).expect("a reply") {
                found.push(reply);
            }
        }
        assert_eq!(
            found,
            [
                Reply::Integer(12),
                Reply::Text("OK".into()),
                Reply::Text(Bytes::from_static(b"ab\r\nc")),
                Reply::Nil,
                Reply::Error("ERR no".into()),
                Reply::Integer(-3),
            ]
        );
        assert!(read.is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            &b"hello\r\n"[..],
            b"\r\n",
            b"\n",
            b":x\r\n",
            b"$99999999999\r\n",
            b"$-2\r\n",
            b"$1\r\nabc",
            b":1\n",
        ] {
            let mut bytes = BytesMut::from(bad);
            assert!(take_reply(&mut bytes).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn commands_are_arrays_of_strings() {
        let mut out = BytesMut::new();
        put_command(&mut out, &[b"INCR", b"a"]);
        assert_eq!(&out[..], b"*2\r\n$4\r\nINCR\r\n$1\r\na\r\n");
    }
}
