//! `log`: what is in a recorded log, and whether it is whole. Reads only; works without KVM.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use replay_log::{
    Answer, Arrival, DiskOutcome, Entry, Group, GroupBody, LogIndex, LogTip, OpenError, Report,
    SegmentReport, verify,
};
use serde::Serialize;
use thiserror::Error;

use super::failure::{Exit, Failure, OrExit as _};
use super::output;

/// What `log` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Count what a log holds: segments, entries of each kind, bytes
    Stat(Where),
    /// Print the entries, one a line
    Inspect {
        #[command(flatten)]
        place: Where,
        /// Begin with this entry
        #[arg(long, value_name = "INDEX", default_value_t = 0)]
        from: u64,
        /// Print at most so many
        #[arg(long, value_name = "N")]
        limit: Option<u64>,
    },
    /// Check every checksum, the hash chain, and that every entry can be read
    Verify(Where),
}

#[derive(Debug, clap::Args)]
struct Where {
    /// The folder of the log
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why a log could not be looked at.
#[derive(Debug, Error)]
pub(super) enum LogError {
    #[error("there is no log in {}: name the folder that holds its segments (*.seg, *.open)", dir.display())]
    Nothing { dir: PathBuf },
    #[error(transparent)]
    Unreadable(#[from] OpenError),
    #[error("the log is damaged; the part before is good through entry {good}")]
    Damaged {
        good: LogIndex,
        #[source]
        damage: OpenError,
    },
}

impl From<LogError> for Failure {
    fn from(error: LogError) -> Self {
        let exit = match &error {
            LogError::Damaged { .. } | LogError::Unreadable(OpenError::Damaged(_)) => Exit::Corrupt,
            LogError::Nothing { .. } | LogError::Unreadable(_) => Exit::Failed,
        };
        Self::new(exit, error)
    }
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    match &args.command {
        Command::Stat(place) => stat(place),
        Command::Verify(place) => check(place),
        Command::Inspect { place, from, limit } => {
            inspect(place, LogIndex(*from), limit.unwrap_or(u64::MAX))
        }
    }
}

/// What `stat` and `verify` say of a log.
#[derive(Debug, Default, Serialize)]
struct Summary {
    segments: Vec<Segment>,
    first: u64,
    end: u64,
    /// The hash of everything, in hex: equal for equal logs.
    chain: String,
    file_bytes: u64,
    payload_bytes: u64,
    batches: u64,
    entries: BTreeMap<&'static str, u64>,
    /// Bytes of frames that arrived.
    frame_bytes: u64,
    landmarks: u64,
    terms: Vec<u64>,
    torn_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Segment {
    file: String,
    sealed: bool,
    first: u64,
    end: u64,
    batches: u64,
    bytes: u64,
    payload_bytes: u64,
}

/// Reads the whole log; what is good of it, and the damage if there is any.
fn survey(dir: &Path) -> Result<(Summary, Option<OpenError>), LogError> {
    let bar = output::bar(folder_bytes(dir));
    let mut summary = Summary::default();
    let mut done = (PathBuf::new(), 0);
    let report = verify(dir, |found| {
        if found.segment != done.0 {
            done = (found.segment.clone(), 0);
        }
        bar.inc(found.offset.saturating_sub(done.1));
        done.1 = found.offset;
        let term = found.batch.term().0;
        if summary.terms.last() != Some(&term) {
            summary.terms.push(term);
        }
        found
            .batch
            .entries()
            .flatten()
            .for_each(|entry| summary.count(&entry));
    })?;
    bar.finish_and_clear();
    if report.segments.is_empty() && report.damage.is_none() {
        return Err(LogError::Nothing {
            dir: dir.to_owned(),
        });
    }
    Ok((summary.with(&report), report.damage))
}

fn folder_bytes(dir: &Path) -> u64 {
    let files = fs::read_dir(dir).into_iter().flatten().flatten();
    files
        .filter_map(|file| Some(file.metadata().ok()?.len()))
        .sum()
}

impl Summary {
    fn count(&mut self, entry: &Entry) {
        *self.entries.entry(kind(entry)).or_default() += 1;
        self.landmarks = self.landmarks.max(entry.at().0);
        if let Entry::Group(Group {
            body: GroupBody::Arrival(Arrival::Frame { bytes, .. }),
            ..
        }) = entry
        {
            self.frame_bytes += bytes.len() as u64;
        }
    }

    fn with(mut self, report: &Report) -> Self {
        let LogTip { index, chain, .. } = report.tip;
        self.end = index.0;
        self.chain = output::hex(&chain.0);
        self.first = report.segments.first().map_or(0, |s| s.base.index.0);
        self.segments = report.segments.iter().map(Segment::from).collect();
        self.file_bytes = report.segments.iter().map(|s| s.bytes).sum();
        self.payload_bytes = report.segments.iter().map(|s| s.payload_bytes).sum();
        self.batches = report.segments.iter().map(|s| s.batches).sum();
        self.torn_bytes = report.torn.as_ref().map_or(0, |torn| torn.bytes);
        self
    }
}

impl From<&SegmentReport> for Segment {
    fn from(report: &SegmentReport) -> Self {
        Self {
            file: report.path.display().to_string(),
            sealed: report.sealed,
            first: report.base.index.0,
            end: report.tip.index.0,
            batches: report.batches,
            bytes: report.bytes,
            payload_bytes: report.payload_bytes,
        }
    }
}

/// The kind of an entry, as `stat` counts them.
fn kind(entry: &Entry) -> &'static str {
    match entry {
        Entry::Header(_) => "header",
        Entry::Mark(_) => "mark",
        Entry::Term(_) => "term",
        Entry::Group(group) => match &group.body {
            GroupBody::Exit { .. } => "exit",
            GroupBody::Arrival(Arrival::Frame { .. }) => "frame",
            GroupBody::Arrival(Arrival::DiskDone { .. }) => "disk",
            GroupBody::Arrival(Arrival::TimerDue { .. }) => "timer",
            GroupBody::Arrival(Arrival::Console { .. }) => "console",
        },
    }
}

fn finish(damage: Option<OpenError>, end: u64) -> Result<(), Failure> {
    match damage {
        None => Ok(()),
        Some(damage) => Err(LogError::Damaged {
            good: LogIndex(end),
            damage,
        }
        .into()),
    }
}

fn stat(place: &Where) -> Result<(), Failure> {
    let (summary, damage) = survey(&place.dir)?;
    if place.json {
        output::json(&summary)?;
        return finish(damage, summary.end);
    }
    let mut table = output::table(["segment", "entries", "batches", "on disk", "payload"]);
    for segment in &summary.segments {
        let sealed = if segment.sealed { "" } else { " (open)" };
        table.add_row([
            format!("{}{sealed}", segment.file),
            format!("{}..{}", segment.first, segment.end),
            segment.batches.to_string(),
            output::bytes(segment.bytes),
            output::bytes(segment.payload_bytes),
        ]);
    }
    output::line(format_args!("{table}\n"))?;
    let terms: Vec<_> = summary.terms.iter().map(ToString::to_string).collect();
    output::line(format_args!(
        "entries {}..{} over {} landmarks, terms {}",
        summary.first,
        summary.end,
        summary.landmarks,
        terms.join(", ")
    ))?;
    for (kind, count) in &summary.entries {
        output::line(format_args!("  {kind:<8} {count}"))?;
    }
    output::line(format_args!(
        "frames in: {}; payload {}; on disk {}",
        output::bytes(summary.frame_bytes),
        output::bytes(summary.payload_bytes),
        output::bytes(summary.file_bytes)
    ))?;
    output::line(format_args!("chain: {}", summary.chain))?;
    finish(damage, summary.end)
}

fn check(place: &Where) -> Result<(), Failure> {
    let (summary, damage) = survey(&place.dir)?;
    if place.json {
        output::json(&summary)?;
    } else {
        output::line(format_args!(
            "{} batches with entries {}..{} are whole; chain {}",
            summary.batches, summary.first, summary.end, summary.chain
        ))?;
        if summary.torn_bytes > 0 {
            output::line(format_args!(
                "the last write was cut off: its {} are left out, which is no damage",
                output::bytes(summary.torn_bytes)
            ))?;
        }
    }
    finish(damage, summary.end)
}

/// One entry, as `inspect --json` prints it.
#[derive(Serialize)]
struct Line<'a> {
    index: u64,
    position: u64,
    kind: &'static str,
    term: u64,
    segment: String,
    offset: u64,
    entry: &'a Entry,
}

fn inspect(place: &Where, from: LogIndex, limit: u64) -> Result<(), Failure> {
    let mut left = limit;
    let mut good = LogIndex::START;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut any = false;
    for found in replay_log::inspect(&place.dir).map_err(LogError::from)? {
        let found = found.map_err(|damage| LogError::Damaged { good, damage })?;
        (any, good) = (true, found.tip.index);
        if found.tip.index <= from {
            continue;
        }
        let entries = found.batch.decode().or_exit(Exit::Corrupt)?;
        for (index, entry) in (found.batch.first().0..).zip(&entries) {
            if index < from.0 {
                continue;
            }
            if left == 0 {
                return flushed(out.flush());
            }
            left -= 1;
            let line = Line {
                index,
                position: entry.at().0,
                kind: kind(entry),
                term: found.batch.term().0,
                segment: found.segment.display().to_string(),
                offset: found.offset,
                entry,
            };
            let written = if place.json {
                serde_json::to_writer(&mut out, &line)
                    .map_err(io::Error::from)
                    .and_then(|()| writeln!(out))
            } else {
                writeln!(
                    out,
                    "{index:>10}  @{:<10} {:<8} {}",
                    line.position,
                    line.kind,
                    describe(entry)
                )
            };
            if written.is_err() {
                return flushed(written);
            }
        }
    }
    if !any {
        return Err(LogError::Nothing {
            dir: place.dir.clone(),
        }
        .into());
    }
    flushed(out.flush())
}

/// A reader that has seen enough (`| head`) is no failure.
fn flushed(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::new(Exit::Failed, error))
        }
        _ => Ok(()),
    }
}

fn describe(entry: &Entry) -> String {
    match entry {
        Entry::Header(header) => format!(
            "machine model {}, image {}, {} disks, term {}",
            header.machine_model,
            output::hex(&header.image.0[..8]),
            header.disks.len(),
            header.term
        ),
        Entry::Mark(mark) => format!("digest {:016x}", mark.digest.0),
        Entry::Term(change) => format!("term {} begins", change.term),
        Entry::Group(group) => match &group.body {
            GroupBody::Arrival(arrival) => describe_arrival(arrival),
            GroupBody::Exit { answers, outputs } => {
                let mut parts: Vec<_> = answers.iter().map(describe_answer).collect();
                if *outputs > 0 {
                    parts.push(format!("{outputs} outputs"));
                }
                parts.join(", ")
            }
        },
    }
}

fn describe_answer(answer: &Answer) -> String {
    match answer {
        Answer::Clock(time) => format!("clock {} ns", time.0),
        Answer::Entropy(bytes) => format!("entropy {}", output::hex(bytes)),
    }
}

fn describe_arrival(arrival: &Arrival) -> String {
    match arrival {
        Arrival::Frame { source, bytes } => format!(
            "{} bytes, number {} of gateway {:x}",
            bytes.len(),
            source.number.0,
            source.gateway.0
        ),
        Arrival::DiskDone { request, outcome } => match outcome {
            DiskOutcome::Written => format!("request {} written", request.0),
            DiskOutcome::Flushed => format!("request {} flushed", request.0),
            DiskOutcome::Read { hash } => {
                format!("request {} read, hash {hash:016x}", request.0)
            }
        },
        Arrival::TimerDue { timer } => format!("timer {} is due", timer.0),
        Arrival::Console { bytes } => format!("{:?}", String::from_utf8_lossy(bytes)),
    }
}
