//! A gateway inside the process that runs the VMM: no cluster, no QUIC, two channels.

use std::collections::VecDeque;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use replay_log::{FrameNumber, FrameSource, GatewayIncarnation};
use tokio::sync::mpsc;

use super::metrics::{GatewayMetrics, add};
use super::pump::{Carrier, HistoryLost};
use super::{Gateway, GatewayError};
use crate::agent::certs::Name;
use crate::protocol::Time;

/// How many frames are kept here when the channel to the VMM is full.
const MOST_WAITING: usize = 256;

type Room = Pin<Box<dyn Future<Output = bool> + Send>>;

/// A gateway that is connected to one VMM by channels.
///
/// The VMM takes frames from `to_vmm` and delivers each once; its released outputs come on
/// `from_vmm`, in order. The gateway ends when either channel is closed.
pub struct LocalGateway {
    gateway: Gateway,
    to_vmm: mpsc::Sender<(FrameSource, Bytes)>,
    from_vmm: mpsc::Receiver<(FrameNumber, Bytes)>,
}

impl LocalGateway {
    /// Connects a gateway that has bound its ports.
    pub const fn new(
        gateway: Gateway,
        to_vmm: mpsc::Sender<(FrameSource, Bytes)>,
        from_vmm: mpsc::Receiver<(FrameNumber, Bytes)>,
    ) -> Self {
        Self {
            gateway,
            to_vmm,
            from_vmm,
        }
    }

    /// Where clients can connect, in the order of the configuration.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.gateway.addresses()
    }

    /// What is counted.
    pub fn metrics(&self) -> Arc<GatewayMetrics> {
        self.gateway.metrics()
    }

    /// Serves until the VMM is gone.
    pub async fn run(self) -> Result<(), GatewayError> {
        let carrier = LocalCarrier {
            incarnation: GatewayIncarnation::default(),
            to_vmm: self.to_vmm,
            from_vmm: self.from_vmm,
            waiting: VecDeque::new(),
            next: FrameNumber(1),
            received: FrameNumber(0),
            room: None,
            ended: false,
            metrics: self.gateway.metrics(),
        };
        match self.gateway.pump(carrier, local_name()).await {
            GatewayError::VmmGone => Ok(()),
            error => Err(error),
        }
    }
}

/// There is no certificate, and no other gateway to be told from.
fn local_name() -> Name {
    "local".parse().expect("a name of five letters")
}

struct LocalCarrier {
    incarnation: GatewayIncarnation,
    to_vmm: mpsc::Sender<(FrameSource, Bytes)>,
    from_vmm: mpsc::Receiver<(FrameNumber, Bytes)>,
    waiting: VecDeque<Bytes>,
    next: FrameNumber,
    received: FrameNumber,
    /// Becomes ready when the VMM has taken frames; says whether the channel is open.
    room: Option<Room>,
    ended: bool,
    metrics: Arc<GatewayMetrics>,
}

impl Carrier for LocalCarrier {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        _now: Time,
        frames: &mut Vec<Bytes>,
    ) -> Result<(), HistoryLost> {
        loop {
            match self.from_vmm.poll_recv(cx) {
                Poll::Ready(Some((number, frame))) if number > self.received => {
                    self.received = number;
                    add(&self.metrics.frames_from_guest, 1);
                    add(&self.metrics.bytes_from_guest, frame.len() as u64);
                    frames.push(frame);
                }
                Poll::Ready(Some(_)) => add(&self.metrics.duplicates, 1),
                Poll::Ready(None) => {
                    self.ended = true;
                    return Ok(());
                }
                Poll::Pending => return Ok(()),
            }
        }
    }

    fn gathers(&self) -> bool {
        false
    }

    fn room(&self) -> usize {
        MOST_WAITING.saturating_sub(self.waiting.len())
    }

    fn send(&mut self, frame: Bytes) {
        add(&self.metrics.frames_to_guest, 1);
        add(&self.metrics.bytes_to_guest, frame.len() as u64);
        self.waiting.push_back(frame);
    }

    fn flush(&mut self, cx: &mut Context<'_>, _now: Time) {
        while let Some(frame) = self.waiting.pop_front() {
            let source = FrameSource {
                gateway: self.incarnation,
                number: self.next,
            };
            match self.to_vmm.try_send((source, frame)) {
                Ok(()) => self.next.0 += 1,
                Err(mpsc::error::TrySendError::Full((_, frame))) => {
                    self.waiting.push_front(frame);
                    let sender = self.to_vmm.clone();
                    let room = self.room.get_or_insert_with(|| {
                        Box::pin(async move { sender.reserve().await.is_ok() })
                    });
                    match room.as_mut().poll(cx) {
                        Poll::Pending => return,
                        Poll::Ready(open) => {
                            self.room = None;
                            self.ended |= !open;
                        }
                    }
                }
                Err(mpsc::error::TrySendError::Closed(_)) => self.ended = true,
            }
            if self.ended {
                return;
            }
        }
    }

    fn poll_timeout(&self) -> Option<Time> {
        None
    }

    fn begin(&mut self, incarnation: GatewayIncarnation, _address: Ipv4Addr, _now: Time) {
        self.incarnation = incarnation;
        self.next = FrameNumber(1);
        self.waiting.clear();
    }

    fn report(&self, _metrics: &GatewayMetrics) {}

    fn has_ended(&self) -> bool {
        self.ended
    }
}
