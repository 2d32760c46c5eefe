//! A host of the lab with the Linux image in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use understudy::lab::{Host, Lab};

use crate::lab::{host, lab, run};
use crate::linux::{Kind, image, told};

const BENCH: &str = "linux";
/// The lab's only host.
pub const HOST: &str = "h1";
/// The host's memory, in MiB: two guests, twice while they are loaded, and the host's own files.
const MEMORY: u32 = 2500;
/// Where the host has its images.
const IMAGES: &str = "/data/images";
/// What all of them have in common.
const FILES: [&str; 2] = ["vmlinux", "initrd.img"];

/// The image on this machine.
enum Image {
    Built(TempDir),
    Given(PathBuf),
}

impl Image {
    fn folder(&self) -> &Path {
        match self {
            Self::Built(folder) => folder.path(),
            Self::Given(folder) => folder,
        }
    }
}

/// One host, the image, and a folder of this machine.
pub struct Stage {
    // Dropped first: the lab has files in the folder.
    lab: Arc<Lab>,
    image: Image,
    manifest: String,
    folder: TempDir,
}

impl Stage {
    /// Builds the image and starts the host; none, and said aloud, where that cannot be.
    pub fn new() -> Option<Self> {
        let image = match std::env::var_os("UNDERSTUDY_LINUX_IMAGE") {
            Some(folder) => Image::Given(folder.into()),
            None => Image::Built(image(BENCH, Kind::Small)?),
        };
        let (lab, folder) = lab(BENCH, 1, MEMORY)?;
        let manifest = image.folder().join("manifest.toml");
        let stage = Self {
            lab: Arc::new(lab),
            manifest: fs::read_to_string(manifest).expect("a manifest"),
            image,
            folder,
        };
        stage.run(&["mkdir", "-p", IMAGES]);
        for file in FILES {
            let (from, to) = (stage.image().join(file), Path::new(IMAGES).join(file));
            stage.host().put(&from, &to).expect("put");
        }
        Some(stage)
    }

    /// The lab, for those who outlive a borrow of this.
    pub fn lab(&self) -> &Arc<Lab> {
        &self.lab
    }

    /// Its host.
    pub fn host(&self) -> Host<'_> {
        host(&self.lab, HOST)
    }

    /// A folder of this machine, for what a measurement leaves.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder of this machine that has the image.
    pub fn image(&self) -> &Path {
        self.image.folder()
    }

    /// Runs a program in the host that must succeed; what it says on standard output.
    pub fn run(&self, words: &[&str]) -> String {
        run(&self.host(), words)
    }

    /// An image in the host whose guest runs this command; nothing: a shell on its console.
    pub fn telling(&self, name: &str, command: &str) -> String {
        let image = format!("{IMAGES}/{name}");
        let manifest = self.folder.path().join("manifest.toml");
        fs::write(&manifest, told(&self.manifest, command)).expect("written");
        self.run(&["mkdir", "-p", &image]);
        for file in FILES {
            self.run(&["ln", "-f", &format!("{IMAGES}/{file}"), &image]);
        }
        let to = Path::new(&image).join("manifest.toml");
        self.host().put(&manifest, &to).expect("put");
        image
    }

    /// What is in a log of the host.
    pub fn log(&self, folder: &str) -> LogStat {
        let said = self.run(&["understudy", "log", "stat", folder, "--json"]);
        let stat: serde_json::Value = serde_json::from_str(&said).expect("JSON");
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or_default();
        let kinds = ["exit", "frame", "disk", "timer", "console"];
        LogStat {
            bytes: number(&stat["file_bytes"]),
            frames: number(&stat["frame_bytes"]),
            groups: kinds
                .map(|kind| number(&stat["entries"][kind]))
                .iter()
                .sum(),
        }
    }
}

/// What a log holds so far.
#[derive(Clone, Copy)]
pub struct LogStat {
    /// Its bytes on disk.
    pub bytes: f64,
    /// The bytes of the frames that arrived.
    pub frames: f64,
    /// How many groups.
    pub groups: f64,
}
