//! The host's clock as the protocol knows it.

use nix::time::{ClockId, clock_gettime};

use crate::protocol::Time;

/// What `CLOCK_BOOTTIME` shows: it goes on while the host sleeps and is never set.
pub fn now() -> Time {
    // Fails only for a clock that the kernel does not have; Linux has had it since 2.6.39.
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has CLOCK_BOOTTIME");
    let nanos = |number: i64| u64::try_from(number).unwrap_or(0);
    let seconds = nanos(now.tv_sec()).saturating_mul(1_000_000_000);
    Time::from_nanos(seconds.saturating_add(nanos(now.tv_nsec())))
}
