//! The disks that an image wants: how a manifest says it, and what they hold at first.
//!
//! ```toml
//! disks = ["64 MiB", { size = "1 GiB", content = "root.img" }]
//! ```

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use replay_log::DiskBase;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, IntoDeserializer as _, MapAccess};
use serde::{Deserialize, Deserializer};
use thiserror::Error;
use vmm::disk::{Base, BaseError};

use super::{ImageError, Size};

/// A disk that an image wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Its size in bytes, a multiple of 512.
    pub size: u64,
    /// The file that it holds at first, followed by zeros; `None`: zeros alone.
    pub content: Option<PathBuf>,
}

/// Why a disk cannot be filled.
#[derive(Debug, Error)]
pub enum FillError {
    /// The content is not there.
    #[error("the disk content {} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The content has grown since the manifest was read.
    #[error("{} has {len} bytes and is to fill a disk of {size}: give the disk more", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its length.
        len: u64,
        /// The disk's.
        size: u64,
    },
    /// The base cannot be written.
    #[error(transparent)]
    Base(#[from] BaseError),
}

impl DiskSpec {
    /// The base that the disk starts from; where it is not zeros, it is put into `folder`. Blocks,
    /// for as long as the content is large.
    pub fn seal(&self, folder: &Path) -> Result<DiskBase, FillError> {
        let Some(path) = &self.content else {
            return Ok(Base::empty(self.size).name());
        };
        self.check_length(path)?;
        let file = File::open(path).map_err(unreadable(path))?;
        let mut padded = file.chain(io::repeat(0)).take(self.size);
        Ok(Base::seal(folder, &mut padded)?.name())
    }

    fn check_length(&self, path: &Path) -> Result<(), FillError> {
        let len = fs::metadata(path).map_err(unreadable(path))?.len();
        if len > self.size {
            let (path, size) = (path.to_owned(), self.size);
            return Err(FillError::TooLong { path, len, size });
        }
        Ok(())
    }
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> FillError {
    let path = path.to_owned();
    |source| FillError::Read { path, source }
}

/// A disk as a manifest has it.
pub(super) struct DiskManifest {
    size: u64,
    content: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Filled {
    size: Size<512>,
    content: String,
}

impl DiskManifest {
    /// The disk; `place` says where a file of the image's folder is.
    pub(super) fn resolve(
        self,
        place: &dyn Fn(&str) -> Result<PathBuf, ImageError>,
    ) -> Result<DiskSpec, ImageError> {
        let disk = DiskSpec {
            size: self.size,
            content: self.content.as_deref().map(place).transpose()?,
        };
        if let Some(path) = &disk.content {
            disk.check_length(path)?;
        }
        Ok(disk)
    }
}

impl<'de> Deserialize<'de> for DiskManifest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = DiskManifest;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(
                    f,
                    "a size, for example \"64 MiB\", or {{ size = \"64 MiB\", content = \"a file of the folder\" }}"
                )
            }
            fn visit_i64<E: de::Error>(self, value: i64) -> Result<DiskManifest, E> {
                Ok(blank(Size::deserialize(value.into_deserializer())?))
            }
            fn visit_str<E: de::Error>(self, value: &str) -> Result<DiskManifest, E> {
                Ok(blank(Size::deserialize(value.into_deserializer())?))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<DiskManifest, A::Error> {
                let filled = Filled::deserialize(MapAccessDeserializer::new(map))?;
                Ok(DiskManifest {
                    size: filled.size.0,
                    content: Some(filled.content),
                })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

fn blank(size: Size<512>) -> DiskManifest {
    DiskManifest {
        size: size.0,
        content: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::images;

    fn folder(disks: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let manifest =
            format!("name = 'x'\nkernel = 'k'\nmemory = 4096\nmodes = []\ndisks = [{disks}]\n");
        fs::write(folder.path().join("manifest.toml"), manifest).unwrap();
        fs::write(folder.path().join("k"), "kernel").unwrap();
        fs::write(folder.path().join("root.img"), [7; 700]).unwrap();
        folder
    }

    #[test]
    fn a_disk_holds_the_file_and_zeros_after_it() {
        let folder = folder("512, { size = 1024, content = 'root.img' }");
        let image = images::find(folder.path().to_str().unwrap()).unwrap();
        assert_eq!(image.machine().disks, [512, 1024]);
        let bases = tempfile::tempdir().unwrap();
        let sealed: Vec<_> = image
            .disks
            .iter()
            .map(|disk| disk.seal(bases.path()).unwrap())
            .collect();
        assert_eq!(sealed[0], Base::empty(512).name());
        let mut wanted = vec![7; 700];
        wanted.resize(1024, 0);
        assert_eq!(sealed[1].digest, *blake3::hash(&wanted).as_bytes());
        let file = fs::read(Base::path(bases.path(), sealed[1])).unwrap();
        assert!(file == wanted);
    }

    #[test]
    fn what_cannot_fill_a_disk_is_refused() {
        for (disks, wanted) in [
            ("{ size = 512, content = 'root.img' }", "700 bytes"),
            ("{ size = 1024, content = 'nothing' }", "cannot be read"),
            ("{ size = 1024, content = '../k' }", "own folder"),
            ("{ size = 1000, content = 'root.img' }", "multiple of 512"),
            ("{ size = 1024 }", "missing field `content`"),
            ("{ size = 1024, contents = 'k' }", "unknown field"),
            ("true", "a size, for example"),
        ] {
            let folder = folder(disks);
            let error = images::find(folder.path().to_str().unwrap()).unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let told = format!("{error}: {source:?}");
            assert!(told.contains(wanted), "{disks}: {told}");
        }
    }
}
