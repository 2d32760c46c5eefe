//! How long clients wait when the primary's host is killed: `understudy demo --kills N --json`,
//! with `KILLS` (default 5) kills in a row, each with a fresh replica paired before.

#![allow(
    clippy::cast_precision_loss,
    reason = "figures for people; none comes near 2^52"
)]

mod common;

use std::process::Command;

use common::{Figures, can_run, median, program, quantile};

fn main() {
    if !can_run(&[]) {
        return;
    }
    let kills = std::env::var("KILLS").unwrap_or_else(|_| "5".to_owned());
    let said = Command::new(program())
        .args(["demo", "--kills", &kills, "--json"])
        .output()
        .expect("the demo");
    let report: serde_json::Value =
        serde_json::from_slice(&said.stdout).unwrap_or_else(|error| panic!("{error}: {said:?}"));
    let milliseconds = |key: &str| -> Vec<f64> {
        let kills = report["kills"].as_array().expect("kills");
        let figure = |kill: &serde_json::Value| kill[key].as_u64().expect("a figure") as f64 / 1e3;
        kills.iter().map(figure).collect()
    };
    let mut figures = Figures::default();
    let mut first = milliseconds("first_answer_us");
    let count = first.len();
    figures.at_most(
        "from SIGKILL to the first answer, median",
        median(&mut first),
        400.0,
        " ms",
    );
    figures.at_most(
        &format!("from SIGKILL to the first answer, worst of {count}"),
        quantile(&mut first, 1.0),
        1_000.0,
        " ms",
    );
    println!(
        "longest time without any answer: {:.0} ms",
        quantile(&mut milliseconds("gap_us"), 1.0)
    );
    for key in ["acknowledged", "lost", "undone", "repeated"] {
        println!("{key}: {}", report[key]);
    }
    assert!(said.status.success(), "a promise was broken: {report}");
    figures.end();
}
