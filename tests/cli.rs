//! The command line as users meet it: help, errors and exit codes of what works without a guest.

#[path = "common/skip.rs"]
mod skip;

use std::io::BufRead as _;

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

/// A log of a header and `marks` marks, in several batches.
fn write_log(dir: &std::path::Path, marks: u64) {
    use replay_log::{
        BatchBuilder, Entry, FileOptions, FileStore, Header, ImageDigest, LogIndex, Mark,
        MarkDigest, Position, Store as _, Term,
    };
    let header = Header {
        machine_model: vmm::MACHINE_MODEL,
        image: ImageDigest([7; 32]),
        config: bytes::Bytes::new(),
        disks: Vec::new(),
        term: Term(1),
        boot: [1; 16],
    };
    let mut store = FileStore::open(dir, FileOptions::default()).expect("an empty folder");
    let mut builder = BatchBuilder::new(Term(1), LogIndex::START);
    builder.push(&Entry::Header(header)).expect("fits");
    for n in 1..=marks {
        let mark = Mark {
            at: Position(n),
            digest: MarkDigest(n.wrapping_mul(0x1234_5678_9abc_def1)),
        };
        builder.push(&Entry::Mark(mark)).expect("fits");
        if n % 10 == 0 {
            let batch = builder.finish().expect("not empty");
            store.append(&batch).expect("appended");
        }
    }
}

#[test]
fn a_whole_log_is_counted_printed_and_verified() {
    let dir = tempfile::tempdir().expect("a folder");
    write_log(dir.path(), 30);
    let dir = dir.path().to_str().expect("UTF-8");
    let (code, out, err) = run(&["log", "stat", dir, "--json"]);
    assert_eq!(code, 0, "{err}");
    let stat: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(stat["end"], 31);
    assert_eq!(stat["entries"]["mark"], 30);
    assert_eq!(stat["entries"]["header"], 1);
    assert_eq!(stat["landmarks"], 30);
    let (code, out, _) = run(&["log", "inspect", dir, "--from", "12", "--limit", "3"]);
    assert_eq!(code, 0);
    assert_eq!(out.lines().count(), 3, "{out}");
    assert!(out.trim_start().starts_with("12  @12"), "{out}");
    let (code, out, _) = run(&["log", "verify", dir]);
    assert_eq!(code, 0);
    assert!(out.contains("entries 0..31 are whole"), "{out}");
}

#[test]
fn a_damaged_log_names_segment_and_offset_and_its_good_part_stays_readable() {
    let dir = tempfile::tempdir().expect("a folder");
    write_log(dir.path(), 3000);
    let segment = std::fs::read_dir(dir.path())
        .expect("a folder")
        .map(|file| file.expect("a file").path())
        .find(|path| path.extension().is_some_and(|e| e == "open"))
        .expect("a segment");
    let mut bytes = std::fs::read(&segment).expect("readable");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    std::fs::write(&segment, bytes).expect("writable");
    let dir = dir.path().to_str().expect("UTF-8");
    let (code, out, err) = run(&["log", "verify", dir]);
    assert_eq!(code, 4, "{err}");
    assert!(out.contains("are whole"), "{out}");
    let segment = segment.to_str().expect("UTF-8");
    assert!(
        err.contains(&format!("segment {segment} is damaged at byte")),
        "{err}"
    );
    let (code, out, _) = run(&["log", "inspect", dir]);
    assert_eq!(code, 4);
    assert!(out.lines().count() > 1000, "the good part is printed");
}

#[test]
fn a_folder_without_a_log_is_a_failure() {
    let dir = tempfile::tempdir().expect("a folder");
    for command in ["stat", "inspect", "verify"] {
        let dir = dir.path().to_str().expect("UTF-8");
        let (code, _, err) = run(&["log", command, dir]);
        assert_eq!(code, 1, "{command}");
        assert!(err.contains("there is no log in"), "{command}: {err}");
    }
}

/// A cluster of one host in a fresh folder. Nothing of it runs.
fn cluster() -> (tempfile::TempDir, String) {
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
fn operators_are_told_how_to_name_the_cluster() {
    for command in [vec!["status"], vec!["events"], vec!["switchover", "vm"]] {
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
    std::io::BufRead::read_line(&mut said, &mut line).expect("it says something");
    assert!(line.contains("keeps records"), "{line}");
    let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
    kill(pid, Signal::SIGTERM).expect("it is there");
    let status = child.wait().expect("it ends");
    assert_eq!(status.code(), Some(0));
}

/// The processes that have this text on their command lines.
/// An image that looks like one and must not be run as what it is not.
fn image(dir: &std::path::Path, more: &str) -> String {
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

fn processes_with(text: &str) -> Vec<String> {
    let all = std::fs::read_dir("/proc").expect("Linux");
    all.filter_map(|entry| std::fs::read(entry.ok()?.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(text))
        .collect()
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
    let readme = include_str!("../README.md");
    for line in understudy::cli::failure::EXIT_CODES.lines().skip(1) {
        let (code, meaning) = line.trim().split_once(' ').expect("a code and its meaning");
        let row = format!("| {code} | {} |", meaning.trim());
        assert!(readme.contains(&row), "{row}");
    }
}
