//! A simulated host: what all VMs on it share. What it has of one of them is a [`Seat`].
//!
//! [`Seat`]: super::seat::Seat

use super::queue::Moment;
use super::random::Random;
use super::storage::Drive;
use super::world::Event;
use crate::protocol::HostName;

/// A clock that is wrong, differently on every host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    offset: u64,
    /// Millionths that it goes fast (or slow).
    drift: i64,
}

impl Clock {
    pub(super) fn new(random: &mut Random) -> Self {
        Self {
            offset: random.below(1_000_000_000_000),
            drift: i64::from(random.below(401) as u16) - 200,
        }
    }

    pub(super) fn shows(self, at: Moment) -> u64 {
        let skew = i128::from(at) * i128::from(self.drift) / 1_000_000;
        let shown = i128::from(self.offset) + i128::from(at) + skew;
        u64::try_from(shown).unwrap_or(0)
    }

    /// The first moment at which it shows at least `shown`.
    pub(super) fn moment(self, shown: u64) -> Moment {
        let since = i128::from(shown) - i128::from(self.offset);
        let at = since * 1_000_000 / (1_000_000 + i128::from(self.drift));
        u64::try_from(at).unwrap_or(0) + 1
    }
}

/// A host.
pub(super) struct Host {
    pub(super) name: HostName,
    pub(super) clock: Clock,
    /// Whether its process runs: one for all VMs.
    up: bool,
    /// Counts the starts of its process; what an earlier one had planned is void.
    pub(super) life: u32,
    pub(super) paused_until: Moment,
    /// What has come while it was paused.
    pub(super) frozen: Vec<Event>,
    // Faults.
    pub(super) drive: Drive,
    pub(super) slow_vm: u32,
    /// Nothing reaches it, and what it sends does.
    pub(super) deaf: u32,
    pub(super) deaf_since: Option<Moment>,
}

impl Host {
    pub(super) fn new(number: usize, random: &mut Random) -> Self {
        let name = format!("host{number}");
        Self {
            name: HostName::new(&name).expect("a name made of letters and digits"),
            clock: Clock::new(random),
            up: false,
            life: 0,
            paused_until: 0,
            frozen: Vec::new(),
            drive: Drive::default(),
            slow_vm: 0,
            deaf: 0,
            deaf_since: None,
        }
    }

    /// Its process is another one, or none.
    pub(super) fn begin(&mut self, up: bool) {
        self.up = up;
        self.life += 1;
    }

    pub(super) fn is_up(&self) -> bool {
        self.up
    }

    /// One reason less that nothing reaches it.
    pub(super) fn hears_again(&mut self) {
        self.deaf -= 1;
        self.deaf_since.take_if(|_| self.deaf == 0);
    }

    /// Whether the process runs and is not frozen.
    pub(super) fn runs(&self, now: Moment) -> bool {
        self.is_up() && self.paused_until <= now
    }
}
