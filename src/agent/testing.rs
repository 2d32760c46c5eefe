//! What the tests of several modules need of the system they run on.

use std::io::Write as _;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

/// The file in which `tests/run` collects what was skipped, one a line.
const COLLECTED_IN: &str = "UNDERSTUDY_SKIPS";

/// Says aloud that a test is skipped, and why.
pub fn skipped(test: &str, why: &dyn std::fmt::Display) {
    let line = format!("SKIPPED {test}: {why}\n");
    // Not by a macro: what those print is shown for failures only.
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(file) = std::env::var_os(COLLECTED_IN) {
        let file = std::fs::File::options()
            .append(true)
            .create(true)
            .open(file);
        let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
        written.expect("the file that collects skipped tests can be written");
    }
}

/// A small file system of its own, unmounted when the test ends.
pub struct SmallDisk(TempDir);

impl SmallDisk {
    /// In memory, with these options: `size=1m`. Only root may.
    pub fn mount(options: &str) -> Result<Self, nix::Error> {
        let dir = TempDir::new().expect("a folder");
        let flags = MsFlags::empty();
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            flags,
            Some(options),
        )?;
        Ok(Self(dir))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A folder that stays mounted stays, and nothing else comes of it.
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}
