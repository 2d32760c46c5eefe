//! What `doctor` measures with small guests on this host's KVM: whether CPUID can be masked, what
//! an exit costs, and whether a replay is exact although kicks storm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use replay_log::{Batch, Header, Term};
use serde::Serialize;
use thiserror::Error;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};
use vmm::boot::BootImage;
use vmm::config::MachineConfig;
use vmm::kvm::trial::Came;
use vmm::kvm::{Kicker, KvmError, KvmMachine, Leaf};
use vmm::machine::MachineError;
use vmm::recorder::{Policy, Recorder};
use vmm::replayer::{FeedError, Replayer};
use vmm::runner::{Runner, Turn};
use vmm::tape::{GuestEnd, TapeError};
use vmm::testing::MemoryHost;

use super::guest::{self, Access, Ring};

/// Guest memory of a probe, in bytes.
const MEMORY: u64 = 4 << 20;
/// How far a probe's clock moves with each look at it, in nanoseconds.
const CLOCK_STEP: u64 = 20_000;
/// How far it moves when the guest waits.
const CLOCK_LEAP: u64 = 100_000;
/// Landmarks that are passed before measuring begins, and while it goes on.
const WARM_UP: u32 = 200;
const MEASURED: u32 = 2_000;
/// Turns that a probe may take; far more than any needs.
const TURNS_MAX: u32 = 100_000;
/// How often the timer interrupts the guest of the self-test.
const INTERRUPTS: u32 = 60;
/// A mark after so many landmarks of the self-test.
const MARK_EVERY: u64 = 5;

/// Why a probe came to no result.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// No machine.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine stopped.
    #[error("a probe's guest failed on this KVM")]
    Machine(#[from] MachineError),
    /// The recorder stopped.
    #[error(transparent)]
    Tape(#[from] TapeError),
    /// The replayer refused its own log.
    #[error(transparent)]
    Feed(#[from] FeedError),
    /// The guest did something else than it was assembled for.
    #[error("a probe's guest ended unexpectedly: {0:?}")]
    Ended(Turn),
    /// The same of a guest under trial.
    #[error("a probe's guest came back unexpectedly: {0:?}")]
    Came(Came),
    /// No interrupt could be injected.
    #[error("a probe's guest never takes an interrupt after a kick")]
    NeverReady,
    /// Its memory cannot be read.
    #[error(transparent)]
    Memory(#[from] GuestMemoryError),
    /// The guest itself is wrong.
    #[error(transparent)]
    Assembler(#[from] iced_x86::IcedError),
}

/// What an exit to user space costs, in nanoseconds, the VMM's own work included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ExitCosts {
    /// IN in ring 0.
    pub port_ring_0: u64,
    /// IN in ring 3.
    pub port_ring_3: u64,
    /// A read from no memory in ring 0.
    pub mmio_ring_0: u64,
    /// The same in ring 3.
    pub mmio_ring_3: u64,
}

/// Measures what exits cost.
pub fn exit_costs() -> Result<ExitCosts, ProbeError> {
    let cost = |ring, access| exit_cost(&guest::accesses(ring, access)?);
    Ok(ExitCosts {
        port_ring_0: cost(Ring::Zero, Access::Port)?,
        port_ring_3: cost(Ring::Three, Access::Port)?,
        mmio_ring_0: cost(Ring::Zero, Access::Mmio)?,
        mmio_ring_3: cost(Ring::Three, Access::Mmio)?,
    })
}

fn exit_cost(image: &BootImage) -> Result<u64, ProbeError> {
    let policy = Policy {
        record: false,
        ..Policy::default()
    };
    let mut tape = Recorder::start(host(), policy, header(image))?;
    let mut runner = Runner::new(KvmMachine::new(&config(), image)?);
    let mut pass = |landmarks| match runner.turn(&mut tape, landmarks)? {
        Turn::Ran => Ok(()),
        turn => Err(ProbeError::Ended(turn)),
    };
    pass(WARM_UP)?;
    let began = Instant::now();
    pass(MEASURED)?;
    let nanos = began.elapsed().as_nanos() / u128::from(MEASURED);
    Ok(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// What a guest learns of the CPU although it should not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Masking {
    /// How many bits of the asked leaves differ from the CPU model, in ring 0.
    pub wrong_bits_ring_0: u32,
    /// The same in ring 3.
    pub wrong_bits_ring_3: u32,
    /// The first of them: function, register (0 for EAX) and bit.
    pub first: Option<(u32, usize, u32)>,
}

impl Masking {
    /// Whether the guest sees the CPU model and nothing else.
    pub const fn holds(&self) -> bool {
        self.wrong_bits_ring_0 == 0 && self.wrong_bits_ring_3 == 0
    }
}

/// Leaves that the model lacks, function and index, and where guests must see zeros: counters, XSAVE,
/// KVM's own, SVM.
const EMPTY_LEAVES: [(u32, u32); 4] = [(0xa, 0), (0xd, 0), (0x4000_0001, 0), (0x8000_000a, 0)];

/// Compares what CPUID tells a guest with `model`, the leaves that KVM was told to give it.
pub fn masking(model: &[Leaf]) -> Result<Masking, ProbeError> {
    let ring_0 = wrong_bits(model, Ring::Zero)?;
    let ring_3 = wrong_bits(model, Ring::Three)?;
    Ok(Masking {
        wrong_bits_ring_0: ring_0.len() as u32,
        wrong_bits_ring_3: ring_3.len() as u32,
        first: ring_0.iter().chain(&ring_3).next().copied(),
    })
}

fn wrong_bits(model: &[Leaf], ring: Ring) -> Result<Vec<(u32, usize, u32)>, ProbeError> {
    let told = model.iter().map(|leaf| (leaf.function, leaf.index));
    let asked: Vec<_> = told.chain(EMPTY_LEAVES).collect();
    let image = guest::cpuid(ring, &asked)?;
    let runner = run_once(&image)?;
    let mut wrong = Vec::new();
    for (number, (function, index)) in asked.into_iter().enumerate() {
        let address = GuestAddress(guest::RESULTS + number as u64 * 16);
        let found: [u32; 4] = runner.machine().memory().read_obj(address)?;
        let told = model
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, index))
            .map_or([0; 4], |leaf| leaf.values);
        for register in 0..4 {
            let differing = found[register] ^ told[register];
            let bits = (0..32).filter(|bit| differing >> bit & 1 == 1);
            wrong.extend(bits.map(|bit| (function, register, bit)));
        }
    }
    Ok(wrong)
}

/// What the self-test came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct SelfTest {
    /// Digests that were compared and found equal.
    pub marks: u64,
    /// Landmarks passed.
    pub landmarks: u64,
    /// Kicks that hit the replay.
    pub kicks: u64,
}

/// Records a guest that the timer interrupts all the time, quietly, and replays it while kicks
/// storm; every digest is compared, and all of memory in the end. `Err` with
/// [`MachineError::Tape`] is a divergence.
pub fn self_test(ring: Ring) -> Result<SelfTest, ProbeError> {
    let image = guest::restless(ring, INTERRUPTS)?;
    let policy = Policy {
        mark_landmarks: MARK_EVERY,
        ..Policy::default()
    };
    let mut recorder = Recorder::start(host(), policy, header(&image))?;
    let recorded = run_to_end(&mut recorder, KvmMachine::new(&config(), &image)?)?;
    recorder.flush()?;
    let batches = std::mem::take(&mut recorder.host().batches);
    replay(&image, &batches, recorded.machine())
}

fn replay(
    image: &BootImage,
    batches: &[Batch],
    recorded: &KvmMachine,
) -> Result<SelfTest, ProbeError> {
    let mut tape = Replayer::new(host(), header(image));
    for batch in batches {
        tape.feed(batch)?;
    }
    let machine = KvmMachine::new(&config(), image)?;
    let storm = Storm::start(machine.kicker());
    let mut runner = Runner::new(machine);
    let ended = loop {
        match runner.turn(&mut tape, 64)? {
            Turn::Ran => {}
            turn => break turn,
        }
    };
    if ended != Turn::Ended(GuestEnd::PowerOff) {
        return Err(ProbeError::Ended(ended));
    }
    if content(runner.machine())? != content(recorded)? {
        return Err(MachineError::Tape(TapeError::Diverged {
            at: runner.at(),
            expected: "the recorded memory".to_owned(),
            found: "another".to_owned(),
        })
        .into());
    }
    Ok(SelfTest {
        marks: tape.marks(),
        landmarks: runner.at().0,
        kicks: storm.stop(),
    })
}

fn content(machine: &KvmMachine) -> Result<Vec<u8>, GuestMemoryError> {
    let mut bytes = vec![0; MEMORY as usize];
    machine.memory().read_slice(&mut bytes, GuestAddress(0))?;
    Ok(bytes)
}

/// Runs a guest until it switches itself off.
pub(super) fn run_once(image: &BootImage) -> Result<Runner<KvmMachine>, ProbeError> {
    let mut tape = Recorder::start(host(), Policy::default(), header(image))?;
    run_to_end(&mut tape, KvmMachine::new(&config(), image)?)
}

/// The same with the dirty log on.
pub(super) fn run_logged(image: &BootImage) -> Result<Runner<KvmMachine>, ProbeError> {
    let mut tape = Recorder::start(host(), Policy::default(), header(image))?;
    let machine = KvmMachine::with_dirty_log(&config(), image)?;
    run_to_end(&mut tape, machine)
}

fn run_to_end(
    tape: &mut Recorder<MemoryHost>,
    machine: KvmMachine,
) -> Result<Runner<KvmMachine>, ProbeError> {
    let mut runner = Runner::new(machine);
    for _ in 0..TURNS_MAX {
        match runner.turn(tape, 64)? {
            Turn::Ran => {}
            Turn::Waiting => tape.host().advance(CLOCK_LEAP),
            Turn::Ended(GuestEnd::PowerOff) => return Ok(runner),
            turn => return Err(ProbeError::Ended(turn)),
        }
    }
    Err(ProbeError::Ended(Turn::Ran))
}

pub(super) fn config() -> MachineConfig {
    MachineConfig {
        memory: MEMORY,
        command_line: String::new(),
        mac: None,
        disks: Vec::new(),
        acpi: false,
    }
}

fn header(image: &BootImage) -> Header {
    Header {
        machine_model: vmm::MACHINE_MODEL,
        image: image.digest(),
        config: Bytes::new(),
        disks: Vec::new(),
        term: Term(1),
        boot: [0; 16],
    }
}

fn host() -> MemoryHost {
    MemoryHost::new(CLOCK_STEP, &[], 1)
}

/// Kicks a vCPU at uneven intervals until it is dropped.
struct Storm {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Storm {
    fn start(kicker: Kicker) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let (mut pause, mut kicks) = (1_u64, 0);
            while !stopped.load(Ordering::Relaxed) {
                kicker.kick();
                kicks += 1;
                pause = pause * 5 % 397;
                // The pace of the storm, not a wait for anything.
                thread::sleep(Duration::from_micros(pause));
            }
            kicks
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    fn stop(mut self) -> u64 {
        self.end()
    }

    fn end(&mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        // The storm itself cannot panic, and a count is all that would be lost.
        self.thread
            .take()
            .map_or(0, |thread| thread.join().unwrap_or(0))
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.end();
    }
}
