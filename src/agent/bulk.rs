//! Bulk between hosts: disk bases, on connections of their own and no faster than the limit, so
//! that neither log nor heartbeats wait for them.
//!
//! A base may take hours. What has come of it stays in `<digest>.partial`, whatever ends the transfer,
//! and the next one goes on behind it; how long that file is says how far it has come. Only when all
//! of it is there is its hash compared with its name, and it becomes a base.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use replay_log::DiskBase;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use vmm::disk::Base;

use super::certs::{Identity, Role};
use super::link::{Channel, Endpoint, Peer, Reply, RequestError, StreamKind, serve_requests};

/// What is read, compressed and sent at a time.
const CHUNK: usize = 256 * 1024;
/// Bytes a second of disk, holes not counted, that one host sends to one other.
const RATE: u64 = 128 << 20;
/// Chunks between the disk and the network.
const CHUNKS_WAITING: usize = 4;
/// Level 1: the network is the limit.
const LEVEL: i32 = 1;
/// Within a hole, this often something is said of it, in bytes: a peer that says nothing is given up.
const HOLE: u64 = 64 << 20;
/// So long nothing may come of a base.
const PATIENCE: Duration = Duration::from_secs(30);

/// A question between hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Question {
    /// Send a base.
    Base {
        /// Which.
        name: DiskBase,
        /// What is before this is here.
        from: u64,
    },
}

/// A part of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Part {
    /// It is not here.
    Missing,
    /// Data; everything between two chunks is zeros.
    Chunk {
        /// Where.
        offset: u64,
        /// A zstd frame of at most [`CHUNK`] bytes of data.
        compressed: Vec<u8>,
    },
    /// There are only zeros up to here, and there is more.
    Zeros {
        /// Where that is.
        through: u64,
    },
    /// There is no more data.
    End,
    /// It could not be read.
    Failed {
        /// A sentence that says why.
        reason: String,
    },
}

/// Why a base did not come over.
#[derive(Debug, Error)]
pub enum FetchError {
    /// The other host could not be asked.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The other host does not have it.
    #[error("{peer} does not have the disk base")]
    Missing {
        /// Who was asked.
        peer: Identity,
    },
    /// The other host could not read it.
    #[error("{peer} cannot read the disk base: {reason}")]
    Failed {
        /// Who was asked.
        peer: Identity,
        /// Its own words.
        reason: String,
    },
    /// What came is not what was asked for.
    #[error("{peer} sent a disk base that is not the one asked for: see to its disk")]
    Wrong {
        /// Who was asked.
        peer: Identity,
    },
    /// Nothing more came.
    #[error("{peer} has sent nothing more of the disk base for {} s", PATIENCE.as_secs())]
    Stalled {
        /// Who was asked.
        peer: Identity,
    },
    /// It cannot be written here.
    #[error("cannot {action} {}: see to the space and the rights of this host's data folder", path.display())]
    Write {
        /// What was to be done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The work was given up: the process ends.
    #[error("the transfer was given up because the process ends")]
    GivenUp,
}

/// Serves the bases in this folder to other hosts until the endpoint ends.
pub async fn serve_bases(endpoint: &Endpoint, bases: PathBuf) {
    let streams = endpoint.serve(StreamKind::Bulk, 8);
    serve_requests(streams, move |from: Identity, question, mut reply| {
        let bases = bases.clone();
        async move {
            let Question::Base { name, from: offset } = question;
            if from.role != Role::Host {
                tracing::warn!(%from, "only hosts get disk bases");
                return;
            }
            let sent = send_base(&bases, name, offset, &mut reply).await;
            let last = match sent {
                Ok(true) => Part::End,
                Ok(false) => Part::Missing,
                Err(reason) => Part::Failed { reason },
            };
            // Fails only when the asker is gone.
            let _ = reply.send(&last).await;
        }
    })
    .await;
}

/// Sends the data of a base from an offset on; `false` when it is not here.
async fn send_base(
    bases: &Path,
    name: DiskBase,
    from: u64,
    reply: &mut Reply,
) -> Result<bool, String> {
    let path = Base::path(bases, name);
    let (chunks, mut ready) = mpsc::channel(CHUNKS_WAITING);
    let reading = tokio::task::spawn_blocking(move || read_chunks(&path, from, &chunks));
    let (began, mut bytes) = (Instant::now(), 0u64);
    while let Some((length, part)) = ready.recv().await {
        reply.send(&part).await.map_err(|error| error.to_string())?;
        bytes += length as u64;
        sleep_until(began + Duration::from_micros(bytes * 1_000_000 / RATE)).await;
    }
    match reading.await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the transfer was given up".to_owned()),
    }
}

/// Hands on a file in parts, each with the number of bytes that were not zeros.
fn read_chunks(path: &Path, from: u64, parts: &mpsc::Sender<(usize, Part)>) -> io::Result<()> {
    let mut file = fs::File::open(path)?;
    file.seek(SeekFrom::Start(from))?;
    let mut buffer = vec![0; CHUNK];
    let (mut offset, mut told) = (from, from);
    loop {
        let mut length = 0;
        while length < CHUNK {
            match file.read(&mut buffer[length..])? {
                0 => break,
                read => length += read,
            }
        }
        let data = &buffer[..length];
        let through = offset + length as u64;
        let part = if data.iter().any(|byte| *byte != 0) {
            let compressed = zstd::bulk::compress(data, LEVEL)?;
            Some((length, Part::Chunk { offset, compressed }))
        } else {
            (through - told >= HOLE).then_some((0, Part::Zeros { through }))
        };
        if let Some(part) = part {
            told = through;
            if parts.blocking_send(part).is_err() {
                // The asker is gone.
                return Ok(());
            }
        }
        offset = through;
        if length < CHUNK {
            return Ok(());
        }
    }
}

/// Gets a base from another host into this folder, and checks it. `come` is told how many bytes are
/// here, again and again. What a transfer that fails has brought stays for the next.
pub async fn fetch_base(
    endpoint: &Endpoint,
    peer: &Peer,
    name: DiskBase,
    bases: &Path,
    come: &(dyn Fn(u64) + Sync),
) -> Result<(), FetchError> {
    let fetch = || fetch_rest(endpoint, peer, name, bases, come, PATIENCE);
    // What was here before may be damaged, which is not the peer's fault.
    if fetch().await? == Came::Whole || fetch().await? == Came::Whole {
        return Ok(());
    }
    Err(FetchError::Wrong {
        peer: peer.identity.clone(),
    })
}

/// What has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Came {
    /// The base.
    Whole,
    /// Something else, which is gone again; not all of it was from this peer.
    Mixed,
}

async fn fetch_rest(
    endpoint: &Endpoint,
    peer: &Peer,
    name: DiskBase,
    bases: &Path,
    come: &(dyn Fn(u64) + Sync),
    patience: Duration,
) -> Result<Came, FetchError> {
    let who = || peer.identity.clone();
    let folder = bases.to_owned();
    let partial = blocking(move || Partial::open(&folder, name)).await??;
    let from = partial.at;
    come(from);
    let channel = Channel::new(endpoint, peer.clone());
    let question = Question::Base { name, from };
    let mut parts = channel.ask::<_, Part>(StreamKind::Bulk, &question).await?;
    let (data, arrived) = mpsc::channel(CHUNKS_WAITING);
    let writing = tokio::task::spawn_blocking(move || partial.write(arrived));
    let failure = loop {
        let part = match timeout(patience, parts.next()).await {
            Err(_) => break Some(FetchError::Stalled { peer: who() }),
            Ok(Err(error)) => break Some(error.into()),
            Ok(Ok(None)) => break Some(FetchError::Wrong { peer: who() }),
            Ok(Ok(Some(part))) => part,
        };
        match part {
            Part::Missing => break Some(FetchError::Missing { peer: who() }),
            Part::Failed { reason } => {
                let peer = who();
                break Some(FetchError::Failed { peer, reason });
            }
            Part::Chunk { offset, .. } => come(offset),
            Part::Zeros { through } => come(through),
            Part::End => {}
        }
        let end = part == Part::End;
        // Fails only when the writing has failed, which says why.
        if data.send(part).await.is_err() || end {
            break None;
        }
    };
    drop(data);
    let written = writing.await.map_err(|_| FetchError::GivenUp)?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    match written? {
        Written::Base => Ok(Came::Whole),
        Written::Other if from > 0 => Ok(Came::Mixed),
        Written::Other | Written::Part => Err(FetchError::Wrong { peer: who() }),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, FetchError> {
    let done = tokio::task::spawn_blocking(work).await;
    // Only a runtime that ends lets it go.
    done.map_err(|_| FetchError::GivenUp)
}

/// What became of a file.
#[derive(Debug)]
enum Written {
    /// It is the base now.
    Base,
    /// It is a part of it, and stays.
    Part,
    /// It was something else, and is gone.
    Other,
}

/// What is here of a base. Blocks.
struct Partial {
    file: fs::File,
    path: PathBuf,
    folder: PathBuf,
    name: DiskBase,
    /// Everything before this is here.
    at: u64,
}

impl Partial {
    fn open(folder: &Path, name: DiskBase) -> Result<Self, FetchError> {
        let path = Base::path(folder, name).with_extension("partial");
        let failed = |action| write_error(action, &path);
        let mut options = fs::OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(failed("open"))?;
        let mut at = file.metadata().map_err(failed("read"))?.len();
        if at > name.size {
            file.set_len(0).map_err(failed("shorten"))?;
            at = 0;
        }
        Ok(Self {
            file,
            folder: folder.to_owned(),
            name,
            at,
            path,
        })
    }

    /// Adds what arrives until the end or until no more comes.
    fn write(mut self, mut arrived: mpsc::Receiver<Part>) -> Result<Written, FetchError> {
        let written = self.write_all(&mut arrived);
        let useless = match &written {
            Ok(Written::Other) => true,
            Ok(Written::Base) => false,
            Ok(Written::Part) | Err(_) => self.at == 0,
        };
        if useless {
            // If it stays it only takes room: what it lacks is found by its hash.
            let _ = fs::remove_file(&self.path);
        }
        written
    }

    fn write_all(&mut self, arrived: &mut mpsc::Receiver<Part>) -> Result<Written, FetchError> {
        while let Some(part) = arrived.blocking_recv() {
            let placed = match part {
                Part::Chunk { offset, compressed } => self.place(offset, &compressed)?,
                Part::Zeros { through } => self.extend(through)?,
                _ => return self.finish(),
            };
            if !placed {
                return Ok(Written::Other);
            }
        }
        Ok(Written::Part)
    }

    /// Adds a chunk; `false` when it is none of this base.
    fn place(&mut self, offset: u64, compressed: &[u8]) -> Result<bool, FetchError> {
        let Ok(data) = zstd::bulk::decompress(compressed, CHUNK) else {
            return Ok(false);
        };
        let ends = offset.checked_add(data.len() as u64);
        let Some(ends) = ends.filter(|end| offset >= self.at && *end <= self.name.size) else {
            return Ok(false);
        };
        let written = self.file.write_all_at(&data, offset);
        written.map_err(write_error("write", &self.path))?;
        self.at = ends;
        Ok(true)
    }

    /// There are only zeros up to here.
    fn extend(&mut self, through: u64) -> Result<bool, FetchError> {
        if !(self.at..=self.name.size).contains(&through) {
            return Ok(false);
        }
        let extended = self.file.set_len(through);
        extended.map_err(write_error("extend", &self.path))?;
        self.at = through;
        Ok(true)
    }

    /// All of it is here: makes it the base that it is to be, if it is.
    fn finish(&mut self) -> Result<Written, FetchError> {
        let failed = |action| write_error(action, &self.path);
        self.file
            .set_len(self.name.size)
            .map_err(failed("extend"))?;
        self.file.rewind().map_err(failed("read"))?;
        let mut hasher = blake3::Hasher::new();
        let hashed = hasher.update_reader(&self.file);
        hashed.map_err(failed("read"))?;
        if *hasher.finalize().as_bytes() != self.name.digest {
            return Ok(Written::Other);
        }
        self.file.sync_all().map_err(failed("sync"))?;
        let base = Base::path(&self.folder, self.name);
        fs::rename(&self.path, &base).map_err(failed("rename"))?;
        let synced = fs::File::open(&self.folder).and_then(|folder| folder.sync_all());
        synced.map_err(write_error("sync", &self.folder))?;
        Ok(Written::Base)
    }
}

fn write_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FetchError {
    let path = path.to_owned();
    move |source| FetchError::Write {
        action,
        path,
        source,
    }
}

#[cfg(test)]
mod tests;
