//! A host in memory, for tests and benchmarks of whatever runs on a tape: its clock moves by a
//! fixed step with each look, its disks are byte vectors, and everything shipped and let out is
//! kept for the test to look at.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use replay_log::{Batch, FrameNumber, FrameSource, GatewayIncarnation, RequestNumber};

use crate::host::{Came, DiskData, DiskReply, FromOutside, Host, HostTime, Output, Shipment};
use crate::replayer::Requeue;
use crate::tape::{DiskOp, DiskRequest, Sources, TapeError};

/// A host in memory.
#[derive(Debug)]
pub struct MemoryHost {
    now: HostTime,
    step: u64,
    random: u64,
    frames: VecDeque<Came>,
    next_frame: FrameNumber,
    console: VecDeque<Bytes>,
    replies: VecDeque<DiskReply>,
    disks: Vec<Vec<u8>>,
    /// How many looks a disk request takes before its completion can be seen.
    disk_delay: u32,
    disk_wait: u32,
    /// Everything shipped, in order.
    pub batches: Vec<Batch>,
    /// Everything let out, in order.
    pub outputs: Vec<Output>,
    /// Every disk request submitted fails from now on.
    pub broken_disk: bool,
}

impl MemoryHost {
    /// A host whose clock moves by `step` nanoseconds with each look at it, with disks of these
    /// sizes, full of zeros. `seed` decides its entropy.
    pub fn new(step: u64, disks: &[u64], seed: u64) -> Self {
        Self {
            now: HostTime(1_000_000_000),
            step,
            random: seed | 1,
            frames: VecDeque::new(),
            next_frame: FrameNumber(0),
            console: VecDeque::new(),
            replies: VecDeque::new(),
            disks: disks.iter().map(|&size| vec![0; size as usize]).collect(),
            disk_delay: 3,
            disk_wait: 0,
            batches: Vec::new(),
            outputs: Vec::new(),
            broken_disk: false,
        }
    }

    /// A frame from the one gateway there is.
    pub fn send_frame(&mut self, bytes: Bytes) {
        self.next_frame.0 += 1;
        let source = FrameSource {
            gateway: GatewayIncarnation(7),
            number: self.next_frame,
        };
        let what = FromOutside::Frame { source, bytes };
        self.frames.push_back(Came { at: self.now, what });
    }

    /// The gateway has sent so many frames before, to another host.
    pub const fn skip_frames(&mut self, sent: u64) {
        self.next_frame.0 += sent;
    }

    /// Somebody types.
    pub fn type_console(&mut self, bytes: Bytes) {
        self.console.push_back(bytes);
    }

    /// Lets time pass.
    pub const fn advance(&mut self, nanos: u64) {
        self.now = self.now.plus(nanos);
    }

    /// What a disk holds.
    pub fn disk(&mut self, disk: usize) -> &mut Vec<u8> {
        &mut self.disks[disk]
    }

    /// Whether anything is on its way to the machine.
    pub fn quiet(&self) -> bool {
        self.frames.is_empty() && self.replies.is_empty() && self.console.is_empty()
    }

    fn execute(&mut self, request: &DiskRequest) -> Option<DiskData> {
        let disk = self.disks.get_mut(usize::from(request.disk))?;
        match &request.op {
            DiskOp::Read { offset, len } => {
                let start = usize::try_from(*offset).ok()?;
                let data = disk.get(start..start.checked_add(*len as usize)?)?;
                Some(DiskData::Read(Bytes::copy_from_slice(data)))
            }
            DiskOp::Write { offset, data } => {
                let start = usize::try_from(*offset).ok()?;
                disk.get_mut(start..start.checked_add(data.len())?)?
                    .copy_from_slice(data);
                Some(DiskData::Written)
            }
            DiskOp::Flush => Some(DiskData::Flushed),
        }
    }
}

impl Host for MemoryHost {
    fn now(&mut self) -> HostTime {
        self.now = self.now.plus(self.step);
        self.now
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), TapeError> {
        for byte in out {
            // xorshift64: any sequence will do, as long as a replay without the log would not
            // guess it.
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            *byte = self.random as u8;
        }
        Ok(())
    }

    fn arrival_waits(&mut self, can_take: Sources) -> bool {
        !self.replies.is_empty()
            || (can_take.console > 0 && !self.console.is_empty())
            || (can_take.frame && !self.frames.is_empty())
    }

    fn arrival(&mut self, can_take: Sources) -> Result<Option<Came>, TapeError> {
        let came = |what| Came { at: self.now, what };
        if !self.replies.is_empty() {
            self.disk_wait = self.disk_wait.saturating_sub(1);
            if self.disk_wait == 0 {
                self.disk_wait = self.disk_delay;
                return Ok(self.replies.pop_front().map(FromOutside::Disk).map(came));
            }
        }
        if can_take.console > 0
            && let Some(bytes) = self.console.pop_front()
        {
            return Ok(Some(came(FromOutside::Console(bytes))));
        }
        if can_take.frame {
            return Ok(self.frames.pop_front());
        }
        Ok(None)
    }

    fn submit(&mut self, requests: Vec<DiskRequest>) -> Result<(), TapeError> {
        for request in requests {
            let data = self.execute(&request).filter(|_| !self.broken_disk);
            let Some(data) = data else {
                return Err(TapeError::Host {
                    reason: "the disk failed".into(),
                });
            };
            if self.replies.is_empty() {
                self.disk_wait = self.disk_delay;
            }
            self.replies.push_back(DiskReply {
                number: request.number,
                data,
            });
        }
        Ok(())
    }

    fn ship(&mut self, shipment: Shipment) -> Result<(), TapeError> {
        self.batches.push(shipment.batch);
        Ok(())
    }

    fn output(&mut self, output: Output) -> Result<(), TapeError> {
        self.outputs.push(output);
        Ok(())
    }

    fn send(&mut self) -> Result<(), TapeError> {
        Ok(())
    }
}

impl Requeue for MemoryHost {
    fn requeue(&mut self, finished: BTreeMap<RequestNumber, DiskData>) {
        for (number, data) in finished.into_iter().rev() {
            self.replies.push_front(DiskReply { number, data });
        }
        self.disk_wait = self.disk_delay;
    }
}
