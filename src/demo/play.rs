//! The play: a cluster is started, the ledger launched, a load put on it, and the primary killed as
//! often as wanted.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::cluster::{Cluster, ClusterError};
use super::load::{Gap, Load, LoadConfig, LoadError};
use super::report::{Kill, Report};
use super::timeline::{Seen, timeline};
use crate::agent::certs::{Identity, Name};
use crate::agent::clock;
use crate::agent::journal::Line;
use crate::agent::operator::{Client, HostStatus, OperatorError, Request};
use crate::cli::operator::start_vm;
use crate::cli::status::{lag_of, role};
use crate::cli::waiting::WaitError;
use crate::config::{Config, ConfigError};
use crate::protocol::{HostName, Policy, Record, RoleName, Rule, Time, VmName};
use crate::sentence::sentence;

/// The demo's VM and image.
const VM: &str = "ledger";
/// The port that the ledger serves.
const PORT: u16 = 6379;
/// The demo's hosts.
const HOSTS: [&str; 3] = ["host-a", "host-b", "host-c"];
/// Between two looks at whether something has happened.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// A replica whose execution is no further behind keeps up.
const KEEPS_UP: Duration = Duration::from_millis(100);
/// How long each step may take before the demo gives up.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long a new replica may take in all until it keeps up.
const HEALING: Duration = Duration::from_mins(10);

/// What the demo is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The `understudy` to run.
    pub program: PathBuf,
    /// How often the primary is killed.
    pub kills: u32,
    /// How many clients increment.
    pub connections: usize,
    /// How many counters each of them has.
    pub keys: usize,
    /// How long each client rests after each answer: the hosts share one machine, and a replica
    /// that is new has to execute the log faster than it grows.
    pub rest: Duration,
    /// How many copies must hold the log before an answer leaves.
    pub rule: Rule,
    /// How long the load runs before each kill and after the last.
    pub lead: Duration,
    /// Whether a killed host comes back with what it had on disk; otherwise with nothing.
    pub keep_data: bool,
    /// Whether the folder is left for those who look for a fault.
    pub keep_folder: bool,
}

/// Why the demo could not be played to its end.
#[derive(Debug, Error)]
pub enum PlayError {
    /// The processes.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The cluster's own configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A host refused, or did not answer.
    #[error(transparent)]
    Operator(#[from] OperatorError),
    /// The VM did not start.
    #[error(transparent)]
    Start(#[from] WaitError),
    /// The load did not begin.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Something that should have happened did not.
    #[error("{what} has not happened within {} s; {saw}", after.as_secs())]
    TimedOut {
        /// What.
        what: String,
        /// How long it had.
        after: Duration,
        /// The last that was seen.
        saw: String,
    },
}

/// What the demo tells while it is played.
pub trait Audience {
    /// What happens now.
    fn scene(&mut self, what: &str);
    /// How the hosts do.
    fn hosts(&mut self, hosts: &Hosts, acknowledged: u64);
    /// A kill is over.
    fn killed(&mut self, number: u32, kill: &Kill);
}

/// How every host does, or why it does not say.
pub type Hosts = BTreeMap<HostName, Result<HostStatus, OperatorError>>;

/// Plays the demo. Call it on a thread that lives until it is over (`block_on` of the main thread).
pub async fn play(options: &Options, audience: &mut dyn Audience) -> Result<Report, PlayError> {
    let began = Instant::now();
    audience.scene("starting a witness and three hosts");
    let mut stage = Stage::build(options).await?;
    audience.scene("launching the ledger with two replicas");
    stage.launch(options.rule).await?;
    audience.scene("connecting the clients");
    let load = stage.load(options).await?;
    let mut kills = Vec::new();
    for number in 1..=options.kills {
        stage.watch(&load, options.lead, audience).await?;
        audience.scene(&format!(
            "killing the primary ({number} of {})",
            options.kills
        ));
        let mut kill = stage.kill(&load).await?;
        if number < options.kills {
            audience.scene(&format!(
                "bringing {} back as a replica, under a lighter load",
                kill.old
            ));
            load.ease(true);
            kill.healed_ms = Some(stage.heal(&kill.old, options.keep_data).await?);
            load.ease(false);
        }
        audience.killed(number, &kill);
        kills.push(kill);
    }
    stage.watch(&load, options.lead, audience).await?;
    audience.scene("reading everything back");
    let mut report = Report::new(
        options.rule.to_string(),
        kills,
        options.kills,
        load.finish().await,
    );
    report.took_ms = millis(began.elapsed());
    Ok(report)
}

/// The cluster, and what is known of it.
struct Stage {
    cluster: Cluster,
    client: Client,
    vm: VmName,
}

impl Stage {
    /// Starts the cluster and waits until every host is connected with every other.
    async fn build(options: &Options) -> Result<Self, PlayError> {
        let names = HOSTS.map(|host| host.parse::<Name>().expect("the demo's names are names"));
        let mut cluster = Cluster::start(&options.program, &names)?;
        if options.keep_folder {
            eprintln!("the folder is {}", cluster.keep_folder().display());
        }
        let config = Config::load(&cluster.folder().join("operator"))?;
        let mut stage = Self {
            cluster,
            client: Client::new(&config)?,
            vm: VmName::new(VM).expect("the demo's names are names"),
        };
        stage
            .until("the hosts' meeting", async |stage| {
                let hosts = stage.client.status_of_all().await;
                let met = |status: &HostStatus| status.peers.values().all(|up| *up);
                let all = hosts.values().all(|host| host.as_ref().is_ok_and(met));
                Ok(if all { Ok(()) } else { Err(tell(&hosts)) })
            })
            .await?;
        Ok(stage)
    }

    async fn launch(&mut self, rule: Rule) -> Result<(), PlayError> {
        let hosts: Vec<HostName> = self.client.hosts().cloned().collect();
        let order = Request::Run {
            vm: self.vm.clone(),
            image: VM.to_owned(),
            hosts: hosts.clone(),
            policy: Policy {
                rule,
                ..Policy::default()
            },
        };
        start_vm(&self.client, &hosts[0], &self.vm, &order).await?;
        self.all_copies().await?;
        Ok(())
    }

    /// Waits until every host holds a copy.
    async fn all_copies(&mut self) -> Result<Record, PlayError> {
        self.until("the record of three copies", async |stage| {
            match stage.client.record(&stage.vm).await {
                Ok(record) if record.copies() == HOSTS.len() => Ok(Ok(record)),
                Ok(record) => Ok(Err(format!("the record names {} copies", record.copies()))),
                Err(OperatorError::NoVm { .. }) => Ok(Err("the VM is unknown".to_owned())),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn load(&mut self, options: &Options) -> Result<Load, PlayError> {
        let vm = self.vm.clone();
        let address = self.cluster.publish(&vm, PORT)?;
        self.until("the gateway's opening", async |_| {
            let connected = TcpStream::connect(address).await;
            Ok(connected.map(drop).map_err(|error| error.to_string()))
        })
        .await?;
        let mut config = LoadConfig::new(address);
        config.connections = options.connections;
        config.keys = options.keys;
        config.pause = Some(options.rest).filter(|rest| !rest.is_zero());
        Ok(Load::start(config).await?)
    }

    /// Lets the load run, and shows how the hosts do.
    async fn watch(
        &mut self,
        load: &Load,
        lead: Duration,
        audience: &mut dyn Audience,
    ) -> Result<(), PlayError> {
        let until = Instant::now() + lead;
        while Instant::now() < until {
            self.cluster.check()?;
            audience.hosts(&self.client.status_of_all().await, load.acknowledged());
            sleep(LOOK_EVERY * 8).await;
        }
        Ok(())
    }

    /// Kills the primary's agent, and its VMM with it, and waits until clients get answers from
    /// another.
    async fn kill(&mut self, load: &Load) -> Result<Kill, PlayError> {
        let before = self.client.record(&self.vm).await?;
        let old = before.primary.host.clone();
        let others: Vec<HostName> = self
            .client
            .hosts()
            .filter(|host| **host != old)
            .cloned()
            .collect();
        let mut known = BTreeMap::new();
        for host in &others {
            known.insert(host.clone(), self.client.status(host).await?.journal);
        }
        let moment = Moment::now();
        self.cluster.kill(&identity(&old))?;
        let new = self.promoted(&others, &before).await?;
        let acknowledged = load.acknowledged();
        self.until("the first answer to a client", async |_| {
            let more = load.acknowledged() > acknowledged;
            let saw = || format!("{} connections are broken", load.broken());
            Ok(if more { Ok(()) } else { Err(saw()) })
        })
        .await?;
        let gap = load.longest_gap_between(moment.instant, Instant::now());
        let mut journal = Vec::new();
        for (host, after) in known {
            journal.extend(self.client.events(&host, after).await?);
        }
        Ok(kill_report(&old, new, moment, gap, &journal))
    }

    /// Waits until one of these hosts runs the guest live in a later term.
    async fn promoted(
        &mut self,
        hosts: &[HostName],
        before: &Record,
    ) -> Result<(HostName, u64), PlayError> {
        self.until("a promotion", async |stage| {
            for host in hosts {
                let status = stage.client.status(host).await?;
                let seen = status.vms.iter().find(|seen| seen.vm == stage.vm);
                let live = seen.and_then(|seen| {
                    let record = seen.node.record.as_ref()?;
                    (seen.node.role == RoleName::Primary && record.term > before.term)
                        .then_some(record.term.0)
                });
                if let Some(term) = live {
                    return Ok(Ok((host.clone(), term)));
                }
            }
            Ok(Err(tell(&stage.client.status_of_all().await)))
        })
        .await
    }

    /// Starts a killed host again and waits until it is a replica that keeps up; how long that
    /// took, in milliseconds.
    async fn heal(&mut self, host: &HostName, keep_data: bool) -> Result<u64, PlayError> {
        let began = Instant::now();
        let who = identity(host);
        if !keep_data {
            self.cluster.forget(&who)?;
        }
        self.cluster.start_process(&who)?;
        self.all_copies().await?;
        let executed = |hosts: &Hosts, vm: &VmName| {
            let status = hosts.get(host)?.as_ref().ok()?;
            let vm = status.vms.iter().find(|known| known.vm == *vm)?;
            Some(vm.node.executed)
        };
        // It executes the log from power-on, which takes as long as it takes: what runs out is the
        // patience with one that comes no further.
        let (mut furthest, mut since) = (None, Instant::now());
        self.until_in("the new replica's keeping up", HEALING, async |stage| {
            let hosts = stage.client.status_of_all().await;
            let now = executed(&hosts, &stage.vm);
            if now > furthest {
                (furthest, since) = (now, Instant::now());
            }
            let lag = lag_of(&hosts, &stage.vm, host);
            Ok(match lag {
                Some(lag) if lag <= KEEPS_UP => Ok(()),
                _ if since.elapsed() > PATIENCE => {
                    return Err(PlayError::TimedOut {
                        what: "the new replica's coming further".to_owned(),
                        after: PATIENCE,
                        saw: tell(&hosts),
                    });
                }
                Some(lag) => Err(format!("{host} is {} ms behind", lag.as_millis())),
                None => Err(tell(&hosts)),
            })
        })
        .await?;
        Ok(millis(began.elapsed()))
    }

    /// Looks again and again until something has happened; what was seen last is told when it does
    /// not happen. Processes have no other way to tell us.
    async fn until<T>(
        &mut self,
        what: &str,
        look: impl AsyncFnMut(&mut Self) -> Result<Result<T, String>, PlayError>,
    ) -> Result<T, PlayError> {
        self.until_in(what, PATIENCE, look).await
    }

    /// The same with another patience.
    async fn until_in<T>(
        &mut self,
        what: &str,
        patience: Duration,
        mut look: impl AsyncFnMut(&mut Self) -> Result<Result<T, String>, PlayError>,
    ) -> Result<T, PlayError> {
        let began = Instant::now();
        loop {
            self.cluster.check()?;
            let saw = match look(self).await {
                Ok(Ok(happened)) => return Ok(happened),
                Ok(Err(saw)) => saw,
                // Busy machines may be silent for a look.
                Err(PlayError::Operator(error)) if error.may_pass() => sentence(&error),
                Err(error) => return Err(error),
            };
            if began.elapsed() > patience {
                return Err(PlayError::TimedOut {
                    what: what.to_owned(),
                    after: patience,
                    saw,
                });
            }
            sleep(LOOK_EVERY).await;
        }
    }
}

/// One moment on both clocks.
#[derive(Clone, Copy)]
struct Moment {
    instant: Instant,
    clock: Time,
}

impl Moment {
    fn now() -> Self {
        Self {
            instant: Instant::now(),
            clock: clock::now(),
        }
    }

    /// When that was on the journals' clock.
    fn clock_at(self, instant: Instant) -> Time {
        let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
        let here = self.clock.as_nanos();
        Time::from_nanos(match instant.checked_duration_since(self.instant) {
            Some(later) => here.saturating_add(nanos(later)),
            None => here.saturating_sub(nanos(self.instant.duration_since(instant))),
        })
    }
}

fn kill_report(
    old: &HostName,
    (new, term): (HostName, u64),
    moment: Moment,
    gap: Option<Gap>,
    journal: &[Line],
) -> Kill {
    let seen = gap.map(|gap| Seen {
        last_answer: moment.clock_at(gap.from),
        first_answer: moment.clock_at(gap.until),
    });
    let micros = |span: Duration| u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
    Kill {
        old: old.clone(),
        new,
        term,
        gap_us: gap.map(|gap| micros(gap.length())),
        first_answer_us: gap.map(|gap| micros(gap.until.saturating_duration_since(moment.instant))),
        timeline: timeline(old, moment.clock, seen, journal),
        healed_ms: None,
    }
}

/// The hosts in a few words, for errors.
fn tell(hosts: &Hosts) -> String {
    let host = |(name, status): (&HostName, &Result<HostStatus, OperatorError>)| match status {
        Ok(status) => {
            let roles: Vec<_> = status
                .vms
                .iter()
                .map(|vm| role(vm.node.role).to_owned())
                .collect();
            format!(
                "{name} is {}",
                if roles.is_empty() {
                    "up".to_owned()
                } else {
                    roles.join(", ")
                }
            )
        }
        Err(error) => format!("{name}: {error}"),
    };
    hosts.iter().map(host).collect::<Vec<_>>().join("; ")
}

fn identity(host: &HostName) -> Identity {
    Identity::host(
        &host
            .as_str()
            .parse()
            .expect("the demo's hosts have such names"),
    )
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
