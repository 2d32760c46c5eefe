//! Debian's own kernel, untouched, in the lab: refused where it would have to be replayed, and booted to
//! a Redis that answers clients outside where nothing protects it. Takes minutes to build and minutes to
//! boot, so it runs with `UNDERSTUDY_SOAK=1` only.

#[path = "common/lab.rs"]
mod common;
#[path = "common/skip.rs"]
mod skip;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use common::{host, lab, run};
use skip::skipped;

/// A host's memory, in MiB: the guest's, and the disk's content while it is sealed.
const MEMORY: u32 = 2500;
/// How long the guest may take to boot on an emulated host, and how often it is asked.
const PATIENCE: Duration = Duration::from_mins(10);
const LOOK_EVERY: Duration = Duration::from_secs(1);
const IMAGE: &str = "/data/debian";

#[test]
fn debian_runs_where_nothing_protects_it() {
    let test = "debian_runs_where_nothing_protects_it";
    if std::env::var_os("UNDERSTUDY_SOAK").is_none() {
        return skipped(test, &"it takes ten minutes: set UNDERSTUDY_SOAK=1");
    }
    let image = tempfile::tempdir().expect("a folder");
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/debian/build");
    let built = Command::new(build).arg(image.path()).output();
    let built = built.expect("it starts");
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}");
    let Some((lab, _folder)) = lab(test, 1, MEMORY) else {
        return;
    };
    let h1 = host(&lab, "h1");
    for file in ["vmlinuz", "initrd.img", "root.img", "manifest.toml"] {
        h1.put(&image.path().join(file), &Path::new(IMAGE).join(file))
            .expect("put");
    }

    let refused = h1.run(&["understudy", "run", IMAGE]).expect("it runs");
    assert!(!refused.success(), "it cannot be replayed");
    assert!(refused.text().contains("none"), "{}", refused.text());

    let publish = ["--publish", "0.0.0.0:6379:6379"];
    let words = ["understudy", "run", IMAGE, "--mode", "none"];
    let guest = h1.detach(&[&words[..], &publish].concat());
    let guest = guest.expect("it starts");
    let output = guest.output.to_str().expect("UTF-8").to_owned();
    let began = Instant::now();
    let ask = |words: &[&str]| {
        let words = [&["timeout", "5", "redis-cli", "-h", "10.88.0.1"], words].concat();
        let said = lab.machine(&words).output().expect("it starts").stdout;
        String::from_utf8_lossy(&said).trim().to_owned()
    };
    while ask(&["ping"]) != "PONG" {
        let said = || run(&h1, &["tail", "-n", "30", &output]);
        assert!(began.elapsed() < PATIENCE, "it does not answer: {}", said());
        std::thread::sleep(LOOK_EVERY);
    }
    println!("Redis answers after {:?}", began.elapsed());
    assert_eq!(ask(&["set", "a", "b"]), "OK");
    assert_eq!(ask(&["get", "a"]), "b");
    run(&h1, &["grep", "-q", "Debian GNU/Linux 12", &output]);
    run(&h1, &["kill", "-INT", &guest.pid.to_string()]);
}
