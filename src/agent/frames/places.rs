//! Who may have how many sessions, and for how long without a welcome. A gateway that opens
//! sessions without end, or asks for what nobody will ever reign in, costs the others nothing.

use replay_log::GatewayIncarnation;

use super::{FrameEvent, FramePort, Session, Standing};
use crate::agent::certs::Name;
use crate::gateway::frames::{Refusal, SessionId, ToGateway};
use crate::protocol::Time;

/// For so many gateways it is remembered what they were told last.
const MOST_TOLD: usize = 64;

impl FramePort {
    /// The gateway of this name, by its certificate, has opened a session. One that has too many
    /// loses the oldest that was not welcomed.
    pub fn connected(&mut self, session: SessionId, who: &Name, now: Time) {
        self.now = now;
        let theirs = self.sessions_of.entry(who.clone()).or_default();
        theirs.push_back(session);
        let surplus = theirs.len() > self.limits.sessions_each;
        let unwelcome = |id: &&SessionId| !self.served.contains_key(id);
        let oldest = theirs.iter().find(unwelcome).copied();
        let full = self.sessions.len() >= self.limits.sessions;
        let until = now.plus(self.limits.welcome_within);
        self.deadlines.push_back((until, session));
        self.sessions.insert(
            session,
            Session {
                who: who.clone(),
                standing: Standing::Silent,
                first: None,
                until,
            },
        );
        if let Some(oldest) = oldest.filter(|_| surplus) {
            self.end(oldest);
        }
        if full {
            self.end(session);
        }
        self.trim_deadlines();
    }

    /// A session has ended.
    pub fn disconnected(&mut self, session: SessionId, now: Time) {
        self.now = now;
        let Some(ended) = self.sessions.remove(&session) else {
            return;
        };
        self.give_up_place(&ended.who, session);
        self.trim_deadlines();
        let Some(incarnation) = self.served.remove(&session) else {
            return;
        };
        if let Some(gateway) = self.gateways.get_mut(&incarnation)
            && gateway.session == Some(session)
        {
            gateway.session = None;
            gateway.absent_since = Some(now);
            self.watch([incarnation]);
        }
    }

    fn give_up_place(&mut self, who: &Name, session: SessionId) {
        if let Some(theirs) = self.sessions_of.get_mut(who) {
            theirs.retain(|id| *id != session);
            if theirs.is_empty() {
                self.sessions_of.remove(who);
            }
        }
    }

    /// The sessions on which frames flow.
    pub fn welcomed(&self) -> impl Iterator<Item = SessionId> {
        self.served.keys().copied()
    }

    /// A session that is not welcomed, or not any more, and has something to say or is over.
    pub fn poll_changed(&mut self) -> Option<SessionId> {
        self.changed.pop()
    }

    /// Nothing more is said or heard: the stream is to be dropped.
    pub(super) fn end(&mut self, id: SessionId) {
        self.served.remove(&id);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.standing = Standing::Over;
            session.first = None;
            let who = session.who.clone();
            self.changed.push(id);
            self.give_up_place(&who, id);
        }
    }

    /// The session is told why it cannot go on, and has a while to hear it.
    pub(super) fn refuse(&mut self, id: SessionId, why: Refusal) {
        self.served.remove(&id);
        let term = self.known;
        let until = self.now.plus(self.limits.welcome_within);
        if let Some(session) = self.sessions.get_mut(&id) {
            session.standing = Standing::Refused;
            session.first = Some(ToGateway::Refused { term, why });
            session.until = until;
            self.deadlines.push_back((until, id));
            self.changed.push(id);
        }
    }

    /// As [`Self::refuse`], and the journal says so; not again and again, for a gateway asks again
    /// at once.
    pub(super) fn refuse_aloud(
        &mut self,
        id: SessionId,
        gateway: GatewayIncarnation,
        why: Refusal,
    ) {
        self.refuse(id, why);
        let Some(session) = self.sessions.get(&id) else {
            return;
        };
        if self.told.get(&session.who) == Some(&why) {
            return;
        }
        if self.told.len() >= MOST_TOLD {
            self.told.clear();
        }
        self.told.insert(session.who.clone(), why);
        self.tell(FrameEvent::Refused { gateway, why });
    }

    /// Forgets the deadlines that have lost their meaning and would come next.
    pub(super) fn trim_deadlines(&mut self) {
        while let Some((until, id)) = self.deadlines.front()
            && !self.is_due_by(*id, *until)
        {
            self.deadlines.pop_front();
        }
    }

    /// Whether a session ends or is refused at this time.
    fn is_due_by(&self, id: SessionId, until: Time) -> bool {
        self.sessions.get(&id).is_some_and(|session| {
            let settled = matches!(session.standing, Standing::Welcomed(_) | Standing::Over);
            session.until == until && !settled
        })
    }

    /// When the next session has waited long enough for its welcome, or for its last words.
    pub(super) fn poll_places(&self) -> Option<Time> {
        self.deadlines.front().map(|(until, _)| *until)
    }

    /// Refuses those that nobody has welcomed in time, and ends those that do not take their
    /// refusal.
    pub(super) fn review_places(&mut self, now: Time) {
        while let Some((until, id)) = self.deadlines.front().copied()
            && until <= now
        {
            self.deadlines.pop_front();
            if !self.is_due_by(id, until) {
                continue;
            }
            match self.sessions.get(&id).map(|session| &session.standing) {
                Some(Standing::Waiting(hello)) => {
                    let gateway = hello.gateway;
                    self.refuse_aloud(id, gateway, Refusal::OtherTerm);
                }
                _ => self.end(id),
            }
        }
        self.trim_deadlines();
    }
}
