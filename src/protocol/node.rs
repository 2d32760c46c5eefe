//! Everything one host knows of one VM: the state machine that the driver and the simulator run.
//!
//! ```text
//!                 claims                   wins the record
//!    Replica ────────────────► Claimant ──────────────────► Primary
//!       ▲  ▲                      │                            │
//!       │  └──── stands down ─────┘                            │
//!       └──────── deposed, handed over, abdicated ─────────────┘
//! ```

mod store;

use replay_log::{LogTip, Position};

use super::api::{Action, Input, Operator, StopReason, Swapped};
use super::config::{Config, Restored};
use super::controller::{Controller, Kind};
use super::core::{Core, Greeting, Rest};
use super::event::Event;
use super::message::{Claim, Message, PROTOCOL_VERSION, Refusal};
use super::mutation::Mutation;
use super::name::{HostName, Incarnation};
use super::primary::Primary;
use super::record::{Committed, Record};
use super::replica::Replica;
use super::status::{RoleName, Status};
use super::time::Time;

/// What a role wants to become.
#[derive(Debug)]
pub(super) enum Turn {
    /// Nothing else.
    Stay,
    /// A claimant.
    Claim { kind: Kind, base: Option<Record> },
    /// The primary: the record names this host, and its reign begins with this log.
    Reign { kind: Kind, base: LogTip },
    /// A replica: the claim has failed.
    StandDown,
    /// A replica, which then hears this.
    Yield { to: HostName, message: Message },
    /// A replica: another host reigns.
    Deposed {
        term: replay_log::Term,
        handed_over: bool,
    },
    /// A replica: the VMM failed here.
    Abdicated,
}

#[derive(Debug)]
enum Role {
    Replica(Box<Replica>),
    Claimant(Box<Controller>),
    Primary(Box<Primary>),
}

/// The protocol's state machine for one VM on one host.
#[derive(Debug)]
pub struct Node {
    core: Core,
    role: Role,
    tick_at: Time,
}

impl Node {
    /// A node that has just (re)started with what was found on disk.
    pub fn new(config: Config, restored: Restored, now: Time) -> Self {
        let core = Core::new(config, restored, now);
        let role = Role::Replica(Box::new(Replica::new(&core)));
        Self {
            core,
            role,
            tick_at: now,
        }
    }

    /// Something happened.
    pub fn handle(&mut self, now: Time, input: Input) {
        self.wake(now);
        let turn = self.dispatch(input);
        self.turn(turn);
    }

    /// The moment that [`Node::poll_timeout`] named has come.
    pub fn handle_timeout(&mut self, now: Time) {
        self.wake(now);
        self.tick_at = self.core.now.plus(self.core.config.timing.doze());
        let turn = match &mut self.role {
            Role::Replica(replica) => replica.tick(&mut self.core),
            Role::Claimant(controller) => controller.tick(&mut self.core),
            Role::Primary(primary) => primary.tick(&mut self.core),
        };
        self.turn(turn);
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.core.actions.pop_front()
    }

    /// When to call [`Node::handle_timeout`] at the latest.
    pub fn poll_timeout(&self) -> Option<Time> {
        let at = match &self.role {
            Role::Replica(replica) => replica.timeout(&self.core),
            Role::Claimant(controller) => controller.timeout(&self.core),
            Role::Primary(primary) => primary.timeout(),
        };
        Some(at.min(self.tick_at))
    }

    /// What the node knows.
    pub fn status(&self) -> Status {
        let core = &self.core;
        let (mut unprotected_since, mut stalled_since, mut throttled) = (None, None, false);
        let (mut primary_silence, mut followers) = (None, vec![]);
        let mut stopped_at = None;
        let role = match &self.role {
            Role::Replica(replica) => {
                primary_silence = core.record.as_ref().map(|_| replica.silence(core));
                stopped_at = Replica::stopped_at(core);
                self.replica_role(replica)
            }
            Role::Claimant(_) => RoleName::Claimant,
            Role::Primary(primary) => {
                unprotected_since = primary.unprotected_since();
                stalled_since = primary.stalled_since();
                throttled = primary.throttled();
                followers = primary.follower_status(core);
                primary.role()
            }
        };
        Status {
            role,
            record: core.record.clone(),
            incarnation: core.durable.incarnation,
            promise: core.durable.promise.clone(),
            tip: core.log.appended,
            stored: core.log.stored.index,
            synced: core.log.synced.index,
            executed: core.executed,
            position: core.position,
            committed: core.committed,
            forgotten: core.forgotten,
            run: core.run,
            unprotected_since,
            stalled_since,
            throttled,
            keeper_set_back: core.keeper_set_back,
            full: core.full.clone(),
            health: core.health(),
            stopped_at,
            seen: core.committed_record(),
            primary_silence,
            followers,
        }
    }

    /// The holding this host has, or is about to have.
    pub fn incarnation(&self) -> Incarnation {
        self.core.durable.incarnation
    }

    fn replica_role(&self, replica: &Replica) -> RoleName {
        let core = &self.core;
        let concerned = core
            .record
            .as_ref()
            .map(|record| record.concerns(core.host()));
        match concerned {
            _ if !core.settled() => RoleName::Starting,
            None if !core.record_read => RoleName::Starting,
            Some(true) if core.is_copy() => RoleName::Member,
            Some(true) => RoleName::Learner,
            _ if replica.follows() => RoleName::Learner,
            _ => RoleName::Outsider,
        }
    }

    fn wake(&mut self, now: Time) {
        self.core.now = self.core.now.max(now);
        self.core.attention.called(now);
    }

    // --- inputs ------------------------------------------------------------------------------

    fn dispatch(&mut self, input: Input) -> Turn {
        let core = &mut self.core;
        match input {
            Input::PeerUp(host) => return self.peer_up(&host),
            Input::PeerDown(host) => return self.peer_down(&host),
            Input::Distance { host, rtt } => {
                core.peers.entry(host).or_default().rtt = rtt;
            }
            Input::Message { from, message } => return self.message(&from, message),
            Input::Stored { incarnation, tip } => {
                core.stored(incarnation, tip);
                return self.log_moved();
            }
            Input::Synced { incarnation, tip } => {
                core.synced(incarnation, tip);
                return self.log_moved();
            }
            Input::StoreFailed { reason } => return self.store_failed(reason),
            Input::StoreFull { reason } => return self.store_full(reason),
            Input::StoreShort { incarnation, tip } => return self.store_short(incarnation, tip),
            Input::StoreRoom => return self.store_room(),
            Input::Persisted(durable) => {
                let settled = core.persisted(durable);
                return self.persisted(settled);
            }
            Input::TipAt { peer, index, tip } => {
                let ours = core.log.appended;
                core.feeds
                    .looked_up(&peer, index, tip, ours, &mut core.actions);
                return self.advance();
            }
            Input::RecordRead(record) => return self.record_read(record),
            Input::ReadFailed { reason } => {
                core.read_ended();
                core.keeper_silent(&reason);
                if let Role::Primary(primary) = &mut self.role {
                    primary.keeper_silent(core, &reason);
                }
            }
            Input::RecordSwapped(swapped) => return self.swapped(swapped),
            Input::Executed {
                run,
                through,
                position,
            } => {
                core.executed(run, through, position);
                if let Role::Replica(replica) = &mut self.role {
                    replica.executed(core);
                }
                return self.advance();
            }
            Input::VmEnded { run, how } if run == core.run => core.journal(Event::VmEnded { how }),
            Input::VmFailed { run, reason, at } if run == core.run => {
                return self.vm_failed(reason, at);
            }
            Input::VmEnded { .. } | Input::VmFailed { .. } => {}
            Input::Operator(wish) => {
                return match &mut self.role {
                    Role::Replica(replica) => replica.operator(core, wish),
                    Role::Primary(primary) => primary.operator(core, wish),
                    Role::Claimant(controller) if wish == Operator::AcceptLoss => {
                        controller.operator_accepts_loss(core)
                    }
                    Role::Claimant(_) => {
                        let why = "this host claims the VM at the moment: try again".to_owned();
                        core.journal(Event::OperatorRefused { why });
                        Turn::Stay
                    }
                };
            }
            _ => {
                if let Role::Primary(primary) = &mut self.role {
                    match input {
                        Input::Recorded { run, batch } => {
                            return primary.recorded(core, run, &batch);
                        }
                        Input::WentLive { run } => return primary.went_live(core, run),
                        Input::Paused { run } => return primary.paused(core, run),
                        Input::GatewayReceived { through } => core.forget(through),
                        Input::OutputWaits { bytes } => primary.output_waits(core, bytes),
                        _ => {}
                    }
                }
            }
        }
        Turn::Stay
    }

    fn peer_up(&mut self, host: &HostName) -> Turn {
        let core = &mut self.core;
        if core.is_up(host) {
            self.peer_down(host);
        }
        let core = &mut self.core;
        core.peers.entry(host.clone()).or_default().up = true;
        core.hello(host);
        match &self.role {
            Role::Primary(_) => core.send_record(host),
            Role::Replica(_) => core.disclaim(host),
            Role::Claimant(_) => {}
        }
        Turn::Stay
    }

    fn peer_down(&mut self, host: &HostName) -> Turn {
        let core = &mut self.core;
        core.peers.entry(host.clone()).or_default().up = false;
        core.feeds.stop(host, &mut core.actions);
        if let Role::Replica(replica) = &mut self.role {
            replica.peer_down(host);
        }
        Turn::Stay
    }

    fn message(&mut self, from: &HostName, message: Message) -> Turn {
        match message {
            Message::Hello {
                protocol,
                incarnation,
                tip,
                known,
            } => {
                if protocol != PROTOCOL_VERSION {
                    let what =
                        format!("speaks protocol version {protocol}, not {PROTOCOL_VERSION}");
                    let peer = from.clone();
                    self.core.journal(Event::PeerMisbehaved { peer, what });
                    return Turn::Stay;
                }
                let peer = self.core.peers.entry(from.clone()).or_default();
                peer.greeting = Some(Greeting { incarnation, tip });
                self.core.inform(from, known);
                if let Role::Primary(primary) = &mut self.role {
                    primary.greets(&mut self.core, from);
                }
                self.advance()
            }
            Message::Record(record) => self.learn(record),
            Message::Renounced { claim } => self.renounced(from, &claim),
            Message::Refused {
                term,
                why,
                promise,
                record,
            } => {
                if let Some(record) = record {
                    let turn = self.learn(record);
                    self.turn(turn);
                }
                let message = Message::Refused {
                    term,
                    why,
                    promise,
                    record: None,
                };
                self.role_message(from, message)
            }
            message if self.may_say(from, &message) => self.role_message(from, message),
            message => {
                if matches!(message, Message::Stream { .. }) {
                    self.core.overlooked = Some(from.clone());
                }
                // It may know a record that this host does not: what counts is the keeper's word.
                self.core.read_record();
                if let Message::Seal { claim, .. } = message {
                    let why = if claim.base > self.core.version() {
                        Refusal::Starting
                    } else {
                        Refusal::NotACopy
                    };
                    self.core.refuse(from, claim.term, why, claim.base);
                }
                Turn::Stay
            }
        }
    }

    /// Only hosts that the record concerns stop, read or feed a VM.
    fn may_say(&self, from: &HostName, message: &Message) -> bool {
        let core = &self.core;
        match message {
            Message::Seal { .. }
            | Message::Fetch { .. }
            | Message::Handover { .. }
            | Message::Consent { .. }
            | Message::TakeBack { .. }
            | Message::Stream { .. }
            | Message::Inquire { .. } => {
                core.concerns(from) || core.mutated(Mutation::StrangersHeard)
            }
            _ => true,
        }
    }

    /// A claimant has given up, and its claim can never come through.
    fn renounced(&mut self, from: &HostName, claim: &Claim) -> Turn {
        if claim.claimant != *from {
            return Turn::Stay;
        }
        let core = &mut self.core;
        let bound = core.release_promise(claim);
        match &mut self.role {
            Role::Replica(replica) => replica.renounced(core, claim, bound),
            Role::Claimant(_) => {}
            Role::Primary(primary) => primary.renounced(core, claim),
        }
        self.advance()
    }

    fn role_message(&mut self, from: &HostName, message: Message) -> Turn {
        let core = &mut self.core;
        match &mut self.role {
            Role::Replica(replica) => replica.message(core, from, message),
            Role::Claimant(controller) => controller.message(core, from, message),
            Role::Primary(primary) => primary.message(core, from, message),
        }
    }

    /// Somebody says that this record is committed.
    fn learn(&mut self, record: Committed) -> Turn {
        let term = self.core.version().term;
        if !self.core.learn(record) {
            return Turn::Stay;
        }
        let core = &mut self.core;
        match &mut self.role {
            Role::Replica(replica) => {
                let new_term = core.version().term > term;
                replica.record_changed(core, new_term);
                for host in core.up_peers() {
                    core.disclaim(&host);
                }
                Turn::Stay
            }
            Role::Claimant(controller) => controller.record_changed(core),
            Role::Primary(primary) => primary.record_changed(core),
        }
    }

    fn record_read(&mut self, record: Option<Committed>) -> Turn {
        self.core.read_ended();
        self.core.record_read = true;
        if !self.core.keeper_says(record.as_ref()) {
            return Turn::Stay;
        }
        let Some(record) = record else {
            return Turn::Stay;
        };
        let version = record.record.version();
        let turn = self.learn(record);
        self.turn(turn);
        match &mut self.role {
            Role::Replica(replica) if version == self.core.version() => {
                replica.record_read(&mut self.core)
            }
            _ => self.advance(),
        }
    }

    fn swapped(&mut self, swapped: Swapped) -> Turn {
        match &swapped {
            Swapped::Done(record) => _ = self.core.keeper_says(Some(record)),
            Swapped::Conflict(record) => _ = self.core.keeper_says(record.as_ref()),
            Swapped::Unknown { .. } => {}
        }
        match &mut self.role {
            Role::Claimant(controller) => controller.swapped(&mut self.core, swapped),
            Role::Primary(primary) => primary.swapped(&mut self.core, swapped),
            // The outcome of what an earlier role asked for.
            Role::Replica(_) => match swapped {
                Swapped::Done(record) | Swapped::Conflict(Some(record)) => self.learn(record),
                _ => Turn::Stay,
            },
        }
    }

    fn vm_failed(&mut self, reason: String, at: Position) -> Turn {
        let core = &mut self.core;
        core.journal(Event::VmFailed {
            reason: reason.clone(),
        });
        match &mut self.role {
            Role::Primary(primary) => primary.vm_failed(core, reason, at),
            Role::Claimant(controller) => {
                core.note_vm_failure();
                core.stop_vm(StopReason::Failed);
                controller.abandon(core, "the VMM failed")
            }
            Role::Replica(replica) => {
                replica.vm_failed(core);
                Turn::Stay
            }
        }
    }

    /// Whatever may have become possible.
    fn advance(&mut self) -> Turn {
        match &mut self.role {
            Role::Replica(_) => Turn::Stay,
            Role::Claimant(controller) => controller.advance(&mut self.core),
            Role::Primary(primary) => primary.advance(&mut self.core),
        }
    }

    // --- roles -------------------------------------------------------------------------------

    /// Becomes what the role wants to become, and whatever that leads to.
    fn turn(&mut self, turn: Turn) {
        let mut turn = turn;
        loop {
            turn = match turn {
                Turn::Stay => return,
                Turn::Claim { kind, base } => {
                    let mut controller = Controller::new(&mut self.core, kind, base);
                    let next = controller.begin(&mut self.core);
                    self.role = Role::Claimant(Box::new(controller));
                    next
                }
                Turn::Reign { kind, base } => {
                    let mut primary = Primary::new(&mut self.core, &kind, base);
                    let next = primary.advance(&mut self.core);
                    self.role = Role::Primary(Box::new(primary));
                    next
                }
                Turn::StandDown => {
                    self.stand_down();
                    Turn::Stay
                }
                Turn::Yield { to, message } => {
                    self.stand_down();
                    self.role_message(&to, message)
                }
                Turn::Deposed { term, handed_over } => {
                    self.deposed(term, handed_over);
                    Turn::Stay
                }
                Turn::Abdicated => {
                    let timing = self.core.config.timing;
                    self.core.feeds.stop_all(&mut self.core.actions);
                    let wait = timing.claim_patience.times(2);
                    self.become_replica(Replica::patient(&self.core, wait));
                    Turn::Stay
                }
            };
        }
    }

    /// Tries again later, each host after another time.
    fn stand_down(&mut self) {
        let core = &self.core;
        let timing = &core.config.timing;
        let rank = core
            .record
            .as_ref()
            .and_then(|record| record.rank(core.host()));
        let wait = timing.stagger.times(rank.unwrap_or(0) as u64);
        self.become_replica(Replica::patient(core, wait.plus(timing.heartbeat)));
    }

    fn deposed(&mut self, term: replay_log::Term, handed_over: bool) {
        let core = &mut self.core;
        core.feeds.stop_all(&mut core.actions);
        if let Some(record) = &core.record {
            let event = Event::Deposed {
                term,
                by: record.version(),
                primary: record.primary.host.clone(),
            };
            core.journal(event);
        }
        if handed_over {
            core.stop_vm(StopReason::HandedOver);
        } else {
            core.stop_vm(StopReason::Deposed);
            core.renew(Rest::Keep, "another host reigns");
        }
        self.become_replica(Replica::new(&self.core));
        self.core.hello_all();
    }

    fn become_replica(&mut self, replica: Replica) {
        self.role = Role::Replica(Box::new(replica));
    }
}
