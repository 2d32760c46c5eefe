//! `images`, `run` and `replay`.

use std::io::BufRead as _;

use super::*;

#[test]
fn what_nothing_protects_is_recorded_by_nothing() {
    for more in [["--record", "/nowhere/log"].as_slice(), &["--unrecorded"]] {
        let command = [&["run", "ledger", "--mode", "none"], more].concat();
        let (code, _, err) = run(&command);
        assert_eq!(code, 2, "{command:?}: {err}");
        assert!(err.contains("can be recorded with --mode none"), "{err}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let manifest = "name = 'mine'\nkernel = 'k'\nmemory = '4 MiB'\nmodes = ['none']\n";
    std::fs::write(folder.path().join("manifest.toml"), manifest).expect("a file");
    std::fs::write(folder.path().join("k"), "no kernel").expect("a file");
    let image = folder.path().display().to_string();
    for command in [
        vec!["run", &image],
        vec!["run", &image, "--record", "/nowhere/log"],
    ] {
        let (code, _, err) = run(&command);
        assert_eq!(code, 3, "{command:?}: {err}");
        assert!(err.contains("cannot be recorded or protected"), "{err}");
        assert!(err.contains("--mode none"), "{err}");
    }
}

#[test]
fn images_are_listed_and_misspelt_ones_are_answered_with_the_closest() {
    let (code, out, _) = run(&["images", "--json"]);
    assert_eq!(code, 0);
    let images: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(images[0]["name"], "ledger");
    assert_eq!(images[0]["ports"][0], 6379);
    let (code, _, err) = run(&["run", "legder"]);
    assert_ne!(code, 0);
    assert!(err.contains("did you mean 'ledger'?"), "{err}");
}

/// The processes that have this text on their command lines.
/// An image that looks like one and must not be run as what it is not.
pub fn image(dir: &std::path::Path, more: &str) -> String {
    let ledger = understudy::images::find("ledger").expect("the ledger");
    std::fs::write(dir.join("kernel"), &ledger.kernel).expect("written");
    std::fs::write(dir.join("initrd"), b"anything").expect("written");
    let manifest = format!("name = \"odd\"\nkernel = \"kernel\"\nmemory = \"64 MiB\"\n{more}\n");
    std::fs::write(dir.join("manifest.toml"), manifest).expect("written");
    dir.to_str().expect("UTF-8").to_owned()
}

#[test]
fn an_image_is_run_as_what_it_is_or_not_at_all() {
    for (manifest, why) in [
        (
            "modes = [\"checkpointed\"]",
            "run as checkpointed only, not as replayed",
        ),
        ("modes = []", "run as nothing only, not as replayed"),
    ] {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = image(dir.path(), manifest);
        let (code, _, err) = run(&["run", &folder]);
        assert_eq!(code, 3, "{manifest}: {err}");
        assert!(
            err.contains(why) && err.contains("use one of ledger"),
            "{err}"
        );
    }
}

#[test]
fn replay_says_what_is_not_there_or_not_its_image() {
    let dir = tempfile::tempdir().expect("a folder");
    let nothing = dir.path().join("nothing");
    for folder in [nothing.as_path(), dir.path()] {
        let (code, _, err) = run(&["replay", folder.to_str().expect("UTF-8")]);
        assert_eq!(code, 1, "{err}");
    }
}

/// Ctrl-C ends a guest well, every time: what was recorded is told, and can be replayed.
#[test]
fn a_guest_that_is_stopped_has_ended_well() {
    if !kvm_is_here("a_guest_that_is_stopped_has_ended_well") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    for attempt in 0..6 {
        let log = dir.path().join(attempt.to_string());
        let log = log.to_str().expect("UTF-8");
        let mut guest = std::process::Command::new(env!("CARGO_BIN_EXE_understudy"))
            .args(["run", "ledger", "--record", log])
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("it starts");
        // It has booted when it says something.
        let mut said = std::io::BufReader::new(guest.stdout.take().expect("piped"));
        said.read_line(&mut String::new()).expect("the console");
        let pid = nix::unistd::Pid::from_raw(guest.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("told");
        let ended = guest.wait_with_output().expect("an end");
        let err = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{err}");
        let recorded = err.split("recorded ").nth(1).expect(&err);
        let entries: u64 = recorded.split(' ').next().expect(&err).parse().expect(&err);
        // More than the header, which left at once: also what no batch had taken along yet.
        assert!(entries > 1, "{err}");
        let (code, out, err) = run(&["replay", log, "--until", "99999999"]);
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("the log ends there"), "{out}");
    }
    let other = tempfile::tempdir().expect("a folder");
    let folder = image(other.path(), "modes = [\"replayed\"]\ninitrd = \"initrd\"");
    let log = dir.path().join("0");
    let log = log.to_str().expect("UTF-8");
    let (code, _, err) = run(&["replay", log, "--image", &folder]);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("was not recorded from"), "{err}");
}
