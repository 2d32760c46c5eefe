//! The agent's end of the numbered frames of one VM: which gateway has what, which output is for
//! whom, and what may be forgotten. Pure: no I/O and no clock. [`super::frame_streams`]
//! connects it to byte streams.
//!
//! Every copy of the VM keeps one, from power-on, and feeds it with the outputs that its machine
//! makes; so a replica that is promoted has what each gateway lacks. A copy whose log was cut back
//! starts its machine anew, and this with it.
//!
//! ```text
//!            lead(term)                         one gateway, while leading:
//!  Following ──────────▶ Leading                  Hello ──▶ welcomed ──frames, acks──▶ gone
//!      ▲                    │                       ▲  (a Hello for a later term waits │
//!      └──────follow()──────┘                       │   for `lead` of that term)       ▼
//!                                                   └──────────────────────────────── absent
//!                                absent for too long, or takes none of too many ──▶ dropped
//! ```

mod absence;
mod destinations;
mod places;
mod sessions;
mod words;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::Ipv4Addr;

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, LogIndex, Term};

use crate::agent::certs::Name;
use crate::gateway::frames::{Boot, Hello, Mac, Refusal, SessionId, ToGateway};
use crate::protocol::{Span, Time, VmName};

use destinations::Destinations;

pub use words::{DropReason, FrameEvent, FrameLimits, FramePortCounters, GatewayError};

/// How long the news of committed frames may wait for outputs to travel with.
const COMMITTED_WITHIN: Span = Span::from_millis(20);

/// After how many committed frames the news does not wait.
const COMMITTED_AFTER: u64 = 64;

/// How many events wait for the journal; beyond it the oldest are forgotten.
const MOST_EVENTS: usize = 1_024;

/// How many gateways are remembered that are gone: their numbers would be needed if they came back.
const MOST_REMEMBERED: usize = 4_096;

#[derive(Debug, Default)]
struct Gateway {
    /// The last frame that was handed to the machine by this primary, or is in the log.
    accepted: FrameNumber,
    /// The last frame in the log.
    logged: FrameNumber,
    /// Logged and not yet committed, oldest first.
    uncommitted: VecDeque<(LogIndex, FrameNumber)>,
    committed: FrameNumber,
    /// Outputs it has not said it received, oldest first.
    outputs: VecDeque<(FrameNumber, Bytes)>,
    output_bytes: usize,
    /// Bytes handed in and not yet taken by the machine.
    arriving_bytes: usize,
    session: Option<SessionId>,
    /// Its address in the guest's network, as it said.
    address: Option<Ipv4Addr>,
    absent_since: Option<Time>,
    /// Since when it has had more to take than is kept for one that is away, and has taken nothing.
    stuck_since: Option<Time>,
    /// It was dropped: nothing is kept for it.
    dropped: bool,
    /// This agent has sent the guest frames in its name: it cannot go on.
    given_up: bool,
}

impl Gateway {
    /// Forgets what it has; gives the last one that was for it alone.
    fn forget_outputs(&mut self, through: FrameNumber) -> Option<FrameNumber> {
        let mut last = None;
        while let Some((number, frame)) = self.outputs.front()
            && *number <= through
        {
            self.output_bytes -= frame.len();
            if Mac::destination(frame).is_some_and(|to| !to.is_group()) {
                last = Some(*number);
            }
            self.outputs.pop_front();
        }
        last
    }
}

#[derive(Debug)]
enum Standing {
    /// Nothing was heard.
    Silent,
    /// It asked for a term that is not led here yet.
    Waiting(Hello),
    /// Frames flow.
    Welcomed(Flow),
    /// Refused, to be told; nothing more is taken.
    Refused,
    /// The stream is to be dropped.
    Over,
}

#[derive(Debug)]
struct Flow {
    gateway: GatewayIncarnation,
    /// The last output that was written to the session.
    sent: FrameNumber,
    /// Outputs up to here were made before the welcome: sent again.
    resend_through: FrameNumber,
    told_committed: FrameNumber,
    /// The news of committed frames waits for nothing any more.
    tell_now: bool,
}

#[derive(Debug)]
struct Session {
    /// The gateway's name, by its certificate.
    who: Name,
    standing: Standing,
    /// Welcomes and refusals to be written first.
    first: Option<ToGateway>,
    /// Unless it is welcomed by then, it is refused; when it is refused, it is over.
    until: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Following,
    Leading(Term),
}

/// The agent's end.
#[derive(Debug)]
pub struct FramePort {
    vm: VmName,
    boot: Boot,
    limits: FrameLimits,
    role: Role,
    /// The highest term this agent has heard of.
    known: Term,
    gateways: BTreeMap<GatewayIncarnation, Gateway>,
    /// Those that may have to be dropped; some need not any more.
    watched: BTreeSet<GatewayIncarnation>,
    owners: HashMap<Mac, GatewayIncarnation>,
    sessions: HashMap<SessionId, Session>,
    /// The sessions of each gateway, by its certificate, oldest first.
    sessions_of: HashMap<Name, VecDeque<SessionId>>,
    /// The sessions that are welcomed.
    served: BTreeMap<SessionId, GatewayIncarnation>,
    /// [`Session::until`] of all sessions that are not welcomed; some are gone or have another.
    deadlines: VecDeque<(Time, SessionId)>,
    /// Sessions that are not served and are to be looked at.
    changed: Vec<SessionId>,
    /// Why a gateway was refused last.
    told: HashMap<Name, Refusal>,
    /// The latest time that was told.
    now: Time,
    arrivals: VecDeque<(FrameSource, Bytes)>,
    held: bool,
    last_output: FrameNumber,
    /// A replica's outputs, not sorted by gateway yet.
    kept: VecDeque<(FrameNumber, Bytes)>,
    /// What every gateway has, as the primary said.
    forgotten: FrameNumber,
    destinations: Destinations,
    /// Something is committed that a gateway has not been told.
    tell_at: Option<Time>,
    events: VecDeque<FrameEvent>,
    fresh_event: bool,
    counters: FramePortCounters,
}

impl FramePort {
    /// A port for a machine that starts from power-on (or replays from there). `boot` is that of
    /// the log's header.
    pub fn new(vm: VmName, boot: Boot, limits: FrameLimits) -> Self {
        Self {
            vm,
            boot,
            limits,
            role: Role::Following,
            known: Term(0),
            gateways: BTreeMap::new(),
            watched: BTreeSet::new(),
            owners: HashMap::new(),
            sessions: HashMap::new(),
            sessions_of: HashMap::new(),
            served: BTreeMap::new(),
            deadlines: VecDeque::new(),
            changed: Vec::new(),
            told: HashMap::new(),
            now: Time::default(),
            arrivals: VecDeque::new(),
            held: false,
            last_output: FrameNumber(0),
            kept: VecDeque::new(),
            forgotten: FrameNumber(0),
            destinations: Destinations::default(),
            tell_at: None,
            events: VecDeque::new(),
            fresh_event: false,
            counters: FramePortCounters::default(),
        }
    }

    // ---- what the machine and its log tell ----

    /// The machine has made an output that the world may see: on the primary after its release, on
    /// a replica as soon as replay makes it. In order; an output that comes again is ignored.
    pub fn output(&mut self, number: FrameNumber, frame: Bytes) {
        if number <= self.last_output {
            return;
        }
        self.last_output = number;
        let owners = &self.owners;
        let protects = |mac: &Mac| owners.contains_key(mac);
        self.destinations.note(number, &frame, protects);
        match self.role {
            Role::Leading(_) => self.route(number, frame),
            Role::Following if number <= self.forgotten => self.note_forgotten(number, &frame),
            Role::Following => self.kept.push_back((number, frame)),
        }
    }

    fn route(&mut self, number: FrameNumber, frame: Bytes) {
        let Some(to) = Mac::destination(&frame) else {
            self.counters.unclaimed += 1;
            return;
        };
        if let Some(owner) = self.owners.get(&to) {
            self.keep(*owner, number, frame);
        } else {
            // Broadcast, or an address of nobody: whoever it is not for drops it.
            let all: Vec<_> = self.gateways.keys().copied().collect();
            for gateway in all {
                self.keep(gateway, number, frame.clone());
            }
        }
    }

    fn keep(&mut self, incarnation: GatewayIncarnation, number: FrameNumber, frame: Bytes) {
        let Some(gateway) = self.gateways.get_mut(&incarnation) else {
            return;
        };
        if gateway.dropped {
            self.counters.unclaimed += 1;
            self.note_forgotten(number, &frame);
            return;
        }
        gateway.output_bytes += frame.len();
        gateway.outputs.push_back((number, frame));
        self.counters.outputs += 1;
        // It is not dropped for that: what comes at once after a stall, or when a copy begins to
        // reign, is as much as the guest could make, and is no fault of who is to take it.
        if gateway.output_bytes > self.limits.outputs && gateway.stuck_since.is_none() {
            gateway.stuck_since = Some(self.now);
            self.watch([incarnation]);
        }
    }

    /// Remembers that an output is not kept any more.
    fn note_forgotten(&mut self, number: FrameNumber, frame: &Bytes) {
        if let Some(to) = Mac::destination(frame) {
            self.destinations.forget(to, number);
        }
    }

    /// The log of this primary now holds the arrivals of one gateway up to this number; `end` is
    /// the place after the last of them.
    pub fn logged(&mut self, through: FrameSource, end: LogIndex) {
        let gateway = self.known_gateway(through.gateway);
        gateway.logged = gateway.logged.max(through.number);
        gateway.accepted = gateway.accepted.max(through.number);
        gateway.uncommitted.push_back((end, through.number));
    }

    /// Everything before this place of this primary's log is committed.
    pub fn committed(&mut self, through: LogIndex, now: Time) {
        for gateway in self.gateways.values_mut() {
            let before = gateway.committed;
            while let Some((end, number)) = gateway.uncommitted.front()
                && *end <= through
            {
                gateway.committed = gateway.committed.max(*number);
                gateway.uncommitted.pop_front();
            }
            if gateway.committed > before && gateway.session.is_some() && self.tell_at.is_none() {
                self.tell_at = Some(now.plus(COMMITTED_WITHIN));
            }
        }
    }

    /// The primary says that every gateway has all outputs up to here. For replicas.
    pub fn forget(&mut self, through: FrameNumber) {
        self.forgotten = self.forgotten.max(through);
        while let Some((number, _)) = self.kept.front()
            && *number <= through
        {
            if let Some((number, frame)) = self.kept.pop_front() {
                self.note_forgotten(number, &frame);
            }
        }
    }

    /// Every gateway has all outputs up to here: no copy needs to keep them.
    pub fn received_by_all(&self) -> FrameNumber {
        let newest = match self.role {
            Role::Leading(_) => self.last_output,
            Role::Following => self.forgotten,
        };
        self.gateways
            .values()
            .filter_map(|gateway| gateway.outputs.front())
            .map(|(number, _)| FrameNumber(number.0.saturating_sub(1)))
            .min()
            .unwrap_or(newest)
    }

    /// Bytes of outputs that are kept, each counted once for each gateway.
    pub fn kept_bytes(&self) -> usize {
        let own: usize = self.kept.iter().map(|(_, frame)| frame.len()).sum();
        self.gateways
            .values()
            .map(|g| g.output_bytes)
            .sum::<usize>()
            + own
    }

    /// This copy reigns: it has executed its whole log, all of it is committed, and every output
    /// it led to has been told by [`FramePort::output`]. `logged` says which frame of each gateway
    /// is the last one in that log. Gateways that wait are welcomed.
    pub fn lead(
        &mut self,
        term: Term,
        logged: impl IntoIterator<Item = (GatewayIncarnation, FrameNumber)>,
        now: Time,
    ) {
        self.now = now;
        self.follow(term);
        self.role = Role::Leading(term);
        for (incarnation, number) in logged {
            let gateway = self.known_gateway(incarnation);
            gateway.logged = gateway.logged.max(number);
        }
        for gateway in self.gateways.values_mut() {
            gateway.accepted = gateway.logged;
            gateway.committed = gateway.logged;
            gateway.absent_since = Some(now);
        }
        self.watch(self.gateways.keys().copied().collect::<Vec<_>>());
        for (number, frame) in std::mem::take(&mut self.kept) {
            self.route(number, frame);
        }
        let mut waiting = Vec::new();
        for (id, session) in &self.sessions {
            if let Standing::Waiting(hello) = &session.standing {
                waiting.push((*id, hello.clone()));
            }
        }
        waiting.sort_by_key(|(id, _)| *id);
        for (id, hello) in waiting {
            self.hello(id, hello);
        }
    }

    /// This copy does not reign, and this is the highest term it knows. Frames that are not in its
    /// log are the next primary's business.
    pub fn follow(&mut self, known: Term) {
        self.role = Role::Following;
        self.known = self.known.max(known);
        self.arrivals.clear();
        self.tell_at = None;
        let mut kept = BTreeMap::new();
        kept.extend(std::mem::take(&mut self.kept));
        for gateway in self.gateways.values_mut() {
            kept.extend(std::mem::take(&mut gateway.outputs));
            gateway.output_bytes = 0;
            gateway.session = None;
            gateway.absent_since = None;
            gateway.stuck_since = None;
            // The next primary may serve it yet: what was said in its name may be in no log.
            gateway.dropped = false;
            gateway.given_up = false;
            gateway.uncommitted.clear();
            gateway.arriving_bytes = 0;
        }
        self.kept = kept.into_iter().collect();
        let is_past = |session: &Session| match &session.standing {
            Standing::Welcomed(_) => true,
            Standing::Waiting(hello) => hello.term < self.known,
            Standing::Silent | Standing::Refused | Standing::Over => false,
        };
        let past: Vec<_> = self
            .sessions
            .iter()
            .filter(|(_, session)| is_past(session))
            .map(|(id, _)| *id)
            .collect();
        for id in past {
            self.refuse(id, Refusal::OtherTerm);
        }
    }

    fn known_gateway(&mut self, incarnation: GatewayIncarnation) -> &mut Gateway {
        if self.gateways.len() >= MOST_REMEMBERED && !self.gateways.contains_key(&incarnation) {
            self.forget_a_gateway();
        }
        self.owners.insert(Mac::of(incarnation), incarnation);
        self.gateways.entry(incarnation).or_default()
    }

    // ---- news ----

    fn tell(&mut self, event: FrameEvent) {
        // A driver that takes none costs no memory.
        if self.events.len() == MOST_EVENTS {
            self.events.pop_front();
        }
        self.events.push_back(event);
        self.fresh_event = true;
    }

    /// The next thing for the journal.
    pub fn poll_event(&mut self) -> Option<FrameEvent> {
        self.events.pop_front()
    }

    /// What was counted.
    pub const fn counters(&self) -> FramePortCounters {
        self.counters
    }

    /// How many gateways are served now.
    pub fn served(&self) -> usize {
        self.served.len()
    }
}

#[cfg(test)]
mod tests;
