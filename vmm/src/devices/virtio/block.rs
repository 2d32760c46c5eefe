//! The block device. A request becomes a command when the driver notifies (or goes idle); its
//! completion arrives later. What cannot be done at all is refused at once, without the outside.
//!
//! ```text
//!   chain ──submit──▶ in flight ──DiskDone──▶ used ring
//!     │                   └──reset──▶ orphan ──DiskDone──▶ forgotten
//!     └──refused (bad sector, length, type)──▶ used ring
//! ```
//!
//! Write data is copied out at submission: what the guest does to its buffer afterwards changes
//! nothing on any copy's disk.

use std::collections::BTreeMap;

use bytes::Bytes;
use replay_log::{DiskOutcome, RequestNumber};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{Bytes as _, GuestAddress};

use super::ring::{Chain, Lie, Ring, Segments};
use super::{Device, Outside, Tell, Trouble};
use crate::GuestMemory;
use crate::tape::{Command, DiskOp, DiskRequest};

/// The only queue.
pub const REQUESTS: usize = 0;
/// How many bytes one request may read or write.
pub const MAX_REQUEST: u32 = 1 << 20;

const SECTOR: u32 = 512;
const QUEUE_SIZE: u16 = 64;
/// A request's header: type, reserved, sector.
const HEADER: usize = 16;
/// What is announced to drivers: chains that fit the queue and requests below [`MAX_REQUEST`].
const SEGMENT_MAX: u32 = 16 << 10;
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Requests that the outside has not finished, those of drivers before a reset included. More are
/// refused: a driver that resets its device in a loop must not make us keep ever more.
const MAX_OUTSTANDING: usize = 512;
/// Bytes that outstanding reads may ask for, because a host keeps what it has read until it is
/// delivered. A driver that keeps to its queue stays below: a chain that reads [`MAX_REQUEST`] has
/// a header and a status beside it, and the queue 64 descriptors.
const MAX_READING: u64 = 24 << 20;

/// What becomes of a request when the outside has finished it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Read(Segments),
    Write,
    Flush,
}

impl Kind {
    /// How many bytes the host will have to keep for it.
    fn reads(&self) -> u32 {
        match self {
            Self::Read(into) => into.len(),
            Self::Write | Self::Flush => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct InFlight {
    head: u16,
    status: GuestAddress,
    kind: Kind,
}

/// A block device.
#[derive(Debug)]
pub struct Block {
    disk: u8,
    size: u64,
    config: [u8; 24],
    in_flight: BTreeMap<RequestNumber, InFlight>,
    /// Requests of drivers that are gone, with the bytes they read.
    orphans: BTreeMap<RequestNumber, u32>,
    /// The bytes that all of them read together.
    reading: u64,
}

/// What the device does with a chain.
enum Verdict {
    Submit(Kind, DiskOp),
    Refuse(u32),
    Identify,
}

/// A completion that cannot belong to the request it names.
#[derive(Debug)]
pub struct Mismatch;

impl Block {
    /// Disk number `disk`, of `size` bytes; a rest below a sector is left out.
    pub fn new(disk: u8, size: u64) -> Self {
        let sectors = size / u64::from(SECTOR);
        let mut config = [0; 24];
        config[0..8].copy_from_slice(&sectors.to_le_bytes());
        config[8..12].copy_from_slice(&SEGMENT_MAX.to_le_bytes());
        config[12..16].copy_from_slice(&SEGMENTS_MAX.to_le_bytes());
        // 16..20: the geometry, which is not offered.
        config[20..24].copy_from_slice(&SECTOR.to_le_bytes());
        Self {
            disk,
            size: sectors * u64::from(SECTOR),
            config,
            in_flight: BTreeMap::new(),
            orphans: BTreeMap::new(),
            reading: 0,
        }
    }

    /// Whether this request is outstanding here.
    pub fn knows(&self, number: RequestNumber) -> bool {
        self.in_flight.contains_key(&number) || self.orphans.contains_key(&number)
    }

    /// Takes the request off the list if its completion is one that it can have. `None`: its
    /// driver is gone, there is nobody to tell.
    pub fn finish(
        &mut self,
        number: RequestNumber,
        outcome: DiskOutcome,
        data: Option<&[u8]>,
    ) -> Result<Option<Finished>, Mismatch> {
        if let Some(reads) = self.orphans.remove(&number) {
            self.reading -= u64::from(reads);
            return Ok(None);
        }
        let matches = match (
            self.in_flight.get(&number).map(|request| &request.kind),
            outcome,
        ) {
            (Some(Kind::Read(into)), DiskOutcome::Read { .. }) => {
                data.is_some_and(|data| data.len() == into.len() as usize)
            }
            (Some(Kind::Write), DiskOutcome::Written)
            | (Some(Kind::Flush), DiskOutcome::Flushed) => true,
            _ => false,
        };
        if !matches {
            return Err(Mismatch);
        }
        let finished = self.in_flight.remove(&number);
        self.reading -= finished
            .as_ref()
            .map_or(0, |request| u64::from(request.kind.reads()));
        Ok(finished.map(Finished))
    }

    /// Serves a chain: how many bytes of it are written, if it is answered already.
    fn submit(&mut self, chain: Chain, outside: &mut Outside<'_>) -> Result<Option<u32>, Trouble> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let mut header = [0; HEADER];
        readable.read(outside.memory, &mut header)?;
        let status = writable.take_last_byte().ok_or(Lie::Request)?;
        if !readable.skip(HEADER as u32) {
            return Err(Lie::Request.into());
        }
        match self.judge(header, &readable, writable.clone(), outside.memory)? {
            Verdict::Submit(kind, op) => {
                let number = outside.requests.draw();
                self.reading += u64::from(kind.reads());
                let request = InFlight { head, status, kind };
                self.in_flight.insert(number, request);
                outside.tape.command(Command::Disk(DiskRequest {
                    number,
                    disk: self.disk,
                    op,
                }))?;
                Ok(None)
            }
            Verdict::Refuse(reason) => Ok(Some(answer(outside.memory, status, reason, 0)?)),
            Verdict::Identify => {
                writable.write(outside.memory, &self.identity())?;
                let written = VIRTIO_BLK_ID_BYTES;
                let written = answer(outside.memory, status, VIRTIO_BLK_S_OK, written)?;
                Ok(Some(written))
            }
        }
    }

    fn judge(
        &self,
        header: [u8; HEADER],
        readable: &Segments,
        writable: Segments,
        memory: &GuestMemory,
    ) -> Result<Verdict, Lie> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([t0, t1, t2, t3]);
        let sector = u64::from_le_bytes(sector);
        let full = self.in_flight.len() + self.orphans.len() >= MAX_OUTSTANDING;
        Ok(match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_FLUSH if full => {
                Verdict::Refuse(VIRTIO_BLK_S_IOERR)
            }
            VIRTIO_BLK_T_IN => match self.place(sector, writable.len()) {
                Some(_) if self.reading + u64::from(writable.len()) > MAX_READING => {
                    Verdict::Refuse(VIRTIO_BLK_S_IOERR)
                }
                Some(offset) => {
                    let len = writable.len();
                    Verdict::Submit(Kind::Read(writable), DiskOp::Read { offset, len })
                }
                None => Verdict::Refuse(VIRTIO_BLK_S_IOERR),
            },
            VIRTIO_BLK_T_OUT => match self.place(sector, readable.len()) {
                Some(offset) => {
                    // At most MAX_REQUEST, by `place`.
                    let mut data = vec![0; readable.len() as usize];
                    readable.read(memory, &mut data)?;
                    let data = Bytes::from(data);
                    Verdict::Submit(Kind::Write, DiskOp::Write { offset, data })
                }
                None => Verdict::Refuse(VIRTIO_BLK_S_IOERR),
            },
            VIRTIO_BLK_T_FLUSH => Verdict::Submit(Kind::Flush, DiskOp::Flush),
            VIRTIO_BLK_T_GET_ID if writable.len() >= VIRTIO_BLK_ID_BYTES => Verdict::Identify,
            VIRTIO_BLK_T_GET_ID => Verdict::Refuse(VIRTIO_BLK_S_IOERR),
            _ => Verdict::Refuse(VIRTIO_BLK_S_UNSUPP),
        })
    }

    /// The byte offset of a request, if the disk has all of it.
    fn place(&self, sector: u64, len: u32) -> Option<u64> {
        let offset = sector.checked_mul(u64::from(SECTOR))?;
        let end = offset.checked_add(u64::from(len))?;
        let proper = len > 0 && len.is_multiple_of(SECTOR) && len <= MAX_REQUEST;
        (proper && end <= self.size).then_some(offset)
    }

    fn identity(&self) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
        let mut identity = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = format!("understudy-disk-{}", self.disk);
        identity[..name.len()].copy_from_slice(name.as_bytes());
        identity
    }
}

/// Writes a request's status behind `data` bytes; how many bytes are written then.
fn answer(memory: &GuestMemory, status: GuestAddress, code: u32, data: u32) -> Result<u32, Lie> {
    memory.write_obj(code as u8, status).map_err(Lie::Access)?;
    Ok(data + 1)
}

/// A request that the outside has finished and the driver does not know of yet.
#[derive(Debug)]
pub struct Finished(InFlight);

impl Finished {
    /// Hands it to the driver.
    pub fn tell(
        self,
        data: Option<&[u8]>,
        ring: &mut Ring,
        memory: &GuestMemory,
    ) -> Result<Tell, Trouble> {
        let InFlight { head, status, kind } = self.0;
        let mut written = 0;
        if let (Kind::Read(into), Some(data)) = (&kind, data) {
            into.write(memory, data)?;
            written = into.len();
        }
        let written = answer(memory, status, VIRTIO_BLK_S_OK, written)?;
        ring.complete(memory, head, written)?;
        Ok(ring.tell(memory)?)
    }
}

impl Device for Block {
    const KIND: u32 = VIRTIO_ID_BLOCK;
    const QUEUES: &'static [u16] = &[QUEUE_SIZE];
    const UNNOTIFIED: &'static [usize] = &[];
    const FEATURES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_FLUSH;

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn notified(
        &mut self,
        _queue: usize,
        ring: &mut Ring,
        outside: &mut Outside<'_>,
    ) -> Result<Tell, Trouble> {
        ring.serve(outside.memory, |chain| self.submit(chain, outside))
    }

    fn reset(&mut self) {
        let requests = std::mem::take(&mut self.in_flight);
        let orphans = requests
            .into_iter()
            .map(|(number, request)| (number, request.kind.reads()));
        self.orphans.extend(orphans);
    }

    fn digest(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&(self.in_flight.len() as u64).to_le_bytes());
        for (number, request) in &self.in_flight {
            hasher.update(&number.0.to_le_bytes());
            hasher.update(&request.head.to_le_bytes());
            hasher.update(&request.status.0.to_le_bytes());
            match &request.kind {
                Kind::Read(into) => {
                    hasher.update(&[0]);
                    into.digest(hasher);
                }
                Kind::Write => {
                    hasher.update(&[1]);
                }
                Kind::Flush => {
                    hasher.update(&[2]);
                }
            }
        }
        hasher.update(&(self.orphans.len() as u64).to_le_bytes());
        for (number, reads) in &self.orphans {
            hasher.update(&number.0.to_le_bytes());
            hasher.update(&reads.to_le_bytes());
        }
    }
}
