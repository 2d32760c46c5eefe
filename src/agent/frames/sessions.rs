//! What gateways say on their sessions, and what is said to them.

use std::net::Ipv4Addr;

use bytes::{Bytes, BytesMut};
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation};
use smoltcp::wire::{ArpPacket, EthernetFrame, EthernetProtocol, Ipv4Packet};

use super::{COMMITTED_AFTER, Flow, FrameEvent, FramePort, GatewayError, Role, Standing};
use crate::gateway::frames::{
    Hello, Mac, Message, NetworkPort, Refusal, SessionId, ToAgent, ToGateway, is_incarnation_of,
    put_frame,
};

/// A gateway may hear of a reign before this agent does, but not of so many.
const MOST_TERMS_AHEAD: u64 = 1 << 20;

impl FramePort {
    /// A gateway says something. After an error the session is to be closed, and
    /// [`FramePort::disconnected`] called.
    pub fn message(&mut self, session: SessionId, message: ToAgent) -> Result<(), GatewayError> {
        let Some(known) = self.sessions.get_mut(&session) else {
            return Ok(());
        };
        match (&mut known.standing, message) {
            (Standing::Silent, ToAgent::Hello(hello)) => {
                // Whoever is called otherwise is after the connections of another gateway.
                if !is_incarnation_of(hello.gateway, &known.who) {
                    return Err(GatewayError {
                        what: "its incarnation is not one of the gateway that its certificate names",
                    });
                }
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
            (Standing::Refused | Standing::Over, _) => Ok(()),
            (Standing::Silent | Standing::Waiting(_), _) => Err(GatewayError {
                what: "it did not wait for its welcome",
            }),
            (Standing::Welcomed(_), ToAgent::Hello(_)) => Err(GatewayError {
                what: "a second hello",
            }),
        }
    }

    pub(super) fn hello(&mut self, id: SessionId, hello: Hello) {
        let why = match self.role {
            _ if hello.vm != self.vm => Some(Refusal::UnknownVm),
            Role::Leading(term) if term == hello.term => self.cannot_serve(&hello),
            Role::Leading(term) if term > hello.term => Some(Refusal::OtherTerm),
            Role::Following if hello.term < self.known => Some(Refusal::OtherTerm),
            // Nobody will reign in that term, and the refusal costs nobody more than a question.
            _ if hello.term.0 > self.known.0.saturating_add(MOST_TERMS_AHEAD) => {
                Some(Refusal::OtherTerm)
            }
            // The keeper's news may reach the gateway before this agent goes live.
            Role::Leading(_) | Role::Following => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.standing = Standing::Waiting(hello);
                }
                return;
            }
        };
        if let Some(why) = why {
            self.refuse_aloud(id, hello.gateway, why);
            return;
        }
        let term = self.known;
        self.received(hello.gateway, hello.received);
        let now = self.now;
        let gateway = self.known_gateway(hello.gateway);
        let before = gateway.session.replace(id);
        gateway.absent_since = None;
        gateway.stuck_since = gateway.stuck_since.map(|_| now);
        gateway.dropped = false;
        gateway.address = Some(hello.address);
        let (logged, resent) = (gateway.accepted, gateway.outputs.len());
        self.served.insert(id, hello.gateway);
        if let Some(session) = self.sessions.get_mut(&id) {
            self.told.remove(&session.who);
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
        self.trim_deadlines();
        self.tell(FrameEvent::Welcomed {
            gateway: hello.gateway,
            logged,
            resent,
        });
        // The same gateway on an older stream: what comes there is not heard any more.
        if let Some(before) = before.filter(|before| *before != id) {
            self.end(before);
        }
    }

    fn received(&mut self, incarnation: GatewayIncarnation, through: FrameNumber) {
        let Some(gateway) = self.gateways.get_mut(&incarnation) else {
            return;
        };
        let before = gateway.outputs.len();
        let forgotten = gateway.forget_outputs(through);
        if gateway.outputs.len() < before {
            let stuck = gateway.output_bytes > self.limits.outputs;
            gateway.stuck_since = stuck.then_some(self.now);
        }
        if let Some(last) = forgotten {
            self.destinations.forget(Mac::of(incarnation), last);
        }
    }

    fn cannot_serve(&self, hello: &Hello) -> Option<Refusal> {
        let mac = Mac::of(hello.gateway);
        let gateway = self.gateways.get(&hello.gateway);
        let is_new = gateway.is_none_or(|gateway| gateway.accepted == FrameNumber(0));
        let lacks = self.destinations.lacks(mac, hello.received, is_new);
        match gateway {
            _ if lacks => Some(Refusal::TooLate),
            Some(gateway) if gateway.given_up => Some(Refusal::TooLate),
            Some(gateway) if gateway.session.is_some() => None,
            _ if self.is_taken(hello) => Some(Refusal::AddressTaken),
            _ if self.served.len() >= self.limits.gateways => Some(Refusal::TooMany),
            _ => None,
        }
    }

    /// Whether another gateway, one that is not dropped, has one of the addresses of this one. The
    /// guest's outputs say so after a change of primary, before that gateway is back.
    fn is_taken(&self, hello: &Hello) -> bool {
        let mac = Mac::of(hello.gateway);
        let known = self.destinations.owner(hello.address);
        self.gateways.iter().any(|(other, gateway)| {
            let theirs = Mac::of(*other);
            let same =
                theirs == mac || gateway.address == Some(hello.address) || known == Some(theirs);
            *other != hello.gateway && !gateway.dropped && same
        })
    }

    fn arrival(&mut self, source: FrameSource, bytes: Bytes) -> Result<(), GatewayError> {
        let Some(gateway) = self.gateways.get_mut(&source.gateway) else {
            return Ok(());
        };
        if !is_from(&bytes, Mac::of(source.gateway), gateway.address) {
            return Err(GatewayError {
                what: "a frame is not from its address",
            });
        }
        if source.number <= gateway.accepted {
            self.counters.duplicates += 1;
            return Ok(());
        }
        if source.number.0 != gateway.accepted.0 + 1 {
            return Err(GatewayError {
                what: "a frame is missing before this one",
            });
        }
        self.destinations.hear(&bytes);
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

    /// Whether [`FramePort::poll_arrival`] would give something, or [`FramePort::poll_event`]
    /// something that this was not asked about before.
    pub fn has_news(&mut self) -> bool {
        std::mem::take(&mut self.fresh_event) || (!self.held && !self.arrivals.is_empty())
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

    /// Whether the stream of a session is to be dropped, whatever is still to be written.
    pub fn is_over(&self, session: SessionId) -> bool {
        let standing = self.sessions.get(&session).map(|s| &s.standing);
        matches!(standing, None | Some(Standing::Over))
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
            Standing::Refused | Standing::Over => return true,
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
}

/// Whether a frame is from these addresses. One that pretends to be from another gateway could end
/// that one's connections, or draw them to itself.
fn is_from(frame: &[u8], mac: Mac, address: Option<Ipv4Addr>) -> bool {
    if Mac::source(frame) != Some(mac) {
        return false;
    }
    let Ok(frame) = EthernetFrame::new_checked(frame) else {
        return true;
    };
    let sender = match frame.ethertype() {
        EthernetProtocol::Ipv4 => {
            let packet = Ipv4Packet::new_checked(frame.payload());
            packet.ok().map(|packet| packet.src_addr())
        }
        EthernetProtocol::Arp => {
            let packet = ArpPacket::new_checked(frame.payload()).ok();
            let packet = packet.filter(|packet| packet.source_hardware_addr() == mac.0);
            packet.and_then(|packet| {
                let [a, b, c, d] = *packet.source_protocol_addr() else {
                    return None;
                };
                Some(Ipv4Addr::new(a, b, c, d))
            })
        }
        _ => return true,
    };
    sender.is_some() && sender == address
}
