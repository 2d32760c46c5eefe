//! The host as a VMM process has it: a socket to the agent, a disk worker, the kernel's clock and
//! entropy. One queue brings everything to the vCPU thread.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use bytes::Bytes;
use replay_log::RequestNumber;
use ring::rand::{SecureRandom, SystemRandom};
use vmm::disk::{DiskCompletion, DiskNews, DiskWorker, Finish};
use vmm::host::{Came, DiskData, DiskReply, FromOutside, Host, HostTime, Output, Shipment};
use vmm::replayer::Requeue;
use vmm::tape::{DiskOp, DiskRequest, Sources, TapeError};

use super::ipc::{self, FromVm, IpcError, ToVm};
use super::pulse::{Pulse, Voice};
use crate::agent::clock;

/// When so many bytes have been said, they leave, whoever waits for them.
const SEND_AT_ONCE: usize = 256 << 10;

/// So many bytes of outputs wait for the disk at most.
const HELD_MOST: usize = 8 << 20;

/// What reaches the vCPU thread, and when it reached this process.
pub type Stamped = (HostTime, Inbox);

/// Stamps what has just come.
pub fn stamped(inbox: Inbox) -> Stamped {
    (HostTime(clock::now().as_nanos()), inbox)
}

/// What reaches the vCPU thread.
pub enum Inbox {
    /// The agent says these.
    Agent(Vec<ToVm>),
    /// The disk worker has news.
    Disk(DiskNews),
    /// The agent is gone, or talks nonsense.
    Lost(Option<IpcError>),
}

/// The host of a VMM process.
pub struct ProcessHost {
    inbox: Receiver<Stamped>,
    frames: VecDeque<Came>,
    console: VecDeque<(HostTime, Bytes)>,
    disk: VecDeque<(HostTime, Result<DiskReply, String>)>,
    /// What the agent wants done between two turns.
    control: VecDeque<ToVm>,
    lost: bool,
    worker: Option<DiskWorker>,
    agent: Voice,
    pulse: Arc<Pulse>,
    out: Vec<u8>,
    /// Flushes may finish before they are durable: outputs wait for them.
    holds: bool,
    /// The last flush that the machine asked for, that it was told of, and that is durable.
    asked: RequestNumber,
    flushed: RequestNumber,
    durable: RequestNumber,
    /// Outputs with the flush that they wait for, and their bytes.
    held: VecDeque<(RequestNumber, Output)>,
    held_bytes: usize,
    /// Something has been said that is not to wait for the next turn.
    let_out: bool,
    /// So many requests are with the disk.
    owed: usize,
    /// Counts what the disk has told, and what it had told at the last ping.
    disk_news: u64,
    disk_news_at_ping: u64,
}

impl ProcessHost {
    /// A host that hears through `inbox` and speaks through `agent`.
    pub fn new(inbox: Receiver<Stamped>, agent: Voice, pulse: Arc<Pulse>) -> Self {
        Self {
            pulse,
            inbox,
            frames: VecDeque::new(),
            console: VecDeque::new(),
            disk: VecDeque::new(),
            control: VecDeque::new(),
            lost: false,
            worker: None,
            agent,
            out: Vec::new(),
            holds: false,
            asked: RequestNumber(0),
            flushed: RequestNumber(0),
            durable: RequestNumber(0),
            held: VecDeque::new(),
            held_bytes: 0,
            let_out: false,
            owed: 0,
            disk_news: 0,
            disk_news_at_ping: 0,
        }
    }

    /// Gives it its disks, whose requests finish like this.
    pub fn set_worker(&mut self, worker: DiskWorker, finish: Finish) {
        self.worker = Some(worker);
        self.holds = finish == Finish::Ahead;
    }

    /// Makes durable what the guest has flushed while this was a replica: whoever has gone live may
    /// be asked for its disks alone.
    pub fn sync_disks(&mut self) -> Result<(), TapeError> {
        self.holds = true;
        let Some(worker) = &self.worker else {
            return Ok(());
        };
        let synced = self.pulse.away(|| worker.sync_at_once(Finish::Ahead));
        synced.map_err(|error| TapeError::Host {
            reason: error.to_string(),
        })?;
        // Among them those that the machine is yet to be told of, and that nothing more is heard of.
        self.durable = self.asked;
        Ok(())
    }

    /// Sorts what has come in.
    fn sort(&mut self, (at, inbox): Stamped) {
        match inbox {
            Inbox::Agent(messages) => messages.into_iter().for_each(|one| self.hear(at, one)),
            Inbox::Disk(news) => {
                self.disk_news += 1;
                match news {
                    DiskNews::Finished(completions) => {
                        self.owed = self.owed.saturating_sub(completions.len());
                        self.finished(at, completions);
                    }
                    DiskNews::Durable(flush) => self.durable(flush),
                }
            }
            Inbox::Lost(error) => {
                if let Some(error) = error {
                    tracing::error!(%error, "the agent's messages cannot be read");
                }
                self.lost = true;
            }
        }
    }

    fn finished(&mut self, at: HostTime, completions: Vec<DiskCompletion>) {
        self.disk.extend(completions.into_iter().map(|one| {
            let number = one.number;
            let reply = |data| DiskReply { number, data };
            (at, one.result.map(reply).map_err(|error| error.to_string()))
        }));
    }

    /// What waited for this flush goes out.
    fn durable(&mut self, flush: RequestNumber) {
        self.durable = self.durable.max(flush);
        while let Some((needs, _)) = self.held.front()
            && *needs <= self.durable
            && let Some((_, output)) = self.held.pop_front()
        {
            self.held_bytes -= output.bytes.len();
            let said = self.say(&FromVm::Output(output));
            if let Err(error) = said.and_then(|()| self.send_much()) {
                tracing::error!(%error, "an output cannot be told");
                self.lost = true;
            }
        }
        self.let_out = true;
    }

    /// The agent wants to know whether this thread lives, and its disk.
    fn answer_ping(&mut self) {
        let owes = self.owed > 0 || !self.held.is_empty();
        let rests = self.disk_news == self.disk_news_at_ping;
        self.disk_news_at_ping = self.disk_news;
        let answer = if owes && rests {
            FromVm::Busy
        } else {
            FromVm::Pong
        };
        if let Err(error) = self.say(&answer) {
            tracing::error!(%error, "a ping cannot be answered");
            self.lost = true;
        }
        self.let_out = true;
    }

    /// Waits until no output waits for the disk.
    pub fn finish_outputs(&mut self) -> Result<(), TapeError> {
        while !self.held.is_empty() && !self.lost {
            let failed = |(_, reply): &(_, Result<_, String>)| reply.as_ref().err().cloned();
            if let Some(reason) = self.disk.iter().find_map(failed) {
                return Err(TapeError::Host { reason });
            }
            match self.inbox.recv() {
                Ok(inbox) => self.sort(inbox),
                Err(_) => self.lost = true,
            }
            if std::mem::take(&mut self.let_out) {
                self.send()?;
            }
        }
        self.send()
    }

    fn send_much(&mut self) -> Result<(), TapeError> {
        if self.out.len() < SEND_AT_ONCE {
            return Ok(());
        }
        self.send()
    }

    fn hear(&mut self, at: HostTime, message: ToVm) {
        match message {
            ToVm::Frame { source, bytes } => {
                let what = FromOutside::Frame { source, bytes };
                self.frames.push_back(Came { at, what });
            }
            ToVm::Console(bytes) => self.console.push_back((at, bytes)),
            ToVm::Ping { .. } => self.answer_ping(),
            control => self.control.push_back(control),
        }
    }

    /// Takes in whatever is there without waiting.
    fn drain(&mut self) {
        while let Ok(inbox) = self.inbox.try_recv() {
            self.sort(inbox);
        }
        if std::mem::take(&mut self.let_out)
            && let Err(error) = self.send()
        {
            tracing::error!(%error, "the agent does not listen");
            self.lost = true;
        }
    }

    /// The next thing the agent wants done between two turns. `None`: nothing now.
    pub fn control(&mut self) -> Option<ToVm> {
        self.drain();
        self.control.pop_front()
    }

    /// Whether the agent is gone.
    pub const fn lost(&self) -> bool {
        self.lost
    }

    /// Waits until something comes that has not been acted on, or until this time.
    pub fn wait(&mut self, until: Option<HostTime>) {
        // Whatever looked for arrivals may have found a message that is not one.
        if self.lost || !self.control.is_empty() {
            return;
        }
        if let Some(worker) = &self.worker {
            worker.nudge();
        }
        let got = match until {
            None => self
                .inbox
                .recv()
                .map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => {
                let nanos = until.since(self.now());
                if nanos == 0 {
                    return;
                }
                self.inbox.recv_timeout(Duration::from_nanos(nanos))
            }
        };
        match got {
            Ok(inbox) => self.sort(inbox),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.lost = true,
        }
        self.drain();
    }

    /// Whether something that was said has not left yet.
    pub const fn has_unsent(&self) -> bool {
        !self.out.is_empty()
    }

    /// Says something to the agent. It leaves with [`Host::send`].
    pub fn say(&mut self, message: &FromVm) -> Result<(), TapeError> {
        let out = std::mem::take(&mut self.out);
        self.out = ipc::encode(message, out).map_err(|error| lost(&error))?;
        Ok(())
    }
}

fn lost(error: &IpcError) -> TapeError {
    TapeError::Host {
        reason: error.to_string(),
    }
}

impl Host for ProcessHost {
    fn now(&mut self) -> HostTime {
        HostTime(clock::now().as_nanos())
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), TapeError> {
        SystemRandom::new().fill(out).map_err(|_| TapeError::Host {
            reason: "the kernel gives no entropy".into(),
        })
    }

    fn arrival_waits(&mut self, can_take: Sources) -> bool {
        self.drain();
        !self.disk.is_empty()
            || (can_take.frame && !self.frames.is_empty())
            || (can_take.console > 0 && !self.console.is_empty())
    }

    fn arrival(&mut self, can_take: Sources) -> Result<Option<Came>, TapeError> {
        self.drain();
        if let Some((at, reply)) = self.disk.pop_front() {
            let reply = reply.map_err(|reason| TapeError::Host { reason })?;
            if self.holds && reply.data == DiskData::Flushed {
                self.flushed = self.flushed.max(reply.number);
            }
            let what = FromOutside::Disk(reply);
            return Ok(Some(Came { at, what }));
        }
        if can_take.frame
            && let Some(frame) = self.frames.pop_front()
        {
            return Ok(Some(frame));
        }
        if can_take.console > 0
            && let Some((at, mut bytes)) = self.console.pop_front()
        {
            if bytes.len() > can_take.console {
                let rest = bytes.split_off(can_take.console);
                self.console.push_front((at, rest));
            }
            let what = FromOutside::Console(bytes);
            return Ok(Some(Came { at, what }));
        }
        Ok(None)
    }

    fn submit(&mut self, requests: Vec<DiskRequest>) -> Result<(), TapeError> {
        let worker = self.worker.as_ref().ok_or_else(|| TapeError::Host {
            reason: "the guest uses a disk that its host has not set up".into(),
        })?;
        let flush = |request: &&DiskRequest| request.op == DiskOp::Flush;
        if let Some(last) = requests.iter().rfind(flush) {
            self.asked = last.number;
        }
        let asked = requests.len();
        // It may have to wait for room.
        let submitted = self.pulse.away(|| worker.submit(requests));
        let submitted = submitted.map_err(|error| TapeError::Host {
            reason: error.to_string(),
        })?;
        self.owed += asked.saturating_sub(submitted.len());
        let now = self.now();
        self.finished(now, submitted);
        Ok(())
    }

    fn ship(&mut self, shipment: Shipment) -> Result<(), TapeError> {
        let mut batch = Vec::with_capacity(shipment.batch.payload().len() + 32);
        shipment.batch.encode_frame(&mut batch);
        self.say(&FromVm::Shipped {
            batch: batch.into(),
            at: shipment.at,
            frames: shipment.frames,
        })
    }

    fn output(&mut self, output: Output) -> Result<(), TapeError> {
        if self.flushed > self.durable {
            self.held_bytes += output.bytes.len();
            self.held.push_back((self.flushed, output));
            // However long its disk takes: a guest with this much to say waits for it.
            return if self.held_bytes > HELD_MOST {
                self.finish_outputs()
            } else {
                Ok(())
            };
        }
        self.say(&FromVm::Output(output))?;
        self.send_much()
    }

    fn send(&mut self) -> Result<(), TapeError> {
        if self.out.is_empty() {
            return Ok(());
        }
        let sent = self.agent.say(&self.out);
        self.out.clear();
        sent.map_err(|error| lost(&error.into()))
    }
}

impl Requeue for ProcessHost {
    fn requeue(&mut self, finished: BTreeMap<RequestNumber, DiskData>) {
        for (number, data) in finished.into_iter().rev() {
            let reply = DiskReply { number, data };
            self.disk.push_front((HostTime(0), Ok(reply)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::channel;

    use super::*;

    fn host() -> (ProcessHost, std::sync::mpsc::Sender<Stamped>, UnixStream) {
        let (sender, inbox) = channel();
        let (ours, theirs) = UnixStream::pair().expect("a socket");
        theirs.set_nonblocking(true).expect("an option");
        (made(inbox, ours), sender, theirs)
    }

    fn made(inbox: Receiver<Stamped>, agent: UnixStream) -> ProcessHost {
        let voice = Voice::new(agent);
        let pulse = Pulse::new(voice.clone());
        ProcessHost::new(inbox, voice, Arc::new(pulse))
    }

    fn flushed(number: u64) -> Stamped {
        stamped(Inbox::Disk(DiskNews::Finished(vec![DiskCompletion {
            number: RequestNumber(number),
            result: Ok(DiskData::Flushed),
        }])))
    }

    fn output(number: u64) -> Output {
        Output {
            number: replay_log::FrameNumber(number),
            needs: replay_log::LogIndex(number),
            kind: vmm::host::OutputKind::Frame,
            bytes: Bytes::from_static(b"answer"),
        }
    }

    fn answer(host: &mut ProcessHost, number: u64) {
        host.output(output(number)).expect("taken");
        host.send().expect("sent");
    }

    /// The numbers of the outputs that have been said.
    fn said(theirs: &UnixStream) -> Vec<u64> {
        let number = |message| match message {
            FromVm::Output(output) => output.number.0,
            other => panic!("{other:?}"),
        };
        all_said(theirs).into_iter().map(number).collect()
    }

    fn all_said(theirs: &UnixStream) -> Vec<FromVm> {
        let mut bytes = Vec::new();
        let end = std::io::Read::read_to_end(&mut &*theirs, &mut bytes);
        assert!(end.is_err(), "nothing more is there, and nobody has left");
        let mut all = Vec::new();
        let mut rest = &bytes[..];
        while let Some((message, used)) = ipc::decode(rest).expect("messages") {
            all.push(message);
            rest = &rest[used..];
        }
        all
    }

    /// Whoever asks hears of a disk that does nothing, and not of one that takes its time.
    #[test]
    fn a_ping_is_answered_by_the_thread_and_its_disk() {
        let (mut host, sender, theirs) = host();
        host.holds = true;
        let ping = |host: &mut ProcessHost| {
            let ping = Inbox::Agent(vec![ToVm::Ping { kick: true }]);
            sender.send(stamped(ping)).expect("sent");
            host.wait(None);
            let mut said = all_said(&theirs);
            assert!(said.len() == 1, "{said:?}");
            said.remove(0)
        };
        assert!(matches!(ping(&mut host), FromVm::Pong));
        host.sort(flushed(2));
        host.arrival(Sources::default()).expect("no failure");
        answer(&mut host, 1);
        assert!(matches!(ping(&mut host), FromVm::Pong), "it has just begun");
        assert!(matches!(ping(&mut host), FromVm::Busy));
        host.sort(flushed(4));
        assert!(matches!(ping(&mut host), FromVm::Pong), "it does something");
        assert!(matches!(ping(&mut host), FromVm::Busy));
        host.owed = 1;
        host.held.clear();
        assert!(matches!(ping(&mut host), FromVm::Busy), "a read is owed");
        host.owed = 0;
        assert!(matches!(ping(&mut host), FromVm::Pong));
    }

    #[test]
    fn what_follows_a_flush_leaves_when_it_is_durable() {
        let (mut host, sender, theirs) = host();
        host.holds = true;
        sender.send(flushed(2)).expect("sent");
        answer(&mut host, 1);
        assert_eq!(said(&theirs), [1], "the machine does not know of the flush");
        let told = host.arrival(Sources::default()).expect("no failure");
        assert!(matches!(
            told,
            Some(Came {
                what: FromOutside::Disk(_),
                ..
            })
        ));
        answer(&mut host, 2);
        assert!(said(&theirs).is_empty());
        sender
            .send(stamped(Inbox::Disk(DiskNews::Durable(RequestNumber(2)))))
            .expect("sent");
        host.wait(None);
        assert_eq!(said(&theirs), [2]);
        answer(&mut host, 3);
        assert_eq!(said(&theirs), [3]);
    }

    #[test]
    fn a_guest_with_much_to_say_waits_for_its_disk() {
        let (mut host, sender, theirs) = host();
        host.holds = true;
        sender.send(flushed(2)).expect("sent");
        host.arrival(Sources::default()).expect("no failure");
        host.held_bytes = HELD_MOST;
        // Comes while the machine waits in the middle of its output.
        sender
            .send(stamped(Inbox::Disk(DiskNews::Durable(RequestNumber(2)))))
            .expect("sent");
        answer(&mut host, 1);
        assert_eq!(said(&theirs), [1]);
        sender.send(flushed(4)).expect("sent");
        host.arrival(Sources::default()).expect("no failure");
        sender
            .send(stamped(Inbox::Disk(DiskNews::Finished(vec![
                DiskCompletion {
                    number: RequestNumber(4),
                    result: Err(vmm::disk::DiskError::NoSuchDisk {
                        number: RequestNumber(4),
                        disk: 0,
                    }),
                },
            ]))))
            .expect("sent");
        host.output(output(2)).expect_err("its disk has failed");
        assert!(said(&theirs).is_empty());
    }

    /// A flush that a replica's log has not shown to be finished is finished by whoever goes live,
    /// and nothing more is heard of it.
    #[test]
    fn no_answer_waits_for_a_flush_from_before_going_live() {
        use vmm::disk::{Base, Durability, Overlay};
        let folder = tempfile::tempdir().expect("a folder");
        let overlay = Overlay::open(folder.path(), Base::empty(1 << 20), Durability::Sync);
        let (mut host, sender, theirs) = host();
        let notify = move |news| drop(sender.send(stamped(Inbox::Disk(news))));
        let disks = vec![overlay.expect("a disk")];
        let worker = DiskWorker::new(disks, Finish::Later, Box::new(notify)).expect("a thread");
        host.set_worker(worker, Finish::Later);
        let flush = DiskRequest {
            number: RequestNumber(7),
            disk: 0,
            op: DiskOp::Flush,
        };
        host.submit(vec![flush]).expect("submitted");
        host.sync_disks().expect("durable");
        let told = host.arrival(Sources::default()).expect("no failure");
        assert!(matches!(
            told,
            Some(Came {
                what: FromOutside::Disk(_),
                ..
            })
        ));
        answer(&mut host, 1);
        assert_eq!(said(&theirs), [1]);
    }

    /// While the machine asks for arrivals, everything that has come is taken in. An order among it
    /// must not wait for something else to come.
    #[test]
    fn an_order_that_was_found_on_the_way_ends_the_wait() {
        let (sender, inbox) = channel();
        let (ours, _theirs) = UnixStream::pair().expect("a socket");
        let mut host = made(inbox, ours);
        sender
            .send(stamped(Inbox::Agent(vec![ToVm::Pause(true)])))
            .expect("sent");
        let arrival = host.arrival(Sources::default()).expect("no failure");
        assert!(arrival.is_none());
        // Would never end: nothing else comes.
        host.wait(None);
        assert!(matches!(host.control(), Some(ToVm::Pause(true))));
        sender.send(stamped(Inbox::Lost(None))).expect("sent");
        assert!(!host.arrival_waits(Sources::default()));
        host.wait(None);
        assert!(host.lost());
    }
}
