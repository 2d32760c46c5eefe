//! A guest in the host, with a shell on its console: lines are typed, and what it says is heard as
//! it comes, so that nobody looks at it again and again while it is measured.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use understudy::lab::{Ended, LabError};

use crate::lab::host;
use crate::stage::{HOST, Stage};

/// How long an emulated host may take for one step of a guest. Busy machines take their time.
const PATIENCE: Duration = Duration::from_mins(5);
/// Runs a program whose standard input is a pipe with a name. It holds the pipe open for writing,
/// too: so it does not end when somebody who has written a line closes it.
const WITH_KEYBOARD: &str = r#"mkfifo "$1" && exec 3<>"$1" && shift && exec "$@" <&3"#;

/// What becomes of what happens to a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recorder {
    /// Nothing, and nothing is prepared for it.
    Off,
    /// It is recorded into a folder.
    On,
}

/// A running guest.
pub struct Guest<'a> {
    stage: &'a Stage,
    keyboard: String,
    log: String,
    /// What it has said, on its console and its VMM on standard error.
    said: String,
    heard: Receiver<Vec<u8>>,
    vmm: JoinHandle<Result<Ended, LabError>>,
    /// How much work it was given.
    given: u32,
}

impl<'a> Guest<'a> {
    /// Starts one with its Redis at this port of the host; returns when the shell is there.
    pub fn start(stage: &'a Stage, image: &str, port: u16, recorder: Recorder) -> Self {
        let keyboard = format!("/tmp/keyboard-{port}");
        let log = format!("/data/log-{port}");
        let publish = format!("0.0.0.0:{port}:6379");
        // The guest's disk belongs on the host's: there a flush takes its time.
        let mut words = vec!["env", "TMPDIR=/data", "sh", "-c", WITH_KEYBOARD, "sh"];
        words.extend([&keyboard, "understudy", "run", image, "--console"]);
        words.extend(["--publish", &publish]);
        match recorder {
            Recorder::Off => words.push("--unrecorded"),
            Recorder::On => words.extend(["--record", &log]),
        }
        let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        let lab = Arc::clone(stage.lab());
        let (ear, heard) = channel();
        let vmm = std::thread::spawn(move || {
            host(&lab, HOST).run_to(&words, &mut Ear(ear.clone()), &mut Ear(ear))
        });
        let mut guest = Self {
            stage,
            keyboard,
            log,
            said: String::new(),
            heard,
            vmm,
            given: 0,
        };
        guest.hears(|said| said.contains("# ").then_some(()));
        guest
    }

    /// The folder of its log, if it is recorded.
    pub fn log(&self) -> &str {
        &self.log
    }

    /// Types a line.
    pub fn types(&self, line: &str) {
        let write = r#"printf '%s\n' "$1" >"$2""#;
        self.stage
            .run(&["sh", "-c", write, "sh", line, &self.keyboard]);
    }

    /// Types a command and waits for its end; how long it took, in seconds of the guest's clock.
    pub fn takes(&mut self, command: &str) -> f64 {
        self.given += 1;
        let told = format!("took {}: ", self.given);
        self.types(&format!("time -f '{told}%e s' {command}"));
        // The shell echoes what is typed: that has no number there.
        self.hears(|said| {
            let after = said.split(&told).skip(1);
            after
                .filter_map(|rest| rest.split_once(" s"))
                .find_map(|(number, _)| number.parse().ok())
        })
    }

    /// Switches it off, and waits for its VMM to end.
    pub fn stop(self) {
        self.types("poweroff -f");
        let said: Vec<u8> = self.heard.into_iter().flatten().collect();
        let ended = self.vmm.join().expect("no panic").expect("it runs");
        let said = self.said + &String::from_utf8_lossy(&said);
        assert_eq!(ended, Ended::Code(0), "{said}");
    }

    /// Waits until this finds what it looks for in what the guest has said.
    fn hears<T>(&mut self, found: impl Fn(&str) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found(&self.said) {
                return found;
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.heard.recv_timeout(left) {
                Ok(bytes) => self.said += &String::from_utf8_lossy(&bytes),
                Err(why) => panic!("{why}; the guest has said: {}", self.said),
            }
        }
    }
}

/// Passes on what a program says.
struct Ear(Sender<Vec<u8>>);

impl Write for Ear {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Nobody listens any more: then nobody minds.
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
