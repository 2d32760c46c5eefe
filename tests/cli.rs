//! The command line as users meet it: help, errors and exit codes of what works without a guest.

use assert_cmd::Command;

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
}
