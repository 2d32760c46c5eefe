//! Three hosts and a keeper, in a world without faults but those that a test asks for.

use std::collections::BTreeMap;

use replay_log::{Batch, BatchBuilder, Entry, LogIndex, LogTip, Mark, MarkDigest, Position};

use super::super::*;
use super::name;

/// A host without faults: whatever is to be stored is stored at once.
#[allow(
    clippy::struct_excessive_bools,
    reason = "each is a thing that a test makes of a host"
)]
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
    /// Nothing more is taken of what is appended: too much waits.
    pub(super) store_overflows: bool,
    /// No machine can be started.
    pub(super) has_no_image: bool,
    /// Its machine executes whatever comes at once; else only the beginning of the log.
    pub(super) keeps_up: bool,
    /// It hears nobody, the keeper neither; what it says is heard.
    pub(super) deaf: bool,
    /// Its guest is paused.
    pub(super) paused: bool,
    /// Its log was given up; whether it was set aside.
    pub(super) dropped: Option<bool>,
    /// The disk that its folder is on.
    pub(super) disk: DiskId,
}

/// Something that is on its way.
enum Mail {
    Input(HostName, Input),
    /// A question to the keeper, which is slow.
    Keeper(HostName, Action),
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
    /// How long the keeper takes to do what it is asked for.
    pub(super) keeper_takes: Span,
    mail: BTreeMap<(Time, u64), Mail>,
    mailed: u64,
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
        Self::with_hosts(&["a", "b", "c"])
    }

    pub(super) fn with_hosts(hosts: &[&str]) -> Self {
        let now = Time::from_nanos(1_000_000_000);
        let hosts = (1..).zip(hosts).map(|(fresh, host)| {
            let vm = VmName::new("vm").expect("a name");
            let restored = Restored {
                disk: DiskId(fresh),
                fresh,
                ..Restored::default()
            };
            let node = Node::new(Config::new(name(host), vm), restored, now);
            (name(host), Host::new(node, DiskId(fresh)))
        });
        let mut trio = Self {
            now,
            hosts: hosts.collect(),
            record: None,
            keeper_down: false,
            far: None,
            starts: 100,
            keeper_takes: Span::ZERO,
            mail: BTreeMap::new(),
            mailed: 0,
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
        trio.create_on(&["a", "b", "c"], policy);
        trio.record_entries(1);
        trio.pass(200);
        assert_eq!(trio.record().members.len(), 2, "{:?}", trio.record);
        trio
    }

    /// `a` creates the VM, with copies wanted on these.
    pub(super) fn create_on(&mut self, hosts: &[&str], policy: Policy) {
        let hosts = hosts.iter().map(|host| name(host)).collect();
        let create = Operator::Create { hosts, policy };
        self.input(&name("a"), Input::Operator(create));
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
        let heard = matches!(
            input,
            Input::Message { .. }
                | Input::RecordRead(_)
                | Input::ReadFailed { .. }
                | Input::RecordSwapped(_)
        );
        let reached = |here: &&mut Host| !(here.cut_off || heard && here.deaf);
        if let Some(here) = self.hosts.get_mut(host).filter(reached) {
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
            disk: here.disk,
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
                self.mail(at, Mail::Input(to.clone(), input));
            }
            _ => self.input(to, Input::Message { from, message }),
        }
    }

    fn mail(&mut self, at: Time, mail: Mail) {
        self.mailed += 1;
        self.mail.insert((at, self.mailed), mail);
    }

    /// Lets milliseconds pass.
    pub(super) fn pass(&mut self, millis: u64) {
        for _ in 0..millis {
            self.now = self.now.plus(Span::from_millis(1));
            while let Some(mail) = self
                .mail
                .first_entry()
                .filter(|due| due.key().0 <= self.now)
            {
                match mail.remove() {
                    Mail::Input(to, input) => self.input(&to, input),
                    Mail::Keeper(from, action) => {
                        for input in self.keep(action) {
                            self.input(&from, input);
                        }
                    }
                }
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
        self.record_on("a", batches);
    }

    /// The guest of this host makes so many batches.
    pub(super) fn record_on(&mut self, host: &str, batches: u64) {
        for _ in 0..batches {
            let here = self.host(host);
            let builder = here.builder.as_mut().expect("it records");
            let digest = MarkDigest(builder.end().0);
            let at = Position(builder.end().0);
            builder
                .push(&Entry::Mark(Mark { at, digest }))
                .expect("a mark");
            let batch = builder.finish().expect("an entry");
            let run = here.run;
            self.input(&name(host), Input::Recorded { run, batch });
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

    /// What the keeper does and answers.
    fn keep(&mut self, action: Action) -> Vec<Input> {
        match action {
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
            _ => vec![],
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
            Action::ReadRecord { .. } | Action::SwapRecord { .. } => {
                if self.keeper_takes == Span::ZERO {
                    return self.keep(action);
                }
                let at = self.now.plus(self.keeper_takes);
                self.mail(at, Mail::Keeper(host.clone(), action));
                vec![]
            }
            action => here.perform(now, action),
        }
    }
}

impl Host {
    fn new(node: Node, disk: DiskId) -> Self {
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
            store_overflows: false,
            has_no_image: false,
            keeps_up: false,
            deaf: false,
            paused: false,
            dropped: None,
            disk,
        }
    }

    fn perform(&mut self, now: Time, action: Action) -> Vec<Input> {
        match action {
            Action::Persist(durable) => {
                self.durable = durable.clone();
                return vec![Input::Persisted(durable)];
            }
            Action::Append { .. } if self.store_overflows => {
                let (incarnation, tip) = (self.durable.incarnation, self.tip);
                return vec![Input::StoreShort { incarnation, tip }];
            }
            Action::Append { batch } => {
                assert_eq!(batch.first(), self.tip.index, "a gap in the log");
                self.tip = batch.tip(self.tip.chain);
                self.batches.push(batch);
                let mut inputs = self.begun();
                if !self.store_is_stuck {
                    let (incarnation, tip) = (self.durable.incarnation, self.tip);
                    inputs.push(Input::Stored { incarnation, tip });
                }
                return inputs;
            }
            Action::Sync if self.store_is_stuck => return vec![],
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
            Action::DropLog { aside, .. } => {
                self.dropped = Some(aside);
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
            Action::PauseVm { run } => {
                self.paused = true;
                return vec![Input::Paused { run }];
            }
            Action::ResumeVm { .. } => self.paused = false,
            Action::StopVm { why, .. } => self.stopped = Some(why),
            Action::Release { through, .. } => self.released = self.released.max(through),
            Action::Journal(event) => self.events.push(event),
            _ => {}
        }
        vec![]
    }

    /// The guest has executed the beginning of the log, and no more until a test says so, or all.
    fn begun(&self) -> Vec<Input> {
        let through = if self.keeps_up { self.tip.index.0 } else { 1 };
        let begun = Input::Executed {
            run: self.run,
            through: LogIndex(through),
            position: Position(through),
        };
        let has_log = self.tip.index > LogIndex::START;
        let replays = has_log && self.builder.is_none() && !self.has_no_image;
        if replays { vec![begun] } else { vec![] }
    }

    /// The disk is another one, and empty.
    pub(super) fn lose_disk(&mut self) {
        self.forget_after(LogIndex::START);
        self.durable = Durable::default();
        self.disk = DiskId(self.disk.0 + 1_000);
    }

    /// The disk loses what it had synced behind here.
    pub(super) fn forget_after(&mut self, index: LogIndex) {
        self.batches.retain(|batch| batch.end() <= index);
        let mut tip = LogTip::default();
        for batch in &self.batches {
            tip = batch.tip(tip.chain);
        }
        self.tip = tip;
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
