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
//!                                            absent for too long, or too many bytes ──▶ dropped
//! ```

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::{Bytes, BytesMut};
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, LogIndex, Term};
use thiserror::Error;

use crate::gateway::frames::{
    Boot, Hello, Mac, Message, NetworkPort, Refusal, SessionId, ToAgent, ToGateway, put_frame,
};
use crate::protocol::{Span, Time, VmName};

/// How long the news of committed frames may wait for outputs to travel with.
const COMMITTED_WITHIN: Span = Span::from_millis(20);

/// After how many committed frames the news does not wait.
const COMMITTED_AFTER: u64 = 64;

/// How many gateways are remembered that are gone: their numbers would be needed if they came back.
const MOST_REMEMBERED: usize = 4_096;

/// What one VM keeps for its gateways.
#[derive(Clone, Copy, Debug)]
pub struct FrameLimits {
    /// How many gateways may be served at the same time.
    pub gateways: usize,
    /// Bytes of outputs kept for one gateway; one that lacks more is dropped.
    pub outputs: usize,
    /// Bytes of frames that wait for the machine, for each gateway; beyond it nothing is read from
    /// the gateway.
    pub arrivals: usize,
    /// How long a gateway may be away before it is dropped and what was kept for it is forgotten.
    pub absence: Span,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            gateways: 64,
            outputs: 4 << 20,
            arrivals: 1 << 20,
            absence: Span::from_millis(60_000),
        }
    }
}

/// Something the journal should say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameEvent {
    /// A gateway is served.
    Welcomed {
        /// Which.
        gateway: GatewayIncarnation,
        /// The last of its frames that the machine has or will get.
        logged: FrameNumber,
        /// How many outputs are sent to it again.
        resent: usize,
    },
    /// A gateway was turned away.
    Refused {
        /// Which.
        gateway: GatewayIncarnation,
        /// Why.
        why: Refusal,
    },
    /// A gateway stayed away for too long, or took nothing for too long; what was kept for it is
    /// forgotten and it cannot go on.
    Dropped {
        /// Which.
        gateway: GatewayIncarnation,
        /// Why.
        why: DropReason,
        /// How many outputs were forgotten.
        outputs: usize,
    },
}

/// Why a gateway was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// It was away longer than [`FrameLimits::absence`].
    Absent,
    /// It lacked more than [`FrameLimits::outputs`].
    TooFarBehind,
}

/// A gateway broke the rules: its session is closed, nothing else is disturbed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the gateway broke the frame protocol: {what}")]
pub struct GatewayError {
    what: &'static str,
}

/// What has gone through a port, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FramePortCounters {
    /// Frames handed to the machine.
    pub arrivals: u64,
    /// Frames that came a second time and were dropped.
    pub duplicates: u64,
    /// Outputs queued for gateways, once for each gateway.
    pub outputs: u64,
    /// Outputs that were sent again after a welcome.
    pub resent: u64,
    /// Outputs that nobody was there for.
    pub unclaimed: u64,
}

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
    absent_since: Option<Time>,
    /// It was dropped: nothing is kept for it.
    dropped: bool,
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
    standing: Standing,
    /// Welcomes and refusals to be written first.
    first: Option<ToGateway>,
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
    owners: HashMap<Mac, GatewayIncarnation>,
    sessions: HashMap<SessionId, Session>,
    arrivals: VecDeque<(FrameSource, Bytes)>,
    held: bool,
    last_output: FrameNumber,
    /// A replica's outputs, not sorted by gateway yet.
    kept: VecDeque<(FrameNumber, Bytes)>,
    /// What every gateway has, as the primary said.
    forgotten: FrameNumber,
    /// The last output for each address that is not kept any more: a gateway that lacks it cannot
    /// go on.
    forgotten_for: HashMap<Mac, FrameNumber>,
    /// Something is committed that a gateway has not been told.
    tell_at: Option<Time>,
    events: VecDeque<FrameEvent>,
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
            owners: HashMap::new(),
            sessions: HashMap::new(),
            arrivals: VecDeque::new(),
            held: false,
            last_output: FrameNumber(0),
            kept: VecDeque::new(),
            forgotten: FrameNumber(0),
            forgotten_for: HashMap::new(),
            tell_at: None,
            events: VecDeque::new(),
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
        if gateway.output_bytes > self.limits.outputs {
            self.drop_gateway(incarnation, DropReason::TooFarBehind);
        }
    }

    /// Remembers that an output is not kept any more. Copies differ about who was there for a
    /// broadcast, so a forgotten one binds nobody.
    fn note_forgotten(&mut self, number: FrameNumber, frame: &Bytes) {
        if let Some(to) = Mac::destination(frame)
            && !to.is_group()
        {
            self.forgotten_for.insert(to, number);
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
        self.follow(term);
        self.role = Role::Leading(term);
        for (incarnation, number) in logged {
            let gateway = self.known_gateway(incarnation);
            gateway.logged = gateway.logged.max(number);
        }
        for gateway in self.gateways.values_mut() {
            gateway.accepted = gateway.logged;
            gateway.committed = gateway.logged;
            gateway.absent_since = (!gateway.dropped).then_some(now);
        }
        for (number, frame) in std::mem::take(&mut self.kept) {
            self.route(number, frame);
        }
        let mut waiting = Vec::new();
        for (id, session) in &mut self.sessions {
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
            gateway.uncommitted.clear();
            gateway.arriving_bytes = 0;
        }
        self.kept = kept.into_iter().collect();
        for session in self.sessions.values_mut() {
            let over = match &session.standing {
                Standing::Welcomed(_) => true,
                Standing::Waiting(hello) => hello.term < self.known,
                Standing::Silent | Standing::Refused => false,
            };
            if over {
                session.standing = Standing::Refused;
                session.first = Some(ToGateway::Refused {
                    term: self.known,
                    why: Refusal::OtherTerm,
                });
            }
        }
    }

    fn known_gateway(&mut self, incarnation: GatewayIncarnation) -> &mut Gateway {
        if self.gateways.len() >= MOST_REMEMBERED && !self.gateways.contains_key(&incarnation) {
            self.forget_a_gateway();
        }
        self.owners.insert(Mac::of(incarnation), incarnation);
        self.gateways.entry(incarnation).or_default()
    }

    // ---- sessions ----

    /// A gateway has opened a session.
    pub fn connected(&mut self, session: SessionId) {
        self.sessions.insert(
            session,
            Session {
                standing: Standing::Silent,
                first: None,
            },
        );
    }

    /// A session has ended.
    pub fn disconnected(&mut self, session: SessionId, now: Time) {
        let Some(ended) = self.sessions.remove(&session) else {
            return;
        };
        if let Standing::Welcomed(flow) = ended.standing
            && let Some(gateway) = self.gateways.get_mut(&flow.gateway)
            && gateway.session == Some(session)
        {
            gateway.session = None;
            gateway.absent_since = Some(now);
        }
    }

    /// A gateway says something. After an error the session is to be closed, and
    /// [`FramePort::disconnected`] called.
    pub fn message(&mut self, session: SessionId, message: ToAgent) -> Result<(), GatewayError> {
        let Some(known) = self.sessions.get_mut(&session) else {
            return Ok(());
        };
        match (&mut known.standing, message) {
            (Standing::Silent, ToAgent::Hello(hello)) => {
                self.hello(session, hello);
                Ok(())
            }
            (Standing::Welcomed(flow), ToAgent::Frame { number, bytes, .. }) => {
                let gateway = flow.gateway;
                self.arrival(FrameSource { gateway, number }, bytes)
            }
            (Standing::Welcomed(flow), ToAgent::Received { through }) => {
                if through > flow.sent {
                    return Err(GatewayError {
                        what: "it received an output that it was not sent",
                    });
                }
                let gateway = flow.gateway;
                self.received(gateway, through);
                Ok(())
            }
            // What was under way when the refusal was said.
            (Standing::Refused, _) => Ok(()),
            (Standing::Silent | Standing::Waiting(_), _) => Err(GatewayError {
                what: "it did not wait for its welcome",
            }),
            (Standing::Welcomed(_), ToAgent::Hello(_)) => Err(GatewayError {
                what: "a second hello",
            }),
        }
    }

    fn hello(&mut self, id: SessionId, hello: Hello) {
        let why = match self.role {
            _ if hello.vm != self.vm => Some(Refusal::UnknownVm),
            Role::Leading(term) if term == hello.term => self.cannot_serve(&hello),
            Role::Leading(term) if term > hello.term => Some(Refusal::OtherTerm),
            Role::Following if hello.term < self.known => Some(Refusal::OtherTerm),
            // The keeper's news may reach the gateway before this agent goes live.
            Role::Leading(_) | Role::Following => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.standing = Standing::Waiting(hello);
                }
                return;
            }
        };
        let term = self.known;
        if let Some(why) = why {
            if let Some(session) = self.sessions.get_mut(&id) {
                session.standing = Standing::Refused;
                session.first = Some(ToGateway::Refused { term, why });
            }
            self.events.push_back(FrameEvent::Refused {
                gateway: hello.gateway,
                why,
            });
            return;
        }
        self.received(hello.gateway, hello.received);
        let gateway = self.known_gateway(hello.gateway);
        let before = gateway.session.replace(id);
        gateway.absent_since = None;
        gateway.dropped = false;
        let (logged, resent) = (gateway.accepted, gateway.outputs.len());
        if let Some(session) = self.sessions.get_mut(&id) {
            session.first = Some(ToGateway::Welcome {
                term,
                boot: self.boot,
                logged,
            });
            session.standing = Standing::Welcomed(Flow {
                gateway: hello.gateway,
                sent: hello.received,
                resend_through: self.last_output,
                told_committed: FrameNumber(0),
                tell_now: true,
            });
        }
        self.events.push_back(FrameEvent::Welcomed {
            gateway: hello.gateway,
            logged,
            resent,
        });
        // The same gateway on an older stream: what comes there is not heard any more.
        if let Some(before) = before.filter(|before| *before != id)
            && let Some(older) = self.sessions.get_mut(&before)
        {
            older.standing = Standing::Refused;
        }
    }

    fn received(&mut self, incarnation: GatewayIncarnation, through: FrameNumber) {
        if let Some(gateway) = self.gateways.get_mut(&incarnation)
            && let Some(last) = gateway.forget_outputs(through)
        {
            self.forgotten_for.insert(Mac::of(incarnation), last);
        }
    }

    fn cannot_serve(&self, hello: &Hello) -> Option<Refusal> {
        let served = || self.gateways.values().filter(|g| g.session.is_some());
        let forgotten = self.forgotten_for.get(&Mac::of(hello.gateway));
        match self.gateways.get(&hello.gateway) {
            _ if forgotten.is_some_and(|forgotten| hello.received < *forgotten) => {
                Some(Refusal::TooLate)
            }
            Some(gateway) if gateway.session.is_some() => None,
            _ if served().count() >= self.limits.gateways => Some(Refusal::TooMany),
            _ => None,
        }
    }

    fn arrival(&mut self, source: FrameSource, bytes: Bytes) -> Result<(), GatewayError> {
        let Some(gateway) = self.gateways.get_mut(&source.gateway) else {
            return Ok(());
        };
        if source.number <= gateway.accepted {
            self.counters.duplicates += 1;
            return Ok(());
        }
        if source.number.0 != gateway.accepted.0 + 1 {
            return Err(GatewayError {
                what: "a frame is missing before this one",
            });
        }
        gateway.accepted = source.number;
        gateway.arriving_bytes += bytes.len();
        self.counters.arrivals += 1;
        self.arrivals.push_back((source, bytes));
        Ok(())
    }

    /// The next frame for the machine. Each comes once; the log must show it before any output
    /// that it leads to.
    pub fn poll_arrival(&mut self) -> Option<(FrameSource, Bytes)> {
        if self.held {
            return None;
        }
        let (source, bytes) = self.arrivals.pop_front()?;
        if let Some(gateway) = self.gateways.get_mut(&source.gateway) {
            gateway.arriving_bytes = gateway.arriving_bytes.saturating_sub(bytes.len());
        }
        Some((source, bytes))
    }

    /// Whether [`FramePort::poll_arrival`] or [`FramePort::poll_event`] would give something.
    pub fn has_news(&self) -> bool {
        (!self.held && !self.arrivals.is_empty()) || !self.events.is_empty()
    }

    /// Holds arrivals back while the machine's queue is full, or lets them go on. What waits here
    /// is bounded by [`FrameLimits::arrivals`].
    pub const fn hold_arrivals(&mut self, held: bool) {
        self.held = held;
    }

    /// Whether more may be read from a session. When not, it is the machine's turn to take frames.
    pub fn wants_input(&self, session: SessionId) -> bool {
        match self.sessions.get(&session).map(|s| &s.standing) {
            Some(Standing::Welcomed(flow)) => self
                .gateways
                .get(&flow.gateway)
                .is_none_or(|gateway| gateway.arriving_bytes < self.limits.arrivals),
            _ => true,
        }
    }

    /// Appends what is to be written to a session until there are `budget` bytes or nothing is
    /// left. Says whether the session ends after that.
    pub fn transmit(&mut self, session: SessionId, out: &mut BytesMut, budget: usize) -> bool {
        let Some(known) = self.sessions.get_mut(&session) else {
            return true;
        };
        if let Some(first) = known.first.take() {
            first.encode(out);
        }
        let flow = match &mut known.standing {
            Standing::Welcomed(flow) => flow,
            Standing::Refused => return true,
            Standing::Silent | Standing::Waiting(_) => return false,
        };
        let Some(gateway) = self.gateways.get_mut(&flow.gateway) else {
            return true;
        };
        if gateway.session != Some(session) {
            return true;
        }
        let skipped = gateway
            .outputs
            .partition_point(|(number, _)| *number <= flow.sent);
        let mut any = false;
        for (number, bytes) in gateway.outputs.range(skipped..) {
            if out.len() >= budget {
                break;
            }
            put_frame(out, NetworkPort::default(), *number, bytes);
            if *number <= flow.resend_through {
                self.counters.resent += 1;
            }
            flow.sent = *number;
            any = true;
        }
        let untold = gateway.committed.0.saturating_sub(flow.told_committed.0);
        if untold > 0 && (any || flow.tell_now || untold >= COMMITTED_AFTER) {
            flow.tell_now = false;
            flow.told_committed = gateway.committed;
            ToGateway::Committed {
                through: gateway.committed,
            }
            .encode(out);
        }
        false
    }

    // ---- time ----

    /// When [`FramePort::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        let absent = match self.role {
            Role::Leading(_) => self
                .gateways
                .values()
                .filter_map(|gateway| gateway.absent_since)
                .min()
                .map(|since| since.plus(self.limits.absence)),
            Role::Following => None,
        };
        [absent, self.tell_at].into_iter().flatten().min()
    }

    /// Does what has become due; every session is to be asked for what it has to write then.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.tell_at.is_some_and(|at| at <= now) {
            self.tell_at = None;
            for session in self.sessions.values_mut() {
                if let Standing::Welcomed(flow) = &mut session.standing {
                    flow.tell_now = true;
                }
            }
        }
        if !matches!(self.role, Role::Leading(_)) {
            return;
        }
        let gone: Vec<_> = self
            .gateways
            .iter()
            .filter(|(_, gateway)| {
                gateway
                    .absent_since
                    .is_some_and(|since| since.plus(self.limits.absence) <= now)
            })
            .map(|(incarnation, _)| *incarnation)
            .collect();
        for incarnation in gone {
            self.drop_gateway(incarnation, DropReason::Absent);
        }
    }

    fn drop_gateway(&mut self, incarnation: GatewayIncarnation, why: DropReason) {
        let Some(gateway) = self.gateways.get_mut(&incarnation) else {
            return;
        };
        let outputs = gateway.outputs.len();
        if let Some(last) = gateway.forget_outputs(FrameNumber(u64::MAX)) {
            self.forgotten_for.insert(Mac::of(incarnation), last);
        }
        gateway.absent_since = None;
        gateway.dropped = true;
        if let Some(session) = gateway.session.take()
            && let Some(session) = self.sessions.get_mut(&session)
        {
            session.standing = Standing::Refused;
            session.first = Some(ToGateway::Refused {
                term: self.known,
                why: Refusal::TooLate,
            });
        }
        self.events.push_back(FrameEvent::Dropped {
            gateway: incarnation,
            why,
            outputs,
        });
    }

    /// Forgets a gateway that is gone for good, or at least one that is not there.
    fn forget_a_gateway(&mut self) {
        let victim = self
            .gateways
            .iter()
            .filter(|(_, gateway)| gateway.session.is_none())
            .min_by_key(|(_, gateway)| (!gateway.dropped, gateway.outputs.len()))
            .map(|(incarnation, _)| *incarnation);
        if let Some(victim) = victim {
            self.gateways.remove(&victim);
            self.owners.remove(&Mac::of(victim));
            self.forgotten_for.remove(&Mac::of(victim));
        }
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
        self.gateways
            .values()
            .filter(|gateway| gateway.session.is_some())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Time = Time::from_nanos(0);

    fn seconds(seconds: u64) -> Time {
        START.plus(Span::from_millis(seconds * 1_000))
    }

    fn vm(name: &str) -> VmName {
        VmName::new(name).expect("a name")
    }

    const GATEWAY: GatewayIncarnation = GatewayIncarnation(5);
    const OTHER: GatewayIncarnation = GatewayIncarnation(6);

    fn port() -> FramePort {
        let limits = FrameLimits {
            gateways: 2,
            outputs: 100,
            arrivals: 30,
            absence: Span::from_millis(60_000),
        };
        FramePort::new(vm("vm"), Boot([1; 16]), limits)
    }

    fn hello(gateway: GatewayIncarnation, term: u64, received: u64) -> ToAgent {
        ToAgent::Hello(Hello {
            vm: vm("vm"),
            gateway,
            term: Term(term),
            received: FrameNumber(received),
        })
    }

    /// An output, 15 bytes long.
    fn ethernet(to: GatewayIncarnation) -> Bytes {
        [&Mac::of(to).0[..], &[2, 0, 0, 0, 0, 99, 8, 0, 42]]
            .concat()
            .into()
    }

    fn frame(number: u64) -> ToAgent {
        ToAgent::Frame {
            port: NetworkPort::default(),
            number: FrameNumber(number),
            bytes: Bytes::from_static(&[0; 15]),
        }
    }

    fn written(port: &mut FramePort, session: SessionId) -> (Vec<ToGateway>, bool) {
        let mut out = BytesMut::new();
        let ends = port.transmit(session, &mut out, 1 << 16);
        let mut messages = Vec::new();
        while let Some(message) = ToGateway::decode(&mut out).expect("well formed") {
            messages.push(message);
        }
        (messages, ends)
    }

    fn refusal(port: &mut FramePort, session: SessionId) -> Option<Refusal> {
        let (messages, ends) = written(port, session);
        match messages.first() {
            Some(ToGateway::Refused { why, .. }) if ends => Some(*why),
            _ => None,
        }
    }

    fn join(port: &mut FramePort, session: u64, gateway: GatewayIncarnation, received: u64) {
        port.connected(SessionId(session));
        port.message(SessionId(session), hello(gateway, 1, received))
            .expect("hello");
    }

    /// A leading port whose machine has logged one frame of each of two gateways.
    fn leading() -> FramePort {
        let mut port = port();
        let logged = [(GATEWAY, FrameNumber(1)), (OTHER, FrameNumber(1))];
        port.lead(Term(1), logged, START);
        port
    }

    #[test]
    fn a_frame_that_comes_twice_is_delivered_once_and_a_gap_is_refused() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        for number in [1, 2, 2, 3] {
            port.message(SessionId(1), frame(number)).expect("a frame");
        }
        let numbers: Vec<_> = std::iter::from_fn(|| port.poll_arrival())
            .map(|(source, _)| source.number.0)
            .collect();
        assert_eq!(numbers, [2, 3]);
        assert_eq!(port.counters().duplicates, 2);
        assert!(port.message(SessionId(1), frame(5)).is_err());
    }

    #[test]
    fn a_hello_waits_for_the_reign_that_it_names() {
        let mut port = port();
        join(&mut port, 1, GATEWAY, 0);
        assert_eq!(written(&mut port, SessionId(1)), (vec![], false));
        port.lead(Term(1), [], START);
        let (messages, ends) = written(&mut port, SessionId(1));
        assert!(matches!(messages[..], [ToGateway::Welcome { .. }]));
        assert!(!ends);
        // Deposed: the session is over, and so is one for a term that is past.
        port.follow(Term(2));
        assert_eq!(refusal(&mut port, SessionId(1)), Some(Refusal::OtherTerm));
        join(&mut port, 2, GATEWAY, 0);
        assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::OtherTerm));
    }

    #[test]
    fn outputs_go_to_whom_they_are_for() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        join(&mut port, 2, OTHER, 0);
        port.output(FrameNumber(1), ethernet(GATEWAY));
        port.output(FrameNumber(4), ethernet(OTHER));
        let mut broadcast = ethernet(GATEWAY).to_vec();
        broadcast[..6].fill(0xff);
        port.output(FrameNumber(5), broadcast.into());
        let mut numbers = |session| {
            let (messages, _) = written(&mut port, SessionId(session));
            messages
                .iter()
                .filter_map(|message| match message {
                    ToGateway::Frame { number, .. } => Some(number.0),
                    _ => None,
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(numbers(1), [1, 5]);
        assert_eq!(numbers(2), [4, 5]);
        assert_eq!(port.received_by_all(), FrameNumber(0));
        let received = |through| ToAgent::Received {
            through: FrameNumber(through),
        };
        port.message(SessionId(1), received(5)).expect("received");
        assert_eq!(port.received_by_all(), FrameNumber(3));
        assert!(port.message(SessionId(2), received(6)).is_err());
    }

    #[test]
    fn a_gateway_that_stays_away_is_dropped_and_cannot_come_back() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        port.output(FrameNumber(1), ethernet(GATEWAY));
        port.output(FrameNumber(2), ethernet(OTHER));
        assert_eq!(port.received_by_all(), FrameNumber(0));
        port.disconnected(SessionId(1), seconds(10));
        // The other gateway was known from the log and never came: it goes first.
        assert_eq!(port.poll_timeout(), Some(seconds(60)));
        port.handle_timeout(seconds(60));
        port.handle_timeout(seconds(70));
        let dropped: Vec<_> = std::iter::from_fn(|| port.poll_event())
            .filter_map(|event| match event {
                FrameEvent::Dropped { gateway, why, .. } => Some((gateway, why)),
                _ => None,
            })
            .collect();
        assert_eq!(
            dropped,
            [(OTHER, DropReason::Absent), (GATEWAY, DropReason::Absent)]
        );
        assert_eq!(port.received_by_all(), FrameNumber(2));
        join(&mut port, 2, GATEWAY, 0);
        assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::TooLate));
        join(&mut port, 3, GATEWAY, 1);
        assert_eq!(refusal(&mut port, SessionId(3)), None);
    }

    #[test]
    fn a_gateway_that_takes_nothing_is_dropped_at_the_bound() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        for number in 1..=7 {
            port.output(FrameNumber(number), ethernet(GATEWAY));
        }
        assert_eq!(refusal(&mut port, SessionId(1)), Some(Refusal::TooLate));
        assert_eq!(port.received_by_all(), FrameNumber(7));
    }

    #[test]
    fn a_machine_that_takes_nothing_stops_the_gateway() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        port.message(SessionId(1), frame(2)).expect("a frame");
        assert!(port.wants_input(SessionId(1)));
        port.message(SessionId(1), frame(3)).expect("a frame");
        assert!(!port.wants_input(SessionId(1)), "30 bytes of 30 wait");
        port.hold_arrivals(true);
        assert_eq!((port.poll_arrival(), port.has_news()), (None, true));
        while port.poll_event().is_some() {}
        assert!(!port.has_news());
        port.hold_arrivals(false);
        assert!(port.has_news());
        port.poll_arrival();
        assert!(port.wants_input(SessionId(1)));
    }

    #[test]
    fn frames_are_committed_to_the_gateway_when_the_log_is() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        written(&mut port, SessionId(1));
        port.message(SessionId(1), frame(2)).expect("a frame");
        let (source, _) = port.poll_arrival().expect("it arrives");
        port.logged(source, LogIndex(7));
        port.committed(LogIndex(6), START);
        assert_eq!(port.poll_timeout(), Some(seconds(60)));
        port.committed(LogIndex(7), START);
        assert_eq!(written(&mut port, SessionId(1)).0, []);
        port.handle_timeout(START.plus(COMMITTED_WITHIN));
        assert_eq!(
            written(&mut port, SessionId(1)).0,
            [ToGateway::Committed {
                through: FrameNumber(2)
            }]
        );
    }

    #[test]
    fn a_replica_keeps_outputs_until_all_gateways_have_them() {
        let mut port = leading();
        port.follow(Term(1));
        port.output(FrameNumber(1), ethernet(GATEWAY));
        port.output(FrameNumber(2), ethernet(GATEWAY));
        port.forget(FrameNumber(3));
        // Replay comes to it later than the gateway did.
        port.output(FrameNumber(3), ethernet(GATEWAY));
        port.output(FrameNumber(4), ethernet(GATEWAY));
        port.lead(Term(2), [], START);
        port.connected(SessionId(1));
        port.message(SessionId(1), hello(GATEWAY, 2, 3))
            .expect("hello");
        let (messages, _) = written(&mut port, SessionId(1));
        let numbers: Vec<_> = messages
            .iter()
            .filter_map(|message| match message {
                ToGateway::Frame { number, .. } => Some(number.0),
                _ => None,
            })
            .collect();
        assert_eq!(numbers, [4]);
        // One that lacks what all were thought to have cannot go on.
        port.connected(SessionId(2));
        port.message(SessionId(2), hello(GATEWAY, 2, 2))
            .expect("hello");
        assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::TooLate));
    }

    #[test]
    fn strangers_are_turned_away() {
        let mut port = leading();
        port.connected(SessionId(1));
        assert!(port.message(SessionId(1), frame(1)).is_err());
        let wrong = ToAgent::Hello(Hello {
            vm: vm("another"),
            gateway: GATEWAY,
            term: Term(1),
            received: FrameNumber(0),
        });
        port.connected(SessionId(2));
        port.message(SessionId(2), wrong).expect("hello");
        assert_eq!(refusal(&mut port, SessionId(2)), Some(Refusal::UnknownVm));
        join(&mut port, 3, GATEWAY, 0);
        join(&mut port, 4, OTHER, 0);
        join(&mut port, 5, GatewayIncarnation(7), 0);
        assert_eq!(refusal(&mut port, SessionId(5)), Some(Refusal::TooMany));
        // The same gateway again takes the place of its older session.
        join(&mut port, 6, GATEWAY, 0);
        assert_eq!(refusal(&mut port, SessionId(6)), None);
        assert!(written(&mut port, SessionId(3)).1, "the older one ends");
    }
}
