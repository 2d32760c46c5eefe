//! Labs as tests use them: in a folder of their own, where this machine can have one.

use std::path::Path;
use std::time::Instant;

use tempfile::TempDir;
use understudy::lab::{Config, Host, Lab, StartError, needs};

use super::skip::skipped;

/// The program under test.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_understudy"))
}

/// Starts a lab whose hosts have this much memory; none, and said aloud, where there can be none.
pub fn lab(test: &str, hosts: u8, memory_mib: u32) -> Option<(Lab, TempDir)> {
    if let Err(missing) = needs::check() {
        skipped(test, &missing);
        return None;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let config = Config {
        hosts,
        memory_mib,
        dir: folder.path().join("lab"),
        ..Config::new(program())
    };
    let started = Instant::now();
    match Lab::up(&config, &mut |event| println!("{event:?}")) {
        Ok(lab) => {
            println!("{hosts} hosts are up after {:?}", started.elapsed());
            Some((lab, folder))
        }
        Err(error @ StartError::Image(_)) => {
            skipped(test, &error);
            None
        }
        Err(error) => panic!("no lab: {error}"),
    }
}

/// A host of it.
#[allow(dead_code, reason = "not every test names its hosts")]
pub fn host<'a>(lab: &'a Lab, name: &str) -> Host<'a> {
    let id = name.parse().expect("the name of a host");
    lab.host(id).expect("a host")
}

/// Runs a program that must succeed; what it says on standard output.
pub fn run(host: &Host<'_>, words: &[&str]) -> String {
    let output = host.run(words).expect("it runs");
    assert!(output.success(), "{words:?}: {}", output.text());
    String::from_utf8(output.stdout).expect("UTF-8")
}
