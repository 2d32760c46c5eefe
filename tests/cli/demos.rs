//! `demo` and `simulate`.

use super::*;

fn processes_with(text: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").expect("Linux");
    all.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(text))
        .collect()
}

#[test]
fn the_demo_holds_what_is_promised() {
    if !kvm_is_here("the_demo_holds_what_is_promised") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let output = understudy()
        .args(["demo", "--kills", "2", "--lead", "1", "--json"])
        .env("TMPDIR", dir.path())
        .output()
        .expect("it starts");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    for promise in ["lost", "undone", "repeated"] {
        assert_eq!(report[promise], 0, "{promise}: {report}");
    }
    assert_eq!(report["broken"], serde_json::json!([]));
    assert!(report["acknowledged"].as_u64() > Some(0));
    let kills = report["kills"].as_array().expect("kills");
    assert_eq!(kills.len(), 2);
    for kill in kills {
        assert_ne!(kill["old"], kill["new"]);
        let moments: Vec<_> = kill["timeline"]
            .as_array()
            .expect("moments")
            .iter()
            .map(|m| &m["what"])
            .collect();
        for moment in [
            "last output",
            "kill",
            "suspicion",
            "claim",
            "seal",
            "record",
            "live",
            "first answer",
        ] {
            assert!(moments.iter().any(|m| *m == moment), "{moment}: {kill}");
        }
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("a folder").collect();
    assert!(left.is_empty(), "the folder is left: {left:?}");
}

/// Starts a demo with its folder in `dir` and sends it a signal once its cluster is up; its status.
fn interrupted_demo(
    dir: &std::path::Path,
    signal: nix::sys::signal::Signal,
) -> std::process::ExitStatus {
    use std::io::BufRead as _;
    let mut demo = std::process::Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(["demo", "--lead", "600"])
        .env("TMPDIR", dir)
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let said = std::io::BufReader::new(demo.stdout.take().expect("piped"));
    let up = said
        .lines()
        .any(|line| line.expect("UTF-8").contains("writes acknowledged"));
    assert!(up, "the load never ran");
    let folder = dir.display().to_string();
    // A witness, three agents, three VMMs and the gateway; VMMs do not name the folder.
    assert_eq!(processes_with(&folder).len(), 5);
    let pid = nix::unistd::Pid::from_raw(demo.id().try_into().expect("a pid"));
    nix::sys::signal::kill(pid, signal).expect("it is there");
    let status = demo.wait().expect("it ends");
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !processes_with(&folder).is_empty() {
        assert!(
            std::time::Instant::now() < patience,
            "{:?}",
            processes_with(&folder)
        );
        std::thread::yield_now();
    }
    status
}

#[test]
fn nothing_of_a_demo_is_left_when_it_is_interrupted() {
    if !kvm_is_here("nothing_of_a_demo_is_left_when_it_is_interrupted") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let status = interrupted_demo(dir.path(), nix::sys::signal::Signal::SIGINT);
    assert_eq!(status.code(), Some(130));
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("a folder").collect();
    assert!(left.is_empty(), "the folder is left: {left:?}");
}

#[test]
fn no_process_of_a_demo_survives_its_being_killed() {
    if !kvm_is_here("no_process_of_a_demo_survives_its_being_killed") {
        return;
    }
    let dir = tempfile::tempdir().expect("a folder");
    let status = interrupted_demo(dir.path(), nix::sys::signal::Signal::SIGKILL);
    assert_eq!(status.code(), None);
}

#[test]
fn a_seed_is_simulated_and_the_same_seed_is_the_same_simulation() {
    let (code, out, err) = run(&["simulate", "--seeds", "20"]);
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("20 seeds in "), "{out}");
    let (_, first, _) = run(&["simulate", "--seed", "3"]);
    let (_, second, _) = run(&["simulate", "--seed", "3"]);
    assert_eq!(first, second);
    assert!(first.contains("seed 3: "), "{first}");
}

#[test]
fn a_broken_rule_is_noticed_and_the_seed_is_told() {
    let (code, out, err) = run(&[
        "simulate",
        "--seeds",
        "500",
        "--mutation",
        "release-before-commit",
    ]);
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("broken in"), "{err}");
    let again = out
        .lines()
        .find_map(|line| line.split_once("replay with: "));
    let (_, again) = again.expect("the command that does it again");
    let again: Vec<_> = again.split_whitespace().skip(1).collect();
    let (code, _, err) = run(&again);
    assert_eq!(code, 5, "{again:?}: {err}");
    let (code, _, err) = run(&["simulate", "--mutation", "no-seel"]);
    assert_eq!(code, 2);
    assert!(err.contains("'no-seal'"), "{err}");
}
