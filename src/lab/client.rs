//! A lab as those see it who use it: commands, tests, benchmarks.

use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;

use super::exec;
use super::keeper::{self, FolderError};
use super::machine;
use super::start::{Config, Event, StartError, Starter};
use super::state::{Delay, End, HostId, LabFolder, LabStatus};
use super::wire::{
    self, CHUNK, Call, Detached, Done, FromClient, FromJob, Job, Reply, ToJob, WINDOW, WireError,
};

/// Why something cannot be done with a lab.
#[derive(Debug, Error)]
pub enum LabError {
    /// There is none.
    #[error("no lab is running in {}: start one with 'understudy lab up'", .0.display())]
    NoLab(PathBuf),
    /// There was one.
    #[error("the lab in {} has ended without 'understudy lab down'; that, or 'understudy lab up', cleans up after it", .0.display())]
    Ended(PathBuf),
    /// Its keeper cannot be reached.
    #[error("the keeper of the lab in {} cannot be reached", dir.display())]
    Unreachable {
        /// The lab's folder.
        dir: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Its keeper went.
    #[error("the keeper of the lab has gone, and the lab with it")]
    Gone,
    /// Its keeper and we do not understand each other.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Its keeper says why.
    #[error("{0}")]
    Refused(String),
    /// The host says why.
    #[error("{host}: {why}")]
    Host {
        /// Which.
        host: HostId,
        /// What it says.
        why: String,
    },
    /// It has no such host.
    #[error("there is no {0} in this lab: 'understudy lab status' shows the hosts there are")]
    NoHost(HostId),
    /// A file of this machine.
    #[error("{} cannot be {what}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What a program said cannot be passed on.
    #[error("the output of the program cannot be written")]
    Output(#[source] io::Error),
    /// What an earlier lab left cannot be cleaned up.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The lab's network cannot be entered.
    #[error("the network of the lab cannot be entered: {0}")]
    Enter(io::Error),
}

/// A running lab. One that was started here ends when this is dropped, unless it was told to stay.
pub struct Lab {
    program: PathBuf,
    folder: LabFolder,
    starter: Option<Starter>,
}

impl Lab {
    /// Starts a lab and waits until all its hosts answer.
    pub fn up(config: &Config, tell: &mut dyn FnMut(Event)) -> Result<Self, StartError> {
        let (mut starter, dir) = Starter::spawn(config)?;
        starter.ready(&dir, tell)?;
        Ok(Self {
            program: config.program.clone(),
            folder: LabFolder::new(&dir),
            starter: Some(starter),
        })
    }

    /// The lab that is running in this folder.
    pub fn find(dir: &Path) -> Result<Self, LabError> {
        let dir = std::path::absolute(dir).map_err(|source| LabError::File {
            path: dir.to_owned(),
            what: "found",
            source,
        })?;
        let lab = Self {
            program: PathBuf::from(exec::OWN_PROGRAM),
            folder: LabFolder::new(&dir),
            starter: None,
        };
        lab.connect()?;
        Ok(lab)
    }

    /// Removes what a lab that is no more has left in this folder; whether there was anything.
    pub fn clean(dir: &Path) -> Result<bool, FolderError> {
        keeper::clean(dir)
    }

    /// Lets it go on when this process has ended.
    pub fn stay(mut self) -> Result<(), LabError> {
        if let Some(starter) = self.starter.take() {
            starter.stay()?;
        }
        Ok(())
    }

    /// Ends it: processes, network, disks. When this returns, nothing is there any more.
    pub fn down(mut self) -> Result<(), LabError> {
        let keeper = self.status()?.keeper;
        let keeper = i32::try_from(keeper).ok().and_then(Pid::from_raw);
        let keeper = keeper.ok_or(LabError::Gone)?;
        // Fails only when it has ended by now.
        let handle = pidfd_open(keeper, PidfdFlags::empty()).map_err(|_| LabError::Gone)?;
        self.call(Call::Down)?;
        machine::wait_for(&handle).map_err(LabError::Enter)?;
        if let Some(starter) = self.starter.take() {
            starter.wait();
        }
        Ok(())
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        self.folder.path()
    }

    /// How it does.
    pub fn status(&self) -> Result<LabStatus, LabError> {
        match self.ask(Call::Status)? {
            Reply::Status(status) => Ok(status),
            _ => Err(LabError::Gone),
        }
    }

    /// One of its hosts.
    pub fn host(&self, id: HostId) -> Result<Host<'_>, LabError> {
        let known = self.status()?.hosts.iter().any(|host| host.name == id);
        if known {
            Ok(Host { lab: self, id })
        } else {
            Err(LabError::NoHost(id))
        }
    }

    /// Cuts the link between two ends: no frame passes, either way.
    pub fn partition(&self, a: End, b: End) -> Result<(), LabError> {
        self.call(Call::Link { a, b, cut: true })
    }

    /// Mends the link between two ends.
    pub fn heal(&self, a: End, b: End) -> Result<(), LabError> {
        self.call(Call::Link { a, b, cut: false })
    }

    /// Makes the link between two ends longer, or as short as it was, from now on.
    pub fn delay(&self, a: End, b: End, delay: Delay) -> Result<(), LabError> {
        self.call(Call::Delay { a, b, delay })
    }

    /// A program of this machine, to be run on the lab's network, where it has the address of
    /// [`End::Machine`]. It ends with the lab.
    pub fn machine<S: AsRef<str>>(&self, words: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(["lab", "run", "--dir"])
            .arg(self.dir())
            .args(["machine", "--"])
            .args(words.iter().map(AsRef::as_ref));
        command
    }

    /// Runs a program of this machine on the lab's network, with this process's own input and
    /// output; its exit code. For a process that does nothing else: it stays on that network.
    pub fn run_here(&self, words: &[String]) -> Result<u8, LabError> {
        let mut connection = self.connect()?;
        wire::write(&mut connection, &FromClient::Call(Call::Watch))?;
        machine::run(&connection, words).map_err(LabError::Enter)
    }

    fn connect(&self) -> Result<UnixStream, LabError> {
        let dir = self.dir().to_owned();
        UnixStream::connect(self.folder.socket()).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                if self.folder.kept().exists() {
                    LabError::Ended(dir)
                } else {
                    LabError::NoLab(dir)
                }
            }
            _ => LabError::Unreachable { dir, source },
        })
    }

    fn ask(&self, call: Call) -> Result<Reply, LabError> {
        let mut connection = self.connect()?;
        wire::write(&mut connection, &FromClient::Call(call))?;
        match wire::read(&mut connection)?.ok_or(LabError::Gone)? {
            Reply::Refused(why) => Err(LabError::Refused(why)),
            reply => Ok(reply),
        }
    }

    fn call(&self, call: Call) -> Result<(), LabError> {
        self.ask(call).map(drop)
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Ended {
    /// The exit code, as shells have it: 128 and more for signals.
    pub fn code(self) -> u8 {
        let code = match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        };
        u8::try_from(code).unwrap_or(u8::MAX)
    }
}

/// What a program said.
#[derive(Clone, Debug)]
pub struct Output {
    /// How it ended.
    pub ended: Ended,
    /// On standard output.
    pub stdout: Vec<u8>,
    /// On standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether its exit code was 0.
    pub fn success(&self) -> bool {
        self.ended == Ended::Code(0)
    }

    /// What it said, both streams, for those who read it.
    pub fn text(&self) -> String {
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        text(&self.stdout) + &text(&self.stderr)
    }
}

/// A host of a lab.
pub struct Host<'a> {
    lab: &'a Lab,
    id: HostId,
}

impl Host<'_> {
    /// Which one.
    pub fn id(&self) -> HostId {
        self.id
    }

    /// Cuts its power: what it had not written to its disk is lost.
    pub fn kill(&self) -> Result<(), LabError> {
        self.lab.call(Call::Kill(self.id))
    }

    /// Powers it on and waits until it answers.
    pub fn start(&self) -> Result<(), LabError> {
        self.lab.call(Call::Start(self.id))
    }

    /// Runs a program in it to its end, and gives what it said.
    pub fn run<S: AsRef<str>>(&self, words: &[S]) -> Result<Output, LabError> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let ended = self.run_to(words, &mut stdout, &mut stderr)?;
        Ok(Output {
            ended,
            stdout,
            stderr,
        })
    }

    /// Runs a program in it to its end, and passes on what it says as it says it.
    pub fn run_to<S: AsRef<str>>(
        &self,
        words: &[S],
        out: &mut dyn Write,
        err: &mut dyn Write,
    ) -> Result<Ended, LabError> {
        let mut job = self.job(Job::Run(owned(words)))?;
        loop {
            match job.next()? {
                FromJob::Out(bytes) => job.pass_on(&bytes, out).map_err(LabError::Output)?,
                FromJob::Err(bytes) => job.pass_on(&bytes, err).map_err(LabError::Output)?,
                FromJob::Took(_) => {}
                FromJob::Done(done) => match self.done(done)? {
                    Done::Exited(code) => return Ok(Ended::Code(code)),
                    Done::Signalled(signal) => return Ok(Ended::Signal(signal)),
                    _ => return Err(LabError::Gone),
                },
            }
        }
    }

    /// Starts a program in it that goes on by itself.
    pub fn detach<S: AsRef<str>>(&self, words: &[S]) -> Result<Detached, LabError> {
        let mut job = self.job(Job::Detach(owned(words)))?;
        loop {
            if let FromJob::Done(done) = job.next()? {
                return match self.done(done)? {
                    Done::Detached(detached) => Ok(detached),
                    _ => Err(LabError::Gone),
                };
            }
        }
    }

    /// Copies a file of this machine into it, permissions included.
    pub fn put(&self, file: &Path, path: &Path) -> Result<(), LabError> {
        let unread = |source| LabError::File {
            path: file.to_owned(),
            what: "read",
            source,
        };
        let mut from = File::open(file).map_err(unread)?;
        let metadata = from.metadata().map_err(unread)?;
        let mut job = self.job(Job::Put {
            path: path.to_owned(),
            mode: metadata.permissions().mode() & 0o7777,
        })?;
        let mut chunk = vec![0; CHUNK];
        let (mut on_the_way, mut whole) = (0, false);
        loop {
            if !whole && on_the_way + CHUNK <= WINDOW {
                let length = from.read(&mut chunk).map_err(unread)?;
                whole = length == 0;
                on_the_way += length;
                job.say(if whole {
                    ToJob::End
                } else {
                    ToJob::Data(Bytes::copy_from_slice(&chunk[..length]))
                })?;
                continue;
            }
            match job.next()? {
                FromJob::Took(bytes) => on_the_way = on_the_way.saturating_sub(bytes as usize),
                FromJob::Done(done) => return self.done(done).map(drop),
                FromJob::Out(_) | FromJob::Err(_) => {}
            }
        }
    }

    /// Copies a file of it to this machine, permissions included.
    pub fn get(&self, path: &Path, file: &Path) -> Result<(), LabError> {
        let unwritten = |source| LabError::File {
            path: file.to_owned(),
            what: "written",
            source,
        };
        let mut job = self.job(Job::Get {
            path: path.to_owned(),
        })?;
        // Only once the host has said that there is something.
        let mut to = None;
        loop {
            match job.next()? {
                FromJob::Out(bytes) => {
                    let to = match &mut to {
                        Some(to) => to,
                        None => to.insert(File::create(file).map_err(unwritten)?),
                    };
                    job.pass_on(&bytes, to).map_err(unwritten)?;
                }
                FromJob::Done(done) => {
                    if let Done::Got { mode } = self.done(done)? {
                        let to = match to {
                            Some(to) => to,
                            None => File::create(file).map_err(unwritten)?,
                        };
                        let mode = fs::Permissions::from_mode(mode);
                        to.set_permissions(mode).map_err(unwritten)?;
                    }
                    return Ok(());
                }
                FromJob::Took(_) | FromJob::Err(_) => {}
            }
        }
    }

    fn job(&self, job: Job) -> Result<RunningJob, LabError> {
        let mut connection = self.lab.connect()?;
        let call = Call::Job(self.id, job);
        wire::write(&mut connection, &FromClient::Call(call))?;
        Ok(RunningJob(connection))
    }

    fn done(&self, done: Result<Done, String>) -> Result<Done, LabError> {
        done.map_err(|why| LabError::Host { host: self.id, why })
    }
}

fn owned<S: AsRef<str>>(words: &[S]) -> Vec<String> {
    words.iter().map(|word| word.as_ref().to_owned()).collect()
}

/// A job in a host; dropping it ends the job.
struct RunningJob(UnixStream);

impl RunningJob {
    fn next(&mut self) -> Result<FromJob, LabError> {
        match wire::read(&mut self.0)?.ok_or(LabError::Gone)? {
            Reply::Job(event) => Ok(event),
            Reply::Refused(why) => Err(LabError::Refused(why)),
            Reply::Done | Reply::Status(_) => Err(LabError::Gone),
        }
    }

    fn say(&mut self, what: ToJob) -> Result<(), LabError> {
        match wire::write(&mut self.0, &FromClient::Job(what)) {
            // It has ended, and its last word says why.
            Err(WireError::Io(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            told => Ok(told?),
        }
    }

    /// Writes what came, and makes room for more.
    fn pass_on(&mut self, bytes: &Bytes, to: &mut (impl Write + ?Sized)) -> io::Result<()> {
        to.write_all(bytes)?;
        to.flush()?;
        let took = ToJob::Took(bytes.len() as u32);
        self.say(took).map_err(io::Error::other)
    }
}
