//! The command line as users meet it: help, errors and exit codes of what works without a guest.

#[path = "../common/skip.rs"]
mod skip;

mod clusters;
mod demos;
mod guests;
mod logs;

use assert_cmd::Command;

use clusters::cluster;
use guests::image;
use logs::write_log;

fn understudy() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_understudy"));
    command.env_remove("UNDERSTUDY_CLUSTER");
    command.env_remove("UNDERSTUDY_LOG");
    command
}

/// Runs it; exit code, stdout, stderr.
fn run(args: &[&str]) -> (i32, String, String) {
    let output = understudy().args(args).output().expect("it starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it speaks UTF-8");
    let code = output.status.code().expect("no signal ended it");
    (code, text(output.stdout), text(output.stderr))
}

/// Whether guests can run here; says aloud if not, so that no test passes by not running.
fn kvm_is_here(test: &str) -> bool {
    match understudy::doctor::missing_kvm() {
        None => true,
        Some(why) => {
            skip::skipped(test, &why);
            false
        }
    }
}

#[test]
fn help_names_every_exit_code() {
    let (code, out, _) = run(&["--help"]);
    assert_eq!(code, 0);
    assert!(out.contains(understudy::cli::failure::EXIT_CODES), "{out}");
}

#[test]
fn without_a_command_it_shows_how_to_use_it() {
    let (code, out, err) = run(&[]);
    assert_eq!(code, 2);
    assert!(out.is_empty());
    assert!(err.contains("Usage: understudy <COMMAND>"), "{err}");
}

#[test]
fn what_is_misspelt_is_answered_with_what_is_close() {
    for (args, close) in [
        (vec!["docter"], "doctor"),
        (vec!["doctor", "--jsn"], "--json"),
    ] {
        let (code, out, err) = run(&args);
        assert_eq!(code, 2, "{args:?}");
        assert!(out.is_empty());
        assert!(err.contains(&format!("'{close}'")), "{args:?}: {err}");
    }
}

#[test]
fn doctor_says_in_json_whether_guests_run_here() {
    let (code, out, err) = run(&["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    let findings = report["findings"].as_array().expect("findings");
    let lacking = findings.iter().any(|f| f["verdict"] == "lacking");
    assert_eq!(code, if lacking { 3 } else { 0 }, "{err}");
    assert_eq!(lacking, err.contains("guests cannot be protected"), "{err}");
    assert!(findings.iter().any(|f| f["what"] == "KVM"));
    let images = report["images"].as_array().expect("images");
    let row = |image: &str, mode: &str| {
        let found = images
            .iter()
            .find(|row| row["image"] == image && row["mode"] == mode);
        found.unwrap_or_else(|| panic!("{image} as {mode}: {out}"))
    };
    assert_eq!(row("ledger", "replayed")["here"], !lacking);
    assert_eq!(row("ledger", "checkpointed")["here"], false);
    assert!(row("linux", "replayed")["here"].is_boolean());
    for row in images.iter().filter(|row| row["here"] == false) {
        assert!(row["why"].is_string(), "{row}");
    }
    if !lacking {
        let measured = &report["measured"];
        for what in ["speed", "injection", "debugging", "branches", "dirty_log"] {
            assert!(!measured[what].is_null(), "{what}: {out}");
        }
        assert_eq!(measured["fingerprint"]["cpu_model"], vmm::kvm::CPU_MODEL);
    }
}

#[test]
fn what_this_host_lacks_for_an_image_is_said_alike_by_all() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = image(
        dir.path(),
        "modes = [\"replayed\"]\nneeds = [\"native-ring-0\"]",
    );
    let (_, out, _) = run(&["doctor", "--json", "--image", &folder]);
    let report: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    let images = report["images"].as_array().expect("images");
    let row = images.iter().find(|row| row["image"] == "odd");
    let row = row.expect("the image that was named");
    if row["here"] == true {
        return skip::skipped("what this host lacks", &"this host runs every image");
    }
    let why = row["why"].as_str().expect("a reason");
    let (code, _, err) = run(&["run", &folder]);
    assert_eq!(code, 3, "{err}");
    assert!(err.contains(why), "{err}: {why}");
    assert_eq!(err.lines().count(), 1, "{err}");
}

#[test]
fn without_kvm_what_needs_it_says_so_in_one_sentence() {
    let hide = [
        "-m",
        "sh",
        "-c",
        "mount -t tmpfs none /dev && exec \"$@\"",
        "sh",
    ];
    let hidden = |args: &[&str]| {
        assert_cmd::Command::new("unshare")
            .args(hide)
            .args(args)
            .env_remove("UNDERSTUDY_CLUSTER")
            .output()
    };
    if !hidden(&["true"]).is_ok_and(|output| output.status.success()) {
        let test = "without_kvm_what_needs_it_says_so_in_one_sentence";
        return skip::skipped(test, &"it needs root, to hide /dev/kvm");
    }
    let (_dir, cluster) = cluster();
    let agent = format!("{cluster}/hosts/alpha");
    for command in [
        vec!["demo"],
        vec!["doctor"],
        vec!["run", "ledger"],
        vec!["agent", "--config", &agent],
    ] {
        let mut args = vec![env!("CARGO_BIN_EXE_understudy")];
        args.extend(&command);
        let output = hidden(&args).expect("it starts");
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{command:?}: {err}");
        assert!(
            err.contains("/dev/kvm cannot be opened"),
            "{command:?}: {err}"
        );
        assert_eq!(err.lines().count(), 1, "{command:?}: {err}");
    }
    let images = hidden(&[env!("CARGO_BIN_EXE_understudy"), "images"]).expect("it starts");
    assert_eq!(images.status.code(), Some(0));
    let listed = String::from_utf8_lossy(&images.stdout);
    let said = "ledger does not run on this host: /dev/kvm cannot be opened";
    assert!(listed.contains(said), "{listed}");
}

#[test]
fn a_reader_who_has_seen_enough_is_no_reason_to_complain() {
    let dir = tempfile::tempdir().expect("a folder");
    write_log(dir.path(), 3000);
    let output = std::process::Command::new("sh")
        .args([
            "-c",
            "\"$0\" log inspect \"$1\" --json | head -n 1",
            env!("CARGO_BIN_EXE_understudy"),
        ])
        .arg(dir.path())
        .output()
        .expect("sh is there");
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.is_empty(), "{err}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).lines().count(), 1);
}

#[test]
fn the_readme_has_the_same_exit_codes() {
    let readme = include_str!("../../README.md");
    for line in understudy::cli::failure::EXIT_CODES.lines().skip(1) {
        let (code, meaning) = line.trim().split_once(' ').expect("a code and its meaning");
        let row = format!("| {code} | {} |", meaning.trim());
        assert!(readme.contains(&row), "{row}");
    }
}
