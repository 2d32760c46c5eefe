//! What is said to `tc` inside a host, so that its links are as long as they are asked to be.
//!
//! Each end delays what it sends. The machine's kernel may have no netem, so a host delays what comes
//! from the machine, too.

use std::fmt::Write as _;

use crate::lab::state::{Delay, End, HostId, MAX_HOSTS};

/// By its path: busybox has a poorer one of the same name.
const TC: &str = "/bin/tc";
/// Frames that may be on a link.
const LIMIT: u32 = 100_000;

/// The words of a program that sets the delays from `host` to these others; it may be run again.
pub fn words(host: HostId, delays: &[(End, Delay)]) -> Vec<String> {
    let mut script = format!("set -e\n{TC} qdisc show dev eth0 | grep -q 'qdisc prio 1:' || {{\n");
    script.push_str("ip link set ifb0 up\n");
    let mut once = format!(
        "qdisc add dev eth0 root handle 1: prio bands 16 priomap{}\n",
        " 0".repeat(16)
    );
    let others = HostId::first(MAX_HOSTS)
        .filter(|other| *other != host)
        .map(End::Host)
        .chain([End::Machine]);
    for other in others {
        // Writing to a string cannot fail.
        let _ = writeln!(
            once,
            "filter add dev eth0 parent 1: protocol ip prio 1 u32 match ip dst {}/32 flowid 1:{:x}",
            other.address(),
            band(other),
        );
    }
    let _ = writeln!(once, "qdisc add dev eth0 ingress");
    let _ = writeln!(
        once,
        "filter add dev eth0 parent ffff: protocol ip prio 1 u32 match ip src {}/32 action mirred egress redirect dev ifb0",
        End::Machine.address(),
    );
    let _ = writeln!(script, "{TC} -batch - <<X\n{once}X\n}}");
    for (other, delay) in delays {
        let band = band(*other);
        set(
            &mut script,
            &format!("eth0 parent 1:{band:x} handle {band:x}0:"),
            *delay,
        );
        if *other == End::Machine {
            set(&mut script, "ifb0 root handle 1:", *delay);
        }
    }
    ["sh", "-c", &script].map(String::from).into()
}

/// The band of the frames to an end; the first one is for all that is not delayed.
fn band(to: End) -> u8 {
    match to {
        End::Host(host) => host.number() + 1,
        End::Machine => MAX_HOSTS + 2,
    }
}

fn set(script: &mut String, place: &str, delay: Delay) {
    let _ = if delay.is_none() {
        // There may be none.
        let place = place.split(" handle").next().unwrap_or(place);
        writeln!(script, "{TC} qdisc del dev {place} 2>/dev/null || true")
    } else {
        let Delay { ms, loss_percent } = delay;
        writeln!(
            script,
            "{TC} qdisc replace dev {place} netem limit {LIMIT} delay {ms}ms loss {loss_percent}%"
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_a_band_of_its_own() {
        let hosts = HostId::first(MAX_HOSTS).map(End::Host);
        let mut bands: Vec<_> = hosts.chain([End::Machine]).map(band).collect();
        bands.sort_unstable();
        assert_eq!(bands, (2..=16).collect::<Vec<_>>());
    }

    #[test]
    fn a_delay_of_nothing_is_taken_away() {
        let h1: HostId = "h1".parse().expect("a host");
        let to = |end: &str, ms| {
            let delay = Delay {
                ms,
                loss_percent: 0.0,
            };
            (end.parse::<End>().expect("an end"), delay)
        };
        let words = words(h1, &[to("h2", 40), to("machine", 0)]);
        let script = &words[2];
        assert!(
            script.contains("replace dev eth0 parent 1:3 handle 30: netem limit 100000 delay 40ms")
        );
        assert!(script.contains("qdisc del dev eth0 parent 1:10 2>"));
        assert!(script.contains("qdisc del dev ifb0 root 2>"));
    }
}
