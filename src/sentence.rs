//! How an error is told to people: in one sentence, on a terminal, in a journal or to a peer.

use std::error::Error;
use std::fmt::Write as _;

/// An error with its causes. A cause that the sentence quotes already is not said twice.
pub fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            // Writing to a string cannot fail.
            let _ = write!(text, " ({said})");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("the outer thing failed: {quoted}")]
    struct Outer {
        quoted: &'static str,
        source: std::io::Error,
    }

    #[test]
    fn a_cause_is_said_once() {
        let outer = |quoted| Outer {
            quoted,
            source: std::io::Error::other("the disk is full"),
        };
        let quoting = sentence(&outer("the disk is full"));
        assert_eq!(quoting, "the outer thing failed: the disk is full");
        let not_quoting = sentence(&outer("try again"));
        assert_eq!(
            not_quoting,
            "the outer thing failed: try again (the disk is full)"
        );
    }
}
