//! How a VM stands, in words: who runs it, who could go on, what is waited for when nobody does, and
//! what an order that accepts loss would cost.
//!
//! All of it by what the hosts say that they *are*. The record alone does not do: it names who was to
//! run the VM when it was last changed, and that host may have restarted since, or wait for others.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::output;
use crate::agent::operator::{HostStatus, OperatorError, VmStatus};
use crate::protocol::{
    FollowerStatus, Health, HostName, Record, RoleName, SetBack, Span, Status, Stumble, Time,
    VmName,
};

/// The order that gives a witness back what it has lost.
pub const RECOVER: &str = "'understudy witness recover' gives it back what the hosts know";

/// What every host says, or why it says nothing.
pub type Look = BTreeMap<HostName, Result<HostStatus, OperatorError>>;

/// Below this a replica goes on as good as at once.
const AT_ONCE: Duration = Duration::from_millis(200);
/// A replica that has heard its primary this recently hears it.
const HEARS: Span = Span::from_millis(1_000);
/// So few entries are executed in no time, unless the guest computes between them: then the age of the
/// first is how long that takes.
const FEW_ENTRIES: u64 = 2_000;
/// About what executing one entry takes.
const ENTRY: Duration = Duration::from_micros(10);

/// What the hosts of a cluster say of one VM.
pub struct Standing<'a> {
    vm: &'a VmName,
    /// The newest record that any of them knows.
    pub record: &'a Record,
    seen: BTreeMap<&'a HostName, (Time, &'a VmStatus)>,
}

/// The order that goes on with what one host has.
pub fn accepting_loss(vm: &VmName, to: &HostName) -> String {
    format!("'understudy switchover {vm} --to {to} --accept-loss'")
}

/// The VMs of which any host knows a record.
pub fn all(look: &Look) -> Vec<Standing<'_>> {
    let mut names: Vec<_> = look
        .values()
        .flatten()
        .flat_map(|status| &status.vms)
        .map(|seen| &seen.vm)
        .collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .filter_map(|vm| Standing::of(look, vm))
        .collect()
}

impl<'a> Standing<'a> {
    /// What is said of this VM; `None` when no host knows a record of it.
    pub fn of(look: &'a Look, vm: &'a VmName) -> Option<Self> {
        let seen: BTreeMap<_, _> = look
            .iter()
            .filter_map(|(host, status)| {
                let status = status.as_ref().ok()?;
                let seen = status.vms.iter().find(|seen| seen.vm == *vm)?;
                Some((host, (status.now, seen)))
            })
            .collect();
        let records = seen.values().filter_map(|(_, s)| s.node.record.as_ref());
        let record = records.max_by_key(|record| record.version())?;
        Some(Self { vm, record, seen })
    }

    /// Which VM.
    pub const fn vm(&self) -> &'a VmName {
        self.vm
    }

    /// What a host says of it.
    pub fn on(&self, host: &HostName) -> Option<&'a VmStatus> {
        self.seen.get(host).map(|(_, seen)| *seen)
    }

    fn node(&self, host: &HostName) -> Option<&'a Status> {
        self.on(host).map(|seen| &seen.node)
    }

    /// The host that is in this role by the newest record that is known.
    fn in_role(&self, role: RoleName) -> Option<&'a HostName> {
        let newest = self.record.version();
        let known = |node: &Status| node.record.as_ref().map(Record::version);
        self.seen
            .iter()
            .find(|(_, (_, s))| s.node.role == role && known(&s.node) == Some(newest))
            .map(|(host, _)| *host)
    }

    /// The host that runs the guest.
    pub fn runs_on(&self) -> Option<&'a HostName> {
        self.in_role(RoleName::Primary)
    }

    /// A host that hears the primary of the newest record, while the primary itself does not answer
    /// whoever asks here.
    pub fn heard_by(&self) -> Option<&'a HostName> {
        let primary = &self.record.primary.host;
        if self.seen.contains_key(primary) {
            return None;
        }
        let hears = |node: &Status| node.primary_silence.is_some_and(|silence| silence < HEARS);
        self.seen
            .iter()
            .find(|(_, (_, s))| s.node.record.as_ref() == Some(self.record) && hears(&s.node))
            .map(|(host, _)| *host)
    }

    /// Why an order that accepts loss for `to` would be a mistake: somebody else runs the VM, and lets
    /// its output go.
    pub fn runs_elsewhere(&self, to: &HostName) -> Option<String> {
        let vm = self.vm;
        let better = format!("use 'understudy switchover {vm} --to {to}', which loses nothing");
        let host = self.runs_on()?;
        let stalled = self.node(host)?.stalled_since.is_some();
        (host != to && !stalled).then(|| format!("{host} runs {vm}: {better}"))
    }

    /// How the guest has ended, if it has, as the host that runs it says.
    pub fn ended(&self) -> Option<String> {
        let seen = self.on(self.runs_on()?)?;
        let ending = seen.guest.as_ref()?.ended?;
        Some(ending.to_string())
    }

    /// One sentence, without the VM's name.
    pub fn sentence(&self) -> String {
        if let Some(host) = self.runs_on() {
            return self.running(host);
        }
        if let Some(host) = self.in_role(RoleName::HandingOver) {
            return format!("{host} hands it over, and has stopped the guest for that");
        }
        if let Some(host) = self.in_role(RoleName::GoingLive) {
            let behind = self
                .node(host)
                .map_or(0, |node| node.stored.since(node.executed));
            return format!(
                "{host} reigns in term {} and is about to run it: it has {behind} entries of the log still to execute",
                self.record.term
            );
        }
        if let Some(host) = self.heard_by() {
            return format!(
                "{} runs it in term {}, as {host} says: it does not answer here",
                self.record.primary.host, self.record.term
            );
        }
        format!("NOBODY RUNS IT: {}", self.nobody())
    }

    fn running(&self, host: &HostName) -> String {
        let record = self.record;
        let mut text = format!(
            "{host} runs it in term {}, rule {}",
            record.term, record.policy.rule
        );
        if let Some(ending) = self.ended() {
            let _ = write!(text, "; THE GUEST HAS ENDED: {ending}");
        }
        let ago = |since: fn(&Status) -> Option<Time>| {
            let (now, seen) = self.seen.get(host)?;
            Some(self::ago(*now, since(&seen.node)?))
        };
        if record.members.is_empty() {
            text.push_str(", UNPROTECTED");
            if let Some(ago) = ago(|node| node.unprotected_since) {
                let _ = write!(text, " since {ago} ago");
            }
        } else {
            let _ = write!(text, ", {}", self.successors().join("; "));
        }
        if let Some(ago) = ago(|node| node.stalled_since) {
            let _ = write!(text, "; OUTPUT WAITS for copies since {ago} ago");
        }
        if record.loss {
            text.push_str("; it began with less than was acknowledged before");
        }
        if let Some(failed) = &record.failed {
            let _ = write!(text, "; {}", stumbled(failed));
        }
        if let Some(why) = self.node(host).and_then(|node| node.full.as_ref()) {
            let _ = write!(text, "; THE DISK OF {host} TAKES NOTHING MORE: {why}");
        }
        text
    }

    /// Who may succeed, and how soon; and who is named and cannot, with the reason.
    pub fn successors(&self) -> Vec<String> {
        let (mut at_once, mut words) = (Vec::new(), Vec::new());
        for member in &self.record.members {
            let host = &member.host;
            match (self.cannot_start(host), self.ready_in(host)) {
                (Some(why), _) => words.push(format!("{host} CANNOT SUCCEED: {why}")),
                (None, Some(time)) if time >= AT_ONCE => words.push(format!(
                    "{host} may succeed in about {:.1} s",
                    time.as_secs_f64()
                )),
                (None, _) => at_once.push(host.as_str()),
            }
        }
        if !at_once.is_empty() {
            words.insert(0, format!("{} may succeed", at_once.join(", ")));
        }
        words
    }

    /// Why nobody could go on with the copy on this host, by its own word, or by its primary's where it
    /// does not answer.
    pub fn cannot_start(&self, host: &HostName) -> Option<String> {
        let own = self.on(host);
        let health = own.map(|seen| seen.node.health);
        let health = health.or_else(|| Some(self.follower(host)?.health))?;
        let words = match health {
            Health::Well => return None,
            Health::Full => "its disk takes nothing more",
            Health::Unable => "its VMM does not come to the end of what it holds",
        };
        let why = own.and_then(|seen| seen.node.full.as_ref().or(seen.failure.as_ref()));
        Some(why.map_or_else(|| words.to_owned(), |why| format!("{words} ({why})")))
    }

    /// What the host that runs the guest says of a replica.
    fn follower(&self, host: &HostName) -> Option<&'a FollowerStatus> {
        let primary = self.node(self.runs_on()?)?;
        primary.followers.iter().find(|f| f.host == *host)
    }

    /// How long this replica would still execute what it holds, if the primary died now.
    pub fn ready_in(&self, host: &HostName) -> Option<Duration> {
        self.follower(host).map(still_to_execute)
    }

    /// Why nobody runs it, and what can be done about it.
    fn nobody(&self) -> String {
        let record = self.record;
        if let Some((host, kept)) = self.set_back() {
            return format!(
                "the witness has {kept} of it, and {host} has seen {}: {RECOVER}",
                record.version()
            );
        }
        if let Some(failed) = self.stopped_at() {
            let again = self.candidate().map_or(String::new(), |to| {
                format!("; {} tries once more", accepting_loss(self.vm, to))
            });
            return format!("{}{again}", stumbled(failed));
        }
        if let Some(host) = self.in_role(RoleName::Claimant) {
            return format!("{host} claims it");
        }
        let able: Vec<_> = self.able().map(HostName::as_str).collect();
        if able.len() >= record.seals() {
            return format!(
                "{} may claim it, and needs the witness for that",
                able.join(" or ")
            );
        }
        let starting = |(_, s): &(Time, &VmStatus)| s.node.role == RoleName::Starting;
        if self.seen.values().all(starting) {
            let hosts: Vec<_> = self.seen.keys().map(|host| host.as_str()).collect();
            return format!(
                "{} {} what is known of it, which needs the witness",
                hosts.join(", "),
                if hosts.len() == 1 {
                    "finds out"
                } else {
                    "find out"
                }
            );
        }
        let Some(to) = self.candidate() else {
            return format!("no host that answers has it; start {}", self.silent());
        };
        let silent = self.silent();
        let order = accepting_loss(self.vm, to);
        if silent.is_empty() {
            format!(
                "its copies have lost what they had in memory; {to} boots it from its disks as soon as it may, or with {order}"
            )
        } else {
            format!(
                "{to} waits for {silent} ({order} goes on without, and may lose what only {silent} held)"
            )
        }
    }

    /// A host to which the witness has told less than it has seen, and what that was.
    fn set_back(&self) -> Option<(&'a HostName, String)> {
        self.seen.iter().find_map(|(host, (_, seen))| {
            let kept = seen.node.keeper_set_back?;
            let kept = match kept {
                SetBack::Emptied => "nothing".to_owned(),
                SetBack::To(kept) => kept.to_string(),
            };
            Some((*host, kept))
        })
    }

    /// Where the guest has stopped so many hosts that none claims it any more.
    fn stopped_at(&self) -> Option<&'a Stumble> {
        let told = self
            .seen
            .values()
            .find_map(|(_, seen)| seen.node.stopped_at.as_ref());
        let failed = self.record.failed.as_ref();
        told.or(failed.filter(|failed| failed.reigns >= Stumble::LIMIT))
    }

    /// The copies that answer and are what the record names: they may succeed, together if they are
    /// enough.
    fn able(&self) -> impl Iterator<Item = &'a HostName> {
        let copies = self.record.all_copies();
        copies
            .filter(|copy| {
                let node = self.node(&copy.host);
                node.is_some_and(|node| node.incarnation == copy.incarnation)
            })
            .map(|copy| &copy.host)
    }

    /// The copies that do not answer.
    fn silent(&self) -> String {
        let silent = self
            .record
            .all_copies()
            .map(|copy| &copy.host)
            .filter(|host| !self.seen.contains_key(host));
        let mut silent: Vec<_> = silent.map(HostName::as_str).collect();
        silent.sort_unstable();
        silent.join(", ")
    }

    /// The host that would lose least: that with the longest log, or, where nobody has one, the last to
    /// run the guest, who has its disks.
    fn candidate(&self) -> Option<&'a HostName> {
        let record = self.record;
        let concerned = self
            .seen
            .iter()
            .filter(|(host, _)| record.concerns(host))
            .map(|(host, (_, seen))| (seen.node.stored, *host));
        let primary = &record.primary.host;
        let (held, longest) = concerned.max_by_key(|(held, host)| (*held, *host == primary))?;
        let empty = held.0 == 0;
        (!empty || longest == primary).then_some(longest)
    }

    /// What `to` would go on with, and what that may cost: said before the order is given.
    pub fn cost(&self, to: &HostName) -> String {
        let Some(node) = self.node(to) else {
            return format!("{to} says nothing of {}", self.vm);
        };
        let held = |(host, (_, s)): (&&'a HostName, &(Time, &'a VmStatus))| {
            self.record
                .concerns(host)
                .then_some((s.node.stored, s.node.committed))
        };
        let known: Vec<_> = self.seen.iter().filter_map(held).collect();
        let longest = known.iter().map(|(held, _)| *held).max();
        let longest = longest.unwrap_or_default().max(node.stored);
        if longest.0 == 0 {
            return format!(
                "{to} has no log of {}: it would boot from its disks as the guest last flushed them there, and whatever was only in memory would be lost",
                self.vm
            );
        }
        let committed = known.iter().map(|(_, committed)| *committed).max();
        let missing = committed.unwrap_or_default().since(longest);
        let lacks = match missing {
            0 => "lacking nothing that is known to be committed".to_owned(),
            1 => "without 1 entry that is known to be committed".to_owned(),
            more => format!("without {more} entries that are known to be committed"),
        };
        let mut text = format!("{to} would go on from entry {longest} of the log, {lacks}");
        let primary = &self.record.primary.host;
        match node.primary_silence {
            _ if to == primary => text.push_str(
                "; whatever it acknowledged as the primary and had in memory only is lost",
            ),
            Some(silence) => {
                let silence = Duration::from_nanos(silence.as_nanos());
                let _ = write!(
                    text,
                    "; whatever was acknowledged in the last {}, since {to} has heard {primary}, may be lost",
                    output::span(silence)
                );
            }
            None => text.push_str("; whatever was acknowledged later may be lost"),
        }
        let silent = self.silent();
        if !silent.is_empty() {
            let _ = write!(text, "; {silent} cannot be asked for more");
        }
        text
    }
}

/// How long a follower would still execute what it holds.
fn still_to_execute(follower: &FollowerStatus) -> Duration {
    let behind = follower.held.since(follower.executed);
    if behind > FEW_ENTRIES {
        ENTRY.saturating_mul(u32::try_from(behind).unwrap_or(u32::MAX))
    } else {
        Duration::from_nanos(follower.lag.as_nanos())
    }
}

fn stumbled(failed: &Stumble) -> String {
    let reigns = match failed.reigns {
        1 => "one reign".to_owned(),
        reigns => format!("{reigns} reigns in a row"),
    };
    format!(
        "{reigns} failed at position {}: {}",
        failed.at, failed.reason
    )
}

/// How long ago something was, in words.
pub fn ago(now: Time, since: Time) -> String {
    output::span(Duration::from_nanos(now.since(since).as_nanos()))
}

#[cfg(test)]
pub(super) mod tests;
