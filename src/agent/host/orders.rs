//! What operators want of this host.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;

use super::super::certs::Identity;
use super::super::clock;
use super::super::journal::Incident;
use super::super::library::LibraryError;
use super::super::operator::{
    Answer, Asked, HostStatus, LinkFigures, Request, VmAnswer, VmQuestion,
};
use super::{Agent, Wish};
use crate::protocol::{HostName, Operator, VmName};
use crate::sentence::sentence;

/// So long a driver's answer is waited for.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

impl Agent {
    /// Takes an operator's request. A VM's image is looked for first, and read for that: heartbeats
    /// do not wait for a disk.
    pub(super) fn asked(&self, asked: Asked) -> Option<Asked> {
        let Request::Run { image, .. } = &asked.request else {
            return Some(asked);
        };
        let (env, image) = (Arc::clone(&self.env), image.clone());
        let wishes = self.wishes.clone();
        tokio::task::spawn_blocking(move || {
            let found = env.library.image_named(&image).map(drop);
            let found = found.map_err(|error: LibraryError| sentence(&error));
            // Without the agent there is nobody to create it.
            let _ = wishes.blocking_send(Wish::Create { asked, found });
        });
        None
    }

    /// Begins what is asked for. Answers that have to be waited for come from a task.
    pub(super) fn order(&mut self, asked: Asked) {
        let Asked {
            who,
            request,
            reply,
        } = asked;
        match self.obey(&who, request) {
            // An operator who does not wait any more needs no answer.
            Ok(answer) => drop(tokio::spawn(answer(reply))),
            Err(why) => drop(reply.send(Answer::Refused { why })),
        }
    }

    fn obey(&mut self, who: &Identity, request: Request) -> Result<Answering, String> {
        let (vm, order) = match request {
            Request::Status => {
                let status = self.status();
                return Ok(answering(
                    async move { Answer::Status(Box::new(status.await)) },
                ));
            }
            Request::Run {
                vm,
                image,
                hosts,
                policy,
            } => {
                self.check_fit(&hosts)?;
                self.prepare(&vm, &image)?;
                (vm, Operator::Create { hosts, policy })
            }
            Request::Pair { vm, hosts, policy } => {
                self.check_fit(&hosts)?;
                (vm, Operator::Pair { hosts, policy })
            }
            Request::Switchover { vm, to } => (vm, Operator::Switchover { to }),
            Request::AcceptLoss { vm } => (vm, Operator::AcceptLoss),
            Request::Remove { vm } => return Ok(self.check_removal(vm)),
            Request::Events { .. } | Request::Metrics => {
                return Err("this is answered elsewhere".to_owned());
            }
        };
        let journal = *self.env.journal.written().borrow();
        let ordered = Incident::Ordered {
            operator: who.to_string(),
            order: format!("{order:?}"),
        };
        self.env.journal.write(Some(&vm), ordered);
        let asked = self.ask(&vm, VmQuestion::Do(order));
        Ok(answering(async move {
            match asked.await {
                Some(_) => Answer::Taken { journal },
                None => Answer::Refused { why: not_here(&vm) },
            }
        }))
    }

    /// Notes the image, which is here, that a VM is to be created from.
    fn prepare(&mut self, vm: &VmName, image: &str) -> Result<(), String> {
        let home = super::super::driver::Home::open(&self.env.config.data, vm);
        let home = home.map_err(|error| sentence(&error))?;
        // A VM that has run here keeps what it was created from: the order will be refused.
        if home.header().map_err(|error| sentence(&error))?.is_none() {
            home.set_image(image).map_err(|error| sentence(&error))?;
        }
        self.take(vm, "an operator creates it")
            .map_err(|error| sentence(&error))
    }

    /// Removes a VM once it is known that its record does not name this host.
    fn check_removal(&self, vm: VmName) -> Answering {
        let (asked, wishes) = (self.ask(&vm, VmQuestion::Status), self.wishes.clone());
        let host = self.env.host.clone();
        Box::new(move |reply: oneshot::Sender<Answer>| {
            Box::pin(async move {
                let Some(VmAnswer::Status(status)) = asked.await else {
                    let why = not_here(&vm);
                    return drop(reply.send(Answer::Refused { why }));
                };
                let record = status.node.record;
                if record.is_some_and(|record| record.copy_on(&host).is_some()) {
                    let why =
                        format!("the record of {vm} names {host}: pair it without {host} first");
                    return drop(reply.send(Answer::Refused { why }));
                }
                // Fails only when the agent ends.
                let _ = wishes.send(Wish::Remove { vm, reply }).await;
            })
        })
    }

    pub(super) fn remove(&mut self, vm: VmName, reply: oneshot::Sender<Answer>) {
        let running = self.drivers.remove(&vm);
        let env = Arc::clone(&self.env);
        tokio::spawn(async move {
            if let Some(running) = running {
                // It has ended, in whatever way.
                let _ = running.end().await;
            }
            let folder = env.config.data.join("vms").join(vm.as_str());
            let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder));
            let answer = match removed.await {
                Ok(Err(error)) => Answer::Refused {
                    why: format!("the folder of {vm} cannot be removed: {error}"),
                },
                _ => Answer::Done,
            };
            let why = "an operator removed it".to_owned();
            env.journal.write(Some(&vm), Incident::VmRemoved { why });
            // An operator who does not wait any more needs no answer.
            let _ = reply.send(answer);
        });
    }

    /// Asks every driver, and puts together what they answer.
    pub(super) fn status(&self) -> impl Future<Output = HostStatus> + Send + 'static {
        let counters = self.endpoint.counters();
        let hosts = self.env.config.other_hosts();
        let peers = hosts.iter().map(|peer| {
            let name = HostName::from(&peer.identity.name);
            let up = self.up.contains(&name);
            (name, up)
        });
        let status = HostStatus {
            host: self.env.host.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            now: clock::now(),
            peers: peers.collect(),
            journal: *self.env.journal.written().borrow(),
            vms: Vec::new(),
            link: LinkFigures {
                log_bytes_raw: counters.log_bytes_raw.get(),
                log_bytes_sent: counters.log_bytes_sent.get(),
                log_bytes_received: counters.log_bytes_received.get(),
                refused_certificates: counters.refused_certificates.get(),
                refused_peers: counters.refused_peers.get(),
                closed_for_garbage: counters.closed_for_garbage.get(),
            },
        };
        let vms = self.drivers.keys();
        let asked: Vec<_> = vms.map(|vm| self.ask(vm, VmQuestion::Status)).collect();
        async move {
            let mut status = status;
            for asked in asked {
                if let Some(VmAnswer::Status(vm)) = asked.await {
                    status.vms.push(*vm);
                }
            }
            status
        }
    }

    /// Asks a driver; `None` when there is none, or it does not answer.
    fn ask(
        &self,
        vm: &VmName,
        question: VmQuestion,
    ) -> impl Future<Output = Option<VmAnswer>> + Send + 'static {
        let running = self.drivers.get(vm);
        let answer = running.and_then(|running| running.ask(question));
        async move { timeout(ANSWER_PATIENCE, answer?).await.ok()?.ok() }
    }
}

/// An answer that has to be waited for, and where it goes.
type Answering =
    Box<dyn FnOnce(oneshot::Sender<Answer>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

fn answering(answer: impl Future<Output = Answer> + Send + 'static) -> Answering {
    Box::new(move |reply| {
        Box::pin(async move {
            // An operator who does not wait any more needs no answer.
            let _ = reply.send(answer.await);
        })
    })
}

fn not_here(vm: &VmName) -> String {
    format!("this host does not look after {vm}: ask its primary, which 'understudy status' names")
}
