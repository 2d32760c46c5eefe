//! Gateways that are away, or take nothing: how long what the guest says to them is kept, and when
//! they are dropped.

use std::collections::{BTreeSet, HashMap};

use replay_log::{FrameNumber, FrameSource, GatewayIncarnation};

use super::{DropReason, FrameEvent, FramePort, Gateway, Role, Standing};
use crate::gateway::frames::{Mac, Refusal, mark};
use crate::protocol::Time;

impl FramePort {
    /// It is so late. Told often; what has become due is done by [`FramePort::handle_timeout`].
    pub const fn tell_time(&mut self, now: Time) {
        self.now = now;
    }

    /// When [`FramePort::handle_timeout`] wants to be called.
    pub fn poll_timeout(&self) -> Option<Time> {
        let watched = match self.role {
            Role::Leading(_) => self.watched.iter().filter_map(|g| self.due(*g)).min(),
            Role::Following => None,
        };
        [watched, self.tell_at, self.poll_places()]
            .into_iter()
            .flatten()
            .min()
    }

    /// Does what has become due; every session is to be asked for what it has to write then.
    pub fn handle_timeout(&mut self, now: Time) {
        self.now = now;
        self.review_places(now);
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
        for incarnation in std::mem::take(&mut self.watched) {
            match self.due(incarnation) {
                Some(due) if due <= now => {
                    let gateway = self.gateways.get(&incarnation);
                    let stuck = gateway.and_then(|gateway| gateway.stuck_since);
                    let stuck = stuck.is_some_and(|since| since.plus(self.limits.patience) <= now);
                    let why = if stuck {
                        DropReason::TooFarBehind
                    } else {
                        DropReason::Absent
                    };
                    self.drop_gateway(incarnation, why);
                }
                Some(_) => {
                    self.watched.insert(incarnation);
                }
                None => {}
            }
        }
    }

    /// When a gateway is dropped unless it comes, or takes something.
    fn due(&self, incarnation: GatewayIncarnation) -> Option<Time> {
        let gateway = self.gateways.get(&incarnation)?;
        let away = gateway.absent_since.map(|since| {
            since.plus(if self.has_successor(incarnation) {
                self.limits.replaced
            } else {
                self.limits.absence
            })
        });
        let stuck = gateway
            .stuck_since
            .map(|since| since.plus(self.limits.patience));
        away.into_iter().chain(stuck).min()
    }

    /// Whether another run of the same gateway is served.
    fn has_successor(&self, incarnation: GatewayIncarnation) -> bool {
        let mut served = self.served.values();
        served.any(|other| *other != incarnation && mark(*other) == mark(incarnation))
    }

    /// Bytes for the gateway that has most to take, when they are more than is kept for one that is
    /// away; 0 otherwise. What they are made of is committed, so it has to go out: a guest that goes
    /// on making more is to be held back.
    pub fn overdue_bytes(&self) -> usize {
        let stuck = |incarnation| {
            let gateway: &Gateway = self.gateways.get(incarnation)?;
            gateway.stuck_since.map(|_| gateway.output_bytes)
        };
        self.watched.iter().filter_map(stuck).max().unwrap_or(0)
    }

    pub(super) fn drop_gateway(&mut self, incarnation: GatewayIncarnation, why: DropReason) {
        let Some(gateway) = self.gateways.get_mut(&incarnation) else {
            return;
        };
        let outputs = gateway.outputs.len();
        // Of one that the log names and that never came there is nothing to tell.
        let was_here = gateway.address.is_some();
        if let Some(last) = gateway.forget_outputs(FrameNumber(u64::MAX)) {
            self.destinations.forget(Mac::of(incarnation), last);
        }
        gateway.absent_since = None;
        gateway.stuck_since = None;
        gateway.dropped = true;
        if let Some(session) = gateway.session.take() {
            self.refuse(session, Refusal::TooLate);
        }
        let resets = self.reset_connections(incarnation);
        if was_here || outputs > 0 || resets > 0 {
            self.tell(FrameEvent::Dropped {
                gateway: incarnation,
                why,
                outputs,
            });
        }
    }

    /// Nobody will end the connections of a gateway that is gone, so the guest would keep them for
    /// as long as its own patience lasts. They are reset in the gateway's name and with its next
    /// numbers: if it came back, to this primary or another, it would learn that it was given up.
    /// Says how many they are.
    fn reset_connections(&mut self, incarnation: GatewayIncarnation) -> usize {
        let resets = self.destinations.resets(Mac::of(incarnation));
        let count = resets.len();
        let Some(gateway) = self.gateways.get_mut(&incarnation) else {
            return 0;
        };
        for reset in resets {
            gateway.given_up = true;
            gateway.accepted.0 += 1;
            gateway.arriving_bytes += reset.len();
            let source = FrameSource {
                gateway: incarnation,
                number: gateway.accepted,
            };
            self.arrivals.push_back((source, reset));
        }
        count
    }

    /// Forgets an incarnation that is gone for good, or at least one that is not there: of the
    /// gateway that has most of them, so that no gateway makes another one's forgotten.
    pub(super) fn forget_a_gateway(&mut self) {
        let mut runs: HashMap<u32, usize> = HashMap::new();
        let away = || self.gateways.iter().filter(|(_, g)| g.session.is_none());
        for (incarnation, _) in away() {
            *runs.entry(mark(*incarnation)).or_default() += 1;
        }
        let most = runs.values().max().copied().unwrap_or(0);
        let victim = away()
            .filter(|(incarnation, _)| runs.get(&mark(**incarnation)) == Some(&most))
            .min_by_key(|(_, gateway)| (!gateway.dropped, gateway.outputs.len()))
            .map(|(incarnation, _)| *incarnation);
        if let Some(victim) = victim {
            self.gateways.remove(&victim);
            self.owners.remove(&Mac::of(victim));
            self.destinations.remove(Mac::of(victim));
        }
    }

    /// Has [`Self::due`] asked about these.
    pub(super) fn watch(&mut self, incarnations: impl IntoIterator<Item = GatewayIncarnation>) {
        let watched: &mut BTreeSet<_> = &mut self.watched;
        watched.extend(incarnations);
    }
}
