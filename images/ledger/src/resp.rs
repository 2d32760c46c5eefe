//! The parser of the Redis protocol (RESP2 requests and inline commands): incremental, bounded,
//! with Redis's own words for what is wrong.
//!
//! ```text
//!            '*n'                '$len'             len bytes + CRLF
//!   Start ─────────► Arguments ─────────► Bulk(len) ────────┐
//!     │ ▲                ▲  └── n seen: a request           │
//!     │ └─ inline line   └──────────────────────────────────┘
//! ```
//!
//! What has been parsed of an unfinished request is remembered, so a request that arrives byte by
//! byte costs no more than one that arrives at once.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::limits::{MAX_ARGUMENTS, MAX_BULK, MAX_COMMAND, MAX_LINE};

/// What a client sent is not a request; the connection ends after it has been told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// An inline command without an end.
    InlineTooLong,
    /// A `*` line without an end.
    CountTooLong,
    /// Not a number of arguments, or too many.
    InvalidCount,
    /// A `$` line without an end.
    LengthTooLong,
    /// Something else where a `$` line must be.
    ExpectedBulk(u8),
    /// Not a length, or too long.
    InvalidLength,
    /// Quotes of an inline command do not match.
    UnbalancedQuotes,
    /// All arguments together are too long.
    CommandTooLong,
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Protocol error: ")?;
        match self {
            Self::InlineTooLong => f.write_str("too big inline request"),
            Self::CountTooLong => f.write_str("too big mbulk count string"),
            Self::InvalidCount => f.write_str("invalid multibulk length"),
            Self::LengthTooLong => f.write_str("too big bulk count string"),
            Self::ExpectedBulk(found) => write!(f, "expected '$', got '{}'", char::from(*found)),
            Self::InvalidLength => f.write_str("invalid bulk length"),
            Self::UnbalancedQuotes => f.write_str("unbalanced quotes in request"),
            Self::CommandTooLong => f.write_str("too big request"),
        }
    }
}

/// Where in a request the parser is.
#[derive(Debug, Default)]
enum Progress {
    /// Before the first byte of a request.
    #[default]
    Start,
    /// This many arguments are still to come.
    Arguments(usize),
    /// This many arguments are still to come, the first of them this long.
    Bulk(usize, usize),
}

/// What a client has sent and nobody has executed yet.
#[derive(Debug, Default)]
pub struct RequestBuffer {
    bytes: Vec<u8>,
    /// Everything before this belongs to requests that were executed.
    start: usize,
    /// Everything before this has been looked at.
    parsed: usize,
    /// A line end was looked for up to here.
    scanned: usize,
    progress: Progress,
    /// Of the unfinished or the current request, within `bytes`.
    arguments: Vec<Range<usize>>,
    /// The arguments of an inline command, unquoted.
    inline: Vec<Vec<u8>>,
}

impl RequestBuffer {
    /// Takes bytes from the client.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// How many bytes wait to be executed.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next whole request: its arguments, the command's name first. `None` when there is none
    /// yet. After an error the buffer is of no further use.
    pub fn next_request(&mut self) -> Result<Option<Vec<&[u8]>>, ProtocolError> {
        loop {
            if matches!(self.progress, Progress::Start) {
                self.forget_executed();
                match self.bytes.get(self.parsed) {
                    None => return Ok(None),
                    Some(b'*') => match self.multibulk_count()? {
                        None => return Ok(None),
                        Some(0) => continue,
                        Some(count) => self.progress = Progress::Arguments(count),
                    },
                    Some(_) => {
                        if !self.inline_command()? {
                            return Ok(None);
                        }
                        if self.inline.is_empty() {
                            continue;
                        }
                        return Ok(Some(self.inline.iter().map(Vec::as_slice).collect()));
                    }
                }
            }
            if !self.bulks()? {
                return Ok(None);
            }
            self.progress = Progress::Start;
            let bytes = &self.bytes;
            let arguments = self.arguments.iter();
            return Ok(Some(
                arguments
                    .map(|range| bytes.get(range.clone()).unwrap_or_default())
                    .collect(),
            ));
        }
    }

    /// Drops what was executed; moves the rest to the front when that is cheap.
    fn forget_executed(&mut self) {
        self.start = self.parsed;
        self.arguments.clear();
        self.inline.clear();
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.bytes.shrink_to(MAX_LINE);
        } else if self.start * 2 >= self.bytes.len() {
            self.bytes.drain(..self.start);
        } else {
            return;
        }
        self.start = 0;
        self.parsed = 0;
        self.scanned = 0;
    }

    /// The line that begins at `parsed`, without its end, if it is there; `parsed` moves behind it.
    fn line(
        &mut self,
        end: u8,
        too_long: ProtocolError,
    ) -> Result<Option<Range<usize>>, ProtocolError> {
        let from = self.scanned.max(self.parsed);
        let found = self.bytes[from..].iter().position(|&byte| byte == end);
        let Some(found) = found.map(|at| from + at) else {
            self.scanned = self.bytes.len();
            if self.bytes.len() - self.parsed > MAX_LINE {
                return Err(too_long);
            }
            return Ok(None);
        };
        // A line that ends with CR LF is there only when both are; like Redis, what follows the
        // CR is not looked at.
        let behind = if end == b'\r' { found + 2 } else { found + 1 };
        if behind > self.bytes.len() {
            self.scanned = found;
            return Ok(None);
        }
        let line = self.parsed..found;
        self.parsed = behind;
        self.scanned = behind;
        if line.len() > MAX_LINE {
            return Err(too_long);
        }
        Ok(Some(line))
    }

    /// Reads a `*` line. Counts of zero and below are requests of nothing.
    fn multibulk_count(&mut self) -> Result<Option<usize>, ProtocolError> {
        let Some(line) = self.line(b'\r', ProtocolError::CountTooLong)? else {
            return Ok(None);
        };
        let count = parse_integer(&self.bytes[line.start + 1..line.end])
            .ok_or(ProtocolError::InvalidCount)?;
        let count = usize::try_from(count.max(0)).map_err(|_| ProtocolError::InvalidCount)?;
        if count > MAX_ARGUMENTS {
            return Err(ProtocolError::InvalidCount);
        }
        Ok(Some(count))
    }

    /// Reads arguments until the request is whole. Says whether it is.
    fn bulks(&mut self) -> Result<bool, ProtocolError> {
        loop {
            match self.progress {
                Progress::Start | Progress::Arguments(0) => return Ok(true),
                Progress::Arguments(left) => {
                    match self.bytes.get(self.parsed) {
                        None => return Ok(false),
                        Some(b'$') => {}
                        Some(&other) => return Err(ProtocolError::ExpectedBulk(other)),
                    }
                    let Some(line) = self.line(b'\r', ProtocolError::LengthTooLong)? else {
                        return Ok(false);
                    };
                    let length = parse_integer(&self.bytes[line.start + 1..line.end])
                        .and_then(|length| usize::try_from(length).ok())
                        .filter(|&length| length <= MAX_BULK)
                        .ok_or(ProtocolError::InvalidLength)?;
                    if self.parsed - self.start + length > MAX_COMMAND {
                        return Err(ProtocolError::CommandTooLong);
                    }
                    self.progress = Progress::Bulk(left, length);
                }
                Progress::Bulk(left, length) => {
                    let end = self.parsed + length;
                    if self.bytes.len() < end + 2 {
                        return Ok(false);
                    }
                    self.arguments.push(self.parsed..end);
                    self.parsed = end + 2;
                    self.progress = Progress::Arguments(left - 1);
                }
            }
        }
    }

    /// Reads an inline command into `inline`. Says whether its line is there.
    fn inline_command(&mut self) -> Result<bool, ProtocolError> {
        let Some(mut line) = self.line(b'\n', ProtocolError::InlineTooLong)? else {
            return Ok(false);
        };
        if self.bytes[line.clone()].ends_with(b"\r") {
            line.end -= 1;
        }
        self.inline = split_inline(&self.bytes[line]).ok_or(ProtocolError::UnbalancedQuotes)?;
        Ok(true)
    }
}

/// A decimal number as Redis reads it: no sign but `-`, no leading zeros, no blanks, 64 bits.
pub fn parse_integer(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', digits @ ..] => (true, digits),
        digits => (false, digits),
    };
    match digits {
        [b'0'] => return (!negative).then_some(0),
        [b'1'..=b'9', ..] => {}
        _ => return None,
    }
    digits.iter().try_fold(0_i64, |value, &digit| {
        if !digit.is_ascii_digit() {
            return None;
        }
        let digit = i64::from(digit - b'0');
        let value = value.checked_mul(10)?;
        if negative {
            value.checked_sub(digit)
        } else {
            value.checked_add(digit)
        }
    })
}

/// Splits an inline command into arguments: blanks part them, quotes keep them together, double
/// quotes know escapes. `None` when quotes do not match.
fn split_inline(line: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut arguments = Vec::new();
    let mut rest = line;
    loop {
        let blanks = rest.iter().take_while(|byte| is_blank(**byte)).count();
        rest = &rest[blanks..];
        if rest.is_empty() {
            return Some(arguments);
        }
        let (argument, after) = split_argument(rest)?;
        arguments.push(argument);
        rest = after;
    }
}

/// One argument and what follows it.
fn split_argument(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let mut argument = Vec::new();
    let mut rest = text;
    let mut quote = None;
    loop {
        rest = match (quote, rest) {
            (None, []) => return Some((argument, rest)),
            (None, [byte, ..]) if is_blank(*byte) => return Some((argument, rest)),
            (None, [byte @ (b'"' | b'\''), after @ ..]) => {
                quote = Some(*byte);
                after
            }
            (Some(_), []) => return None,
            (Some(b'"'), [b'\\', b'x', high, low, after @ ..])
                if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() =>
            {
                argument.push(hex_digit(*high) << 4 | hex_digit(*low));
                after
            }
            (Some(b'"'), [b'\\', escaped, after @ ..]) => {
                argument.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 0x08,
                    b'a' => 0x07,
                    other => *other,
                });
                after
            }
            (Some(b'\''), [b'\\', b'\'', after @ ..]) => {
                argument.push(b'\'');
                after
            }
            (Some(open), [byte, after @ ..]) if *byte == open => {
                // A closing quote ends the argument.
                return match after {
                    [] => Some((argument, after)),
                    [next, ..] if is_blank(*next) => Some((argument, after)),
                    _ => None,
                };
            }
            (_, [byte, after @ ..]) => {
                argument.push(*byte);
                after
            }
        };
    }
}

const fn is_blank(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c | 0)
}

/// The value of a hexadecimal digit.
const fn hex_digit(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit.wrapping_sub(b'A').wrapping_add(10),
    }
}

/// Bytes as text for an error message, what is not UTF-8 replaced.
pub fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(buffer: &mut RequestBuffer) -> Result<Vec<Vec<String>>, ProtocolError> {
        let mut requests = Vec::new();
        while let Some(request) = buffer.next_request()? {
            requests.push(request.iter().map(|argument| lossy(argument)).collect());
        }
        Ok(requests)
    }

    fn parse(bytes: &[u8]) -> Result<Vec<Vec<String>>, ProtocolError> {
        let mut buffer = RequestBuffer::default();
        buffer.feed(bytes);
        all(&mut buffer)
    }

    #[test]
    fn pipelined_requests_come_out_in_order() {
        let bytes = b"*2\r\n$3\r\nGET\r\n$1\r\na\r\nPING\r\n\r\n*0\r\n*-1\r\n*1\r\n$0\r\n\r\n";
        let requests = parse(bytes).unwrap();
        assert_eq!(requests, [vec!["GET", "a"], vec!["PING"], vec![""]]);
    }

    #[test]
    fn a_request_may_arrive_byte_by_byte() {
        let bytes = b"*3\r\n$3\r\nSET\r\n$4\r\na\r\nb\r\n$2\r\n\r\n\r\nset  x \"y z\"\r\n";
        for cut in 1..7 {
            let mut buffer = RequestBuffer::default();
            let mut requests = Vec::new();
            for part in bytes.chunks(cut) {
                buffer.feed(part);
                requests.append(&mut all(&mut buffer).unwrap());
            }
            assert_eq!(
                requests,
                [vec!["SET", "a\r\nb", "\r\n"], vec!["set", "x", "y z"]]
            );
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn inline_quotes_and_escapes() {
        let requests = parse(b"echo \"a\\x41\\n\\\"\" 'it\\'s' plain\n").unwrap();
        assert_eq!(requests, [vec!["echo", "aA\n\"", "it's", "plain"]]);
        let unbalanced = Err(ProtocolError::UnbalancedQuotes);
        assert_eq!(parse(b"echo \"a\n"), unbalanced);
        assert_eq!(parse(b"echo 'a\n"), unbalanced);
        assert_eq!(parse(b"echo \"a\"b\n"), unbalanced);
    }

    #[test]
    fn errors_have_redis_words() {
        let message = |bytes: &[u8]| parse(bytes).unwrap_err().to_string();
        assert_eq!(
            message(b"*x\r\n"),
            "Protocol error: invalid multibulk length"
        );
        assert_eq!(
            message(b"*99999999\r\n"),
            "Protocol error: invalid multibulk length"
        );
        assert_eq!(message(b"*1\r\nx"), "Protocol error: expected '$', got 'x'");
        assert_eq!(
            message(b"*1\r\n$-1\r\n"),
            "Protocol error: invalid bulk length"
        );
        assert_eq!(
            message(b"*1\r\n$999999999\r\n"),
            "Protocol error: invalid bulk length"
        );
        let mut long = vec![b'*'];
        long.resize(MAX_LINE + 2, b'1');
        assert_eq!(message(&long), "Protocol error: too big mbulk count string");
        long[0] = b'a';
        assert_eq!(message(&long), "Protocol error: too big inline request");
        let mut bulk = b"*1\r\n$".to_vec();
        bulk.resize(MAX_LINE + 8, b'1');
        assert_eq!(message(&bulk), "Protocol error: too big bulk count string");
    }

    #[test]
    fn all_arguments_together_are_bounded() {
        let mut bytes = b"*4\r\n".to_vec();
        for _ in 0..3 {
            bytes.extend_from_slice(format!("${MAX_BULK}\r\n").as_bytes());
            bytes.resize(bytes.len() + MAX_BULK, b'v');
            bytes.extend_from_slice(b"\r\n");
        }
        assert_eq!(parse(&bytes), Err(ProtocolError::CommandTooLong));
    }

    #[test]
    fn integers_are_read_strictly() {
        assert_eq!(parse_integer(b"0"), Some(0));
        assert_eq!(parse_integer(b"-9223372036854775808"), Some(i64::MIN));
        assert_eq!(parse_integer(b"9223372036854775807"), Some(i64::MAX));
        for bad in [
            "",
            "-",
            "-0",
            "01",
            "+1",
            " 1",
            "1 ",
            "9223372036854775808",
            "1a",
        ] {
            assert_eq!(parse_integer(bad.as_bytes()), None, "{bad}");
        }
    }
}
