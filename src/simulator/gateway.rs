//! A simulated gateway and its clients. It numbers frames, passes the outputs that are for it once
//! and in order, learns the term from the keeper, and begins a new session whenever something is
//! missing. (The production ends of the frame streams have their own tests.)

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation, Term};
use vmm::model::Model;

use super::lines;
use super::queue::{MILLI, Moment};
use super::random::Random;
use crate::protocol::Record;

/// How many clients there are.
pub(super) const CLIENTS: usize = 3;
/// A client gives a request up after this long, and never knows whether it happened. All of these
/// are longer where packets travel far.
const GIVE_UP: Moment = 1_500 * MILLI;
/// A session without a sign of life is begun again.
const SILENCE: Moment = 200 * MILLI;
/// Counters that clients raise.
const KEYS: u64 = 3;
/// Where the number of a gateway stands in the numbers of its runs.
const RUNS: u32 = 32;

/// The highest value of each counter that any client has seen, of whichever gateway.
pub(super) type Highest = BTreeMap<u32, u64>;

/// Which gateway this is a run of.
pub(super) fn number_of(run: GatewayIncarnation) -> usize {
    (run.0 >> RUNS) as usize
}

/// One session of the gateway with a primary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Session {
    pub(super) id: u64,
    pub(super) gateway: GatewayIncarnation,
    pub(super) term: Term,
}

/// What the gateway says to a host.
#[derive(Clone, Debug)]
pub(super) enum ToHost {
    /// "Serve me. I have the outputs up to here."
    Attach {
        last: Option<FrameNumber>,
    },
    Frame {
        source: FrameSource,
        bytes: Bytes,
    },
    Received {
        through: FrameNumber,
    },
    Ping,
}

/// What a primary says to the gateway.
#[derive(Clone, Debug)]
pub(super) enum ToGateway {
    /// `machine` tells two boots apart; outputs from `next` on follow.
    Welcome {
        machine: u64,
        accepted: FrameNumber,
        next: FrameNumber,
    },
    /// `follows` is the last output before it that was for this gateway, too.
    Output {
        number: FrameNumber,
        follows: FrameNumber,
        content: u64,
        bytes: Bytes,
    },
    /// Frames up to here are in the committed log.
    Logged { through: FrameNumber },
    Pong {
        accepted: FrameNumber,
        released: FrameNumber,
    },
}

/// What came of something the gateway heard.
#[derive(Debug)]
pub(super) enum Heard {
    Passed {
        gateway: u64,
        term: Term,
        number: FrameNumber,
        content: u64,
        answered: Option<Answered>,
    },
    Nothing,
}

/// A client's answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Answered {
    pub(super) client: usize,
    pub(super) key: u32,
    pub(super) value: u64,
    pub(super) floor: u64,
    pub(super) sent: Moment,
}

#[derive(Clone, Copy, Debug)]
struct Request {
    client: usize,
    floor: u64,
    sent: Moment,
}

/// A gateway with its clients.
#[derive(Debug)]
pub(super) struct Gateway {
    number: usize,
    /// Reasons why it and each host do not hear each other.
    pub(super) blocks: Vec<u32>,
    /// When the last packet arrives that is under way to it, and from it.
    pub(super) hears_at: Moment,
    pub(super) heard_at: Moment,
    /// What each client was answered that it asked for after the repair.
    pub(super) fresh_answers: [u32; CLIENTS],
    pub(super) incarnation: GatewayIncarnation,
    pub(super) term: Term,
    pub(super) primary: Option<usize>,
    /// The newest record that it has read.
    pub(super) record: Option<Record>,
    session: Option<Session>,
    sessions: u64,
    welcomed: bool,
    machine: Option<u64>,
    heard: Moment,
    attached: Moment,
    last: Option<FrameNumber>,
    frames: FrameNumber,
    unlogged: VecDeque<(FrameNumber, Bytes)>,
    requests: BTreeMap<u64, Request>,
    waiting: [Option<u64>; CLIENTS],
    tags: u64,
    /// How long a packet takes there and back, twice.
    slack: Moment,
}

impl Gateway {
    pub(super) fn new(number: usize, hosts: usize, delay: Moment) -> Self {
        Self {
            number,
            blocks: vec![0; hosts],
            hears_at: 0,
            heard_at: 0,
            fresh_answers: [0; CLIENTS],
            incarnation: GatewayIncarnation(((number as u64) << RUNS) + 1),
            term: Term(0),
            primary: None,
            record: None,
            session: None,
            sessions: 0,
            welcomed: false,
            machine: None,
            heard: 0,
            attached: 0,
            last: None,
            frames: FrameNumber(0),
            unlogged: VecDeque::new(),
            requests: BTreeMap::new(),
            waiting: [None; CLIENTS],
            tags: 0,
            slack: 4 * delay,
        }
    }

    /// Another process; what its clients had going on is unknown for ever.
    pub(super) fn restart(&mut self) {
        self.incarnation = GatewayIncarnation(self.incarnation.0 + 1);
        self.session = None;
        self.welcomed = false;
        self.machine = None;
        self.last = None;
        self.frames = FrameNumber(0);
        self.unlogged.clear();
        self.waiting = [None; CLIENTS];
    }

    /// Some answers may be taken back now: an operator said so.
    pub(super) fn forget_answers(&mut self) {
        for request in self.requests.values_mut() {
            request.floor = 0;
        }
    }

    pub(super) fn session(&self) -> Option<Session> {
        self.session
    }

    /// The keeper says who reigns.
    pub(super) fn learn(&mut self, term: Term, primary: usize) {
        if term > self.term {
            self.term = term;
            self.primary = Some(primary);
            self.session = None;
        }
    }

    /// Regular business: what is to be said to the primary now.
    pub(super) fn tick(&mut self, now: Moment) -> Vec<ToHost> {
        let silent = now.saturating_sub(self.heard.max(self.attached)) >= SILENCE + self.slack;
        if self.session.is_none() || silent {
            return self.attach(now);
        }
        if self.welcomed {
            vec![ToHost::Ping]
        } else {
            vec![]
        }
    }

    fn attach(&mut self, now: Moment) -> Vec<ToHost> {
        self.sessions += 1;
        self.session = Some(Session {
            id: self.sessions,
            gateway: self.incarnation,
            term: self.term,
        });
        self.welcomed = false;
        self.attached = now;
        vec![ToHost::Attach { last: self.last }]
    }

    /// A primary says something in a session.
    pub(super) fn hear(
        &mut self,
        now: Moment,
        session: Session,
        message: ToGateway,
        highest: &mut Highest,
        say: &mut Vec<ToHost>,
    ) -> Heard {
        if self.session != Some(session) {
            return Heard::Nothing;
        }
        self.heard = now;
        match message {
            ToGateway::Welcome {
                machine,
                accepted,
                next,
            } => return self.welcome(machine, accepted, next, say),
            ToGateway::Output {
                number,
                follows,
                content,
                bytes,
            } if self.welcomed => {
                let last = self.last.unwrap_or_default();
                if follows <= last && last < number {
                    self.last = Some(number);
                    say.push(ToHost::Received { through: number });
                    return Heard::Passed {
                        gateway: self.incarnation.0,
                        term: session.term,
                        number,
                        content,
                        answered: self.answer(&bytes, highest),
                    };
                }
                if follows > last {
                    *say = self.attach(now);
                }
            }
            ToGateway::Logged { through } => {
                while self.unlogged.front().is_some_and(|(n, _)| *n <= through) {
                    self.unlogged.pop_front();
                }
            }
            ToGateway::Pong { accepted, released } if self.welcomed => {
                if released > self.last.unwrap_or_default()
                    && now - self.attached > 3 * (SILENCE + self.slack)
                {
                    *say = self.attach(now);
                } else {
                    self.resend(accepted, say);
                }
            }
            _ => {}
        }
        Heard::Nothing
    }

    fn welcome(
        &mut self,
        machine: u64,
        accepted: FrameNumber,
        next: FrameNumber,
        say: &mut Vec<ToHost>,
    ) -> Heard {
        if self
            .machine
            .replace(machine)
            .is_some_and(|before| before != machine)
        {
            // The guest has been started anew: it knows nothing of this gateway.
            self.restart();
            return Heard::Nothing;
        }
        if self.last.is_none() {
            self.last = Some(FrameNumber(next.0 - 1));
        }
        self.welcomed = true;
        self.resend(accepted, say);
        Heard::Nothing
    }

    fn resend(&mut self, accepted: FrameNumber, say: &mut Vec<ToHost>) {
        for (number, bytes) in &self.unlogged {
            if *number > accepted {
                say.push(self.frame(*number, bytes));
            }
        }
    }

    fn frame(&self, number: FrameNumber, bytes: &Bytes) -> ToHost {
        ToHost::Frame {
            source: FrameSource {
                gateway: self.incarnation,
                number,
            },
            bytes: bytes.clone(),
        }
    }

    fn answer(&mut self, bytes: &Bytes, highest: &mut Highest) -> Option<Answered> {
        let (tag, key, value) = Model::read_answer(bytes)?;
        let request = self.requests.remove(&tag)?;
        let highest = highest.entry(key).or_default();
        *highest = (*highest).max(value);
        if self.waiting[request.client] == Some(tag) {
            self.waiting[request.client] = None;
        }
        Some(Answered {
            client: request.client,
            key,
            value,
            floor: request.floor,
            sent: request.sent,
        })
    }

    /// A client's turn: it asks for something unless it waits. What the gateway sends for it.
    pub(super) fn client(
        &mut self,
        now: Moment,
        client: usize,
        highest: &Highest,
        random: &mut Random,
    ) -> Option<ToHost> {
        if let Some(tag) = self.waiting[client] {
            let sent = self.requests.get(&tag).map_or(0, |request| request.sent);
            if now - sent < GIVE_UP + 2 * self.slack {
                return None;
            }
            self.waiting[client] = None;
        }
        self.tags += 1;
        let tag = lines::tag(self.number, self.tags);
        let key = random.below(KEYS) as u32;
        let floor = highest.get(&key).copied().unwrap_or_default();
        self.waiting[client] = Some(tag);
        self.requests.insert(
            tag,
            Request {
                client,
                floor,
                sent: now,
            },
        );
        self.frames.0 += 1;
        let bytes = Model::request(tag, key);
        self.unlogged.push_back((self.frames, bytes.clone()));
        self.welcomed.then(|| self.frame(self.frames, &bytes))
    }
}
