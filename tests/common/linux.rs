//! The Linux image as tests use it: built, or found built.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use super::skip::skipped;

/// Whether the full counts are asked for.
#[allow(dead_code, reason = "not every test has a use for it")]
pub fn soak() -> bool {
    std::env::var_os("UNDERSTUDY_SOAK").is_some()
}

/// A command as the image's `init` takes it from the kernel's command line.
#[allow(dead_code, reason = "not every test has a use for it")]
pub fn parameter(command: &str) -> String {
    format!("understudy.run={}", command.replace(' ', "+"))
}

/// A manifest with this command instead of its own; empty for a shell.
#[allow(dead_code, reason = "not every test has a use for it")]
pub fn told(manifest: &str, command: &str) -> String {
    let (before, rest) = manifest.split_once("understudy.run=").expect("a command");
    let (_, after) = rest.split_once('"').expect("the end of the command line");
    format!("{before}{}\"{after}", parameter(command))
}

/// Which of the two images.
#[derive(Clone, Copy)]
pub enum Kind {
    /// A shell and Redis.
    Small,
    /// More programs.
    #[allow(dead_code, reason = "not every test has a use for it")]
    Full,
}

/// Builds an image, or finds it built.
pub fn image(test: &str, kind: Kind) -> Option<TempDir> {
    let folder = tempfile::tempdir().expect("a folder");
    let mut build = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("images/linux/build"));
    if let Kind::Full = kind {
        build.arg("--full");
    }
    let built = build.arg(folder.path()).output();
    let why = match built {
        Ok(built) if built.status.success() => return Some(folder),
        Ok(built) => String::from_utf8_lossy(&built.stderr).into_owned(),
        Err(error) => format!("images/linux/build cannot be run: {error}"),
    };
    // What the build needs and a machine may lack; a kernel that does not compile is a failure.
    let excused = ["please install", "apt-get", "cannot be run"];
    assert!(excused.iter().any(|excuse| why.contains(excuse)), "{why}");
    skipped(test, &why.trim());
    None
}
