//! The driver's ears: what happens outside becomes inputs of the protocol.

use bytes::Bytes;
use replay_log::{Batch, FrameSource, Position};
use vmm::host::{Output, OutputKind};

use super::guest::{Doing, Guest};
use super::keeper::FromStore;
use super::{Back, EARLY_ORDERS, ToDriver, VmDriver};
use crate::agent::clock::now;
use crate::agent::frames::{DropReason, FrameEvent};
use crate::agent::journal::Incident;
use crate::agent::operator::{VmAnswer, VmQuestion};
use crate::agent::vm_process::{FromVm, IpcError};
use crate::protocol::{Event, Input, Message, Span};
use crate::sentence::sentence;

/// What comes from the VMM process: a message, its end, or nonsense.
pub(super) type GuestSaid = Result<Option<FromVm>, IpcError>;

impl VmDriver {
    pub(super) fn hear(&mut self, heard: ToDriver) {
        match heard {
            ToDriver::Heard(input) => {
                if let Input::Message {
                    from,
                    message: Message::Ack(ack) | Message::Report(ack),
                } = &input
                {
                    self.streams.acknowledged(from, ack.held);
                }
                if let Input::PeerDown(peer) = &input {
                    self.streams.stop(peer);
                }
                let believed = self.believed(input);
                self.inputs.extend(believed);
            }
            ToDriver::Gateway(who, stream) => self.gateways.accept(stream, &who, now()),
            ToDriver::Operator(question, reply) => {
                if let Some(answer) = self.answer(question) {
                    // An operator who does not wait any more needs no answer.
                    let _ = reply.send(answer);
                }
            }
        }
    }

    /// What is left of it without a record that no witness has signed.
    fn believed(&self, input: Input) -> Option<Input> {
        let Input::Message { from, message } = input else {
            return Some(input);
        };
        let (message, forged) = self.env.reports.sift(&self.vm, message);
        if let Some(error) = forged {
            let peer = from.clone();
            let what = format!("relays a record that is not believed: {error}");
            let misbehaved = Event::PeerMisbehaved { peer, what };
            self.env.journal.write(Some(&self.vm), misbehaved);
        }
        message.map(|message| Input::Message { from, message })
    }

    /// The answer to a question; `None` when there is no room for an order.
    fn answer(&mut self, question: VmQuestion) -> Option<VmAnswer> {
        match question {
            VmQuestion::Status => return Some(VmAnswer::Status(Box::new(self.status()))),
            VmQuestion::Do(order) if self.asked_keeper => {
                self.inputs.push_back(Input::Operator(order));
            }
            VmQuestion::Do(order) if self.early_orders.len() < EARLY_ORDERS => {
                self.early_orders.push(order);
            }
            VmQuestion::Do(_) => return None,
        }
        Some(VmAnswer::Taken)
    }

    pub(super) fn hear_store(&mut self, returned: FromStore) {
        let mut news = Vec::new();
        self.log.returned(returned, &mut news);
        self.log_news(news);
    }

    pub(super) fn hear_back(&mut self, back: Back) {
        match back {
            Back::Input(input) => {
                let answered = matches!(input, Input::RecordRead(_) | Input::ReadFailed { .. });
                self.inputs.push_back(input);
                if answered {
                    self.asked_keeper = true;
                    let orders = std::mem::take(&mut self.early_orders);
                    self.inputs.extend(orders.into_iter().map(Input::Operator));
                }
            }
            Back::Persist(durable, outcome) => self.persisted(durable, outcome),
            Back::Console => {
                self.console.written();
                self.write_console();
            }
            Back::Parts(run, boots, parts) => self.start_guest(run, boots, parts),
        }
    }

    pub(super) fn hear_guest(&mut self, said: GuestSaid) {
        let Some(guest) = &mut self.guest else { return };
        let run = guest.run();
        match said {
            Ok(Some(said)) => self.guest_said(said),
            Ok(None) => {
                let reason = "the VMM process ended without a word".to_owned();
                self.guest_failed(run, reason);
            }
            Err(error) => {
                self.guest_failed(run, sentence(&error));
            }
        }
    }

    /// Sees to it that the VMM process lives.
    pub(super) fn look_after_guest(&mut self) {
        let Some(guest) = &mut self.guest else { return };
        let run = guest.run();
        if let Err(why) = guest.look() {
            self.guest_failed(run, why);
        }
    }

    fn guest_failed(&mut self, run: crate::protocol::VmRun, reason: String) {
        let at = self.guest.as_ref().map_or(Position::START, Guest::at);
        self.let_guest_die();
        // Whom a guest that is gone kept waiting waits no more.
        self.holds_arrivals();
        self.inputs.push_back(Input::VmFailed { run, reason, at });
    }

    fn guest_said(&mut self, said: FromVm) {
        let Some(guest) = &mut self.guest else { return };
        let run = guest.run();
        match said {
            FromVm::Ready if guest.doing() == Doing::Recording => {
                self.inputs.push_back(Input::WentLive { run });
            }
            FromVm::Ready | FromVm::Pong | FromVm::Busy => {}
            FromVm::Shipped { batch, at, frames } => {
                guest.passed(at);
                self.failure = None;
                self.shipped(&batch, &frames);
            }
            FromVm::Output(output) => {
                let recording = guest.doing() == Doing::Recording;
                self.output(output, recording);
            }
            FromVm::Executed { through, at } => {
                guest.executed(through, at);
                self.failure.take_if(|failure| through >= failure.log);
                self.inputs.push_back(Input::Executed {
                    run,
                    through,
                    position: at,
                });
            }
            FromVm::Live { frames, .. } => {
                guest.is_live();
                self.home.goes_live();
                let home = self.home.clone();
                tokio::task::spawn_blocking(move || {
                    // Done before these disks are touched in any case.
                    if let Err(error) = home.keep_recorded() {
                        tracing::warn!(error = %sentence(&error), "older disks are kept for longer");
                    }
                });
                let term = self.known_term;
                self.gateways.port.lead(term, frames, now());
                self.inputs.push_back(Input::WentLive { run });
            }
            FromVm::Deferred { longest } => guest.deferred(Span::from_nanos(longest)),
            FromVm::Paused { .. } => self.inputs.push_back(Input::Paused { run }),
            FromVm::Ended(ending) => {
                guest.has_ended(ending);
                let how = ending.to_string();
                self.inputs.push_back(Input::VmEnded { run, how });
            }
            FromVm::Failed { at, reason, .. } => {
                guest.stands_at(at);
                self.guest_failed(run, reason);
            }
        }
    }

    fn shipped(&mut self, framed: &Bytes, frames: &[FrameSource]) {
        let Some(guest) = &mut self.guest else { return };
        let run = guest.run();
        match Batch::decode_frame(framed) {
            Ok(Some((batch, _))) => {
                for source in frames {
                    guest.recorded(*source);
                    self.gateways.port.logged(*source, batch.end());
                }
                // What waited for room goes on when the port is polled next, which is at once.
                self.holds_arrivals();
                self.inputs.push_back(Input::Recorded { run, batch });
            }
            Ok(None) => self.guest_failed(run, "the VMM process wrote a torn batch".into()),
            Err(error) => self.guest_failed(run, format!("the VMM process's batch: {error}")),
        }
    }

    /// An output of the machine: a primary's waits for its commit, a replica's is kept in case
    /// this host is the next to send it.
    fn output(&mut self, output: Output, recording: bool) {
        if recording {
            self.outbox.push(output);
        } else if output.kind == OutputKind::Frame {
            self.gateways.port.output(output.number, output.bytes);
        }
    }

    /// Whether the guest has frames enough. The port is told, so that it does not call for those
    /// that wait, and reads no more from gateways than it may keep.
    pub(super) fn holds_arrivals(&mut self) -> bool {
        let enough = self.guest.as_ref().is_some_and(Guest::has_frames_enough);
        let held = enough || self.arrivals.is_full();
        self.gateways.port.hold_arrivals(held);
        held
    }

    /// What gateways have sent goes to the guest; what they have received is told the node.
    pub(super) fn hear_gateways(&mut self) {
        while let Some(event) = self.gateways.port.poll_event() {
            self.env.journal.write(Some(&self.vm), incident(&event));
        }
        let now = now();
        // Where no guest can take them, arrivals are taken all the same: the port goes on calling
        // for as long as one waits and is not held. A gateway sends what is in no log again to
        // whoever reigns next.
        while !self.holds_arrivals()
            && let Some((source, bytes)) = self.gateways.port.poll_arrival()
        {
            let recording = |guest: &Guest| guest.doing() == Doing::Recording;
            if self.guest.as_ref().is_some_and(recording) {
                self.arrivals.push((source, bytes), now);
            }
        }
        let received = self.gateways.port.received_by_all();
        if received != self.told_received {
            self.told_received = received;
            self.inputs
                .push_back(Input::GatewayReceived { through: received });
        }
    }
}

/// What the journal says about a gateway.
fn incident(event: &FrameEvent) -> Incident {
    match *event {
        FrameEvent::Welcomed {
            gateway, resent, ..
        } => Incident::GatewayWelcomed {
            gateway: gateway.0,
            resent: resent as u64,
        },
        FrameEvent::Refused { gateway, why } => Incident::GatewayRefused {
            gateway: gateway.0,
            why: why.as_str().to_owned(),
        },
        FrameEvent::Dropped {
            gateway,
            why,
            outputs,
        } => {
            let why = match why {
                DropReason::Absent => "it was away for too long",
                DropReason::TooFarBehind => "it lacks more than is kept for it",
            };
            let why = format!("{why}; {outputs} outputs for it are forgotten");
            Incident::GatewayRefused {
                gateway: gateway.0,
                why,
            }
        }
    }
}
