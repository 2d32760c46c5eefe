//! How long what arrives has to wait because the guest executes without an exit.
//!
//! Arrivals are delivered at landmarks, and an interrupt is injected when the guest can take one.
//! The wait begins when something reached the host that the machine could have taken, and ends when
//! the guest is entered with no interrupt waiting. What the host itself holds back (a pause, a
//! replica too far behind, a queue of the guest's that is full) does not count.

use crate::host::HostTime;

/// Measures the longest wait.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Deferral {
    /// When there was last nothing to deliver.
    looked: HostTime,
    /// Since when something waits that was delivered and that the guest has not been interrupted for.
    since: Option<HostTime>,
    longest: u64,
}

impl Deferral {
    /// There is nothing now that the machine could take, or it is held back.
    pub(crate) const fn nothing(&mut self, now: HostTime) {
        self.looked = now;
    }

    /// What came then is delivered now.
    pub(crate) fn delivered(&mut self, came: HostTime) {
        let since = came.max(self.looked);
        self.since = Some(self.since.map_or(since, |before| before.min(since)));
    }

    /// Whether a wait may end with the next entry into the guest.
    pub(crate) const fn is_running(&self) -> bool {
        self.since.is_some()
    }

    /// The guest is entered, and no interrupt waits.
    pub(crate) fn ended(&mut self, now: HostTime) {
        if let Some(since) = self.since.take() {
            self.longest = self.longest.max(now.since(since));
        }
    }

    /// The longest wait so far, in nanoseconds.
    pub(crate) const fn longest(&self) -> u64 {
        self.longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_lasts_from_the_host_to_the_guest() {
        let mut deferral = Deferral::default();
        deferral.nothing(HostTime(100));
        deferral.delivered(HostTime(150));
        deferral.delivered(HostTime(170));
        assert!(deferral.is_running());
        deferral.ended(HostTime(250));
        assert_eq!(deferral.longest(), 100, "the first one waited longest");
        deferral.delivered(HostTime(300));
        deferral.ended(HostTime(310));
        assert_eq!(deferral.longest(), 100);
    }

    #[test]
    fn what_could_not_be_taken_earlier_did_not_wait_for_the_guest() {
        let mut deferral = Deferral::default();
        deferral.nothing(HostTime(1_000));
        deferral.delivered(HostTime(10));
        deferral.ended(HostTime(1_020));
        assert_eq!(deferral.longest(), 20);
        assert!(!deferral.is_running());
    }
}
