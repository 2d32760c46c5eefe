//! Waiting for what an order comes to: looks again and again, until it is there or the time is over.
//!
//! A host or the witness may be silent for a look: it is overloaded, starts again, is cut off for a
//! moment. That ends the look, and not the order, which goes on without us.

use std::ops::AsyncFnMut;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::output;
use crate::agent::operator::OperatorError;
use crate::sentence::sentence;

/// Why what was waited for has not been seen.
#[derive(Debug, Error)]
pub enum WaitError {
    /// There is no use in waiting any longer.
    #[error(transparent)]
    Hopeless(#[from] OperatorError),
    /// The time is over.
    #[error("nothing after {} s of waiting for {lacks}", after.as_secs())]
    TooLong {
        /// How long it was waited for.
        after: Duration,
        /// What was missing at the last look, in words that follow "waiting for".
        lacks: String,
    },
}

/// Between two looks there is so much time as the look took, times this: on slow hosts looks are work,
/// too, and who waits must not keep them from what is waited for.
const REST: u32 = 4;
/// And never more than this.
const REST_MAX: Duration = Duration::from_secs(2);

/// Looks every so often, or less often where looks take long, until a look sees it; between two looks
/// the terminal says what is missing. A look returns what it was to see, or what is missing in words
/// that follow "waiting for".
pub async fn until<T>(
    patience: Duration,
    every: Duration,
    mut look: impl AsyncFnMut() -> Result<Result<T, String>, OperatorError>,
) -> Result<T, WaitError> {
    let began = Instant::now();
    let bar = output::spinner();
    loop {
        let looked = Instant::now();
        let lacks = match look().await {
            Ok(Ok(seen)) => {
                bar.finish_and_clear();
                return Ok(seen);
            }
            Ok(Err(lacks)) => lacks,
            Err(error) if error.may_pass() => format!("an answer: {}", sentence(&error)),
            Err(error) => {
                bar.finish_and_clear();
                return Err(error.into());
            }
        };
        let pause = every.max(REST_MAX.min(looked.elapsed() * REST));
        let Some(left) = patience.checked_sub(began.elapsed()) else {
            bar.finish_and_clear();
            return Err(WaitError::TooLong {
                after: patience,
                lacks,
            });
        };
        bar.set_message(format!("waiting for {lacks}"));
        bar.tick();
        tokio::time::sleep(pause.min(left)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::certs::Identity;
    use crate::agent::link::RequestError;

    fn silent() -> OperatorError {
        OperatorError::Request(RequestError::TimedOut {
            peer: Identity::host(&"h1".parse().expect("a name")),
            after: Duration::from_secs(3),
        })
    }

    #[tokio::test]
    async fn a_host_that_is_silent_for_a_look_ends_no_order() {
        let mut looks = vec![
            Ok(Ok(7)),
            Err(silent()),
            Ok(Err("the record to be changed".to_owned())),
            Err(silent()),
        ];
        let seen = until(Duration::from_mins(1), Duration::ZERO, async || {
            looks.pop().expect("no look after it was seen")
        });
        assert!(matches!(seen.await, Ok(7)));
    }

    #[tokio::test]
    async fn a_refusal_ends_the_waiting() {
        let why = "no such image".to_owned();
        let mut looks = vec![Err(OperatorError::Refused { why })];
        let seen = until(Duration::from_mins(1), Duration::ZERO, async || {
            looks.pop().expect("no look after a refusal")
        });
        let seen: Result<(), _> = seen.await;
        assert!(matches!(seen, Err(WaitError::Hopeless(_))), "{seen:?}");
    }

    #[tokio::test]
    async fn who_is_silent_to_the_end_is_named() {
        let look = async || Err(silent());
        let seen: Result<(), _> = until(Duration::ZERO, Duration::ZERO, look).await;
        let why = seen.expect_err("nothing was seen").to_string();
        assert!(why.contains("host h1 did not answer"), "{why}");
    }
}
