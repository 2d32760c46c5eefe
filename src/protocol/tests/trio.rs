//! Three hosts and a keeper, in a world without faults but those that a test asks for.

use std::collections::{BTreeMap, VecDeque};

use replay_log::{Batch, BatchBuilder, Entry, LogIndex, LogTip, Mark, MarkDigest, Position};

use super::super::*;
use super::name;

/// A host without faults: whatever is to be stored is stored at once.
pub(super) struct Host {
    pub(super) node: Node,
    pub(super) batches: Vec<Batch>,
    pub(super) tip: LogTip,
    pub(super) durable: Durable,
    pub(super) builder: Option<BatchBuilder>,
    pub(super) run: VmRun,
    pub(super) released: LogIndex,
    pub(super) events: Vec<Event>,
    pub(super) stopped: Option<StopReason>,
    pub(super) live_at: Option<Time>,
    pub(super) cut_off: bool,
    /// Nothing is known to be stored.
    pub(super) store_is_stuck: bool,
    /// No machine can be started.
    pub(super) has_no_image: bool,
}

/// Three hosts and a keeper.
pub(super) struct Trio {
    pub(super) now: Time,
    hosts: BTreeMap<HostName, Host>,
    pub(super) record: Option<Record>,
    pub(super) keeper_down: bool,
    /// Who is how far away from everybody, and what is on its way from there or to there.
    pub(super) far: Option<(HostName, Span)>,
    /// How many processes have been started: no two draw the same random bits.
    starts: u64,
    mail: VecDeque<(Time, HostName, Input)>,
}

/// As the keeper hands it out.
pub(super) fn by_keeper(record: Record) -> Committed {
    Committed {
        record,
        proof: Proof::default(),
    }
}

impl Trio {
    pub(super) fn new() -> Self {
        let now = Time::from_nanos(1_000_000_000);
        let hosts = [("a", 1), ("b", 2), ("c", 3)].map(|(host, fresh)| {
            let vm = VmName::new("vm").expect("a name");
            let restored = Restored {
                disk: DiskId(fresh),
                fresh,
                ..Restored::default()
            };
            let node = Node::new(Config::new(name(host), vm), restored, now);
            (name(host), Host::new(node))
        });
        let mut trio = Self {
            now,
            hosts: BTreeMap::from(hosts),
            record: None,
            keeper_down: false,
            far: None,
            starts: 3,
            mail: VecDeque::new(),
        };
        for host in trio.names() {
            trio.carry_out(&host);
            for peer in trio.names() {
                if peer != host {
                    trio.input(&host, Input::PeerUp(peer));
                }
            }
        }
        trio
    }

    /// The three paired, `a` the primary.
    pub(super) fn paired(policy: Policy) -> Self {
        let mut trio = Self::new();
        let hosts = trio.names();
        let create = Operator::Create { hosts, policy };
        trio.input(&name("a"), Input::Operator(create));
        trio.record_entries(1);
        trio.pass(200);
        assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record);
        trio
    }

    pub(super) fn names(&self) -> Vec<HostName> {
        self.hosts.keys().cloned().collect()
    }

    fn committed(&self) -> Option<Committed> {
        self.record.clone().map(by_keeper)
    }

    pub(super) fn record(&self) -> &Record {
        self.record.as_ref().expect("a record")
    }

    pub(super) fn host(&mut self, host: &str) -> &mut Host {
        self.hosts.get_mut(&name(host)).expect("one of the three")
    }

    pub(super) fn input(&mut self, host: &HostName, input: Input) {
        let now = self.now;
        if let Some(here) = self.hosts.get_mut(host).filter(|here| !here.cut_off) {
            here.node.handle(now, input);
        }
        self.carry_out(host);
    }

    /// A host's process ends and another one begins, with what the first one left on its disk.
    pub(super) fn restart(&mut self, host: &str) {
        self.starts += 1;
        let (now, fresh, here) = (self.now, self.starts, self.host(host));
        let restored = Restored {
            durable: here.durable.clone(),
            log: here.tip,
            disk: here.durable.disk,
            fresh,
            ..Restored::default()
        };
        let vm = VmName::new("vm").expect("a name");
        here.node = Node::new(Config::new(name(host), vm), restored, now);
        here.builder = None;
        let host = name(host);
        self.carry_out(&host);
        for peer in self.names().into_iter().filter(|peer| *peer != host) {
            self.input(&peer, Input::PeerDown(host.clone()));
            self.input(&peer, Input::PeerUp(host.clone()));
            self.input(&host, Input::PeerUp(peer));
        }
    }

    /// Brings a message, now or when its way is over.
    fn bring(&mut self, from: &HostName, to: &HostName, message: Message) {
        let from = from.clone();
        match &self.far {
            Some((far, away)) if *far == from || far == to => {
                let at = self.now.plus(*away);
                let input = Input::Message { from, message };
                self.mail.push_back((at, to.clone(), input));
            }
            _ => self.input(to, Input::Message { from, message }),
        }
    }

    /// Lets milliseconds pass.
    pub(super) fn pass(&mut self, millis: u64) {
        for _ in 0..millis {
            self.now = self.now.plus(Span::from_millis(1));
            while let Some((_, to, input)) = self.mail.pop_front_if(|(at, ..)| *at <= self.now) {
                self.input(&to, input);
            }
            for host in self.names() {
                let now = self.now;
                let here = self.hosts.get_mut(&host).expect("one of the three");
                if !here.cut_off && here.node.poll_timeout().is_some_and(|at| at <= now) {
                    here.node.handle_timeout(now);
                    self.carry_out(&host);
                }
            }
        }
    }

    /// The guest of `a` makes so many batches.
    pub(super) fn record_entries(&mut self, batches: u64) {
        for _ in 0..batches {
            let here = self.host("a");
            let builder = here.builder.as_mut().expect("a records");
            let digest = MarkDigest(builder.end().0);
            let at = Position(builder.end().0);
            builder
                .push(&Entry::Mark(Mark { at, digest }))
                .expect("a mark");
            let batch = builder.finish().expect("an entry");
            let run = here.run;
            self.input(&name("a"), Input::Recorded { run, batch });
        }
    }

    fn carry_out(&mut self, host: &HostName) {
        while let Some(action) = self.hosts.get_mut(host).and_then(|h| h.node.poll_action()) {
            let reply = self.perform(host, action);
            for input in reply {
                self.input(host, input);
            }
        }
    }

    fn perform(&mut self, host: &HostName, action: Action) -> Vec<Input> {
        let now = self.now;
        let here = self.hosts.get_mut(host).expect("one of the three");
        if here.cut_off {
            return vec![];
        }
        match action {
            Action::Send { to, message } => {
                // Through bytes, as in production.
                let message = Message::decode(&message.encode()).expect("the message again");
                self.bring(host, &to, message);
                vec![]
            }
            Action::StreamLog {
                to,
                term,
                from,
                through,
            } => {
                let wanted = |b: &&Batch| b.first() >= from && b.end() <= through;
                let batches: Vec<_> = here.batches.iter().filter(wanted).cloned().collect();
                for batch in batches {
                    self.bring(host, &to, Message::Log { term, batch });
                }
                vec![]
            }
            Action::ReadRecord { .. } if self.keeper_down => vec![Input::ReadFailed {
                reason: "down".to_owned(),
            }],
            Action::ReadRecord { .. } => vec![Input::RecordRead(self.committed())],
            Action::SwapRecord { .. } if self.keeper_down => {
                vec![Input::RecordSwapped(Swapped::Unknown {
                    reason: "down".to_owned(),
                })]
            }
            Action::SwapRecord { expect, new, .. } => {
                let swapped = if self.record.as_ref().map(Record::version) == expect {
                    new.may_follow(self.record.as_ref()).expect("a good record");
                    self.record = Some(new.clone());
                    Swapped::Done(by_keeper(new))
                } else {
                    Swapped::Conflict(self.committed())
                };
                vec![Input::RecordSwapped(swapped)]
            }
            action => here.perform(now, action),
        }
    }
}

impl Host {
    fn new(node: Node) -> Self {
        Self {
            node,
            batches: vec![],
            tip: LogTip::default(),
            durable: Durable::default(),
            builder: None,
            run: VmRun(0),
            released: LogIndex::START,
            events: vec![],
            stopped: None,
            live_at: None,
            cut_off: false,
            store_is_stuck: false,
            has_no_image: false,
        }
    }

    fn perform(&mut self, now: Time, action: Action) -> Vec<Input> {
        match action {
            Action::Persist(durable) => {
                self.durable = durable.clone();
                return vec![Input::Persisted(durable)];
            }
            Action::Append { batch } => {
                self.tip = batch.tip(self.tip.chain);
                self.batches.push(batch);
                let mut inputs = self.begun();
                if !self.store_is_stuck {
                    let (incarnation, tip) = (self.durable.incarnation, self.tip);
                    inputs.push(Input::Stored { incarnation, tip });
                }
                return inputs;
            }
            Action::Sync => {
                let (incarnation, tip) = (self.durable.incarnation, self.tip);
                return vec![Input::Synced { incarnation, tip }];
            }
            Action::LookUp { peer, index } => {
                let mut tip = LogTip::default();
                let mut batches = self.batches.iter();
                while tip.index < index
                    && let Some(batch) = batches.next()
                {
                    tip = batch.tip(tip.chain);
                }
                let tip = Some(tip).filter(|tip| tip.index == index);
                return vec![Input::TipAt { peer, index, tip }];
            }
            Action::DropLog { .. } => {
                self.batches.clear();
                self.tip = LogTip::default();
            }
            Action::Boot { run, term, .. } | Action::GoLive { run, term, .. } => {
                self.run = run;
                self.builder = Some(BatchBuilder::new(term, self.tip.index));
                self.live_at = Some(now);
                return vec![Input::WentLive { run }];
            }
            Action::Replay { run, .. } => {
                self.run = run;
                self.builder = None;
                return self.begun();
            }
            Action::PauseVm { run } => return vec![Input::Paused { run }],
            Action::StopVm { why, .. } => self.stopped = Some(why),
            Action::Release { through, .. } => self.released = self.released.max(through),
            Action::Journal(event) => self.events.push(event),
            _ => {}
        }
        vec![]
    }

    /// The guest has executed the beginning of the log, and no more until a test says so.
    fn begun(&self) -> Vec<Input> {
        let begun = Input::Executed {
            run: self.run,
            through: LogIndex(1),
            position: Position(1),
        };
        let has_log = self.tip.index > LogIndex::START;
        let replays = has_log && self.builder.is_none() && !self.has_no_image;
        if replays { vec![begun] } else { vec![] }
    }

    pub(super) fn executed_all(&self, run: VmRun) -> Input {
        Input::Executed {
            run,
            through: self.tip.index,
            position: Position(self.tip.index.0),
        }
    }

    pub(super) fn journal(&self) -> Vec<&'static str> {
        self.events.iter().map(Event::code).collect()
    }
}
