//! The hosts' kernel and initramfs: made by `images/host/build`, which this program carries with it.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use thiserror::Error;

/// The script and what it takes into the image.
const FILES: [(&str, &str); 2] = [
    ("build", include_str!("../../images/host/build")),
    ("init", include_str!("../../images/host/init")),
];

/// Why there is no image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// No folder.
    #[error("no temporary folder can be made: set TMPDIR to a folder that you may write to")]
    Folder(#[source] io::Error),
    /// No shell.
    #[error("the script that makes the hosts' image cannot be started: install bash")]
    Start(#[source] io::Error),
    /// It said why.
    #[error("the hosts' image could not be made, as was just said")]
    Failed,
}

/// The folder with `vmlinuz` and `initramfs`, made if there is none yet: that takes some 10 s, and
/// the script tells on stderr how it goes.
pub fn find_or_build() -> Result<PathBuf, ImageError> {
    let folder = tempfile::Builder::new()
        .prefix("understudy-image-")
        .tempdir()
        .map_err(ImageError::Folder)?;
    for (name, text) in FILES {
        let file = folder.path().join(name);
        fs::write(&file, text)
            .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o755)))
            .map_err(ImageError::Folder)?;
    }
    let output = Command::new("bash")
        .arg(folder.path().join("build"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(ImageError::Start)?;
    let said = String::from_utf8_lossy(&output.stdout);
    match said.lines().last() {
        Some(folder) if output.status.success() => Ok(PathBuf::from(folder)),
        _ => Err(ImageError::Failed),
    }
}
