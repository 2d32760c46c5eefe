//! Recording and replaying a guest on KVM, under a storm of kicks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use replay_log::{Batch, Header, ImageDigest, Position, Term};
use thiserror::Error;
use vmm::boot::BootImage;
use vmm::config::MachineConfig;
use vmm::host::Output;
use vmm::kvm::{Kicker, KvmMachine};
use vmm::machine::MachineError;
use vmm::recorder::{Policy, Recorder};
use vmm::replayer::{FeedError, Replayer};
use vmm::runner::{Runner, Turn};
use vmm::tape::{GuestEnd, TapeError};
use vmm::testing::MemoryHost;

use super::{all_memory, config, machine};

/// A disk of 64 sectors.
const DISK: u64 = 64 * 512;
/// How far the host's clock moves with each look at it.
const STEP: u64 = 20_000;
/// How far it moves when the guest waits.
const PATIENCE: u64 = 100_000;

/// How often a replay may wait in a row: a disk takes a few looks.
const WAITS_MAX: u32 = 100;

/// A guest and what happens to it.
#[derive(Clone)]
pub struct Scenario {
    pub image: BootImage,
    /// What the log's header says of the image, right or wrong.
    pub image_digest: ImageDigest,
    pub config: MachineConfig,
    /// How many frames are sent to it.
    pub frames: u32,
    /// A mark at least so often.
    pub mark_landmarks: u64,
    /// How many marks a replay must have compared.
    pub marks_at_least: u64,
    /// Whether kicks storm.
    pub storm: bool,
}

/// What a primary left behind.
pub struct Recorded {
    pub end: GuestEnd,
    pub batches: Vec<Batch>,
    pub outputs: Vec<Output>,
    pub at: Position,
    pub memory: Vec<u8>,
    pub kicks: u64,
}

/// What a replica came to.
pub struct Replayed {
    pub outputs: Vec<Output>,
    pub at: Position,
    pub memory: Vec<u8>,
    pub marks: u64,
    pub kicks: u64,
}

impl Scenario {
    pub fn new(image: BootImage) -> Self {
        Self {
            image_digest: image.digest(),
            image,
            config: config(),
            frames: 0,
            mark_landmarks: 3,
            marks_at_least: 2,
            storm: true,
        }
    }

    #[must_use]
    pub fn with_network(mut self) -> Self {
        self.config.mac = Some([2, 0, 0, 0, 0, 1]);
        self
    }

    #[must_use]
    pub fn with_frames(mut self, frames: u32) -> Self {
        self.frames = frames;
        self
    }

    #[must_use]
    pub fn with_disk(mut self) -> Self {
        self.config.disks = vec![DISK];
        self
    }

    pub fn header(&self) -> Header {
        Header {
            machine_model: vmm::MACHINE_MODEL,
            image: self.image_digest,
            config: Bytes::new(),
            disks: Vec::new(),
            term: Term(1),
            boot: [5; 16],
        }
    }

    pub fn host(&self, seed: u64) -> MemoryHost {
        MemoryHost::new(STEP, &self.config.disks, seed)
    }

    /// The storm over a machine, if there is to be one.
    pub fn storm(&self, machine: &KvmMachine) -> Option<Storm> {
        self.storm.then(|| Storm::start(machine.kicker()))
    }

    /// The same without a storm.
    #[must_use]
    pub fn quiet(mut self) -> Self {
        self.storm = false;
        self
    }

    pub fn machine(&self) -> KvmMachine {
        machine(&self.config, &self.image)
    }

    /// Policy with marks as often as the scenario wants.
    pub fn policy(&self) -> Policy {
        Policy {
            mark_landmarks: self.mark_landmarks,
            mark_age: u64::MAX,
            ..Policy::default()
        }
    }

    /// The n-th frame that is sent to it.
    pub fn frame(n: u32) -> Bytes {
        let len = 60 + n as usize * 37 % 1400;
        (0..len).map(|i| (i as u32 * 31 + n) as u8).collect()
    }
}

/// Runs a primary to the end of its guest, which switches itself off.
pub fn record(scenario: &Scenario) -> Recorded {
    let recorded = record_to_end(scenario);
    assert_eq!(
        recorded.end,
        GuestEnd::PowerOff,
        "the guest found something wrong"
    );
    recorded
}

/// Runs a primary to the end of its guest, whatever that is.
pub fn record_to_end(scenario: &Scenario) -> Recorded {
    let mut tape = Recorder::start(scenario.host(3), scenario.policy(), scenario.header())
        .expect("the recorder starts");
    let machine = scenario.machine();
    let storm = scenario.storm(&machine);
    let mut runner = Runner::new(machine);
    let end = run_live(&mut runner, &mut tape, scenario, 0);
    drop(storm);
    Recorded {
        end,
        kicks: runner.kicks(),
        at: runner.at(),
        memory: all_memory(runner.machine()),
        batches: std::mem::take(&mut tape.host().batches),
        outputs: std::mem::take(&mut tape.host().outputs),
    }
}

/// Runs a primary until its guest has ended and everything is shipped. The gateway sent the first
/// `sent` frames before.
pub fn run_live(
    runner: &mut Runner<KvmMachine>,
    tape: &mut Recorder<MemoryHost>,
    scenario: &Scenario,
    mut sent: u32,
) -> GuestEnd {
    let end = loop {
        // Frames come by threes, so that some wait.
        if tape.host().quiet() {
            for _ in 0..3.min(scenario.frames - sent) {
                tape.host().send_frame(Scenario::frame(sent));
                sent += 1;
            }
        }
        match runner.turn(tape, 64).expect("the primary runs") {
            Turn::Ran | Turn::Paused => {}
            Turn::Waiting => tape.host().advance(PATIENCE),
            Turn::Ended(end) => break end,
        }
    };
    tape.flush().expect("the rest is shipped");
    end
}

/// Why a log does not replay to its end.
#[derive(Debug, Error)]
pub enum NoReplay {
    /// It was refused.
    #[error(transparent)]
    Refused(#[from] FeedError),
    /// The replay could not go on.
    #[error(transparent)]
    Stopped(#[from] MachineError),
    /// The replay waits for what does not come, or has ended in another way.
    #[error("the replay stands at {0:?} and the log goes on")]
    Stuck(Turn),
}

impl NoReplay {
    /// Whether somebody who changed the log is found out as he has to be: refused, or by a
    /// divergence that names its position.
    pub fn is_found_out(&self) -> bool {
        matches!(
            self,
            Self::Refused(_)
                | Self::Stopped(MachineError::Tape(
                    TapeError::Diverged { .. } | TapeError::DiskDiffers { .. }
                ))
        )
    }
}

/// Replays a whole log on a fresh machine, of a guest that switches itself off.
pub fn replay(scenario: &Scenario, batches: &[Batch]) -> Result<Replayed, NoReplay> {
    replay_to_end(scenario, batches, GuestEnd::PowerOff)
}

/// Replays a whole log on a fresh machine, of a guest that ends like this.
pub fn replay_to_end(
    scenario: &Scenario,
    batches: &[Batch],
    expected: GuestEnd,
) -> Result<Replayed, NoReplay> {
    let mut tape = Replayer::new(scenario.host(99), scenario.header());
    let machine = scenario.machine();
    let storm = scenario.storm(&machine);
    let mut runner = Runner::new(machine);
    let end = replay_on(&mut runner, &mut tape, batches)?;
    drop(storm);
    if end != Turn::Ended(expected) {
        return Err(NoReplay::Stuck(end));
    }
    Ok(Replayed {
        kicks: runner.kicks(),
        at: runner.at(),
        memory: all_memory(runner.machine()),
        marks: tape.marks(),
        outputs: std::mem::take(&mut tape.host().outputs),
    })
}

/// Replays these batches to their end.
pub fn replay_on(
    runner: &mut Runner<KvmMachine>,
    tape: &mut Replayer<MemoryHost>,
    batches: &[Batch],
) -> Result<Turn, NoReplay> {
    for batch in batches {
        tape.feed(batch)?;
    }
    let mut waits = 0;
    loop {
        match runner.turn(tape, 64)? {
            Turn::Ran | Turn::Paused => waits = 0,
            turn if tape.drained() => return Ok(turn),
            // Its own disk has not finished yet.
            Turn::Waiting if waits < WAITS_MAX => waits += 1,
            turn => return Err(NoReplay::Stuck(turn)),
        }
    }
}

/// Kicks a vCPU at uneven intervals until it is dropped.
pub struct Storm {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Storm {
    /// Begins; the first kick has come when this returns, so that the machine is kicked at least
    /// once.
    pub fn start(kicker: Kicker) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        kicker.kick();
        let thread = std::thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let mut pause = 1u64;
                while !stop.load(Ordering::Relaxed) {
                    kicker.kick();
                    pause = pause * 5 % 397;
                    // The pace of the storm, not a wait for anything.
                    std::thread::sleep(Duration::from_micros(pause));
                }
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        assert!(
            ended.is_some_and(|ended| ended.is_ok()),
            "the storm panicked"
        );
    }
}
