//! The model machine: a guest without a CPU, for the simulator and for tests of the run loop.
//!
//! It is a small deterministic program that does everything a real guest does to the tape: it
//! takes frames and answers them, reads the clock, asks for entropy, arms timers, writes and
//! flushes a disk before it answers, idles, and now and then brings one more exit while pending
//! I/O is completed. What it serves is a set of counters.
//!
//! A request is `tag` (8 bytes, echoed) and `key` (4 bytes, little endian); the answer is `tag`,
//! `key` and the counter's value after it was raised by one (8 bytes). Counters live on disk 0,
//! one sector each, and are read back at power-on.

use std::collections::{BTreeMap, VecDeque};

use bytes::{BufMut, Bytes, BytesMut};
use replay_log::{Answer, Arrival, GuestTime, MarkDigest, RequestNumber, TimerId};

use crate::machine::{DigestScope, Enter, Entered, Machine, MachineError};
use crate::tape::{
    Command, CpuState, Delivery, DiskOp, DiskRequest, GuestEnd, Query, Sources, Tape,
};

/// How many counters there are.
pub const KEYS: u32 = 64;
/// Bytes of a request.
pub const REQUEST_LEN: usize = 12;
/// Bytes of an answer.
pub const ANSWER_LEN: usize = 20;
/// The size of the model machine's disk in bytes.
pub const DISK_SIZE: u64 = KEYS as u64 * SECTOR;
const SECTOR: u64 = 512;
const RECEIVE_BUFFERS: usize = 8;
const TICK_NANOS: u64 = 50_000_000;

/// One exit that the program is about to make.
#[derive(Clone, Debug)]
enum Op {
    ReadDisk,
    ReadClock,
    Entropy,
    ArmTick,
    /// Write the counter and flush, two requests in one exit.
    Store {
        key: u32,
        reply: Bytes,
    },
    Send(Bytes),
    Say(Bytes),
    Idle,
    PowerOff,
}

/// The model machine.
#[derive(Debug)]
pub struct Model {
    cpu: CpuState,
    counters: Vec<u64>,
    /// The counters have been read back; before that nothing is served.
    loaded: bool,
    inbox: VecDeque<Bytes>,
    program: VecDeque<Op>,
    /// Answers that wait for their flush.
    storing: BTreeMap<RequestNumber, Bytes>,
    requests: RequestNumber,
    time: GuestTime,
    ticks: u64,
    served: u64,
    /// Hash over everything that ever happened to the program.
    history: blake3::Hasher,
    /// An exit may be pending; completing it may bring another.
    unsettled: bool,
    twice: bool,
    kicks: u32,
}

impl Default for Model {
    fn default() -> Self {
        Self::new()
    }
}

impl Model {
    /// A model machine at power-on.
    pub fn new() -> Self {
        Self {
            cpu: CpuState::Ready,
            counters: vec![0; KEYS as usize],
            loaded: false,
            inbox: VecDeque::new(),
            program: VecDeque::from([Op::Entropy, Op::ReadDisk, Op::ArmTick, Op::Idle]),
            storing: BTreeMap::new(),
            requests: RequestNumber(0),
            time: GuestTime(0),
            ticks: 0,
            served: 0,
            history: blake3::Hasher::new(),
            unsettled: false,
            twice: false,
            kicks: 0,
        }
    }

    /// A request for the counter `key`; `tag` comes back with the answer.
    pub fn request(tag: u64, key: u32) -> Bytes {
        let mut bytes = BytesMut::with_capacity(REQUEST_LEN);
        bytes.put_u64_le(tag);
        bytes.put_u32_le(key);
        bytes.freeze()
    }

    /// Reads an answer: tag, key, value.
    pub fn read_answer(frame: &[u8]) -> Option<(u64, u32, u64)> {
        let (tag, rest) = frame.split_first_chunk::<8>()?;
        let (key, rest) = rest.split_first_chunk::<4>()?;
        let value = rest.first_chunk::<8>()?;
        Some((
            u64::from_le_bytes(*tag),
            u32::from_le_bytes(*key),
            u64::from_le_bytes(*value),
        ))
    }

    /// Lets the next `kicks` entries come back without having reached a landmark.
    pub const fn kick(&mut self, kicks: u32) {
        self.kicks += kicks;
    }

    /// The counters, for comparing copies in tests.
    pub fn counters(&self) -> &[u64] {
        &self.counters
    }

    fn request_number(&mut self) -> RequestNumber {
        self.requests.0 += 1;
        self.requests
    }

    /// What to do next when nothing is planned: look at what arrived, else idle.
    fn plan(&mut self) -> Op {
        if let Some(op) = self.program.pop_front() {
            return op;
        }
        if !self.loaded {
            return Op::Idle;
        }
        let Some(frame) = self.inbox.pop_front() else {
            return Op::Idle;
        };
        if frame.as_ref() == b"off" {
            return Op::PowerOff;
        }
        if frame.len() != REQUEST_LEN {
            return Op::Say(Bytes::from_static(b"bad request\n"));
        }
        let key = u32::from_le_bytes([frame[8], frame[9], frame[10], frame[11]]) % KEYS;
        let value = &mut self.counters[key as usize];
        *value += 1;
        let mut reply = BytesMut::with_capacity(ANSWER_LEN);
        reply.put_slice(&frame[..8]);
        reply.put_u32_le(key);
        reply.put_u64_le(*value);
        self.served += 1;
        self.program.push_back(Op::Store {
            key,
            reply: reply.freeze(),
        });
        if self.served.is_multiple_of(7) {
            Op::Entropy
        } else {
            Op::ReadClock
        }
    }

    fn exit(&mut self, op: Op, tape: &mut dyn Tape) -> Result<(), MachineError> {
        self.history.update(&[match op {
            Op::ReadDisk => 1,
            Op::ReadClock => 2,
            Op::Entropy => 3,
            Op::ArmTick => 4,
            Op::Store { .. } => 5,
            Op::Send(_) => 6,
            Op::Say(_) => 7,
            Op::Idle => 8,
            Op::PowerOff => 9,
        }]);
        match op {
            Op::ReadDisk => {
                let op = DiskOp::Read {
                    offset: 0,
                    len: DISK_SIZE as u32,
                };
                let number = self.request_number();
                tape.command(Command::Disk(DiskRequest {
                    number,
                    disk: 0,
                    op,
                }))?;
            }
            Op::ReadClock => {
                if let Answer::Clock(time) = tape.answer(Query::Clock)? {
                    self.time = time;
                    self.history.update(&time.0.to_le_bytes());
                }
            }
            Op::Entropy => {
                if let Answer::Entropy(bytes) = tape.answer(Query::Entropy(8))? {
                    self.history.update(&bytes);
                }
            }
            Op::ArmTick => {
                let deadline = Some(GuestTime(self.time.0 + TICK_NANOS));
                tape.command(Command::ArmTimer {
                    timer: TimerId(0),
                    deadline,
                })?;
            }
            Op::Store { key, reply } => self.store(key, reply, tape)?,
            Op::Send(frame) => tape.command(Command::Frame(frame))?,
            Op::Say(text) => tape.command(Command::Console(text))?,
            Op::Idle => self.cpu = CpuState::Idle,
            Op::PowerOff => self.cpu = CpuState::Stopped(GuestEnd::PowerOff),
        }
        Ok(())
    }

    fn store(&mut self, key: u32, reply: Bytes, tape: &mut dyn Tape) -> Result<(), MachineError> {
        let mut sector = BytesMut::zeroed(SECTOR as usize);
        sector[..8].copy_from_slice(&self.counters[key as usize].to_le_bytes());
        let write = DiskOp::Write {
            offset: u64::from(key) * SECTOR,
            data: sector.freeze(),
        };
        let number = self.request_number();
        tape.command(Command::Disk(DiskRequest {
            number,
            disk: 0,
            op: write,
        }))?;
        let number = self.request_number();
        tape.command(Command::Disk(DiskRequest {
            number,
            disk: 0,
            op: DiskOp::Flush,
        }))?;
        self.storing.insert(number, reply);
        Ok(())
    }
}

impl Machine for Model {
    fn enter(&mut self, how: Enter, tape: &mut dyn Tape) -> Result<Entered, MachineError> {
        if how == Enter::Complete {
            if self.unsettled && std::mem::take(&mut self.twice) {
                self.exit(Op::ReadClock, tape)?;
                return Ok(Entered::Exit);
            }
            self.unsettled = false;
            return Ok(Entered::Settled);
        }
        assert_eq!(
            self.cpu,
            CpuState::Ready,
            "a waiting machine is not entered"
        );
        if self.kicks > 0 {
            self.kicks -= 1;
            return Ok(Entered::Kicked);
        }
        if self.unsettled && std::mem::take(&mut self.twice) {
            self.exit(Op::ReadClock, tape)?;
            return Ok(Entered::Exit);
        }
        let op = self.plan();
        // Every fifth answer brings a second exit with its completion, like a 16-byte MMIO access.
        self.twice = matches!(op, Op::Send(_)) && self.served.is_multiple_of(5);
        self.unsettled = true;
        self.exit(op, tape)?;
        Ok(Entered::Exit)
    }

    fn cpu(&self) -> CpuState {
        self.cpu
    }

    fn can_take(&self) -> Sources {
        Sources {
            frame: self.inbox.len() < RECEIVE_BUFFERS,
            console: 16,
        }
    }

    fn deliver(&mut self, delivery: Delivery) -> Result<(), MachineError> {
        let refuse = |what: &str| Err(MachineError::CannotTake { what: what.into() });
        match delivery.arrival {
            Arrival::Frame { bytes, .. } => {
                if self.inbox.len() >= RECEIVE_BUFFERS {
                    return refuse("a frame");
                }
                self.history.update(&bytes);
                self.inbox.push_back(bytes);
            }
            Arrival::DiskDone { request, .. } => {
                self.history.update(&request.0.to_le_bytes());
                if let Some(reply) = self.storing.remove(&request) {
                    self.program.push_back(Op::Send(reply));
                }
                self.loaded |= delivery.data.is_some();
                for (key, sector) in delivery
                    .data
                    .iter()
                    .flat_map(|data| data.chunks(512))
                    .enumerate()
                {
                    if let (Some(value), Some(counter)) =
                        (sector.first_chunk::<8>(), self.counters.get_mut(key))
                    {
                        *counter = u64::from_le_bytes(*value);
                    }
                }
            }
            Arrival::TimerDue { .. } => {
                self.ticks += 1;
                self.program.push_back(Op::ReadClock);
                self.program.push_back(Op::ArmTick);
                if self.ticks.is_multiple_of(16) {
                    self.program
                        .push_back(Op::Say(format!("tick {}\n", self.ticks).into()));
                }
            }
            Arrival::Console { bytes } => {
                self.history.update(&bytes);
                self.program.push_back(Op::Say(bytes));
            }
        }
        if self.cpu == CpuState::Idle {
            self.cpu = CpuState::Ready;
        }
        Ok(())
    }

    fn interrupt_waits(&self) -> bool {
        false
    }

    fn inject(&mut self) -> Result<bool, MachineError> {
        Ok(false)
    }

    fn digest(&mut self, scope: DigestScope) -> Result<MarkDigest, MachineError> {
        let mut hasher = self.history.clone();
        for counter in &self.counters {
            hasher.update(&counter.to_le_bytes());
        }
        hasher.update(&self.time.0.to_le_bytes());
        hasher.update(&[
            u8::from(scope.deep),
            self.inbox.len() as u8,
            self.storing.len() as u8,
        ]);
        let mut first = [0; 8];
        first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
        Ok(MarkDigest(u64::from_le_bytes(first)))
    }
}
