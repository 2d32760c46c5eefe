//! `demo`: what somebody who has just cloned wants to see.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::failure::{Exit, Failure, OrExit as _};
use super::{block_on, output, status};
use crate::demo::play::{Audience, Hosts, Options, play};
use crate::demo::report::Kill;
use crate::doctor;
use crate::protocol::{HostName, Rule};

/// What `demo` is told.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How often the primary is killed
    #[arg(long, value_name = "N", default_value_t = 1)]
    kills: u32,
    /// How many copies must hold the log before an answer leaves: all, quorum or any(K) replicas
    #[arg(long, default_value_t = Rule::All)]
    rule: Rule,
    /// How many clients write
    #[arg(long, value_name = "N", default_value_t = 8)]
    connections: usize,
    /// How many counters each client has
    #[arg(long, value_name = "N", default_value_t = 16)]
    keys: usize,
    /// How many milliseconds each client rests after an answer
    #[arg(long, value_name = "MS", default_value_t = 5)]
    rest: u64,
    /// How many seconds the load runs before each kill
    #[arg(long, value_name = "SECONDS", default_value_t = 3)]
    lead: u64,
    /// Bring killed hosts back with what they had on disk, not with nothing
    #[arg(long)]
    keep_data: bool,
    /// Leave the cluster's folder where it is, logs of every process included
    #[arg(long)]
    keep_folder: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Does it.
pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(missing) = doctor::missing_kvm() {
        return Err(missing).or_exit(Exit::Unavailable);
    }
    let options = Options {
        program: std::env::current_exe().or_fail()?,
        kills: args.kills,
        connections: args.connections.max(1),
        keys: args.keys.max(1),
        rest: Duration::from_millis(args.rest),
        rule: args.rule,
        lead: Duration::from_secs(args.lead),
        keep_data: args.keep_data,
        keep_folder: args.keep_folder,
    };
    block_on(async {
        let mut audience = Screen::new(args.json);
        let report = play(&options, &mut audience).await.or_fail()?;
        audience.clear();
        if args.json {
            output::json(&report)?;
        } else {
            let took = Duration::from_millis(report.took_ms);
            output::line(format_args!("\n{report}\ntook {:.1} s", took.as_secs_f64()))?;
        }
        if report.holds() {
            Ok(())
        } else {
            Err("a promise was broken: acknowledged writes or connections were lost")
                .or_exit(Exit::Broken)
        }
    })
}

/// Where the demo is shown: a line for each host that is drawn anew, on a terminal.
struct Screen {
    json: bool,
    lines: Option<Lines>,
    /// Without a terminal the hosts are shown once a scene.
    shown: bool,
}

struct Lines {
    all: MultiProgress,
    load: ProgressBar,
    hosts: Vec<(HostName, ProgressBar)>,
}

impl Screen {
    fn new(json: bool) -> Self {
        let lines = std::io::stderr().is_terminal().then(|| {
            let all = MultiProgress::new();
            Lines {
                load: all.add(line()),
                hosts: Vec::new(),
                all,
            }
        });
        Self {
            json,
            lines,
            shown: false,
        }
    }

    fn clear(&self) {
        if let Some(lines) = &self.lines {
            // Fails only where the terminal is gone, and then nobody looks.
            let _ = lines.all.clear();
        }
    }

    /// Prints above the lines that are drawn anew.
    fn print(&self, text: &str) {
        if self.json {
            eprintln!("{text}");
            return;
        }
        // Whoever does not read any more may want the exit code still.
        let _ = match &self.lines {
            Some(lines) => lines.all.suspend(|| output::line(text)),
            None => output::line(text),
        };
    }
}

fn line() -> ProgressBar {
    let style = ProgressStyle::with_template("  {msg}");
    ProgressBar::new_spinner()
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
}

impl Audience for Screen {
    fn scene(&mut self, what: &str) {
        self.shown = false;
        self.print(&format!("· {what}"));
    }

    fn hosts(&mut self, hosts: &Hosts, acknowledged: u64) {
        let clients = format!("clients   {acknowledged} writes acknowledged");
        let rows: Vec<_> = hosts.keys().map(|host| (host, row(hosts, host))).collect();
        let Some(lines) = &mut self.lines else {
            if !std::mem::replace(&mut self.shown, true) {
                self.print(&format!("  {clients}"));
                for (_, row) in &rows {
                    self.print(&format!("  {row}"));
                }
            }
            return;
        };
        lines.load.set_message(clients);
        for (host, row) in rows {
            let known = lines.hosts.iter().position(|(name, _)| name == host);
            let index = known.unwrap_or_else(|| {
                lines.hosts.push((host.clone(), lines.all.add(line())));
                lines.hosts.len() - 1
            });
            lines.hosts[index].1.set_message(row);
        }
    }

    fn killed(&mut self, number: u32, kill: &Kill) {
        self.print(&format!("\nkill {number}: {kill}\n"));
    }
}

/// How a host does, in a line.
fn row(hosts: &Hosts, host: &HostName) -> String {
    let text = match hosts.get(host) {
        Some(Ok(seen)) => seen.vms.first().map_or("up".to_owned(), |vm| {
            let lag = status::lag_of(hosts, &vm.vm, host);
            format!(
                "{:<12} position {:<9} lag {:<9} log {}",
                status::role(vm.node.role),
                vm.node.position.0,
                lag.map_or("-".to_owned(), output::span),
                vm.log_bytes.map_or("-".to_owned(), output::bytes),
            )
        }),
        _ => "dead".to_owned(),
    };
    format!("{host:<9} {text}")
}
