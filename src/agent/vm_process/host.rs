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
mod tests;
