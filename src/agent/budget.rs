//! How much memory all guests of a host may have together.

use std::sync::{Arc, Mutex};

use thiserror::Error;

use super::link::lock;
use crate::config::ByteSize;

/// A number of bytes that guests share.
#[derive(Clone, Debug)]
pub struct Budget {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit: u64,
    taken: Mutex<u64>,
}

/// Bytes that one guest has; given back when it is dropped.
#[derive(Debug)]
pub struct Taken {
    shared: Arc<Shared>,
    bytes: u64,
}

/// There is not that much left.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "a guest of {} does not fit: guests have {} of {} on this host; raise limits.guest-memory or use another host",
    ByteSize(*wanted), ByteSize(*taken), ByteSize(*limit)
)]
pub struct OverBudget {
    /// What was wanted.
    pub wanted: u64,
    /// What is taken.
    pub taken: u64,
    /// What there is.
    pub limit: u64,
}

impl Budget {
    /// So much in all.
    pub fn new(limit: ByteSize) -> Self {
        Self {
            shared: Arc::new(Shared {
                limit: limit.0,
                taken: Mutex::default(),
            }),
        }
    }

    /// Takes some of it, if so much is left.
    pub fn take(&self, bytes: u64) -> Result<Taken, OverBudget> {
        let mut taken = lock(&self.shared.taken);
        let limit = self.shared.limit;
        match taken.checked_add(bytes).filter(|sum| *sum <= limit) {
            Some(sum) => {
                *taken = sum;
                Ok(Taken {
                    shared: Arc::clone(&self.shared),
                    bytes,
                })
            }
            None => Err(OverBudget {
                wanted: bytes,
                taken: *taken,
                limit,
            }),
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let mut taken = lock(&self.shared.taken);
        *taken = taken.saturating_sub(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_can_be_taken_again() {
        let budget = Budget::new(ByteSize(100));
        let first = budget.take(60).expect("it fits");
        let over = budget.take(41).expect_err("it does not fit");
        assert_eq!((over.wanted, over.taken, over.limit), (41, 60, 100));
        assert!(budget.take(u64::MAX).is_err());
        let _second = budget.take(40).expect("it fits");
        drop(first);
        let _third = budget.take(60).expect("it fits again");
    }
}
