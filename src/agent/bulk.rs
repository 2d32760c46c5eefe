//! Bulk between hosts: disk bases, on connections of their own and no faster than the limit, so
//! that neither log nor heartbeats wait for them.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use replay_log::DiskBase;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use vmm::disk::{Base, BaseError};

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

/// A question between hosts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Question {
    /// Send this base.
    Base(DiskBase),
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
    /// It cannot be written here.
    #[error(transparent)]
    Base(#[from] BaseError),
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
            let Question::Base(name) = question;
            if from.role != Role::Host {
                tracing::warn!(%from, "only hosts get disk bases");
                return;
            }
            let sent = send_base(&bases, name, &mut reply).await;
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

/// Sends the data of a base; `false` when it is not here.
async fn send_base(bases: &Path, name: DiskBase, reply: &mut Reply) -> Result<bool, String> {
    let path = Base::path(bases, name);
    let file = match fs::File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error.to_string()),
    };
    let (chunks, mut ready) = mpsc::channel(CHUNKS_WAITING);
    let reading = tokio::task::spawn_blocking(move || read_chunks(file, &chunks));
    let (began, mut bytes) = (Instant::now(), 0u64);
    while let Some((offset, length, compressed)) = ready.recv().await {
        let part = Part::Chunk { offset, compressed };
        reply.send(&part).await.map_err(|error| error.to_string())?;
        bytes += length as u64;
        sleep_until(began + Duration::from_micros(bytes * 1_000_000 / RATE)).await;
    }
    match reading.await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the transfer was given up".to_owned()),
    }
}

type Chunk = (u64, usize, Vec<u8>);

fn read_chunks(mut file: fs::File, chunks: &mpsc::Sender<Chunk>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut offset = 0;
    loop {
        let mut length = 0;
        while length < CHUNK {
            match file.read(&mut buffer[length..])? {
                0 => break,
                read => length += read,
            }
        }
        let data = &buffer[..length];
        if data.iter().any(|byte| *byte != 0) {
            let compressed = zstd::bulk::compress(data, LEVEL)?;
            if chunks.blocking_send((offset, length, compressed)).is_err() {
                // The asker is gone.
                return Ok(());
            }
        }
        offset += length as u64;
        if length < CHUNK {
            return Ok(());
        }
    }
}

/// Gets a base from another host into this folder, and checks it on the way.
pub async fn fetch_base(
    endpoint: &Endpoint,
    peer: &Peer,
    name: DiskBase,
    bases: &Path,
) -> Result<(), FetchError> {
    let channel = Channel::new(endpoint, peer.clone());
    let mut parts = channel
        .ask::<_, Part>(StreamKind::Bulk, &Question::Base(name))
        .await?;
    let who = || peer.identity.clone();
    let (data, arrived) = mpsc::channel(CHUNKS_WAITING);
    let folder = bases.to_owned();
    let sealing = tokio::task::spawn_blocking(move || {
        let mut source = Arriving::new(arrived, name.size);
        Base::seal(&folder, &mut source)
    });
    let mut failure = None;
    loop {
        match parts.next().await {
            Ok(Some(Part::Chunk { offset, compressed })) => {
                if data.send(Some((offset, compressed))).await.is_err() {
                    break;
                }
            }
            Ok(Some(Part::End)) => {
                // Fails only when the sealing has failed, which says why.
                let _ = data.send(None).await;
                break;
            }
            Ok(Some(Part::Missing)) => failure = Some(FetchError::Missing { peer: who() }),
            Ok(Some(Part::Failed { reason })) => {
                failure = Some(FetchError::Failed {
                    peer: who(),
                    reason,
                });
            }
            Ok(None) => failure = Some(FetchError::Wrong { peer: who() }),
            Err(error) => failure = Some(error.into()),
        }
        if failure.is_some() {
            break;
        }
    }
    drop(data);
    let sealed = sealing.await.map_err(|_| FetchError::GivenUp)?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    let sealed = sealed?;
    if sealed.name() == name {
        return Ok(());
    }
    // It would lie there under a name that nobody asks for; if it stays it only takes room.
    let _ = fs::remove_file(Base::path(bases, sealed.name()));
    Err(FetchError::Wrong { peer: who() })
}

type Arrival = Option<(u64, Vec<u8>)>;

/// The data of a base as a stream of bytes, zeros between the chunks. Blocks.
struct Arriving {
    chunks: mpsc::Receiver<Arrival>,
    /// Where the reader is.
    at: u64,
    size: u64,
    chunk: Vec<u8>,
    /// Where the chunk begins; after the end of the base when no more come.
    begins: u64,
}

impl Arriving {
    fn new(chunks: mpsc::Receiver<Arrival>, size: u64) -> Self {
        Self {
            chunks,
            at: 0,
            size,
            chunk: Vec::new(),
            begins: 0,
        }
    }

    fn next_chunk(&mut self) -> io::Result<()> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        match self.chunks.blocking_recv() {
            Some(Some((offset, compressed))) => {
                let data = zstd::bulk::decompress(&compressed, CHUNK)?;
                let ends = offset.checked_add(data.len() as u64);
                if offset < self.at || data.is_empty() || ends.is_none_or(|end| end > self.size) {
                    return Err(bad("a part of the disk base is out of place"));
                }
                self.chunk = data;
                self.begins = offset;
                Ok(())
            }
            Some(None) => {
                self.chunk.clear();
                self.begins = self.size;
                Ok(())
            }
            None => Err(bad("the transfer broke off")),
        }
    }
}

impl Read for Arriving {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.size || out.is_empty() {
            return Ok(0);
        }
        let ends = self.begins + self.chunk.len() as u64;
        if self.at >= ends && self.begins < self.size {
            self.next_chunk()?;
        }
        let length = if self.at < self.begins {
            let hole = self.begins - self.at;
            let length = out.len().min(usize::try_from(hole).unwrap_or(usize::MAX));
            out[..length].fill(0);
            length
        } else {
            let from = usize::try_from(self.at - self.begins).unwrap_or(usize::MAX);
            let rest = self.chunk.get(from..).unwrap_or_default();
            let length = out.len().min(rest.len());
            out[..length].copy_from_slice(&rest[..length]);
            length
        };
        self.at += length as u64;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::agent::certs::authority::Authority;

    fn any_port() -> SocketAddr {
        ([127, 0, 0, 1], 0).into()
    }

    fn endpoint(authority: &Authority, name: &str) -> Endpoint {
        let name = name.parse().expect("a name");
        let credentials = authority.issue(&Identity::host(&name)).expect("issued");
        Endpoint::bind(&credentials, any_port()).expect("an endpoint")
    }

    /// Data, a hole longer than a chunk, data that ends within a chunk, a hole at the end.
    fn contents() -> Vec<u8> {
        let mut contents = vec![0; 5 * CHUNK + 512];
        contents[..700].fill(7);
        for (index, byte) in contents[3 * CHUNK - 100..4 * CHUNK].iter_mut().enumerate() {
            *byte = (index * index) as u8;
        }
        contents
    }

    fn served() -> (tempfile::TempDir, Endpoint, Endpoint, Peer, DiskBase) {
        let authority = Authority::generate().expect("an authority");
        let (one, two) = (endpoint(&authority, "a"), endpoint(&authority, "b"));
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = Base::seal(folder.path(), &mut &contents()[..]).expect("sealed");
        let serving = two.clone();
        let bases = folder.path().to_owned();
        tokio::spawn(async move { serve_bases(&serving, bases).await });
        let peer = Peer {
            identity: two.identity().clone(),
            address: two.local_address().expect("bound").into(),
        };
        (folder, one, two, peer, base.name())
    }

    #[tokio::test]
    async fn a_base_comes_over_with_its_holes_and_is_checked() {
        let (_there, one, _two, peer, name) = served();
        let here = tempfile::tempdir().expect("a temporary folder");
        fetch_base(&one, &peer, name, here.path())
            .await
            .expect("fetched");
        let got = fs::read(Base::path(here.path(), name)).expect("there");
        assert_eq!(got, contents());
    }

    #[tokio::test]
    async fn what_is_missing_or_damaged_is_not_taken() {
        let (there, one, _two, peer, name) = served();
        let here = tempfile::tempdir().expect("a temporary folder");
        let other = DiskBase {
            digest: [9; 32],
            ..name
        };
        let missing = fetch_base(&one, &peer, other, here.path()).await;
        assert!(matches!(missing, Err(FetchError::Missing { .. })));
        let path = Base::path(there.path(), name);
        let mut damaged = contents();
        damaged[3] ^= 1;
        fs::remove_file(&path).expect("removed");
        fs::write(&path, damaged).expect("written");
        let wrong = fetch_base(&one, &peer, name, here.path()).await;
        assert!(matches!(wrong, Err(FetchError::Wrong { .. })), "{wrong:?}");
        // Longer than it says.
        fs::write(&path, vec![1; contents().len() + CHUNK]).expect("written");
        let long = fetch_base(&one, &peer, name, here.path()).await;
        assert!(matches!(long, Err(FetchError::Base(_))), "{long:?}");
        assert_eq!(fs::read_dir(here.path()).expect("listed").count(), 0);
    }
}
