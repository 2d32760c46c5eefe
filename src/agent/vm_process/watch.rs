//! Whether a VMM process has stopped answering. Pure: no I/O and no clock.
//!
//! It is asked twice a second. Only the time in which its agent was awake counts, and of that not
//! what the vCPU's thread had to wait for a processor: on a busy machine it answers late and is well.
//!
//! ```text
//!   any word ────────────────────────────► well
//!   no word for SILENT ──────────────────► failed (START before the first)
//!   Busy, and no Pong since, for DISK ───► failed (START before the machine is ready)
//! ```

use super::ipc::FromVm;
use crate::protocol::{Span, Time};

/// How often a process is asked.
const ASK: Span = Span::from_millis(500);
/// A process that has said nothing for so long hangs.
pub const SILENT: Span = Span::from_millis(2_000);
/// So long its disk may do nothing of what it was asked.
const DISK: Span = Span::from_millis(10_000);
/// So long it may take until the machine is ready: its program is read, its memory taken.
const START: Span = Span::from_millis(60_000);
/// More than this between two looks at it, the agent was not awake.
const AWAKE: Span = Span::from_millis(250);
/// How often it is looked at, at the least.
const LOOK: Span = Span::from_millis(200);

/// Watches over one VMM process.
#[derive(Debug)]
pub struct Watch {
    looked: Time,
    asked: Span,
    silent: Span,
    /// How long its disk has done nothing, or its machine is being built.
    busy: Option<Span>,
    /// It has said something since it was started.
    spoke: bool,
    /// Its machine is ready.
    ready: bool,
}

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Well,
    /// Ask it for a sign of life. `kick`: it has been silent.
    Ask {
        /// Whether the vCPU has to be taken out of the guest for that.
        kick: bool,
    },
    /// It has failed: a sentence that says how.
    Failed(String),
}

impl Watch {
    /// Of a process that was started just now.
    pub const fn new(now: Time) -> Self {
        Self {
            looked: now,
            asked: Span::ZERO,
            silent: Span::ZERO,
            busy: None,
            spoke: false,
            ready: false,
        }
    }

    /// It has said something.
    pub const fn heard(&mut self, said: &FromVm) {
        self.spoke = true;
        self.silent = Span::ZERO;
        match said {
            FromVm::Busy if self.busy.is_none() => self.busy = Some(Span::ZERO),
            FromVm::Pong => self.busy = None,
            FromVm::Ready => {
                self.ready = true;
                self.busy = None;
            }
            _ => {}
        }
    }

    /// When to look at the latest.
    pub fn poll_timeout(&self) -> Time {
        self.looked.plus(LOOK)
    }

    /// Looks at it, after everything was heard that has come. `starved` says whether its vCPU's
    /// thread wanted a processor since it was last called and had none; it is called when it matters.
    pub fn look(&mut self, now: Time, starved: impl FnOnce() -> bool) -> Verdict {
        if now < self.poll_timeout() {
            return Verdict::Well;
        }
        let step = now.since(self.looked).min(AWAKE);
        self.looked = now;
        self.asked = self.asked.plus(step);
        let matters = self.silent >= ASK || self.busy.is_some();
        if !(matters && starved()) {
            self.silent = self.silent.plus(step);
            self.busy = self.busy.map(|busy| busy.plus(step));
        }
        let silent = if self.spoke { SILENT } else { START };
        if self.silent >= silent {
            let seconds = self.silent.as_millis() / 1_000;
            return Verdict::Failed(format!(
                "the VMM process has not answered for {seconds} s: it was stopped, or the host \
                 does not let it go on"
            ));
        }
        let (patience, what) = if self.ready {
            (DISK, "has waited for its disk")
        } else {
            (START, "has not built its machine")
        };
        if let Some(busy) = self.busy.filter(|busy| *busy >= patience) {
            let seconds = busy.as_millis() / 1_000;
            return Verdict::Failed(format!(
                "the VMM process {what} for {seconds} s: see to this host's disks"
            ));
        }
        if self.asked >= ASK {
            self.asked = Span::ZERO;
            let kick = self.silent >= ASK;
            return Verdict::Ask { kick };
        }
        Verdict::Well
    }
}

/// Tells a thread that wants a processor and has none from one that hangs, by what the kernel says of
/// it (`/proc`, which waits for no disk).
#[derive(Debug, Default)]
pub struct Starved {
    /// How long the thread had executed when it was last asked for, in nanoseconds.
    executed: Option<u64>,
}

impl Starved {
    /// Whether the first thread of this process, which is the vCPU's, has been waiting for a
    /// processor since this was last called, all the time.
    pub fn look(&mut self, pid: u32) -> bool {
        let proc = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let executed = proc("schedstat").and_then(|text| executed(&text));
        let wants = proc("stat").is_some_and(|text| wants_processor(&text));
        let before = std::mem::replace(&mut self.executed, executed);
        wants && executed.is_some() && before == executed
    }
}

/// Nanoseconds (proc(5), schedstat).
fn executed(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

/// Its state is "running or runnable" (proc_pid_stat(5), field 3). The name before it may contain
/// anything.
fn wants_processor(stat: &str) -> bool {
    let after = stat.rsplit(')').next().unwrap_or_default();
    after.split_whitespace().next() == Some("R")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Clock(u64);

    impl Clock {
        /// Looks every 200 ms for so many milliseconds; says how often it was asked, and with how
        /// many kicks, or how it failed.
        fn run(
            &mut self,
            watch: &mut Watch,
            millis: u64,
            starved: bool,
        ) -> Result<(u32, u32), String> {
            let (mut asked, mut kicks) = (0, 0);
            for _ in 0..millis / 200 {
                self.0 += 200;
                match watch.look(at(self.0), || starved) {
                    Verdict::Well => {}
                    Verdict::Ask { kick } => {
                        asked += 1;
                        kicks += u32::from(kick);
                    }
                    Verdict::Failed(why) => return Err(why),
                }
            }
            Ok((asked, kicks))
        }
    }

    const fn at(millis: u64) -> Time {
        Time::from_nanos(millis * 1_000_000)
    }

    fn ready() -> (Watch, Clock) {
        let mut watch = Watch::new(at(0));
        watch.heard(&FromVm::Ready);
        (watch, Clock(0))
    }

    #[test]
    fn a_process_that_is_silent_is_asked_and_fails() {
        let (mut watch, mut clock) = ready();
        let (asked, kicks) = clock.run(&mut watch, 1_800, false).expect("in time");
        assert_eq!((asked, kicks), (3, 3), "it may answer yet");
        watch.heard(&FromVm::Pong);
        clock
            .run(&mut watch, 1_800, false)
            .expect("it has answered");
        let why = clock.run(&mut watch, 200, false).expect_err("too long");
        assert!(why.contains("has not answered for 2 s"), "{why}");
    }

    #[test]
    fn one_that_speaks_by_itself_is_not_kicked() {
        let (mut watch, mut clock) = ready();
        for _ in 0..20 {
            let (_, kicks) = clock.run(&mut watch, 400, false).expect("it speaks");
            assert_eq!(kicks, 0);
            watch.heard(&FromVm::Deferred { longest: 1 });
        }
    }

    #[test]
    fn neither_a_busy_machine_nor_a_sleeping_agent_is_a_failure() {
        let (mut watch, mut clock) = ready();
        clock.run(&mut watch, 1_800, false).expect("in time");
        clock
            .run(&mut watch, 60_000, true)
            .expect("it has had no processor");
        watch.heard(&FromVm::Pong);
        clock.0 += 60_000;
        let looked = watch.look(at(clock.0), || false);
        assert!(!matches!(looked, Verdict::Failed(_)), "{looked:?}");
    }

    #[test]
    fn a_disk_may_take_longer_and_not_for_ever() {
        let (mut watch, mut clock) = ready();
        let mut busy = |watch: &mut Watch, millis| {
            for _ in 0..millis / 400 {
                clock.run(watch, 400, false)?;
                watch.heard(&FromVm::Busy);
                // Whatever else it says, its disk does nothing.
                watch.heard(&FromVm::Deferred { longest: 1 });
            }
            Ok::<_, String>(())
        };
        busy(&mut watch, 9_600).expect("in time");
        watch.heard(&FromVm::Pong);
        busy(&mut watch, 9_600).expect("it has gone on");
        let why = busy(&mut watch, 1_200).expect_err("too long");
        assert!(why.contains("has waited for its disk for 10 s"), "{why}");
    }

    #[test]
    fn a_start_may_take_long() {
        let mut watch = Watch::new(at(0));
        let mut clock = Clock(0);
        clock.run(&mut watch, 50_000, false).expect("it is read");
        for _ in 0..50 {
            watch.heard(&FromVm::Busy);
            clock.run(&mut watch, 1_000, false).expect("it is built");
        }
        watch.heard(&FromVm::Ready);
        clock.run(&mut watch, 1_800, false).expect("it is ready");
        clock.run(&mut watch, 400, false).expect_err("and hangs");
    }

    #[test]
    fn the_kernel_says_who_waits_for_a_processor() {
        assert_eq!(executed("73369 49874 2\n"), Some(73_369));
        assert!(wants_processor("7 (a) b) R 1 7 7"));
        assert!(!wants_processor("7 (R) T 1 7 7"));
        // This process executes while it asks.
        let mut starved = Starved::default();
        assert!(!starved.look(std::process::id()));
        assert!(!starved.look(u32::MAX), "there is none");
    }
}
