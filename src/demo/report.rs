//! What the demo found, for people and for tools.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::load::LoadReport;
use super::timeline::Step;
use crate::cli::output;
use crate::protocol::HostName;

/// One kill and what followed.
#[derive(Clone, Debug, Serialize)]
pub struct Kill {
    /// The primary that was killed.
    pub old: HostName,
    /// The host that went on.
    pub new: HostName,
    /// The new term.
    pub term: u64,
    /// The longest time in which no client got an answer, in microseconds.
    pub gap_us: Option<u64>,
    /// From the kill to the first answer of the new primary, in microseconds.
    pub first_answer_us: Option<u64>,
    /// The moments in between.
    pub timeline: Vec<Step>,
    /// How long it took until there were as many copies as before, in milliseconds; `None` after
    /// the last kill, when nobody waits for it.
    pub healed_ms: Option<u64>,
}

/// What the demo found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The commit rule.
    pub rule: String,
    /// Every kill.
    pub kills: Vec<Kill>,
    /// How many kills there were to be.
    pub kills_wanted: u32,
    /// Increments that were answered.
    pub acknowledged: u64,
    /// Acknowledged increments that were gone in the end.
    pub lost: u64,
    /// Acknowledged increments that a later answer took back.
    pub undone: u64,
    /// Increments that were executed more than once.
    pub repeated: u64,
    /// Connections that broke, each with the reason.
    pub broken: Vec<String>,
    /// The longest time that a client waited for its next answer, in microseconds.
    pub longest_gap_us: u64,
    /// Half of all increments were answered within this many microseconds.
    pub median_us: u64,
    /// 99 % of them within this many.
    pub p99_us: u64,
    /// How long it all took, in milliseconds.
    pub took_ms: u64,
}

impl Report {
    /// Puts together what the load found and what the kills showed.
    pub fn new(rule: String, kills: Vec<Kill>, kills_wanted: u32, load: LoadReport) -> Self {
        let micros = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        Self {
            rule,
            kills,
            kills_wanted,
            acknowledged: load.acknowledged,
            lost: load.lost,
            undone: load.undone,
            repeated: load.repeated,
            broken: load.broken,
            longest_gap_us: load.longest_gap.map_or(0, |gap| micros(gap.length())),
            median_us: micros(load.latencies.quantile(0.5)),
            p99_us: micros(load.latencies.quantile(0.99)),
            took_ms: 0,
        }
    }

    /// Whether everything held that is promised.
    pub fn holds(&self) -> bool {
        self.kills.len() == self.kills_wanted as usize
            && self.kills.iter().all(|kill| kill.gap_us.is_some())
            && self.acknowledged > 0
            && self.lost == 0
            && self.undone == 0
            && self.repeated == 0
            && self.broken.is_empty()
    }
}

impl fmt::Display for Kill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} was killed, {} went on in term {}:",
            self.old, self.new, self.term
        )?;
        for step in &self.timeline {
            let host = step.host.as_ref().map_or("", HostName::as_str);
            let detail = step.detail.as_deref().unwrap_or_default();
            let span = Duration::from_micros(step.after_kill_us.unsigned_abs());
            let sign = if step.after_kill_us < 0 { '-' } else { '+' };
            let after = format!("{sign}{:.1}", span.as_secs_f64() * 1000.0);
            let line = format!("{after:>8} ms  {:<12}  {host:<8}  {detail}", step.what);
            writeln!(f, "  {}", line.trim_end())?;
        }
        match self.gap_us {
            Some(gap) => write!(f, "  no client got an answer for {}", micros(gap))?,
            None => write!(f, "  no answer came after it")?,
        }
        match self.healed_ms {
            Some(healed) => {
                let healed = Duration::from_millis(healed);
                write!(f, "; whole again {:.1} s later", healed.as_secs_f64())
            }
            None => Ok(()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} acknowledged writes by rule {}, median {}, p99 {}",
            self.acknowledged,
            self.rule,
            micros(self.median_us),
            micros(self.p99_us)
        )?;
        writeln!(
            f,
            "longest gap any client saw: {}",
            micros(self.longest_gap_us)
        )?;
        writeln!(f, "acknowledged writes lost:   {}", self.lost)?;
        writeln!(f, "acknowledged writes undone: {}", self.undone)?;
        writeln!(f, "writes executed twice:      {}", self.repeated)?;
        write!(f, "connections broken:         {}", self.broken.len())?;
        for why in &self.broken {
            write!(f, "\n  {why}")?;
        }
        Ok(())
    }
}

fn micros(micros: u64) -> String {
    output::span(Duration::from_micros(micros))
}
