//! What happened after a kill, put in order from the journals of the hosts and from what the
//! clients saw.
//!
//! The journals' clocks are `CLOCK_BOOTTIME`: on one machine they are the same clock.

use serde::Serialize;

use crate::agent::journal::{Line, What};
use crate::protocol::{Event, HostName, Time};

/// What the clients saw of a failover.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The last answer before the silence.
    pub last_answer: Time,
    /// The first after it.
    pub first_answer: Time,
}

/// One moment of a failover.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What happened.
    pub what: &'static str,
    /// On which host, where it was one.
    pub host: Option<HostName>,
    /// When, in nanoseconds of `CLOCK_BOOTTIME`.
    pub clock: u64,
    /// How long after the kill, in microseconds; before it, negative.
    pub after_kill_us: i64,
    /// More, in the words of the journal.
    pub detail: Option<String>,
}

/// The moments of the failover that followed a kill, in the order of time. Only the host that went
/// live in the end has its claim shown.
pub fn timeline(old: &HostName, killed: Time, seen: Option<Seen>, journal: &[Line]) -> Vec<Step> {
    let at = |what, host: Option<&HostName>, clock: u64, detail: Option<&str>| Step {
        what,
        host: host.cloned(),
        clock,
        after_kill_us: micros_after(clock, killed),
        detail: detail.map(str::to_owned),
    };
    let since: Vec<&Line> = journal
        .iter()
        .filter(|line| line.clock >= killed.as_nanos() && line.host != *old)
        .collect();
    let first = |wanted: &dyn Fn(&Line, &Event) -> bool| {
        since
            .iter()
            .filter(|line| matches!(&line.what, What::Decision(event) if wanted(line, event)))
            .min_by_key(|line| line.clock)
            .copied()
    };
    let live = first(&|_, event| matches!(event, Event::WentLive { .. }));
    let winner = live.map(|line| &line.host);
    let winners = |line: &Line| Some(&line.host) == winner;
    let moments = [
        (
            "suspicion",
            first(&|_, event| matches!(event, Event::Suspected { primary, .. } if primary == old)),
        ),
        (
            "claim",
            first(&|line, event| winners(line) && matches!(event, Event::Claimed { .. })),
        ),
        (
            "seal",
            first(&|line, event| winners(line) && matches!(event, Event::SealsWon { .. })),
        ),
        (
            "record",
            first(
                &|_, event| matches!(event, Event::RecordCommitted { primary, .. } if Some(&primary.host) == winner),
            ),
        ),
        ("live", live),
    ];
    let mut steps = vec![at("kill", Some(old), killed.as_nanos(), None)];
    for (what, line) in moments {
        steps.extend(line.map(|line| at(what, Some(&line.host), line.clock, Some(&line.text))));
    }
    if let Some(seen) = seen {
        let last = seen.last_answer.as_nanos();
        steps.push(at("last output", Some(old), last, None));
        steps.push(at(
            "first answer",
            winner,
            seen.first_answer.as_nanos(),
            None,
        ));
    }
    steps.sort_by_key(|step| step.clock);
    steps
}

fn micros_after(clock: u64, killed: Time) -> i64 {
    let difference = i128::from(clock) - i128::from(killed.as_nanos());
    i64::try_from(difference / 1000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Epoch, Incarnation, Member, Version};
    use replay_log::{LogIndex, Term};

    fn host(name: &str) -> HostName {
        HostName::new(name).expect("a name")
    }

    fn line(name: &str, clock: u64, event: Event) -> Line {
        Line {
            number: clock,
            at: String::new(),
            clock,
            host: host(name),
            vm: None,
            text: event.to_string(),
            what: event.into(),
        }
    }

    fn suspected() -> Event {
        Event::Suspected {
            primary: host("a"),
            silence_ms: 200,
        }
    }

    fn claimed() -> Event {
        Event::Claimed {
            term: Term(2),
            base: Version::default(),
            seals: 1,
        }
    }

    #[test]
    fn the_winners_steps_are_shown_in_the_order_of_time() {
        let member = |name| Member {
            host: host(name),
            incarnation: Incarnation(1),
        };
        let version = Version {
            term: Term(2),
            epoch: Epoch(3),
        };
        let journal = [
            line("c", 290_000, suspected()),
            line("c", 300_000, claimed()),
            line("b", 280_000, suspected()),
            line("b", 310_000, claimed()),
            line(
                "b",
                320_000,
                Event::SealsWon {
                    term: Term(2),
                    by: vec![host("b")],
                    index: LogIndex(9),
                    holder: host("b"),
                },
            ),
            line(
                "c",
                330_000,
                Event::RecordCommitted {
                    version,
                    primary: member("b"),
                    members: vec![member("c")],
                },
            ),
            line("b", 340_000, Event::WentLive { term: Term(2) }),
            // Of the boot, long before.
            line("a", 10_000, Event::WentLive { term: Term(1) }),
        ];
        let seen = Seen {
            last_answer: Time::from_nanos(90_000),
            first_answer: Time::from_nanos(350_000),
        };
        let steps = timeline(&host("a"), Time::from_nanos(100_000), Some(seen), &journal);
        let order: Vec<_> = steps
            .iter()
            .map(|step| (step.what, step.host.as_ref().map_or("", HostName::as_str)))
            .collect();
        assert_eq!(
            order,
            [
                ("last output", "a"),
                ("kill", "a"),
                ("suspicion", "b"),
                ("claim", "b"),
                ("seal", "b"),
                ("record", "c"),
                ("live", "b"),
                ("first answer", "b"),
            ]
        );
        assert_eq!(steps[0].after_kill_us, -10);
        assert_eq!(steps[7].after_kill_us, 250);
    }

    #[test]
    fn without_a_promotion_nothing_is_made_up() {
        let journal = [
            line("b", 280_000, suspected()),
            line("b", 300_000, claimed()),
        ];
        let steps = timeline(&host("a"), Time::from_nanos(100_000), None, &journal);
        let order: Vec<_> = steps.iter().map(|step| step.what).collect();
        assert_eq!(order, ["kill", "suspicion"]);
    }
}
