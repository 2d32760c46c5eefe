//! The agent's end of the numbered frames of one VM: which gateway has what, which output is for
//! whom, and what may be forgotten. Pure: no I/O and no clock. `FrameStreams`
//! connects it to byte streams.
//!
//! Every copy of the VM keeps one, from power-on, and feeds it with the log that it holds and the
//! outputs that its machine makes; so a replica that is promoted knows what each gateway lacks.
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
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, LogIndex, Term};
use thiserror::Error;

use crate::gateway::frames::{
    Boot, Hello, Message, NetworkPort, Refusal, SessionId, ToAgent, ToGateway, put_frame,
};

/// How long the news of committed frames may wait for outputs to travel with.
const COMMITTED_WITHIN: Duration = Duration::from_millis(20);

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
    pub absence: Duration,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self {
            gateways: 64,
            outputs: 4 << 20,
            arrivals: 1 << 20,
            absence: Duration::from_secs(60),
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
    /// The last output for it alone that is not kept any more.
    forgotten: FrameNumber,
    /// Bytes handed in and not yet taken by the machine.
    arriving_bytes: usize,
    session: Option<SessionId>,
    absent_since: Option<Duration>,
    /// It was dropped: nothing is kept for it.
    dropped: bool,
}

impl Gateway {
    fn forget_outputs(&mut self, through: FrameNumber) {
        while let Some((number, bytes)) = self.outputs.front()
            && *number <= through
        {
            self.output_bytes -= bytes.len();
            // Copies differ about who was there for a broadcast, so it binds nobody.
            if Mac::destination(bytes).is_some_and(|mac| !mac.is_group()) {
                self.forgotten = *number;
            }
            self.outputs.pop_front();
        }
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

/// The agent's end. Times are durations since one fixed instant.
#[derive(Debug)]
pub struct FramePort {
    vm: String,
    boot: Boot,
    limits: FrameLimits,
    role: Role,
    /// The highest term this agent has heard of.
    known: Term,
    gateways: BTreeMap<GatewayIncarnation, Gateway>,
    owners: HashMap<Mac, GatewayIncarnation>,
    sessions: HashMap<SessionId, Session>,
    arrivals: VecDeque<(FrameSource, Bytes)>,
    last_output: FrameNumber,
    /// What every gateway has, as the primary said.
    forgotten: FrameNumber,
    /// Something is committed that a gateway has not been told.
    tell_at: Option<Duration>,
    events: VecDeque<FrameEvent>,
    counters: FramePortCounters,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Mac([u8; 6]);

impl Mac {
    fn destination(frame: &[u8]) -> Option<Self> {
        Some(Self(frame.get(..6)?.try_into().ok()?))
    }

    fn source(frame: &[u8]) -> Option<Self> {
        Some(Self(frame.get(6..12)?.try_into().ok()?))
    }

    const fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }
}

impl FramePort {
    /// A port for a machine that starts from power-on (or replays from there). `boot` is that of
    /// the log's header.
    pub fn new(vm: String, boot: Boot, limits: FrameLimits) -> Self {
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
            last_output: FrameNumber(0),
            forgotten: FrameNumber(0),
            tell_at: None,
            events: VecDeque::new(),
            counters: FramePortCounters::default(),
        }
    }

    // ---- what every copy tells its port ----

    /// The log this copy holds now contains this arrival; `end` is the place after its entry.
    /// Called for every arriving frame of the log, in order, on the primary and on replicas.
    pub fn logged(&mut self, source: FrameSource, frame: &Bytes, end: LogIndex) {
        if let Some(mac) = Mac::source(frame)
            && !mac.is_group()
        {
            self.owners.insert(mac, source.gateway);
        }
        let leading = matches!(self.role, Role::Leading(_));
        let gateway = self.gateways.entry(source.gateway).or_default();
        gateway.logged = gateway.logged.max(source.number);
        gateway.accepted = gateway.accepted.max(source.number);
        if leading {
            gateway.uncommitted.push_back((end, source.number));
        }
        if self.gateways.len() > MOST_REMEMBERED {
            self.forget_a_gateway();
        }
    }

    /// Everything before this place of the log is committed. For the primary.
    pub fn committed(&mut self, through: LogIndex, now: Duration) {
        for gateway in self.gateways.values_mut() {
            let before = gateway.committed;
            while let Some((end, number)) = gateway.uncommitted.front()
                && *end <= through
            {
                gateway.committed = gateway.committed.max(*number);
                gateway.uncommitted.pop_front();
            }
            if gateway.committed > before && gateway.session.is_some() && self.tell_at.is_none() {
                self.tell_at = Some(now + COMMITTED_WITHIN);
            }
        }
    }

    /// The machine has made an output that the world may see: on the primary after its release, on
    /// a replica as soon as replay makes it. In order; an output that comes again is ignored.
    pub fn output(&mut self, number: FrameNumber, frame: Bytes) {
        if number <= self.last_output {
            return;
        }
        self.last_output = number;
        let Some(destination) = Mac::destination(&frame) else {
            self.counters.unclaimed += 1;
            return;
        };
        let owner = (!destination.is_group())
            .then(|| self.owners.get(&destination))
            .flatten();
        if let Some(owner) = owner {
            let owner = *owner;
            self.keep(owner, number, frame);
        } else {
            // Broadcast, or an address that nobody has used yet: a gateway that it is not for
            // drops it.
            let all: Vec<_> = self.gateways.keys().copied().collect();
            for gateway in all {
                self.keep(gateway, number, frame.clone());
            }
        }
    }

    fn keep(&mut self, incarnation: GatewayIncarnation, number: FrameNumber, frame: Bytes) {
        let Some(gateway) = self.gateways.get_mut(&incarnation) else {
            self.counters.unclaimed += 1;
            return;
        };
        if gateway.dropped || number <= self.forgotten {
            if Mac::destination(&frame).is_some_and(|mac| !mac.is_group()) {
                gateway.forgotten = number;
            }
            self.counters.unclaimed += u64::from(gateway.dropped);
            return;
        }
        gateway.output_bytes += frame.len();
        gateway.outputs.push_back((number, frame));
        self.counters.outputs += 1;
        if gateway.output_bytes > self.limits.outputs {
            self.drop_gateway(incarnation, DropReason::TooFarBehind);
        }
    }

    /// The primary says that every gateway has all outputs up to here. For replicas.
    pub fn forget(&mut self, through: FrameNumber) {
        self.forgotten = self.forgotten.max(through);
        for gateway in self.gateways.values_mut() {
            gateway.forget_outputs(through);
        }
    }

    /// Every gateway has all outputs up to here: no copy needs to keep them.
    pub fn received_by_all(&self) -> FrameNumber {
        self.gateways
            .values()
            .filter_map(|gateway| gateway.outputs.front())
            .map(|(number, _)| FrameNumber(number.0.saturating_sub(1)))
            .min()
            .unwrap_or(self.last_output)
    }

    /// This copy reigns: everything it has logged is committed, and gateways are welcomed.
    pub fn lead(&mut self, term: Term, now: Duration) {
        self.role = Role::Leading(term);
        self.known = self.known.max(term);
        self.arrivals.clear();
        for gateway in self.gateways.values_mut() {
            gateway.accepted = gateway.logged;
            gateway.committed = gateway.logged;
            gateway.uncommitted.clear();
            gateway.arriving_bytes = 0;
            gateway.session = None;
            gateway.absent_since = (!gateway.dropped).then_some(now);
        }
        let mut waiting = Vec::new();
        for (id, session) in &mut self.sessions {
            match std::mem::replace(&mut session.standing, Standing::Silent) {
                Standing::Waiting(hello) => waiting.push((*id, hello)),
                Standing::Welcomed(_) => {
                    session.standing = Standing::Refused;
                    session.first = Some(ToGateway::Refused {
                        term,
                        why: Refusal::OtherTerm,
                    });
                }
                other => session.standing = other,
            }
        }
        waiting.sort_by_key(|(id, _)| *id);
        for (id, hello) in waiting {
            self.hello(id, hello);
        }
    }

    /// This copy reigns no more, or has heard of a later term. Frames that are not in its log are
    /// the next primary's business.
    pub fn follow(&mut self, known: Term) {
        self.role = Role::Following;
        self.known = self.known.max(known);
        self.arrivals.clear();
        self.tell_at = None;
        for gateway in self.gateways.values_mut() {
            gateway.session = None;
            gateway.absent_since = None;
            gateway.uncommitted.clear();
            gateway.arriving_bytes = 0;
        }
        for session in self.sessions.values_mut() {
            let late = match &session.standing {
                Standing::Welcomed(_) => true,
                Standing::Waiting(hello) => hello.term < self.known,
                Standing::Silent | Standing::Refused => false,
            };
            if late {
                session.standing = Standing::Refused;
                session.first = Some(ToGateway::Refused {
                    term: self.known,
                    why: Refusal::OtherTerm,
                });
            }
        }
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
    pub fn disconnected(&mut self, session: SessionId, now: Duration) {
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
                if let Some(gateway) = self.gateways.get_mut(&flow.gateway) {
                    gateway.forget_outputs(through);
                }
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
        let Some(session) = self.sessions.get_mut(&id) else {
            return;
        };
        if let Some(why) = why {
            session.standing = Standing::Refused;
            session.first = Some(ToGateway::Refused { term, why });
            self.events.push_back(FrameEvent::Refused {
                gateway: hello.gateway,
                why,
            });
            return;
        }
        let gateway = self.gateways.entry(hello.gateway).or_default();
        gateway.forget_outputs(hello.received);
        let before = gateway.session.replace(id);
        gateway.absent_since = None;
        gateway.dropped = false;
        session.first = Some(ToGateway::Welcome {
            term,
            boot: self.boot,
            logged: gateway.accepted,
        });
        session.standing = Standing::Welcomed(Flow {
            gateway: hello.gateway,
            sent: hello.received,
            resend_through: self.last_output,
            told_committed: FrameNumber(0),
            tell_now: true,
        });
        self.events.push_back(FrameEvent::Welcomed {
            gateway: hello.gateway,
            logged: gateway.accepted,
            resent: gateway.outputs.len(),
        });
        // The same gateway on an older stream: what comes there is not heard any more.
        if let Some(before) = before.filter(|before| *before != id)
            && let Some(older) = self.sessions.get_mut(&before)
        {
            older.standing = Standing::Refused;
        }
    }

    fn cannot_serve(&self, hello: &Hello) -> Option<Refusal> {
        let served = || self.gateways.values().filter(|g| g.session.is_some());
        match self.gateways.get(&hello.gateway) {
            Some(gateway) if hello.received < gateway.forgotten => Some(Refusal::TooLate),
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
        let (source, bytes) = self.arrivals.pop_front()?;
        if let Some(gateway) = self.gateways.get_mut(&source.gateway) {
            gateway.arriving_bytes = gateway.arriving_bytes.saturating_sub(bytes.len());
        }
        Some((source, bytes))
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
    pub fn poll_timeout(&self) -> Option<Duration> {
        let absent = match self.role {
            Role::Leading(_) => self
                .gateways
                .values()
                .filter_map(|gateway| gateway.absent_since)
                .min()
                .map(|since| since + self.limits.absence),
            Role::Following => None,
        };
        [absent, self.tell_at].into_iter().flatten().min()
    }

    /// Does what has become due; every session is to be asked for what it has to write then.
    pub fn handle_timeout(&mut self, now: Duration) {
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
                    .is_some_and(|since| since + self.limits.absence <= now)
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
        gateway.forget_outputs(FrameNumber(u64::MAX));
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
            self.owners.retain(|_, owner| *owner != victim);
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

    const GATEWAY: GatewayIncarnation = GatewayIncarnation(5);
    const OTHER: GatewayIncarnation = GatewayIncarnation(6);

    fn port() -> FramePort {
        let limits = FrameLimits {
            gateways: 2,
            outputs: 100,
            arrivals: 30,
            absence: Duration::from_secs(60),
        };
        FramePort::new("vm".into(), Boot([1; 16]), limits)
    }

    fn hello(gateway: GatewayIncarnation, term: u64, received: u64) -> ToAgent {
        ToAgent::Hello(Hello {
            vm: "vm".into(),
            gateway,
            term: Term(term),
            received: FrameNumber(received),
        })
    }

    fn ethernet(from: GatewayIncarnation, to: u8) -> Bytes {
        Bytes::copy_from_slice(&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from.0 as u8, 8, 0, 42])
    }

    fn frame(number: u64) -> ToAgent {
        ToAgent::Frame {
            port: NetworkPort::default(),
            number: FrameNumber(number),
            bytes: ethernet(GATEWAY, 99),
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
        for (index, gateway) in [(1, GATEWAY), (2, OTHER)] {
            let source = FrameSource {
                gateway,
                number: FrameNumber(1),
            };
            port.logged(source, &ethernet(gateway, 99), LogIndex(index));
        }
        port.lead(Term(1), Duration::ZERO);
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
        port.lead(Term(1), Duration::ZERO);
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
        port.output(FrameNumber(1), ethernet(OTHER, GATEWAY.0 as u8));
        port.output(FrameNumber(4), ethernet(GATEWAY, OTHER.0 as u8));
        let mut broadcast = ethernet(GATEWAY, 0).to_vec();
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
        port.output(FrameNumber(1), ethernet(OTHER, GATEWAY.0 as u8));
        port.output(FrameNumber(2), ethernet(GATEWAY, OTHER.0 as u8));
        assert_eq!(port.received_by_all(), FrameNumber(0));
        port.disconnected(SessionId(1), Duration::from_secs(10));
        // The other gateway was known from the log and never came: it goes first.
        assert_eq!(port.poll_timeout(), Some(Duration::from_secs(60)));
        port.handle_timeout(Duration::from_secs(60));
        port.handle_timeout(Duration::from_secs(70));
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
            port.output(FrameNumber(number), ethernet(OTHER, GATEWAY.0 as u8));
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
        port.poll_arrival();
        assert!(port.wants_input(SessionId(1)));
    }

    #[test]
    fn frames_are_committed_to_the_gateway_when_the_log_is() {
        let mut port = leading();
        join(&mut port, 1, GATEWAY, 0);
        written(&mut port, SessionId(1));
        port.message(SessionId(1), frame(2)).expect("a frame");
        let (source, bytes) = port.poll_arrival().expect("it arrives");
        port.logged(source, &bytes, LogIndex(7));
        port.committed(LogIndex(6), Duration::ZERO);
        assert_eq!(port.poll_timeout(), Some(Duration::from_secs(60)));
        port.committed(LogIndex(7), Duration::ZERO);
        assert_eq!(written(&mut port, SessionId(1)).0, []);
        port.handle_timeout(COMMITTED_WITHIN);
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
        port.output(FrameNumber(1), ethernet(OTHER, GATEWAY.0 as u8));
        port.output(FrameNumber(2), ethernet(OTHER, GATEWAY.0 as u8));
        port.forget(FrameNumber(3));
        // Replay comes to it later than the gateway did.
        port.output(FrameNumber(3), ethernet(OTHER, GATEWAY.0 as u8));
        port.output(FrameNumber(4), ethernet(OTHER, GATEWAY.0 as u8));
        port.lead(Term(2), Duration::ZERO);
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
            vm: "another".into(),
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
