//! What `doctor` finds out about single instructions and about a debugger's means: guests of a few
//! instructions each, of which it only matters whether they come through.

use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fmt, io, thread};

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, cr3, cr4, dx, eax, ebx, ecx, edx, ptr, rax, rdi, rsi, xmm0, xmm1, xmmword_ptr,
};
use serde::Serialize;
use vmm::boot::BootImage;
use vmm::devices::layout;
use vmm::kvm::trial::{BranchCounter, Came, Stop, Trial};
use vmm::machine::MachineError;
use vmm::runner::Turn;
use vmm::tape::GuestEnd;

use super::guest::{self, Doors, KERNEL_CODE, NOBODYS_PORT, RESULTS, Ring, TIMER_VECTOR};
use super::probe::{self, ProbeError};

/// How often the loop of a computing guest goes round where its speed is measured.
const ROUNDS: u32 = 20_000;
/// And where each of its instructions is a stop.
const STEPPED_ROUNDS: u32 = 20;
/// A CPU that executes ring 0 by itself is faster than this even if it is emulated as a whole; a KVM
/// that emulates one instruction at a time is several times slower. In picoseconds an instruction.
const NATIVE_AT_MOST: u64 = 150_000;
/// How many interrupts are injected to see how long that takes.
const INJECTIONS: usize = 50;
/// How many kicks may hit the guest in its handler, where it takes no interrupt.
const UNREADY_MAX: usize = 500;
/// How long a guest may compute before it is kicked.
const BEFORE_KICK: Duration = Duration::from_micros(500);

/// What becomes of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It does what it should.
    Works,
    /// The guest gets an exception.
    Faults,
    /// KVM gives up on the guest.
    Fails,
}

/// Instructions and ways that differ between the kinds of KVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trick {
    /// SYSCALL from ring 3 into ring 0.
    Syscall,
    /// POPCNT in ring 0.
    PopulationCount,
    /// CMPXCHG16B in ring 0.
    CompareExchange16,
    /// Scalar SSE arithmetic in ring 0.
    ScalarSse,
    /// Ports from ring 3, opened by IOPL.
    PortsByIopl,
    /// Ports from ring 3, opened by the bitmap in the TSS.
    PortsByBitmap,
    /// RDTSC in ring 3 although CR4.TSD forbids it: it should fault.
    ForbiddenRdtsc,
}

impl Trick {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Syscall,
        Self::PopulationCount,
        Self::CompareExchange16,
        Self::ScalarSse,
        Self::PortsByIopl,
        Self::PortsByBitmap,
        Self::ForbiddenRdtsc,
    ];

    /// Its name in a table.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Syscall => "SYSCALL",
            Self::PopulationCount => "POPCNT in ring 0",
            Self::CompareExchange16 => "CMPXCHG16B in ring 0",
            Self::ScalarSse => "scalar SSE in ring 0",
            Self::PortsByIopl => "ports by IOPL",
            Self::PortsByBitmap => "ports by the TSS",
            Self::ForbiddenRdtsc => "RDTSC under CR4.TSD",
        }
    }

    /// What becomes of it where nothing is missing.
    pub const fn expected(self) -> Fate {
        match self {
            Self::ForbiddenRdtsc => Fate::Faults,
            _ => Fate::Works,
        }
    }

    /// A guest that does it and switches itself off.
    fn guest(self) -> Result<BootImage, IcedError> {
        let doors = match self {
            Self::PortsByIopl => Doors::Iopl,
            Self::PortsByBitmap => Doors::Bitmap,
            _ => Doors::Both,
        };
        let ring = match self {
            Self::PopulationCount | Self::CompareExchange16 | Self::ScalarSse => Ring::Zero,
            _ => Ring::Three,
        };
        let mut handler = None;
        let mut asm = guest::start_after(ring, doors, |asm| match self {
            Self::Syscall => {
                let label = handler.insert(asm.create_label());
                asm.lea(rax, ptr(*label))?;
                admit_syscalls(asm)
            }
            Self::ForbiddenRdtsc => {
                asm.mov(rax, cr4)?;
                asm.or(rax, 4)?;
                asm.mov(cr4, rax)
            }
            _ => Ok(()),
        })?;
        match self {
            Self::Syscall => {
                asm.syscall()?;
                // Whatever comes back here was not in ring 0.
                asm.ud2()?;
                if let Some(label) = &mut handler {
                    asm.set_label(label)?;
                }
                // The ports are open to ring 3 as well; this is not.
                asm.mov(rax, cr3)?;
            }
            Self::PopulationCount => asm.popcnt(eax, ebx)?,
            Self::CompareExchange16 => {
                asm.mov(rdi, RESULTS)?;
                asm.cmpxchg16b(xmmword_ptr(rdi))?;
            }
            Self::ScalarSse => {
                asm.mov(eax, 3)?;
                asm.cvtsi2sd(xmm0, eax)?;
                asm.addsd(xmm1, xmm0)?;
            }
            Self::ForbiddenRdtsc => asm.rdtsc()?,
            Self::PortsByIopl | Self::PortsByBitmap => {}
        }
        guest::finish_with(asm, doors)
    }
}

/// Lets SYSCALL in, to the handler in RAX.
fn admit_syscalls(asm: &mut CodeAssembler) -> Result<(), IcedError> {
    const EFER: u32 = 0xc000_0080;
    const STAR: u32 = 0xc000_0081;
    const LSTAR: u32 = 0xc000_0082;
    const FLAG_MASK: u32 = 0xc000_0084;
    // Code is below 4 GiB.
    asm.mov(edx, 0)?;
    asm.mov(ecx, LSTAR)?;
    asm.wrmsr()?;
    for (register, low, high) in [
        (STAR, 0, KERNEL_CODE as u32),
        (FLAG_MASK, 0x200, 0),
        // SYSCALL, long mode enabled and active.
        (EFER, 0x501, 0),
    ] {
        asm.mov(ecx, register)?;
        asm.mov(eax, low)?;
        asm.mov(edx, high)?;
        asm.wrmsr()?;
    }
    Ok(())
}

/// What becomes of it on this host.
pub fn fate(trick: Trick) -> Result<Fate, ProbeError> {
    match probe::run_once(&trick.guest()?) {
        Ok(_) => Ok(Fate::Works),
        Err(ProbeError::Ended(Turn::Ended(GuestEnd::TripleFault))) => Ok(Fate::Faults),
        Err(
            ProbeError::Ended(Turn::Ended(GuestEnd::Unrunnable { .. }))
            | ProbeError::Machine(MachineError::Host { .. }),
        ) => Ok(Fate::Fails),
        Err(error) => Err(error),
    }
}

/// How fast a guest computes, in picoseconds an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Speed {
    /// In ring 0.
    pub ring_0: u64,
    /// In ring 3.
    pub ring_3: u64,
}

impl Speed {
    /// Whether the CPU executes ring 0 by itself.
    pub const fn ring_0_is_native(&self) -> bool {
        self.ring_0 < NATIVE_AT_MOST
    }
}

/// Measures it.
pub fn speed() -> Result<Speed, ProbeError> {
    let of = |ring| -> Result<u64, ProbeError> {
        let mut trial = computing(ring, ROUNDS)?;
        let began = Instant::now();
        trial.run()?;
        let picos = began.elapsed().as_nanos() * 1000 / u128::from(ROUNDS * 2);
        Ok(u64::try_from(picos).unwrap_or(u64::MAX))
    };
    Ok(Speed {
        ring_0: of(Ring::Zero)?,
        ring_3: of(Ring::Three)?,
    })
}

/// A guest at a port, behind which it goes round a loop of two instructions and comes to the port
/// again.
fn computing(ring: Ring, rounds: u32) -> Result<Trial, ProbeError> {
    let mut asm = guest::start_after(ring, Doors::Both, |_| Ok(()))?;
    let mut round = asm.create_label();
    asm.mov(edx, u32::from(NOBODYS_PORT))?;
    asm.in_(eax, dx)?;
    asm.mov(ecx, rounds)?;
    asm.set_label(&mut round)?;
    asm.dec(ecx)?;
    asm.jnz(round)?;
    asm.in_(eax, dx)?;
    at_port(&guest::finish_with(asm, Doors::Both)?)
}

/// A guest that has come to its port for the first time.
fn at_port(image: &BootImage) -> Result<Trial, ProbeError> {
    let mut trial = Trial::new(&probe::config(), image)?;
    loop {
        match trial.run()? {
            Came::Port(NOBODYS_PORT) => return Ok(trial),
            Came::Port(_) => {}
            came => return Err(ProbeError::Came(came)),
        }
    }
}

/// In which rings something works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rings {
    /// In ring 0 and in ring 3.
    Both,
    /// In ring 0 only.
    Zero,
    /// In ring 3 only.
    Three,
    /// In neither.
    None,
}

impl Rings {
    fn where_it(
        mut works: impl FnMut(Ring) -> Result<bool, ProbeError>,
    ) -> Result<Self, ProbeError> {
        Ok(match (works(Ring::Zero)?, works(Ring::Three)?) {
            (true, true) => Self::Both,
            (true, false) => Self::Zero,
            (false, true) => Self::Three,
            (false, false) => Self::None,
        })
    }
}

impl fmt::Display for Rings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "in both rings",
            Self::Zero => "in ring 0 only",
            Self::Three => "in ring 3 only",
            Self::None => "in neither ring",
        })
    }
}

/// What a debugger can do with a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Debugging {
    /// Each instruction is a stop.
    pub steps: Rings,
    /// An address is a stop.
    pub breakpoints: Rings,
}

/// Tries it.
pub fn debugging() -> Result<Debugging, ProbeError> {
    Ok(Debugging {
        steps: Rings::where_it(steps)?,
        breakpoints: Rings::where_it(breaks)?,
    })
}

fn steps(ring: Ring) -> Result<bool, ProbeError> {
    let mut trial = computing(ring, STEPPED_ROUNDS)?;
    trial.next_instruction()?;
    let mut stops = 0;
    let came = match trial.stop_at(Stop::EachInstruction) {
        Ok(()) => count_stops(&mut trial, &mut stops),
        Err(_) => return Ok(false),
    };
    // Every instruction of the loop, and what is before and behind it.
    Ok(matches!(came, Some(Came::Port(_))) && stops >= STEPPED_ROUNDS * 2)
}

/// Runs until something else than a stop comes; `None` if KVM gives up.
fn count_stops(trial: &mut Trial, stops: &mut u32) -> Option<Came> {
    // Far more than there can be; a debugger that never lets go is none.
    for _ in 0..STEPPED_ROUNDS * 10 {
        match trial.run() {
            Ok(Came::Stopped(_)) => *stops += 1,
            Ok(came) => return Some(came),
            Err(_) => return None,
        }
    }
    None
}

fn breaks(ring: Ring) -> Result<bool, ProbeError> {
    let mut trial = computing(ring, STEPPED_ROUNDS)?;
    // The loop begins behind an instruction of five bytes.
    let address = trial.next_instruction()? + 5;
    if trial.stop_at(Stop::At(address)).is_err() {
        return Ok(false);
    }
    Ok(matches!(trial.run(), Ok(Came::Stopped(at)) if at == address))
}

/// How long it takes from a kick until the guest's handler has come to its first exit, in
/// nanoseconds: the median.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Injection {
    /// Of a guest that computes in ring 0.
    pub ring_0: u64,
    /// In ring 3.
    pub ring_3: u64,
}

/// Measures it.
pub fn injection() -> Result<Injection, ProbeError> {
    Ok(Injection {
        ring_0: injection_into(Ring::Zero)?,
        ring_3: injection_into(Ring::Three)?,
    })
}

fn injection_into(ring: Ring) -> Result<u64, ProbeError> {
    let mut trial = at_port(&spinning(ring)?)?;
    let kicker = trial.kicker();
    let (go, wanted) = mpsc::channel();
    let (tell, kicked) = mpsc::channel();
    // It ends when nobody wants another kick.
    let kicking = thread::spawn(move || {
        for () in wanted {
            thread::sleep(BEFORE_KICK);
            let at = Instant::now();
            kicker.kick();
            if tell.send(at).is_err() {
                break;
            }
        }
    });
    let mut round = || -> Result<Option<u64>, ProbeError> {
        // The other thread ends after this one.
        let _ = go.send(());
        let came = trial.run()?;
        let began = kicked.recv().unwrap_or_else(|_| Instant::now());
        if came != Came::Kicked {
            return Err(ProbeError::Came(came));
        }
        if !trial.inject(TIMER_VECTOR as u8)? {
            return Ok(None);
        }
        match trial.run()? {
            Came::Port(layout::PIC_MASTER) => {}
            came => return Err(ProbeError::Came(came)),
        }
        let nanos = began.elapsed().as_nanos();
        Ok(Some(u64::try_from(nanos).unwrap_or(u64::MAX)))
    };
    let times: Result<Vec<u64>, ProbeError> = (0..INJECTIONS + UNREADY_MAX)
        .filter_map(|_| round().transpose())
        .take(INJECTIONS)
        .collect();
    drop(go);
    // It does not panic, and what it knew has been told.
    let _ = kicking.join();
    let mut times = times?;
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied();
    median.ok_or(ProbeError::NeverReady)
}

/// A guest that comes to its port once and then computes without end, with interrupts on.
fn spinning(ring: Ring) -> Result<BootImage, IcedError> {
    let mut asm = guest::start_after(ring, Doors::Both, |_| Ok(()))?;
    let mut round = asm.create_label();
    if ring == Ring::Zero {
        asm.sti()?;
    }
    asm.mov(edx, u32::from(NOBODYS_PORT))?;
    asm.in_(eax, dx)?;
    asm.set_label(&mut round)?;
    asm.inc(rsi)?;
    asm.jmp(round)?;
    guest::finish_with(asm, Doors::Both)
}

/// What became of counting a guest's branches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Branches {
    /// The same number each time, and the right one.
    Exact,
    /// There is a counter, and it is not exact.
    Inexact {
        /// How many branches the guest took.
        taken: u64,
        /// What was counted, each time.
        counted: Vec<u64>,
    },
    /// There is no counter.
    None {
        /// Why not.
        why: String,
    },
}

/// Counts the branches of a loop in ring 3, several times.
pub fn branches() -> Result<Branches, ProbeError> {
    let mut counted = Vec::new();
    for _ in 0..5 {
        let mut trial = computing(Ring::Three, ROUNDS)?;
        let count = match BranchCounter::new() {
            Ok(mut counter) => trial.run().map(|_| counter.count())?,
            Err(error) => Err(error),
        };
        match count {
            Ok(count) => counted.push(count),
            Err(error) => {
                let why = why_no_counter(&error);
                return Ok(Branches::None { why });
            }
        }
    }
    let taken = u64::from(ROUNDS);
    Ok(if counted.iter().all(|count| *count == taken) {
        Branches::Exact
    } else {
        Branches::Inexact { taken, counted }
    })
}

fn why_no_counter(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "not for this user: set kernel.perf_event_paranoid to 1".to_owned()
        }
        io::ErrorKind::UnexpectedEof => "the CPU has no counter left".to_owned(),
        _ => format!("perf_event_open: {error}"),
    }
}

/// Whether KVM's dirty log tells of a page that a guest has written.
pub fn dirty_log() -> Result<bool, ProbeError> {
    let runner = probe::run_logged(&guest::cpuid(Ring::Three, &[(0, 0)])?)?;
    let log = runner.machine().dirty_log()?;
    let page = RESULTS / vmm::kvm::PAGE;
    let word = log.get((page / 64) as usize).copied().unwrap_or(0);
    Ok(word >> (page % 64) & 1 == 1)
}
