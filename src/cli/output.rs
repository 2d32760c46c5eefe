//! How results look: tables without frames, and figures that people can read.

use std::fmt::{self, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use thiserror::Error;

use super::failure::{Failure, OrExit as _};

/// An empty table with these column heads.
pub fn table<const N: usize>(heads: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(heads);
    table
}

/// Nobody reads what is said, as in `understudy events | head`: no reason to complain.
#[derive(Debug, Error)]
#[error("nobody reads the output")]
pub struct Unread;

/// Says a line on stdout.
pub fn line(text: impl fmt::Display) -> Result<(), Failure> {
    match writeln!(io::stdout().lock(), "{text}") {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Unread).or_fail(),
        Err(error) => Err(error).or_fail(),
    }
}

/// Prints a value as JSON, over several lines.
pub fn json<T: Serialize>(value: &T) -> Result<(), Failure> {
    line(serde_json::to_string_pretty(value).or_fail()?)
}

/// Prints a value as one line of JSON.
pub fn json_line<T: Serialize>(value: &T) -> Result<(), Failure> {
    line(serde_json::to_string(value).or_fail()?)
}

/// Bytes in the unit that fits: `532 B`, `1.5 kB`, `2.0 MB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let (mut tenths, mut unit) = (bytes.saturating_add(50) / 100, 0);
    while tenths >= 10_000 && unit + 1 < UNITS.len() {
        tenths = (tenths + 500) / 1000;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Sizes that are powers of two: `64 MiB`.
pub fn memory(bytes: u64) -> String {
    if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) {
        format!("{} GiB", bytes >> 30)
    } else {
        format!("{} MiB", bytes >> 20)
    }
}

/// A time span in milliseconds, or in microseconds below one of them.
pub fn span(span: Duration) -> String {
    let micros = span.as_micros();
    if micros < 1_000 {
        format!("{micros} µs")
    } else if micros < 10_000_000 {
        format!("{:.1} ms", span.as_secs_f64() * 1000.0)
    } else {
        format!("{:.1} s", span.as_secs_f64())
    }
}

/// Something that turns while work of unknown length goes on; invisible where nobody watches.
pub fn spinner() -> ProgressBar {
    if std::io::stderr().is_terminal() {
        ProgressBar::new_spinner()
    } else {
        ProgressBar::hidden()
    }
}

/// A bar for work of known length; invisible where nobody watches.
pub fn bar(length: u64) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} {msg} {eta}");
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_the_unit_that_fits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_000), "1.0 kB");
        assert_eq!(bytes(1_449), "1.4 kB");
        assert_eq!(bytes(999_949), "999.9 kB");
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(u64::MAX), "18.4 EB");
        assert_eq!(hex(&[0, 0xa5]), "00a5");
        assert_eq!(bytes(2_500_000_000), "2.5 GB");
        assert_eq!(span(Duration::from_micros(12)), "12 µs");
        assert_eq!(span(Duration::from_micros(1_240)), "1.2 ms");
        assert_eq!(span(Duration::from_secs(75)), "75.0 s");
    }
}
