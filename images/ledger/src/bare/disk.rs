//! The disk: waiting reads at boot, one commit in flight afterwards.

use alloc::collections::VecDeque;
use alloc::vec::Vec;

use ledger::journal::recovery::{Disk as RecoveryDisk, DiskFailed};
use ledger::journal::{Commit, DiskWrite, SECTOR, Sector};

use super::ports;
use super::virtio::block::{Block, Failed, Request};

/// The most bytes of one request.
const REQUEST: usize = 128 * 1024;

/// The disk that holds the log.
pub struct Disk {
    block: Block,
    /// The data of the commit in flight: the device reads it until it is done.
    in_flight: Vec<DiskWrite>,
    /// Requests of it that found no room yet, in order.
    waiting: VecDeque<Request>,
    /// Requests of it that are not done.
    open: usize,
}

impl Disk {
    /// Nothing in flight.
    pub fn new(block: Block) -> Self {
        Self {
            block,
            in_flight: Vec::new(),
            waiting: VecDeque::new(),
            open: 0,
        }
    }

    /// Starts a commit: all its writes, then a flush. None may be in flight.
    pub fn start(&mut self, commit: Commit) {
        assert!(self.open == 0, "one commit at a time");
        self.in_flight = commit.writes;
        for write in &self.in_flight {
            for (index, part) in write.data.chunks(REQUEST).enumerate() {
                self.waiting.push_back(Request::Write {
                    sector: write.sector.0 + (index * (REQUEST / SECTOR)) as u64,
                    from: part.as_ptr(),
                    len: part.len() as u32,
                });
            }
        }
        self.waiting.push_back(Request::Flush);
        self.open = self.waiting.len();
        self.submit();
    }

    /// Looks at what is done. True when the commit in flight has become durable.
    pub fn poll(&mut self) -> Result<bool, DiskFailed> {
        let before = self.open;
        while let Some(done) = self.block.take_done() {
            done.map_err(|Failed| DiskFailed)?;
            self.open = self.open.saturating_sub(1);
        }
        self.submit();
        let durable = before > 0 && self.open == 0;
        if durable {
            self.in_flight = Vec::new();
        }
        Ok(durable)
    }

    /// Whether a commit is in flight: its end will wake the machine.
    pub fn busy(&self) -> bool {
        self.open > 0
    }

    fn submit(&mut self) {
        while self.block.has_room()
            && let Some(request) = self.waiting.pop_front()
        {
            // SAFETY: the data is in `in_flight`, untouched until all requests are done.
            unsafe { self.block.submit(request) };
        }
    }

    /// Submits one request and waits for it.
    fn wait_for(&mut self, request: Request) -> Result<(), DiskFailed> {
        // SAFETY: the data is borrowed by the callers, who wait here until the device is done.
        if !unsafe { self.block.submit(request) } {
            return Err(DiskFailed);
        }
        loop {
            ports::idle();
            if let Some(done) = self.block.take_done() {
                return done.map_err(|Failed| DiskFailed);
            }
        }
    }
}

impl RecoveryDisk for Disk {
    fn sectors(&self) -> u64 {
        self.block.sectors()
    }

    fn read(&mut self, from: Sector, buffer: &mut [u8]) -> Result<(), DiskFailed> {
        for (index, part) in buffer.chunks_mut(REQUEST).enumerate() {
            self.wait_for(Request::Read {
                sector: from.0 + (index * (REQUEST / SECTOR)) as u64,
                to: part.as_mut_ptr(),
                len: part.len() as u32,
            })?;
        }
        Ok(())
    }

    fn write(&mut self, to: Sector, data: &[u8]) -> Result<(), DiskFailed> {
        for (index, part) in data.chunks(REQUEST).enumerate() {
            self.wait_for(Request::Write {
                sector: to.0 + (index * (REQUEST / SECTOR)) as u64,
                from: part.as_ptr(),
                len: part.len() as u32,
            })?;
        }
        self.wait_for(Request::Flush)
    }
}
