//! How Linux guests end, or do not, on emulated hosts: with a panic, with a full disk, in a loop that
//! makes no exit. `status` says it clearly, and every copy says the same: two copies on two of three
//! hosts, and with `UNDERSTUDY_SOAK=1` three, which takes far longer where few processors emulate many.
//! (`ends/` has what no Linux does by itself, and what a host's death changes.)

#[path = "common/lab.rs"]
mod common;
#[path = "common/linux.rs"]
mod linux;
#[path = "common/site.rs"]
mod site;
#[path = "common/skip.rs"]
mod skip;

use common::{host, lab};
use linux::{Kind, image, soak};
use serde_json::Value;
use site::{HOSTS, Site, of};

/// A host's memory, in MiB: three guests, each twice while it is loaded.
const MEMORY: u32 = 2000;

/// A guest that shows no landmark for so long computes, in nanoseconds.
const LONG: u64 = 3_000_000_000;

/// A guest, and what becomes of it.
struct Case {
    name: &'static str,
    command: &'static str,
    /// What it says last on its console, among other things.
    says: &'static str,
    /// How it ends; none: never, and it makes no exit.
    ends: Option<&'static str>,
}

const CASES: [Case; 3] = [
    // The kernel starts the machine again a second after a panic (`panic=1`), which ends it here.
    Case {
        name: "panics",
        command: "echo 1 >/proc/sys/vm/panic_on_oom; tail /dev/zero",
        says: "Kernel panic - not syncing: Out of memory",
        ends: Some("reset"),
    },
    Case {
        name: "fills-its-disk",
        command: "dd if=/dev/zero of=/data/file bs=64k",
        says: "No space left on device",
        ends: Some("power_off"),
    },
    // What it says leaves when it sleeps: in the loop nothing does.
    Case {
        name: "loops",
        command: "echo it loops; sleep 1; while :; do :; done",
        says: "it loops",
        ends: None,
    },
];

#[test]
fn linux_guests_end_the_same_on_every_copy() {
    let test = "linux_guests_end_the_same_on_every_copy";
    let Some(image) = image(test, Kind::Small) else {
        return;
    };
    let Some((lab, folder)) = lab(test, 3, MEMORY) else {
        return;
    };
    let site = Site::open(lab, folder, image.path());
    for case in &CASES {
        comes_to_its_end(&site, case);
    }
    site.until("the table says it, too", |_| {
        let said = site.operate(&["status"]).ok()?;
        CASES.iter().all(|case| shown(&said, case)).then_some(())
    });
    site.lab.down().expect("it ends");
}

/// The hosts that have a copy of each guest; the first is its first primary.
fn copies() -> &'static [&'static str] {
    if soak() { &HOSTS } else { &HOSTS[..2] }
}

fn comes_to_its_end(site: &Site, case: &Case) {
    site.put_image(case.name, case.command);
    // A host is a copy when its guest has executed nearly everything, and emulated hosts are slow.
    let mut words = vec!["pair", case.name, "--image", case.name, "--wait", "400"];
    let (first, others) = copies().split_first().expect("copies");
    words.extend(["--primary", first]);
    for other in others {
        words.extend(["--replica", other]);
    }
    site.operate(&words).expect("paired");
    let console = format!("cat /data/config/data/vms/{}/console.log", case.name);
    site.until(&format!("it {}", case.name), |status| {
        let all = all_say_the_same(status, case);
        // Before its last words it may compute for long, too. A host has on its console what was said
        // while it reigned.
        let says = |name| {
            let said = host(&site.lab, name).run(&["sh", "-c", &console]);
            said.expect("it runs").text().contains(case.says)
        };
        (all && copies().iter().copied().any(says)).then_some(())
    });
}

/// Whether the guest has ended on all hosts, or, if it never ends, is seen to compute; all of them at
/// the end of the same log.
fn all_say_the_same(status: &Value, case: &Case) -> bool {
    let each = copies().iter().map(|host| of(status, host, case.name));
    let mut all: Vec<&Value> = each.collect();
    // Slow hosts may have promoted another than the first.
    all.sort_by_key(|one| one["node"]["role"] != "primary");
    let (first, others) = all.split_first().expect("copies");
    let alike = |place: &str| {
        others
            .iter()
            .all(|one| one.pointer(place) == first.pointer(place))
    };
    let members = first["node"]["record"]["members"].as_array();
    if members.is_none_or(|members| members.len() != others.len()) {
        return false;
    }
    if let Some(how) = case.ends {
        return first["guest"]["ended"]["how"] == how && alike("/guest/ended");
    }
    let silence = first["guest"]["silence"].as_u64().unwrap_or_default();
    silence > LONG && alike("/node/executed") && alike("/guest/ended")
}

/// Whether the table of `status` says it, on each host's line.
fn shown(said: &str, case: &Case) -> bool {
    let title = format!("{}: ", case.name);
    let part = said.split("VM ").find(|part| part.starts_with(&title));
    let lines = part.into_iter().flat_map(str::lines);
    let rows = lines.filter(|row| {
        let first = row.split_whitespace().next();
        first.is_some_and(|first| copies().contains(&first))
    });
    let words = match case.ends {
        Some(how) => format!("the guest has ended: {}", how.replace('_', " ")),
        None => "computes without an exit for".to_owned(),
    };
    let mut right = 0;
    for row in rows {
        // Only who records it knows that a guest computes.
        let expected = case.ends.is_some() || row.contains("PRIMARY");
        right += usize::from(row.contains(&words) == expected);
    }
    right == copies().len()
}
