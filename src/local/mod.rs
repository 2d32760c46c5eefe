//! A guest on this host alone: one VMM process, a gateway in this process, and, if wanted, a
//! recording. What `understudy run` does, and what benchmarks compare with.

mod recording;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, Header, Term};
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;
use tokio::sync::mpsc;
use vmm::host::{Output, OutputKind};
use vmm::tape::Ending;

use crate::agent::vm_process::{
    DiskSetup, FromVm, IpcError, SpawnError, Spawned, Start, StartAs, ToVm, VmProcess, begin_with,
};
use crate::gateway::stack::StackConfig;
use crate::gateway::{Gateway, GatewayConfig, GatewayError, LocalGateway, Publish};
use crate::images::{FillError, Image};
use recording::Recording;
pub use recording::{Recorded, RecordingError};

/// Frames that may wait between the gateway and the machine.
const FRAMES_WAITING: usize = 256;
/// A guest that computes without an exit is not waited for longer when its recording ends.
const LAST_LANDMARK: Duration = Duration::from_secs(1);

/// What becomes of a guest's log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Log {
    /// It is kept in this folder.
    Kept(PathBuf),
    /// It is written and kept nowhere.
    Dropped,
    /// It is not written. Only to measure what it costs.
    Unwritten,
    /// There cannot be one: the guest is given what arrives wherever it is, not at landmarks only.
    Impossible,
}

/// What is to be run.
pub struct LocalRun {
    /// The image.
    pub image: Image,
    /// Its log.
    pub log: Log,
    /// Which ports are published.
    pub publish: Vec<Publish>,
    /// The program that is a VMM process; `None`: this program itself.
    pub vmm_binary: Option<PathBuf>,
}

/// Why a guest could not be run on this host alone.
#[derive(Debug, Error)]
pub enum LocalError {
    /// The recording.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// The VMM process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The VMM process talks nonsense, or is gone.
    #[error(transparent)]
    Ipc(#[from] IpcError),
    /// The VMM process failed.
    #[error("{reason}")]
    Failed {
        /// Its own words.
        reason: String,
    },
    /// The VMM process is gone.
    #[error("the VMM process ended without a word: see the kernel's log for what killed it")]
    Gone,
    /// The gateway.
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    /// Ports are published and the image has no network.
    #[error("the image {image} has no network device, so none of its ports can be published")]
    NoNetwork {
        /// The image.
        image: String,
    },
    /// What a disk holds.
    #[error(transparent)]
    Fill(#[from] FillError),
    /// A folder for its disks.
    #[error("no temporary folder for the guest's disks: {0}")]
    Temporary(#[source] std::io::Error),
    /// No entropy.
    #[error("the kernel gives no random bytes")]
    NoRandom,
}

/// What the VMM process has said, as far as it matters to whoever listens.
enum Said {
    Ended(Ending),
    Paused,
    Other,
}

/// A running guest.
pub struct LocalMachine {
    process: VmProcess,
    recording: Option<Recording>,
    to_gateway: Option<mpsc::Sender<(FrameNumber, Bytes)>>,
    from_gateway: mpsc::Receiver<(FrameSource, Bytes)>,
    /// Where clients can connect, in the order of [`LocalRun::publish`].
    pub addresses: Vec<SocketAddr>,
    gateway: Option<tokio::task::JoinHandle<Result<(), GatewayError>>>,
    /// The longest that something which arrived has waited for the guest.
    pub longest_deferral: Duration,
    /// It has ended, or failed: nothing more is heard of it.
    over: bool,
    /// Removed when the guest has ended.
    _disks: tempfile::TempDir,
}

impl LocalMachine {
    /// Starts a guest. Call it on a thread that lives as long as the guest.
    pub async fn start(run: LocalRun) -> Result<Self, LocalError> {
        let (recording, start_as) = match &run.log {
            Log::Kept(folder) => (Some(Recording::begin(folder)?), StartAs::Recorded),
            Log::Dropped => (None, StartAs::Recorded),
            Log::Unwritten => (None, StartAs::Unrecorded),
            Log::Impossible => (None, StartAs::Unprotected),
        };
        let disks = tempfile::Builder::new()
            .prefix("understudy-disks-")
            .tempdir()
            .map_err(LocalError::Temporary)?;
        let header = header_of(&run.image, disks.path())?;
        let gateway = gateway_of(&run).await?;
        let start = Start {
            image: run.image.boot(),
            disks: setups(disks.path(), header.disks.len()),
            header,
            start_as,
        };
        let spawned = Spawned::new(run.vmm_binary.as_deref(), begin_with(start)?)?;
        let process = VmProcess::begin(spawned)?;
        let (to_vmm, from_gateway) = mpsc::channel(FRAMES_WAITING);
        let (to_gateway, from_vmm) = mpsc::channel(FRAMES_WAITING);
        let addresses = gateway.as_ref().map(Gateway::addresses).unwrap_or_default();
        let task =
            gateway.map(|gateway| tokio::spawn(LocalGateway::new(gateway, to_vmm, from_vmm).run()));
        Ok(Self {
            process,
            recording,
            to_gateway: task.is_some().then_some(to_gateway),
            from_gateway,
            addresses,
            gateway: task,
            longest_deferral: Duration::ZERO,
            over: false,
            _disks: disks,
        })
    }

    /// The VMM process's id.
    pub fn pid(&self) -> Option<u32> {
        self.process.id()
    }

    /// Serves the guest until it ends by its own doing. `console` gets what it says, `typed` is asked
    /// for what is typed next.
    pub async fn serve(
        &mut self,
        mut console: impl FnMut(&[u8]),
        mut typed: impl AsyncFnMut() -> Bytes,
    ) -> Result<Ending, LocalError> {
        let served = self.attend(&mut console, &mut typed).await;
        self.over = true;
        served
    }

    async fn attend(
        &mut self,
        console: &mut impl FnMut(&[u8]),
        typed: &mut impl AsyncFnMut() -> Bytes,
    ) -> Result<Ending, LocalError> {
        loop {
            tokio::select! {
                said = self.process.recv() => {
                    let said = said?.ok_or(LocalError::Gone)?;
                    if let Said::Ended(end) = self.hear(said, console).await? {
                        return Ok(end);
                    }
                }
                Some(frame) = self.from_gateway.recv() => self.let_in(frame)?,
                bytes = typed() => self.type_console(bytes)?,
                ended = Self::gateway_ended(&mut self.gateway) => {
                    self.gateway = None;
                    ended?;
                }
            }
        }
    }

    async fn hear(
        &mut self,
        said: FromVm,
        console: &mut impl FnMut(&[u8]),
    ) -> Result<Said, LocalError> {
        match said {
            FromVm::Ended(end) => return Ok(Said::Ended(end)),
            FromVm::Paused { .. } => return Ok(Said::Paused),
            FromVm::Failed { reason, .. } => return Err(LocalError::Failed { reason }),
            FromVm::Shipped { batch, .. } => self.keep(batch)?,
            FromVm::Deferred { longest } => self.longest_deferral = Duration::from_nanos(longest),
            FromVm::Output(output) => self.let_out(output, console).await,
            _ => {}
        }
        Ok(Said::Other)
    }

    /// Types on the guest's console.
    pub fn type_console(&self, bytes: Bytes) -> Result<(), LocalError> {
        self.process.sender().send(&ToVm::Console(bytes))?;
        Ok(self.process.sender().flush()?)
    }

    /// Gives the guest a frame, and those that are there already with it.
    fn let_in(&mut self, first: (FrameSource, Bytes)) -> Result<(), LocalError> {
        let mut next = Some(first);
        while let Some((source, bytes)) = next {
            self.process.sender().send(&ToVm::Frame { source, bytes })?;
            next = self.from_gateway.try_recv().ok();
        }
        Ok(self.process.sender().flush()?)
    }

    /// Ends the guest at its next landmark, as a power failure would, with its log complete.
    /// Returns how much was recorded, if anything was to be.
    pub async fn end(
        mut self,
        mut console: impl FnMut(&[u8]),
    ) -> Result<Option<Recorded>, LocalError> {
        if self.recording.is_some() && !self.over {
            let paused = self.pause(&mut console);
            // Without a landmark there is nothing that the log lacks but the way there.
            let paused = tokio::time::timeout(LAST_LANDMARK, paused).await;
            // A process that Ctrl-C has ended, too, has shipped what it could; a log that takes no
            // more is a failure.
            if let Ok(Err(error @ LocalError::Recording(_))) = paused {
                return Err(error);
            }
        }
        Ok(self.recording.take().map(Recording::end).transpose()?)
    }

    /// Brings the guest to a landmark, everything before it shipped.
    async fn pause(&mut self, console: &mut impl FnMut(&[u8])) -> Result<(), LocalError> {
        self.process.sender().send(&ToVm::Pause(true))?;
        self.process.sender().flush()?;
        while let Some(said) = self.process.recv().await? {
            if !matches!(self.hear(said, console).await?, Said::Other) {
                break;
            }
        }
        Ok(())
    }

    async fn gateway_ended(
        task: &mut Option<tokio::task::JoinHandle<Result<(), GatewayError>>>,
    ) -> Result<(), GatewayError> {
        match task {
            // A gateway that was cancelled ended with the runtime.
            Some(task) => task.await.unwrap_or(Ok(())),
            None => std::future::pending().await,
        }
    }

    fn keep(&mut self, batch: Bytes) -> Result<(), LocalError> {
        let lost = self.recording.take_if(|recording| !recording.keep(batch));
        Ok(lost.map_or(Ok(()), |lost| lost.end().map(drop))?)
    }

    /// Nobody goes on from this log, so outputs do not wait for it.
    async fn let_out(&mut self, output: Output, console: &mut impl FnMut(&[u8])) {
        match output.kind {
            OutputKind::Console => console(&output.bytes),
            OutputKind::Frame => {
                if let Some(gateway) = &self.to_gateway {
                    // A gateway that is gone has ended with an error of its own.
                    let _ = gateway.send((output.number, output.bytes)).await;
                }
            }
        }
    }
}

/// The header of its log; what its disks hold at first is put into `bases`.
fn header_of(image: &Image, bases: &Path) -> Result<Header, LocalError> {
    let mut boot = [0; 16];
    SystemRandom::new()
        .fill(&mut boot)
        .map_err(|_| LocalError::NoRandom)?;
    Ok(Header {
        machine_model: vmm::MACHINE_MODEL,
        image: image.digest(),
        config: image.machine().to_bytes(),
        disks: image
            .disks
            .iter()
            .map(|disk| disk.seal(bases))
            .collect::<Result<_, _>>()?,
        term: Term(1),
        boot,
    })
}

/// Disks of which nothing outlives the run, though flushes reach the disk as on any other.
fn setups(folder: &Path, count: usize) -> Vec<DiskSetup> {
    let setup = |disk: usize| DiskSetup {
        bases: folder.to_owned(),
        overlay: folder.join(disk.to_string()),
        durable: true,
    };
    (0..count).map(setup).collect()
}

async fn gateway_of(run: &LocalRun) -> Result<Option<Gateway>, LocalError> {
    if run.publish.is_empty() {
        return Ok(None);
    }
    let Some(network) = &run.image.network else {
        return Err(LocalError::NoNetwork {
            image: run.image.name.clone(),
        });
    };
    let stack = StackConfig::new(network.address, network.prefix);
    Ok(Some(
        Gateway::bind(GatewayConfig::new(run.publish.clone(), stack)).await?,
    ))
}
