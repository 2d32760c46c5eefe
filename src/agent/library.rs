//! What a host has to run guests from: images, by name and by digest, and sealed disk bases. A
//! base that it lacks it fetches from the other hosts.

use std::path::PathBuf;

use replay_log::{DiskBase, Header, ImageDigest};
use thiserror::Error;
use vmm::disk::{Base, BaseError};

use crate::agent::bulk::{self, FetchError};
use crate::agent::link::{Endpoint, Peer};
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

    async fn have_base(&self, name: DiskBase) -> Result<(), LibraryError> {
        match Base::open(&self.bases, name) {
            Ok(_) => return Ok(()),
            Err(BaseError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        let mut last = None;
        for peer in &self.peers {
            match bulk::fetch_base(&self.endpoint, peer, name, &self.bases).await {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        Err(LibraryError::Fetch(last))
    }
}
