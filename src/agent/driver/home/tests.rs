//! A VM's folder over restarts, on full disks, and through the runs of its guest.

use tempfile::TempDir;
use vmm::disk::{Base, Durability, Overlay};

use super::*;
use crate::agent::testing::{SmallDisk, skipped};
use crate::agent::vm_process::DiskSetup;
use crate::protocol::Incarnation;

fn vm() -> VmName {
    VmName::new("shop").expect("a name")
}

fn state(incarnation: u64) -> Durable {
    Durable {
        incarnation: Incarnation(incarnation),
        ..Durable::default()
    }
}

#[test]
fn the_state_is_found_again_and_that_of_an_earlier_version_once() {
    let data = TempDir::new().expect("a folder");
    let dir = data.path().join("vms/shop");
    std::fs::create_dir_all(&dir).expect("a folder");
    let old = dir.join("state.json");
    std::fs::write(&old, serde_json::to_vec_pretty(&state(7)).expect("plain")).expect("written");
    let home = Home::open(data.path(), &vm()).expect("usable");
    assert_eq!(home.durable().expect("readable"), state(7));
    assert!(!old.exists(), "there is one that counts");
    for turn in 8..12 {
        home.persist(&state(turn)).expect("room");
        assert_eq!(home.durable().expect("readable"), state(turn));
        let again = Home::open(data.path(), &vm()).expect("usable");
        assert_eq!(again.durable().expect("readable"), state(turn));
    }
    // What is damaged is no beginning.
    std::fs::write(dir.join("state"), b"nothing").expect("written");
    let damaged = home.durable();
    assert!(
        matches!(damaged, Err(HomeError::Garbled { .. })),
        "{damaged:?}"
    );
}

/// A promise is made durable where there is no room for another byte.
#[test]
fn promises_are_made_on_a_full_disk() {
    let disk = match SmallDisk::mount("size=4m,nr_inodes=200") {
        Ok(disk) => disk,
        Err(why) => return skipped("promises_are_made_on_a_full_disk", &why),
    };
    let home = Home::open(disk.path(), &vm()).expect("usable");
    let files = (0..).map(|i| std::fs::File::create(disk.path().join(format!("file{i}"))));
    let full = files.take_while(Result::is_ok).last();
    assert!(full.is_some(), "there was room");
    let ballast = vec![1; 8 << 20];
    let filled = std::fs::write(disk.path().join("file0"), ballast);
    assert_eq!(
        filled.expect_err("no room").kind(),
        io::ErrorKind::StorageFull
    );
    let path = home.dir.join("other");
    assert!(
        durable::replace(&path, b"anything").is_err(),
        "not another file"
    );
    for turn in 1..10 {
        home.persist(&state(turn)).expect("its room is reserved");
        assert_eq!(home.durable().expect("readable"), state(turn));
    }
    let again = Home::open(disk.path(), &vm()).expect("usable");
    assert_eq!(again.durable().expect("readable"), state(9));
}

struct Disks {
    home: Home,
    _data: TempDir,
}

impl Disks {
    fn new() -> Self {
        let data = TempDir::new().expect("a folder");
        let home = Home::open(data.path(), &vm()).expect("usable");
        Self { home, _data: data }
    }

    fn header(boot: u8, disks: Vec<DiskBase>) -> Header {
        Header {
            machine_model: 1,
            image: replay_log::ImageDigest([1; 32]),
            config: Vec::new().into(),
            disks,
            term: Term(1),
            boot: [boot; 16],
        }
    }

    fn zeros() -> DiskBase {
        Base::empty(1 << 20).name()
    }

    /// What a guest writes at the beginning of its disk, and flushes.
    fn write(&self, setup: &DiskSetup, name: DiskBase, text: &[u8; 512]) {
        let base = Base::open(&self.home.bases, name).expect("here");
        let mut overlay = Overlay::open(&setup.overlay, base, Durability::Sync).expect("opened");
        overlay.write(0, text).expect("written");
        overlay.flush().expect("synced");
    }

    /// What is at the beginning of the disk that a cold boot would start from.
    fn cold(&self) -> [u8; 512] {
        let sealed = self.home.seal_disks().expect("sealed");
        let base = Base::open(&self.home.bases, sealed[0]).expect("here");
        let overlay = TempDir::new().expect("a folder");
        let overlay = Overlay::open(overlay.path(), base, Durability::PageCache);
        let text = overlay.expect("opened").read(0, 512).expect("readable");
        text[..].try_into().expect("512 bytes")
    }
}

/// Until another run records here, a replay leaves the disks of the last one that did alone.
#[test]
fn a_replay_keeps_the_disks_that_are_the_way_back() {
    let here = Disks::new();
    let first = Disks::header(1, vec![Disks::zeros()]);
    let setup = here.home.boot_disks(&first, false, |_| {}).expect("disks");
    here.write(&setup[0], first.disks[0], &[1; 512]);
    assert_eq!(here.cold(), [1; 512]);
    // Replays, of the same log and of others', which come to nothing.
    for boot in 1..4 {
        let header = Disks::header(boot, vec![Disks::zeros()]);
        let setup = here.home.replica_disks(&header).expect("disks");
        here.home.keep_header(&header).expect("kept");
        assert!(!setup[0].overlay.exists(), "nothing is written to it");
        here.write(&setup[0], header.disks[0], &[9; 512]);
        assert_eq!(here.cold(), [1; 512], "what the last recording run flushed");
        let again = Home::open(here.home.dir.ancestors().nth(2).expect("data"), &vm());
        assert_eq!(
            again.expect("usable").seal_disks().expect("sealed").len(),
            1
        );
    }
    // One goes live, whether that is noted in time or with the next step.
    for (value, noted) in [(2, true), (3, false)] {
        let header = Disks::header(value, vec![Disks::zeros()]);
        let setup = here.home.replica_disks(&header).expect("disks");
        here.write(&setup[0], header.disks[0], &[value; 512]);
        here.home.goes_live();
        if noted {
            here.home.keep_recorded().expect("noted");
            assert!(!here.home.dir.join("disks.recorded").exists());
        }
        let other = Disks::header(9, vec![Disks::zeros()]);
        let setup = here.home.replica_disks(&other).expect("disks");
        here.write(&setup[0], other.disks[0], &[9; 512]);
        assert_eq!(here.cold(), [value; 512]);
    }
    // A cold boot goes on from there, wherever it is stopped.
    let bases = here.home.seal_disks().expect("sealed");
    let cold = Disks::header(5, bases);
    here.home.keep_header(&cold).expect("kept");
    assert_eq!(here.cold(), [3; 512]);
    let setup = here.home.boot_disks(&cold, true, |_| {}).expect("disks");
    assert_eq!(here.cold(), [3; 512]);
    here.write(&setup[0], cold.disks[0], &[5; 512]);
    assert_eq!(here.cold(), [5; 512]);
    // And a first boot in the same place throws nothing away.
    let anew = Disks::header(6, vec![Disks::zeros()]);
    let mut told = Vec::new();
    let tell = |folder: &Path| told.push(folder.to_owned());
    here.home.boot_disks(&anew, false, tell).expect("disks");
    assert_eq!(here.cold(), [0; 512]);
    let aside = here.home.dir.join("disks.aside-1");
    assert_eq!(told, std::slice::from_ref(&aside));
    assert!(aside.join("0").exists());
}

/// The folder of an earlier version has its header beside the disks.
#[test]
fn disks_of_an_earlier_version_are_kept_too() {
    let here = Disks::new();
    let first = Disks::header(1, vec![Disks::zeros()]);
    let setup = here.home.boot_disks(&first, false, |_| {}).expect("disks");
    here.write(&setup[0], first.disks[0], &[4; 512]);
    here.home.keep_header(&first).expect("kept");
    for file in ["header", "recorded"] {
        std::fs::remove_file(here.home.dir.join("disks").join(file)).expect("removed");
    }
    assert_eq!(here.cold(), [4; 512]);
    let other = Disks::header(2, vec![Disks::zeros()]);
    here.home.replica_disks(&other).expect("disks");
    here.home.keep_header(&other).expect("kept");
    assert_eq!(here.cold(), [4; 512]);
}

#[test]
fn limits_differ_a_little_between_hosts() {
    let limits: std::collections::BTreeSet<u64> = ["a", "b", "c", "d"]
        .map(|host| spread(8 << 30, host))
        .into();
    assert!(limits.len() > 2, "{limits:?}");
    assert!(
        limits
            .iter()
            .all(|limit| (760 << 20..=820 << 20).contains(&(limit / 10)))
    );
}
