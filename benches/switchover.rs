//! How long clients wait when the primary's host is killed: `understudy demo --kills N --json`,
//! with `KILLS` (default 5) kills in a row, each with a fresh replica paired before.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures for people; none comes near 2^52"
)]

use std::path::Path;
use std::process::Command;

fn main() {
    if !Path::new("/dev/kvm").exists() {
        println!("SKIPPED: this bench needs /dev/kvm");
        return;
    }
    let kills = std::env::var("KILLS").unwrap_or_else(|_| "5".to_owned());
    let said = Command::new(env!("CARGO_BIN_EXE_understudy"))
        .args(["demo", "--kills", &kills, "--json"])
        .output()
        .expect("the demo");
    let report: serde_json::Value =
        serde_json::from_slice(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    let figures = |key: &str| -> Vec<f64> {
        let kills = report["kills"].as_array().into_iter().flatten();
        let mut figures: Vec<f64> = kills
            .filter_map(|kill| kill[key].as_u64())
            .map(|us| us as f64 / 1e3)
            .collect();
        figures.sort_by(f64::total_cmp);
        figures
    };
    for (key, what) in [
        ("first_answer_us", "from SIGKILL to the first answer"),
        ("gap_us", "longest gap without any answer"),
    ] {
        let figures = figures(key);
        let (Some(worst), Some(median)) = (figures.last(), figures.get(figures.len() / 2)) else {
            panic!("no kills in {report}");
        };
        println!(
            "{what}: median {median:.0} ms, worst of {} {worst:.0} ms",
            figures.len()
        );
    }
    for key in ["acknowledged", "lost", "undone", "repeated"] {
        println!("{key}: {}", report[key]);
    }
    assert!(said.status.success(), "a promise was broken: {report}");
}
