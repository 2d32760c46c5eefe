//! `init`, the processes of a cluster, and what operators ask of it.

use std::io::BufRead as _;

use super::*;

#[test]
fn init_makes_a_cluster_once() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = dir.path().join("cluster");
    let cluster = cluster.to_str().expect("UTF-8");
    let init = |hosts: &[&str]| {
        let mut args = vec!["init", cluster, "--witness", "w=127.0.0.1:7400"];
        args.extend(hosts.iter().flat_map(|host| ["--host", host]));
        run(&args)
    };
    let (code, out, err) = init(&["a=127.0.0.1:7401", "b=127.0.0.1:7402"]);
    assert_eq!(code, 0, "{err}");
    for said in [
        "understudy agent --config",
        "understudy witness --config",
        "hosts/a",
        "hosts/b",
    ] {
        assert!(out.contains(said), "{said}: {out}");
    }
    let (code, _, err) = init(&["a=127.0.0.1:7401"]);
    assert_eq!(code, 1);
    assert!(
        err.contains("is there already and is not overwritten"),
        "{err}"
    );
}

#[test]
fn init_refuses_what_cannot_be_and_serves_metrics_unless_told_not_to() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = dir.path().join("cluster");
    let path = cluster.to_str().expect("UTF-8");
    let init = |more: &[&str]| {
        let common = ["init", path, "--witness", "w=127.0.0.1:7400"];
        run(&[&common, more].concat())
    };
    for (args, why) in [
        (
            vec!["--host", "a=127.0.0.1:1", "--host", "a=127.0.0.1:2"],
            "given twice, as 127.0.0.1:1 and as 127.0.0.1:2",
        ),
        (
            vec!["--host", "a=127.0.0.1:7400"],
            "a and w are both to listen",
        ),
    ] {
        let (code, _, err) = init(&args);
        assert_eq!(code, 2, "{args:?}: {err}");
        assert!(err.contains(why), "{args:?}: {err}");
        assert!(!cluster.exists(), "nothing is written");
    }
    let two = ["--host", "a=127.0.0.1:7401", "--host", "b=127.0.0.1:7402"];
    assert_eq!(init(&two).0, 0);
    let config = |host: &str| {
        let file = cluster.join("hosts").join(host).join("understudy.toml");
        std::fs::read_to_string(file).expect("a configuration")
    };
    assert!(config("a").contains("metrics = \"127.0.0.1:8401\""));
    assert!(config("b").contains("metrics = \"127.0.0.1:8402\""));
    std::fs::remove_dir_all(&cluster).expect("removed");
    assert_eq!(init(&[&two[..], &["--no-metrics"]].concat()).0, 0);
    assert!(!config("a").contains("metrics"));
}

#[test]
fn addresses_that_are_none_are_a_usage_error() {
    for (wrong, said) in [
        ("a", "write a name, '='"),
        ("a=localhost", "is no IP address with a port"),
        ("A=127.0.0.1:1", "lower-case"),
    ] {
        let (code, _, err) = run(&[
            "init",
            "/nowhere",
            "--witness",
            wrong,
            "--host",
            "a=127.0.0.1:1",
        ]);
        assert_eq!(code, 2, "{wrong}");
        assert!(err.contains(said), "{wrong}: {err}");
    }
}

#[test]
fn a_process_refuses_the_folder_of_another_role() {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = dir.path().join("c").display().to_string();
    let (code, _, err) = run(&[
        "init",
        &cluster,
        "--witness",
        "w=127.0.0.1:7400",
        "--host",
        "a=127.0.0.1:7401",
    ]);
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = run(&["witness", "--config", &format!("{cluster}/hosts/a")]);
    assert_eq!(code, 2);
    assert!(err.contains("start it with 'understudy agent'"), "{err}");
    let (code, _, err) = run(&["witness", "--config", &format!("{cluster}/nobody")]);
    assert_eq!(code, 1);
    assert!(err.contains("cannot read"), "{err}");
}

/// A cluster of one host in a fresh folder. Nothing of it runs.
pub fn cluster() -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a folder");
    let cluster = dir.path().join("c").display().to_string();
    let hosts = ["--host", "alpha=127.0.0.1:1", "--host", "beta=127.0.0.1:2"];
    let mut args = vec!["init", &cluster, "--witness", "w=127.0.0.1:3"];
    args.extend(hosts);
    let (code, _, err) = run(&args);
    assert_eq!(code, 0, "{err}");
    (dir, cluster)
}

#[test]
fn operators_are_told_how_to_name_the_cluster() {
    for command in [
        vec!["status"],
        vec!["events"],
        vec!["switchover", "vm"],
        vec!["remove", "vm", "--host", "a"],
    ] {
        let (code, _, err) = run(&command);
        assert_eq!(code, 2, "{command:?}");
        assert!(err.contains("--cluster <DIR>"), "{err}");
        let mut command = command;
        command.extend(["--cluster", "/nowhere"]);
        let (code, _, err) = run(&command);
        assert_eq!(code, 1, "{command:?}");
        assert!(err.contains("cannot read /nowhere"), "{err}");
    }
}

#[test]
fn a_misspelt_host_is_answered_with_the_closest() {
    let (_dir, cluster) = cluster();
    let (code, _, err) = run(&[
        "pair",
        "vm",
        "--cluster",
        &cluster,
        "--primary",
        "alhpa",
        "--replica",
        "beta",
    ]);
    assert_eq!(code, 1);
    assert!(
        err.contains("there is no host 'alhpa': did you mean 'alpha'?"),
        "{err}"
    );
}

#[test]
fn bad_rules_are_a_usage_error() {
    let (_dir, cluster) = cluster();
    let pair = |option: &str, value: &str| {
        let args = [
            "pair",
            "vm",
            "--cluster",
            &cluster,
            "--primary",
            "alpha",
            option,
            value,
        ];
        run(&args)
    };
    let (code, _, err) = pair("--rule", "most");
    assert_eq!(code, 2);
    assert!(err.contains("all, quorum or any("), "{err}");
    let (code, _, err) = pair("--on-loss", "shrnk");
    assert_eq!(code, 2);
    assert!(err.contains("'shrink'"), "{err}");
}

#[test]
fn a_cluster_of_which_nobody_answers_is_a_failure() {
    let (_dir, cluster) = cluster();
    let (code, out, err) = run(&["status", "--cluster", &cluster, "--json"]);
    assert_eq!(code, 1);
    assert!(err.contains("no host of the cluster answers"), "{err}");
    let status: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert!(status["hosts"]["alpha"]["error"].is_string(), "{out}");
}

#[test]
fn a_witness_ends_well_when_it_is_told_to_and_not_at_all_for_a_strangers_sake() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use std::process::{Command, Stdio};
    let dir = tempfile::tempdir().expect("a folder");
    let free = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port");
    let witness = format!("w={}", free.local_addr().expect("bound"));
    drop(free);
    let cluster = dir.path().join("c").display().to_string();
    let (code, _, err) = run(&[
        "init",
        &cluster,
        "--witness",
        &witness,
        "--host",
        "a=127.0.0.1:1",
    ]);
    assert_eq!(code, 0, "{err}");
    let folder = format!("{cluster}/witnesses/w");
    let (code, _, err) = run(&["witness", "--config", &folder, "--die-with", "1"]);
    assert_eq!(code, 1);
    assert!(err.contains("has ended already"), "{err}");
    let mut child = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(["witness", "--config", &folder])
        .env("UNDERSTUDY_LOG", "info")
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    // It listens for signals as soon as it keeps records.
    let mut said = std::io::BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    said.read_line(&mut line).expect("it says something");
    assert!(line.contains("keeps records"), "{line}");
    let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
    kill(pid, Signal::SIGTERM).expect("it is there");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(0));
}
