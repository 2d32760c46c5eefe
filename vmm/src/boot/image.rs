//! What a guest is started from, and the name of it that logs carry.

use bytes::Bytes;
use replay_log::ImageDigest;
use serde::{Deserialize, Serialize};

/// What a guest is started from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootImage {
    /// The kernel: an ELF file for x86-64, or a Linux bzImage.
    pub kernel: Bytes,
    /// The initial RAM disk, as Linux wants it: an archive, or several one after the other.
    pub initrd: Option<Bytes>,
}

impl BootImage {
    /// An image that consists of a kernel alone.
    pub fn new(kernel: impl Into<Bytes>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
        }
    }

    /// The hash of everything it consists of.
    pub fn digest(&self) -> ImageDigest {
        let mut hasher = blake3::Hasher::new();
        for part in [Some(&self.kernel), self.initrd.as_ref()]
            .into_iter()
            .flatten()
        {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        ImageDigest(*hasher.finalize().as_bytes())
    }
}
