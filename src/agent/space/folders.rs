//! What the folders of a host's VMs take: their logs, and what is set aside beside them.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// In the name of a folder that is set aside.
const ASIDE: &str = ".aside-";
/// Folders are looked into so deep: a disk's overlay lies in `disks.aside-1/0/`.
const DEPTH: u32 = 4;

/// A log or disks that were set aside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetAside {
    /// Their folder, below the data folder.
    pub folder: String,
    /// What they take, in bytes.
    pub bytes: u64,
}

/// The logs of all VMs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Logs {
    pub(super) vms: usize,
    pub(super) bytes: u64,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Folders {
    pub(super) logs: Logs,
    pub(super) aside: Vec<SetAside>,
}

impl Folders {
    /// Looks below a host's data folder. What goes away meanwhile, or cannot be read, counts for
    /// nothing. Blocks.
    pub(super) fn of(data: &Path) -> Self {
        let mut found = Self::default();
        for vm in fs::read_dir(data.join("vms"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if !vm.path().is_dir() {
                continue;
            }
            found.logs.vms += 1;
            found.logs.bytes += bytes_in(&vm.path().join("log"), DEPTH);
            for folder in fs::read_dir(vm.path()).into_iter().flatten().flatten() {
                let path = folder.path();
                if !folder.file_name().to_string_lossy().contains(ASIDE) || !path.is_dir() {
                    continue;
                }
                let name = path.strip_prefix(data).unwrap_or(&path);
                found.aside.push(SetAside {
                    folder: name.display().to_string(),
                    bytes: bytes_in(&path, DEPTH),
                });
            }
        }
        found.aside.sort_by(|a, b| a.folder.cmp(&b.folder));
        found
    }
}

fn bytes_in(folder: &Path, depth: u32) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = files.map(|file| match file.metadata() {
        Ok(about) if about.is_dir() && depth > 0 => bytes_in(&file.path(), depth - 1),
        Ok(about) if about.is_file() => about.len(),
        _ => 0,
    });
    bytes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_and_what_is_set_aside_are_found() {
        let data = tempfile::tempdir().expect("a folder");
        for (file, bytes) in [
            ("vms/shop/log/0.open", 100),
            ("vms/shop/log.aside-1/0.seg", 30),
            ("vms/shop/disks.aside-2/0/blocks", 7),
            ("vms/shop/log.old-3/0.seg", 1_000),
            ("vms/bank/log/0.seg", 5),
            ("bases/some", 9_000),
        ] {
            let path = data.path().join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            fs::write(path, vec![0; bytes]).expect("written");
        }
        let found = Folders::of(data.path());
        assert_eq!(found.logs, Logs { vms: 2, bytes: 105 });
        let aside = [("vms/shop/disks.aside-2", 7), ("vms/shop/log.aside-1", 30)];
        let aside = aside.map(|(folder, bytes)| SetAside {
            folder: folder.to_owned(),
            bytes,
        });
        assert_eq!(found.aside, aside);
        assert_eq!(Folders::of(&data.path().join("none")).logs, Logs::default());
    }
}
