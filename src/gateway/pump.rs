//! Moves bytes between the clients' sockets and the guest-side stack. One task owns everything;
//! a socket that becomes ready puts its name on a list and wakes that task.
//!
//! Memory is bounded for each client: a client that does not read fills its receive buffer in the
//! stack, and the guest's window closes; a guest that does not read fills the send buffer, and
//! nothing more is read from the client.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::Bytes;
use replay_log::GatewayIncarnation;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Sleep;

use super::metrics::{GatewayMetrics, add, set};
use super::patience::watch_over;
use super::ready::{Ready, ReadyWaker};
use super::stack::{ConnectionId, Progress, Stack};
use super::{GatewayConfig, GatewayError};
use crate::agent::certs::Name;
use crate::protocol::{Span, Time};

/// How long nobody is accepted after the host had no file descriptor left for a client.
const ACCEPT_PAUSE: Span = Span::from_millis(100);

/// The longest that a frame for the guest waits for others.
const LINGER: Span = Span::from_micros(200);

/// The guest has lost this gateway's connections.
pub(super) struct HistoryLost(pub(super) &'static str);

/// What carries frames between the stack and the guest.
pub(super) trait Carrier {
    /// Takes what has come for the stack, and arranges to be woken when more does.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        now: Time,
        frames: &mut Vec<Bytes>,
    ) -> Result<(), HistoryLost>;

    /// Whether each departure costs so much that frames do well to leave together.
    fn gathers(&self) -> bool;

    /// How many frames it would take now. At 0 nothing is read from clients.
    fn room(&self) -> usize;

    /// Takes a frame for the guest.
    fn send(&mut self, frame: Bytes);

    /// Sends what it took on its way.
    fn flush(&mut self, cx: &mut Context<'_>, now: Time);

    /// When it wants to be polled at the latest.
    fn poll_timeout(&self) -> Option<Time>;

    /// Begins, or begins anew, as this incarnation with this address in the guest's network.
    fn begin(&mut self, incarnation: GatewayIncarnation, address: Ipv4Addr, now: Time);

    /// Writes down what it counts.
    fn report(&self, metrics: &GatewayMetrics);

    /// Whether there is nobody left to carry frames to.
    fn has_ended(&self) -> bool {
        false
    }
}

struct Client {
    socket: TcpStream,
    from: IpAddr,
    waker: Arc<ReadyWaker<ConnectionId>>,
    /// It will send nothing more, and the guest has been told.
    finished: bool,
    /// The guest will send nothing more, and the client has been told.
    told_end: bool,
    /// Its bytes wait because the carrier is full.
    stopped: bool,
}

/// What became of a client in one look at it.
enum Fate {
    Lives,
    /// Both directions have ended in order.
    Done,
    /// The guest reset the connection.
    ResetByGuest,
    /// The client reset the connection or is gone.
    ResetByClient,
}

/// One published port.
pub(super) struct Published {
    pub(super) listener: TcpListener,
    pub(super) guest_port: u16,
}

/// Everything that one gateway does, as one future's worth of state.
pub(super) struct Pump<C> {
    carrier: C,
    /// The gateway's name: every incarnation is one of it.
    name: Name,
    stack: Stack,
    config: GatewayConfig,
    published: Vec<Published>,
    clients: HashMap<ConnectionId, Client>,
    /// How many clients there are from each address.
    sources: HashMap<IpAddr, usize>,
    /// When the clients are looked after next, if there are any.
    look_after_at: Option<Time>,
    /// Clients may be waiting to be accepted that nothing will wake us for.
    accept_again: bool,
    accept_at: Option<Time>,
    ready: Arc<Ready<ConnectionId>>,
    /// Clients to be looked at in this turn.
    turn: Vec<ConnectionId>,
    stopped: Vec<ConnectionId>,
    frames: Vec<Bytes>,
    /// Frames were given to the carrier since the last look at the sockets.
    more_to_flush: bool,
    lingering_since: Option<Time>,
    /// Ready when the sockets have been looked at again.
    look_again: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    started: Instant,
    timer: Pin<Box<Sleep>>,
    timer_at: Option<Time>,
    metrics: Arc<GatewayMetrics>,
}

impl<C: Carrier> Pump<C> {
    pub(super) fn new(
        mut carrier: C,
        name: Name,
        config: GatewayConfig,
        published: Vec<Published>,
        metrics: Arc<GatewayMetrics>,
    ) -> Result<Self, GatewayError> {
        let incarnation = super::fresh_incarnation(&name);
        let stack = Stack::new(incarnation, config.stack.clone(), Time::default())?;
        carrier.begin(incarnation, stack.address().ip, Time::default());
        Ok(Self {
            carrier,
            name,
            stack,
            config,
            published,
            clients: HashMap::new(),
            sources: HashMap::new(),
            look_after_at: None,
            accept_again: false,
            accept_at: None,
            ready: Arc::default(),
            turn: Vec::new(),
            stopped: Vec::new(),
            frames: Vec::new(),
            more_to_flush: false,
            lingering_since: None,
            look_again: None,
            started: Instant::now(),
            timer: Box::pin(tokio::time::sleep(std::time::Duration::ZERO)),
            timer_at: None,
            metrics,
        })
    }

    fn now(&self) -> Time {
        let nanos = self.started.elapsed().as_nanos();
        Time::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// One turn: everything that can be done now is done. Never ready but with an error.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<GatewayError> {
        self.ready.listen(cx.waker());
        loop {
            let now = self.now();
            if let Err(lost) = self.take_frames(cx, now)
                && let Err(error) = self.start_afresh(&lost, now)
            {
                return Poll::Ready(error);
            }
            if let Err(error) = self.accept(cx, now) {
                return Poll::Ready(error);
            }
            if self.stack.poll_timeout().is_some_and(|due| due <= now) {
                self.stack.handle_timeout(now);
            }
            if self.look_after_at.is_some_and(|at| at <= now) {
                self.look_after_clients(now);
            }
            self.serve_clients(now);
            if self.lingers(cx, now) {
                return Poll::Pending;
            }
            self.carrier.flush(cx, now);
            self.report();
            if self.carrier.has_ended() {
                return Poll::Ready(GatewayError::VmmGone);
            }
            let room_for_more = self.accept_again && self.clients.len() < self.config.most_clients;
            if !room_for_more && !self.timer_is_due(cx) {
                return Poll::Pending;
            }
        }
    }

    fn take_frames(&mut self, cx: &mut Context<'_>, now: Time) -> Result<(), HistoryLost> {
        let taken = self.carrier.poll(cx, now, &mut self.frames);
        for frame in self.frames.drain(..) {
            self.stack.handle_frame(frame, now);
        }
        taken
    }

    /// Every client is reset, but for those whose connection to the guest does not stand yet, and a
    /// new incarnation begins.
    fn start_afresh(&mut self, lost: &HistoryLost, now: Time) -> Result<(), GatewayError> {
        let incarnation = super::fresh_incarnation(&self.name);
        tracing::warn!(
            reason = lost.0,
            clients = self.clients.len(),
            incarnation = incarnation.0,
            "this gateway's connections to the guest cannot go on: every client that has one is reset"
        );
        self.stopped.clear();
        add(&self.metrics.fresh_starts, 1);
        let stack = Stack::new(incarnation, self.config.stack.clone(), now)?;
        let before = std::mem::replace(&mut self.stack, stack);
        self.carrier
            .begin(incarnation, self.stack.address().ip, now);
        self.sources.clear();
        for (id, client) in std::mem::take(&mut self.clients) {
            if let Some(guest_port) = before.connecting_to(id) {
                // Nothing of it has reached the guest that matters now.
                self.connect(client.socket, client.from, guest_port, now);
            } else {
                add(&self.metrics.clients_reset, 1);
                let _ = client.socket.set_zero_linger();
            }
        }
        Ok(())
    }

    fn accept(&mut self, cx: &mut Context<'_>, now: Time) -> Result<(), GatewayError> {
        if self.accept_at.is_some_and(|at| now < at) {
            return Ok(());
        }
        self.accept_at = None;
        self.accept_again = false;
        for index in 0..self.published.len() {
            loop {
                if self.clients.len() >= self.config.most_clients {
                    // The others wait in the listener's queue until one leaves.
                    self.accept_again = true;
                    return Ok(());
                }
                let published = &self.published[index];
                let guest_port = published.guest_port;
                match published.listener.poll_accept(cx) {
                    Poll::Ready(Ok((socket, from))) => {
                        self.welcome_client(socket, from.ip().to_canonical(), guest_port, now);
                    }
                    Poll::Ready(Err(error)) if is_of_one_client(&error) => {}
                    Poll::Ready(Err(error)) if is_shortage(&error) => {
                        tracing::warn!(%error, "no more clients can be accepted for now");
                        self.accept_at = Some(now.plus(ACCEPT_PAUSE));
                        return Ok(());
                    }
                    Poll::Ready(Err(source)) => {
                        return Err(GatewayError::Accept { guest_port, source });
                    }
                    Poll::Pending => break,
                }
            }
        }
        Ok(())
    }

    fn welcome_client(&mut self, socket: TcpStream, from: IpAddr, guest_port: u16, now: Time) {
        let theirs = self.sources.get(&from).copied().unwrap_or(0);
        if theirs >= self.config.most_clients_each {
            add(&self.metrics.clients_turned_away, 1);
            tracing::debug!(%from, theirs, "a client is turned away: too many of one address");
            let _ = socket.set_zero_linger();
            return;
        }
        let _ = socket.set_nodelay(true);
        if let Err(error) = watch_over(&socket) {
            // It is gone already, or this kernel cannot; it is served for as long as it is there.
            tracing::debug!(%error, %from, "the kernel does not watch over a client");
        }
        add(&self.metrics.clients_accepted, 1);
        let every = self.config.look_after_every;
        self.look_after_at.get_or_insert(now.plus(every));
        self.connect(socket, from, guest_port, now);
    }

    /// Lets go of clients that the kernel has given up, where nothing is read or written that would
    /// tell of it: they have said all they had to say, or the guest takes nothing.
    fn look_after_clients(&mut self, now: Time) {
        let gone = |client: &Client| !matches!(client.socket.take_error(), Ok(None));
        let gone: Vec<_> = self
            .clients
            .iter()
            .filter(|(_, client)| gone(client))
            .map(|(id, _)| *id)
            .collect();
        for id in gone {
            self.stack.abort(id, now);
            self.let_go(id);
        }
        let every = self.config.look_after_every;
        self.look_after_at = (!self.clients.is_empty()).then(|| now.plus(every));
    }

    fn let_go(&mut self, id: ConnectionId) {
        let Some(client) = self.clients.remove(&id) else {
            return;
        };
        if let Some(theirs) = self.sources.get_mut(&client.from) {
            *theirs -= 1;
            if *theirs == 0 {
                self.sources.remove(&client.from);
            }
        }
    }

    /// Gives a client a connection to the guest.
    fn connect(&mut self, socket: TcpStream, from: IpAddr, guest_port: u16, now: Time) {
        let id = match self.stack.connect(guest_port, now) {
            Ok(id) => id,
            Err(error) => {
                tracing::warn!(%error, "a client is turned away");
                add(&self.metrics.clients_reset, 1);
                let _ = socket.set_zero_linger();
                return;
            }
        };
        let waker = ReadyWaker::new(id, &self.ready);
        self.clients.insert(
            id,
            Client {
                socket,
                from,
                waker,
                finished: false,
                told_end: false,
                stopped: false,
            },
        );
        *self.sources.entry(from).or_default() += 1;
        self.turn.push(id);
    }

    fn serve_clients(&mut self, now: Time) {
        if self.carrier.room() > 0 && !self.stopped.is_empty() {
            for id in self.stopped.drain(..) {
                if let Some(client) = self.clients.get_mut(&id) {
                    client.stopped = false;
                }
                self.turn.push(id);
            }
        }
        self.ready.take(&mut self.turn);
        loop {
            while let Some(id) = self.stack.poll_touched() {
                self.turn.push(id);
            }
            if self.turn.is_empty() {
                break;
            }
            let mut turn = std::mem::take(&mut self.turn);
            for id in turn.drain(..) {
                self.serve(id, now);
            }
            self.turn = turn;
            self.let_frames_out(now);
        }
        self.let_frames_out(now);
    }

    fn let_frames_out(&mut self, now: Time) {
        self.stack.set_room(self.carrier.room());
        self.stack.egress(now);
        while let Some(frame) = self.stack.poll_transmit() {
            self.carrier.send(frame);
            self.more_to_flush = true;
        }
    }

    /// Whether what there is for the guest waits for what other clients are about to say: for as
    /// long as each look at the sockets finds more, and not for long. The guest takes in one turn
    /// what comes together, and answers it with one flush of its disk.
    fn lingers(&mut self, cx: &mut Context<'_>, now: Time) -> bool {
        if std::mem::take(&mut self.more_to_flush) {
            let since = *self.lingering_since.get_or_insert(now);
            let may = self.carrier.gathers() && self.carrier.room() > 0;
            if may && now.since(since) < LINGER {
                self.look_again = Some(Box::pin(tokio::task::yield_now()));
            }
        }
        if let Some(look) = &mut self.look_again
            && look.as_mut().poll(cx).is_pending()
        {
            return true;
        }
        self.look_again = None;
        self.lingering_since = None;
        false
    }

    fn serve(&mut self, id: ConnectionId, now: Time) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        client.waker.unlist();
        let may_read = self.carrier.room() > 0;
        let was_stopped = client.stopped;
        let fate = client.exchange(id, &mut self.stack, may_read);
        if client.stopped && !was_stopped {
            add(&self.metrics.stops_reading, 1);
            self.stopped.push(id);
        }
        match fate {
            Fate::Lives => return,
            Fate::Done => self.stack.remove(id, now),
            Fate::ResetByGuest => {
                let _ = client.socket.set_zero_linger();
                add(&self.metrics.clients_reset, 1);
                self.stack.abort(id, now);
            }
            Fate::ResetByClient => self.stack.abort(id, now),
        }
        self.let_go(id);
    }

    fn report(&self) {
        set(&self.metrics.clients, self.clients.len() as u64);
        self.carrier.report(&self.metrics);
    }

    /// Sets the timer; says whether it is due already.
    fn timer_is_due(&mut self, cx: &mut Context<'_>) -> bool {
        let next = [
            self.stack.poll_timeout(),
            self.carrier.poll_timeout(),
            self.accept_at,
            self.look_after_at,
        ]
        .into_iter()
        .flatten()
        .min();
        let Some(at) = next else {
            self.timer_at = None;
            return false;
        };
        if self.timer_at != Some(at) {
            self.timer_at = Some(at);
            let deadline = self.started + std::time::Duration::from_nanos(at.as_nanos());
            self.timer.as_mut().reset(deadline.into());
        }
        if self.timer.as_mut().poll(cx).is_ready() {
            self.timer_at = None;
            return true;
        }
        false
    }
}

/// A client that is gone before it was accepted.
fn is_of_one_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// No file descriptors or memory, for now.
fn is_shortage(error: &io::Error) -> bool {
    use nix::errno::Errno;
    let shortages = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM];
    error
        .raw_os_error()
        .is_some_and(|code| shortages.contains(&Errno::from_raw(code)))
}

impl Client {
    /// Moves what can be moved, both ways.
    fn exchange(&mut self, id: ConnectionId, stack: &mut Stack, may_read: bool) -> Fate {
        let waker = Waker::from(Arc::clone(&self.waker));
        let mut cx = Context::from_waker(&waker);
        if self.give(id, stack, &mut cx).is_err() {
            return Fate::ResetByClient;
        }
        match stack.progress(id) {
            None | Some(Progress::Reset) => return Fate::ResetByGuest,
            Some(Progress::Closed) if self.told_end => return Fate::Done,
            Some(_) => {}
        }
        if self.finished {
            return Fate::Lives;
        }
        if !may_read {
            self.stopped = true;
            return Fate::Lives;
        }
        match self.take(id, stack, &mut cx) {
            Ok(()) => Fate::Lives,
            Err(_) => Fate::ResetByClient,
        }
    }

    /// From the guest to the client.
    fn give(
        &mut self,
        id: ConnectionId,
        stack: &mut Stack,
        cx: &mut Context<'_>,
    ) -> io::Result<()> {
        let mut outcome = Ok(());
        let socket = &mut self.socket;
        stack.receive(id, |bytes| {
            match Pin::new(&mut *socket).poll_write(cx, bytes) {
                Poll::Ready(Ok(written)) => written,
                Poll::Ready(Err(error)) => {
                    outcome = Err(error);
                    0
                }
                Poll::Pending => 0,
            }
        });
        outcome?;
        if !self.told_end && stack.is_drained(id) {
            // At once, for TCP.
            if let Poll::Ready(told) = Pin::new(&mut self.socket).poll_shutdown(cx) {
                // A client that is gone already needs no telling.
                if told.is_ok() || self.finished {
                    self.told_end = true;
                } else {
                    return told;
                }
            }
        }
        Ok(())
    }

    /// From the client to the guest.
    fn take(
        &mut self,
        id: ConnectionId,
        stack: &mut Stack,
        cx: &mut Context<'_>,
    ) -> io::Result<()> {
        let mut outcome = Ok(());
        let mut end = false;
        let socket = &mut self.socket;
        stack.send(id, |room| {
            let mut buffer = ReadBuf::new(room);
            match Pin::new(&mut *socket).poll_read(cx, &mut buffer) {
                Poll::Ready(Ok(())) => {
                    end = buffer.filled().is_empty();
                    buffer.filled().len()
                }
                Poll::Ready(Err(error)) => {
                    outcome = Err(error);
                    0
                }
                Poll::Pending => 0,
            }
        });
        outcome?;
        if end {
            self.finished = true;
            stack.finish(id);
        }
        Ok(())
    }
}
