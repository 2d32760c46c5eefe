//! Tests that cannot run here say so where it is seen, and are counted: the runner counts them as
//! passed and keeps what they print to itself.

use std::io::Write as _;

/// The file in which `tests/run` collects them, one a line.
const COLLECTED_IN: &str = "UNDERSTUDY_SKIPS";

/// Says that a test is skipped, and why.
pub fn skipped(test: &str, why: &dyn std::fmt::Display) {
    let line = format!("SKIPPED {test}: {why}\n");
    // Not by a macro: what those print is shown for failures only.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(file) = std::env::var_os(COLLECTED_IN) {
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(file);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        written.expect("the file that collects skipped tests can be written");
    }
}
