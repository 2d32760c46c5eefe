//! The agent inside a host: takes jobs over the serial port that the keeper holds, and does them.
//!
//! The port is read and written by a thread each, as serial ports block; jobs are tasks.

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::timeout;

use super::wire::{
    self, CHUNK, Detached, Done, FromHost, FromJob, Job, PORT, PROTOCOL, ToHost, ToJob, WINDOW,
    WireError,
};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "lab-host";
/// Where the kernel lists the ports.
const PORTS: &str = "/sys/class/virtio-ports";
/// Where programs are.
const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";
/// How long a program may take to end by itself once nobody waits for it any more.
const PATIENCE: Duration = Duration::from_secs(5);
/// Messages from the keeper that may wait for the tasks.
const WAITING: usize = 64;

/// Why the agent of a host ends.
#[derive(Debug, Error)]
pub enum HostError {
    /// It is not inside a host.
    #[error(
        "there is no serial port '{PORT}': this is started by the init of a lab's host, not by hand"
    )]
    NoPort,
    /// The port.
    #[error("the serial port cannot be used")]
    Port(#[source] io::Error),
    /// The keeper.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Does what the keeper asks for until the port fails.
pub async fn serve() -> Result<(), HostError> {
    let port = File::options()
        .read(true)
        .write(true)
        .open(find_port()?)
        .map_err(HostError::Port)?;
    let (said, mut incoming) = mpsc::channel(WAITING);
    let (out, outgoing) = mpsc::unbounded_channel();
    let reading = port.try_clone().map_err(HostError::Port)?;
    let writer = task::spawn_blocking(move || write_all(port, outgoing));
    // The port reads as ended until the keeper's end of it is known, and takes nothing until then.
    // So the first message goes out before anything is read.
    let hello = FromHost::Hello { protocol: PROTOCOL };
    let (written, first) = tokio::sync::oneshot::channel();
    let _ = out.send((hello, Some(written)));
    let _ = first.await;
    let reader = task::spawn_blocking(move || read_all(reading, &said));
    let mut jobs = Jobs::new(out);
    while let Some(message) = incoming.recv().await {
        jobs.take(message);
    }
    let failed = reader.await.unwrap_or(Ok(()));
    drop(jobs);
    writer.abort();
    failed.map_err(HostError::Wire)
}

type Outgoing = (FromHost, Option<tokio::sync::oneshot::Sender<()>>);
type Out = mpsc::UnboundedSender<Outgoing>;

fn find_port() -> Result<PathBuf, HostError> {
    let ports = fs::read_dir(PORTS).map_err(|_| HostError::NoPort)?;
    let named = |entry: &fs::DirEntry| {
        fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT)
    };
    let port = ports.filter_map(Result::ok).find(named);
    let port = port.ok_or(HostError::NoPort)?;
    Ok(Path::new("/dev").join(port.file_name()))
}

fn read_all(mut port: File, said: &mpsc::Sender<ToHost>) -> Result<(), WireError> {
    while let Some(message) = wire::read(&mut port)? {
        if said.blocking_send(message).is_err() {
            break;
        }
    }
    Ok(())
}

fn write_all(mut port: File, mut outgoing: mpsc::UnboundedReceiver<Outgoing>) {
    while let Some((message, written)) = outgoing.blocking_recv() {
        if let Err(error) = wire::write(&mut port, &message) {
            eprintln!("understudy lab-host: {error}");
            return;
        }
        if let Some(written) = written {
            let _ = written.send(());
        }
    }
}

/// The jobs that run.
struct Jobs {
    out: Out,
    running: BTreeMap<u32, Running>,
    detached: u32,
}

struct Running {
    said: mpsc::UnboundedSender<ToJob>,
    window: Arc<Semaphore>,
    cancel: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Jobs {
    fn new(out: Out) -> Self {
        Self {
            out,
            running: BTreeMap::new(),
            detached: 0,
        }
    }

    fn take(&mut self, message: ToHost) {
        match message {
            ToHost::Start(id, job) => self.start(id, job),
            ToHost::Job(id, ToJob::Took(bytes)) => {
                if let Some(job) = self.running.get(&id) {
                    let room = WINDOW.saturating_sub(job.window.available_permits());
                    job.window.add_permits(room.min(bytes as usize));
                }
            }
            ToHost::Job(id, message) => {
                if let Some(job) = self.running.get(&id) {
                    // A job that has ended takes nothing more.
                    let _ = job.said.send(message);
                }
            }
            ToHost::Cancel(id) => {
                if let Some(job) = self.running.get(&id) {
                    job.cancel.send_replace(true);
                }
            }
        }
    }

    fn start(&mut self, id: u32, job: Job) {
        self.running.retain(|_, job| !job.task.is_finished());
        self.detached += 1;
        let detached = self.detached;
        let (said, inbox) = mpsc::unbounded_channel();
        let (cancel, cancelled) = watch::channel(false);
        let window = Arc::new(Semaphore::new(WINDOW));
        let to_client = ToClient {
            id,
            out: self.out.clone(),
            window: Arc::clone(&window),
        };
        let task = tokio::spawn(async move {
            let done = perform(job, detached, inbox, cancelled, &to_client).await;
            to_client.say(FromJob::Done(done.map_err(|error| error.to_string())));
        });
        let running = Running {
            said,
            window,
            cancel,
            task,
        };
        self.running.insert(id, running);
    }
}

/// The way from a job to the client that started it.
#[derive(Clone)]
struct ToClient {
    id: u32,
    out: Out,
    window: Arc<Semaphore>,
}

impl ToClient {
    fn say(&self, what: FromJob) {
        // Fails only when the port has failed, and then everything ends.
        let _ = self.out.send((FromHost::Job(self.id, what), None));
    }

    /// Says data when there is room for it.
    async fn data(&self, bytes: &[u8], kind: fn(Bytes) -> FromJob) {
        if let Ok(room) = self.window.acquire_many(bytes.len() as u32).await {
            room.forget();
            self.say(kind(Bytes::copy_from_slice(bytes)));
        }
    }
}

/// Why a job could not be done.
#[derive(Debug, Error)]
enum JobError {
    #[error("no program was named")]
    NoProgram,
    #[error("{program} cannot be started: {source}")]
    Start { program: String, source: io::Error },
    #[error("{} cannot be {what}: {source}", path.display())]
    File {
        path: PathBuf,
        what: &'static str,
        source: io::Error,
    },
    #[error("{} is a folder: name the file in it", .0.display())]
    IsFolder(PathBuf),
    #[error("the sender went before all of {} had come", .0.display())]
    Torn(PathBuf),
    #[error("the program's end cannot be awaited: {0}")]
    Wait(io::Error),
}

fn file_error(path: &Path, what: &'static str) -> impl FnOnce(io::Error) -> JobError {
    move |source| JobError::File {
        path: path.to_owned(),
        what,
        source,
    }
}

async fn perform(
    job: Job,
    number: u32,
    inbox: mpsc::UnboundedReceiver<ToJob>,
    cancelled: watch::Receiver<bool>,
    to_client: &ToClient,
) -> Result<Done, JobError> {
    match job {
        Job::Run(words) => run(&words, cancelled, to_client).await,
        Job::Detach(words) => detach(&words, number),
        Job::Put { path, mode } => put(&path, mode, inbox, cancelled, to_client).await,
        Job::Get { path } => get(&path, cancelled, to_client).await,
    }
}

/// Waits until a flag is raised; nobody raises it any more when its owner is gone.
async fn raised(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|raised| *raised).await;
}

fn program(words: &[String]) -> Result<Command, JobError> {
    let (program, arguments) = words.split_first().ok_or(JobError::NoProgram)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", PATH)
        .env("HOME", "/root")
        .stdin(Stdio::null())
        // A group of its own, so that what it starts can be told to end with it.
        .process_group(0);
    Ok(command)
}

fn started(words: &[String], mut command: Command) -> Result<Child, JobError> {
    command.spawn().map_err(|source| JobError::Start {
        program: words.first().cloned().unwrap_or_default(),
        source,
    })
}

fn detach(words: &[String], number: u32) -> Result<Done, JobError> {
    let output = PathBuf::from(format!("/tmp/detached-{number}.log"));
    let file = File::create(&output).map_err(file_error(&output, "written"))?;
    let both = file.try_clone().map_err(file_error(&output, "written"))?;
    let mut command = program(words)?;
    command.stdout(file).stderr(both);
    let mut child = started(words, command)?;
    let pid = child.id().unwrap_or_default();
    // So that no corpse stays. Tokio takes care of children that are dropped only when its driver wakes
    // for something else: here that was minutes later.
    tokio::spawn(async move { child.wait().await });
    Ok(Done::Detached(Detached { pid, output }))
}

async fn run(
    words: &[String],
    mut cancelled: watch::Receiver<bool>,
    to_client: &ToClient,
) -> Result<Done, JobError> {
    let mut command = program(words)?;
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = started(words, command)?;
    let (ended, end) = watch::channel(false);
    let out = child
        .stdout
        .take()
        .map(|pipe| tokio::spawn(pump(pipe, to_client.clone(), FromJob::Out, end.clone())));
    let err = child
        .stderr
        .take()
        .map(|pipe| tokio::spawn(pump(pipe, to_client.clone(), FromJob::Err, end)));
    let status = tokio::select! {
        status = child.wait() => status,
        () = raised(&mut cancelled) => {
            let status = end_group(&mut child).await;
            // Nobody takes what it said last.
            to_client.window.close();
            status
        }
    };
    ended.send_replace(true);
    for pump in [out, err].into_iter().flatten() {
        tokio::select! {
            _ = pump => {}
            () = raised(&mut cancelled) => break,
        }
    }
    status.map(how_it_ended).map_err(JobError::Wait)
}

fn how_it_ended(status: ExitStatus) -> Done {
    match (status.code(), status.signal()) {
        (Some(code), _) => Done::Exited(code),
        (None, signal) => Done::Signalled(signal.unwrap_or_default()),
    }
}

/// Asks a program and what it has started to end, and then does not ask any more.
async fn end_group(child: &mut Child) -> io::Result<ExitStatus> {
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let signal = |signal| {
        if let Some(group) = group {
            // Fails only when all have ended.
            let _ = killpg(Pid::from_raw(group), signal);
        }
    };
    signal(Signal::SIGTERM);
    if let Ok(status) = timeout(PATIENCE, child.wait()).await {
        return status;
    }
    signal(Signal::SIGKILL);
    child.wait().await
}

/// Says what comes out of a pipe until the program has ended; then what is still in it, and no
/// more: others that it has started may hold the pipe for ever.
async fn pump<P>(
    mut pipe: P,
    to_client: ToClient,
    kind: fn(Bytes) -> FromJob,
    mut ended: watch::Receiver<bool>,
) where
    P: AsyncRead + Unpin + IntoFile,
{
    let mut chunk = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            read = pipe.read(&mut chunk) => read,
            () = raised(&mut ended) => break,
        };
        match read {
            Ok(0) | Err(_) => return,
            Ok(length) => to_client.data(&chunk[..length], kind).await,
        }
    }
    let Ok(mut rest) = pipe.into_file() else {
        return;
    };
    // It does not block: an error says that nothing is there.
    while let Ok(length @ 1..) = rest.read(&mut chunk) {
        to_client.data(&chunk[..length], kind).await;
    }
}

/// A pipe that can be read without the runtime.
trait IntoFile {
    fn into_file(self) -> io::Result<File>;
}

impl IntoFile for tokio::process::ChildStdout {
    fn into_file(self) -> io::Result<File> {
        self.into_owned_fd().map(File::from)
    }
}

impl IntoFile for tokio::process::ChildStderr {
    fn into_file(self) -> io::Result<File> {
        self.into_owned_fd().map(File::from)
    }
}

async fn put(
    path: &Path,
    mode: u32,
    mut inbox: mpsc::UnboundedReceiver<ToJob>,
    mut cancelled: watch::Receiver<bool>,
    to_client: &ToClient,
) -> Result<Done, JobError> {
    if path.is_dir() {
        return Err(JobError::IsFolder(path.to_owned()));
    }
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(file_error(folder, "made"))?;
    }
    // Written beside it and renamed, so that a program that runs can be replaced.
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = PathBuf::from(beside);
    let file = File::create(&beside).map_err(file_error(path, "written"))?;
    let written = async {
        let mut at = 0;
        while let Some(message) = inbox.recv().await {
            match message {
                ToJob::Data(bytes) => {
                    file.write_all_at(&bytes, at)?;
                    at += bytes.len() as u64;
                    to_client.say(FromJob::Took(bytes.len() as u32));
                }
                ToJob::End => return Ok(true),
                ToJob::Took(_) => {}
            }
        }
        Ok(false)
    };
    let whole = tokio::select! {
        whole = written => whole.map_err(file_error(path, "written")),
        () = raised(&mut cancelled) => Ok(false),
    };
    let kept = whole.and_then(|whole| {
        if !whole {
            return Err(JobError::Torn(path.to_owned()));
        }
        file.set_permissions(Permissions::from_mode(mode))
            .and_then(|()| fs::rename(&beside, path))
            .map_err(file_error(path, "written"))
    });
    if kept.is_err() {
        // There may be none.
        let _ = fs::remove_file(&beside);
    }
    kept.map(|()| Done::Put)
}

async fn get(
    path: &Path,
    mut cancelled: watch::Receiver<bool>,
    to_client: &ToClient,
) -> Result<Done, JobError> {
    if path.is_dir() {
        return Err(JobError::IsFolder(path.to_owned()));
    }
    let mut file = File::open(path).map_err(file_error(path, "read"))?;
    let metadata = file.metadata().map_err(file_error(path, "read"))?;
    let sent = async {
        let mut chunk = vec![0; CHUNK];
        loop {
            match file.read(&mut chunk)? {
                0 => return Ok(()),
                length => to_client.data(&chunk[..length], FromJob::Out).await,
            }
        }
    };
    tokio::select! {
        sent = sent => sent.map_err(file_error(path, "read"))?,
        () = raised(&mut cancelled) => {}
    }
    Ok(Done::Got {
        mode: metadata.permissions().mode() & 0o7777,
    })
}
