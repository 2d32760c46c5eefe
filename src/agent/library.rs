//! What a host has to run guests from: images, by name and by digest, and sealed disk bases. A
//! base that it lacks it fetches from the other hosts.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::Mutex;

use replay_log::{DiskBase, Header, ImageDigest};
use thiserror::Error;
use vmm::disk::{Base, BaseError};

use crate::agent::bulk::{self, FetchError};
use crate::agent::link::{Endpoint, Peer, lock};
use crate::doctor::offer::{self, CannotRun, Host};
use crate::images::{self, Image, ImageError, Mode};

/// Why something cannot be run here.
#[derive(Debug, Error)]
pub enum LibraryError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No image with this digest.
    #[error(
        "this host has no image {digest}: put the image's folder into {}, the same version as on the primary",
        folder.display()
    )]
    NoImage {
        /// The first bytes of its digest.
        digest: String,
        /// Where it is looked for.
        folder: PathBuf,
    },
    /// The image, on this host.
    #[error(transparent)]
    CannotRun(#[from] CannotRun),
    /// A base is there and is damaged, or cannot be read.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A base is on no host that can be reached.
    #[error("a disk base is not here and could be fetched from no other host")]
    Fetch(#[source] Option<FetchError>),
}

/// What a host has.
pub struct Library {
    images: PathBuf,
    bases: PathBuf,
    endpoint: Endpoint,
    peers: Vec<Peer>,
    host: Host,
    /// One transfer at a time: two would write the same file, and share the same network.
    fetching: tokio::sync::Mutex<()>,
    /// How far the transfers have come that are under way or were given up.
    come: Mutex<BTreeMap<[u8; 32], u64>>,
}

impl Library {
    /// What is in the data folder of `host`, or with these other hosts.
    pub fn new(data: &std::path::Path, endpoint: Endpoint, peers: Vec<Peer>, host: Host) -> Self {
        Self {
            images: data.join("images"),
            bases: data.join("bases"),
            endpoint,
            peers,
            host,
            fetching: tokio::sync::Mutex::default(),
            come: Mutex::default(),
        }
    }

    /// The image of this name, embedded or a folder, if it can be run here. Reads it, so it is not
    /// for the agent's own thread.
    pub fn image_named(&self, name: &str) -> Result<Image, LibraryError> {
        let folder = self.images.join(name);
        let image = if !name.contains('/') && folder.is_dir() {
            images::find(&folder.to_string_lossy())
        } else {
            images::find(name)
        }?;
        offer::check(&self.host, &image, Mode::Replayed)?;
        Ok(image)
    }

    /// The image with this digest, if it can be run here. Reads and hashes images until it has
    /// found it, so it is not for the agent's own thread.
    pub fn image(&self, digest: ImageDigest) -> Result<Image, LibraryError> {
        let folders = std::fs::read_dir(&self.images)
            .into_iter()
            .flatten()
            .flatten();
        let own = folders.filter_map(|entry| images::find(&entry.path().to_string_lossy()).ok());
        let found = images::embedded()?
            .into_iter()
            .chain(own)
            .find(|i| i.digest() == digest);
        let image = found.ok_or_else(|| LibraryError::NoImage {
            digest: blake3::Hash::from_bytes(digest.0).to_hex()[..12].to_owned(),
            folder: self.images.clone(),
        })?;
        offer::check(&self.host, &image, Mode::Replayed)?;
        Ok(image)
    }

    /// Fetches the disk bases that a log names and that are not here.
    pub async fn fetch_bases(&self, header: &Header) -> Result<(), LibraryError> {
        for base in &header.disks {
            self.have_base(*base).await?;
        }
        Ok(())
    }

    /// How many bytes of these bases have come, and of how many, while they are being fetched.
    pub fn fetched(&self, bases: &[DiskBase]) -> Option<(u64, u64)> {
        let come = lock(&self.come);
        let under_way = bases
            .iter()
            .filter_map(|base| Some((*come.get(&base.digest)?, base.size)));
        under_way.reduce(|(come, of), (more, size)| (come + more, of.saturating_add(size)))
    }

    async fn have_base(&self, name: DiskBase) -> Result<(), LibraryError> {
        if self.has_base(name).await? {
            return Ok(());
        }
        let noted = |bytes| {
            lock(&self.come).insert(name.digest, bytes);
        };
        noted(0);
        let fetched = self.fetch_base(name, &noted).await;
        lock(&self.come).remove(&name.digest);
        fetched
    }

    async fn fetch_base(
        &self,
        name: DiskBase,
        noted: &(dyn Fn(u64) + Sync),
    ) -> Result<(), LibraryError> {
        let _alone = self.fetching.lock().await;
        // Another VM may have needed it, too.
        if self.has_base(name).await? {
            return Ok(());
        }
        let mut last = None;
        for peer in &self.peers {
            match bulk::fetch_base(&self.endpoint, peer, name, &self.bases, noted).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::info!(peer = %peer.identity, %error, "a disk base did not come");
                    // That one does not have it says less than how another failed.
                    let says_more = !matches!(error, FetchError::Missing { .. });
                    if last.is_none() || says_more {
                        last = Some(error);
                    }
                }
            }
        }
        Err(LibraryError::Fetch(last))
    }

    /// Whether a base is here. Heartbeats wait neither for the disk nor for the name of a disk of
    /// zeros.
    async fn has_base(&self, name: DiskBase) -> Result<bool, LibraryError> {
        let bases = self.bases.clone();
        let opened = tokio::task::spawn_blocking(move || Base::open(&bases, name).map(drop)).await;
        match opened {
            Ok(Ok(())) => Ok(true),
            Ok(Err(BaseError::Io { source, .. })) if source.kind() == ErrorKind::NotFound => {
                Ok(false)
            }
            Ok(Err(error)) => Err(error.into()),
            // Only a runtime that ends lets it go.
            Err(_) => Err(LibraryError::Fetch(Some(FetchError::GivenUp))),
        }
    }
}
