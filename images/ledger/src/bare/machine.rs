//! The whole machine and its loop.
//!
//! One turn: take frames, execute, start a commit, send what is durable, go idle. A batch of
//! requests costs three or four exits: the clock, idle (which starts the commit), idle (which sends
//! the answers when the commit is durable), and the clock before that if no other commit follows.

use core::fmt;

use ledger::journal::NonceSequence;
use ledger::journal::recovery::RecoveryError;
use ledger::service::Service;

use super::boot::{Boot, BootError};
use super::clock::Clock;
use super::console;
use super::disk::Disk;
use super::network::{Buffers, Network};
use super::ports;
use super::virtio::DeviceError;
use super::virtio::block::Block;
use super::virtio::net::Net;

/// The machine's virtio windows.
const NET_WINDOW: u64 = 0xd000_0000;
const DISK_WINDOW: u64 = 0xd000_1000;

/// What the data may take of the heap: the rest is for sockets, buffers, commits and fragments.
const DATA_SHARE: (usize, usize) = (2, 5);

/// Zeroed by the VMM, as all memory of a new machine.
static mut BUFFERS: Buffers = [0; size_of::<Buffers>()];

/// Why the ledger cannot start.
#[derive(Debug)]
pub enum StartError {
    /// The command line.
    Boot(BootError),
    /// A device.
    Device(DeviceError),
    /// The log.
    Recovery(RecoveryError),
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boot(error) => error.fmt(f),
            Self::Device(error) => error.fmt(f),
            Self::Recovery(error) => error.fmt(f),
        }
    }
}

impl From<BootError> for StartError {
    fn from(error: BootError) -> Self {
        Self::Boot(error)
    }
}

impl From<DeviceError> for StartError {
    fn from(error: DeviceError) -> Self {
        Self::Device(error)
    }
}

impl From<RecoveryError> for StartError {
    fn from(error: RecoveryError) -> Self {
        Self::Recovery(error)
    }
}

/// Everything.
pub struct Machine {
    clock: Clock,
    network: Network,
    service: Service,
    disk: Disk,
}

impl Machine {
    /// Reads the log back and listens.
    pub fn new(boot: &Boot) -> Result<Self, StartError> {
        let config = boot.network()?;
        // SAFETY: these are this machine's windows, opened once.
        let (net, block) = unsafe { (Net::open(NET_WINDOW)?, Block::open(DISK_WINDOW)?) };
        let mut disk = Disk::new(block);
        let memory = boot.heap / DATA_SHARE.1 * DATA_SHARE.0;
        let nonces = NonceSequence::new(ports::entropy());
        let service = Service::recover(&mut disk, memory, nonces)?;
        let clock = Clock::new();
        let buffers: *mut Buffers = &raw mut BUFFERS;
        // SAFETY: borrowed once, here.
        let buffers = unsafe { &mut *buffers };
        let network = Network::new(net, config, buffers, ports::entropy(), clock.now());
        // Short: every byte of the console is an exit where KVM emulates string output.
        if service.recovered().torn {
            console::line(format_args!("ledger: dropped a torn batch"));
        }
        console::line(format_args!("ledger: ready"));
        Ok(Self {
            clock,
            network,
            service,
            disk,
        })
    }

    /// Serves until the disk fails.
    pub fn run(&mut self) -> ! {
        // Whether the clock was read in the last turn.
        let mut fresh = false;
        loop {
            let Ok(durable) = self.disk.poll() else {
                console::line(format_args!("ledger: the disk refused a request"));
                ports::power_off()
            };
            if durable {
                self.service.committed();
            }
            // A disk answers within a moment, so the time of the turn that asked it is good enough.
            // But the timer may have been due together with the disk, and nobody would tell again:
            // only when another commit is sure to wake us can the clock be left for the next turn.
            let mut read = !(durable && fresh);
            if read {
                self.clock.read();
            }
            self.turn();
            if !read && !self.disk.busy() {
                self.clock.read();
                read = true;
            }
            if let Some(deadline) = self.network.deadline(self.clock.now()) {
                self.clock.wake_by(deadline);
            }
            fresh = read;
            ports::idle();
        }
    }

    /// Does everything that can be done now.
    fn turn(&mut self) {
        let now = self.clock.now();
        self.network.receive(now);
        loop {
            self.network.serve(&mut self.service);
            if let Some(commit) = self.service.next_commit() {
                self.disk.start(commit);
            }
            if !self.network.answer(&mut self.service, now) {
                break;
            }
        }
        self.network.send(now);
    }
}
