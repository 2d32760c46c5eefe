//! What operators want of this host.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::super::certs::Identity;
use super::super::clock;
use super::super::driver::{Home, Surroundings};
use super::super::journal::Incident;
use super::super::operator::{
    Answer, Asked, HostStatus, LinkFigures, Request, VmAnswer, VmQuestion,
};
use super::inbox::Running;
use super::{Agent, Wish};
use crate::protocol::{HostName, Operator, Record, VmName};
use crate::sentence::sentence;

/// So long a driver's answer is waited for.
const ANSWER_PATIENCE: Duration = Duration::from_secs(3);

impl Agent {
    /// Takes an operator's request. A VM's image is looked for first, and read for that: heartbeats
    /// do not wait for a disk.
    pub(super) fn asked(&self, asked: Asked) -> Option<Asked> {
        let (vm, image, hosts) = match &asked.request {
            Request::Run {
                vm, image, hosts, ..
            } => (vm, image, hosts.as_slice()),
            Request::StartOver { vm, image } => (vm, image, [].as_slice()),
            _ => return Some(asked),
        };
        let may_take = || self.may_take(vm).map_err(|error| sentence(&error));
        if let Err(why) = self.check_fit(hosts).and_then(|()| may_take()) {
            // An operator who does not wait any more needs no answer.
            drop(asked.reply.send(Answer::Refused { why }));
            return None;
        }
        let (env, vm, image) = (Arc::clone(&self.env), vm.clone(), image.clone());
        let wishes = self.wishes.clone();
        tokio::task::spawn_blocking(move || {
            let found = prepare(&env, &vm, &image);
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
                vm, hosts, policy, ..
            } => {
                // Its folder is prepared by now.
                self.take(&vm, "an operator creates it")
                    .map_err(|error| sentence(&error))?;
                (vm, Operator::Create { hosts, policy })
            }
            Request::StartOver { vm, .. } => {
                self.take(&vm, "an operator starts it over")
                    .map_err(|error| sentence(&error))?;
                (vm, Operator::StartOver)
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
            order: order.to_string(),
        };
        self.env.journal.write(Some(&vm), ordered);
        let here = self.drivers.contains_key(&vm);
        let asked = self.ask(&vm, VmQuestion::Do(order));
        Ok(answering(async move {
            let why = match asked.await {
                Some(_) => return Answer::Taken { journal },
                None if here => format!(
                    "this host looks after {vm} and does not answer for it: see what 'understudy \
                     events' says before you order anew"
                ),
                None => not_here(&vm),
            };
            Answer::Refused { why }
        }))
    }

    /// Removes a VM once it is known that no record names this host.
    fn check_removal(&self, vm: VmName) -> Answering {
        let (asked, wishes) = (self.ask(&vm, VmQuestion::Status), self.wishes.clone());
        let env = Arc::clone(&self.env);
        Box::new(move |reply: oneshot::Sender<Answer>| {
            Box::pin(async move {
                let known = match asked.await {
                    Some(VmAnswer::Status(status)) => status.node.record,
                    // Nobody looks after it; there may be a folder all the same.
                    _ => None,
                };
                if let Err(why) = may_remove(&env, &vm, known.as_ref()).await {
                    return drop(reply.send(Answer::Refused { why }));
                }
                // Fails only when the agent ends.
                let _ = wishes.send(Wish::Remove { vm, reply }).await;
            })
        })
    }

    pub(super) fn remove(&mut self, vm: VmName, reply: oneshot::Sender<Answer>) {
        if !self.removing.insert(vm.clone()) {
            let why = format!("{vm} is being removed already");
            return drop(reply.send(Answer::Refused { why }));
        }
        self.unreadable.remove(&vm);
        let running = self.drivers.remove(&vm);
        let (env, wishes) = (Arc::clone(&self.env), self.wishes.clone());
        tokio::spawn(async move {
            let answer = match remove_folder(&env, &vm, running).await {
                Ok(()) => {
                    env.reports.forget(&vm);
                    let why = "an operator removed it".to_owned();
                    env.journal.write(Some(&vm), Incident::VmRemoved { why });
                    Answer::Done
                }
                Err(why) => Answer::Refused { why },
            };
            // Fails only when the agent ends.
            let _ = wishes.send(Wish::Removed { vm }).await;
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
            witness: self.env.witness.as_ref().map(|_| self.env.reports.health()),
            vms: Vec::new(),
            silent: self.unreadable(),
            troubles: self.troubles.values().cloned().collect(),
            space: self.env.space.last(),
            aside: self.env.space.aside(),
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
        let asked: Vec<_> = vms
            .map(|vm| (vm.clone(), self.ask(vm, VmQuestion::Status)))
            .collect();
        async move {
            let mut status = status;
            for (vm, asked) in asked {
                if let Some(VmAnswer::Status(vm)) = asked.await {
                    status.vms.push(*vm);
                } else {
                    let why = "what looks after it does not answer: it is being opened, or busy";
                    status.silent.insert(vm, why.to_owned());
                }
            }
            status
        }
    }

    /// The VMs that cannot be looked after, and why.
    fn unreadable(&self) -> BTreeMap<VmName, String> {
        let unreadable = self.unreadable.iter();
        let idle = unreadable.filter(|(vm, _)| !self.drivers.contains_key(*vm));
        idle.map(|(vm, (_, why))| (vm.clone(), why.clone()))
            .collect()
    }

    /// Asks a driver; `None` when there is none, or it does not answer.
    fn ask(
        &self,
        vm: &VmName,
        question: VmQuestion,
    ) -> impl Future<Output = Option<VmAnswer>> + Send + 'static {
        let running = self.drivers.get(vm);
        let answer = running.and_then(|running| running.ask(question));
        let until = Instant::now() + ANSWER_PATIENCE;
        async move { timeout_at(until, answer?).await.ok()?.ok() }
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

/// Notes the image that a VM is to be created from, if it is here. Blocks. The error is a sentence.
fn prepare(env: &Surroundings, vm: &VmName, image: &str) -> Result<(), String> {
    let found = env.library.image_named(image);
    found.map_err(|error| sentence(&error))?;
    let home = Home::open(&env.config.data, vm).map_err(|error| sentence(&error))?;
    // A VM that has run here keeps what it was created from: the order will be refused.
    if home.header().map_err(|error| sentence(&error))?.is_none() {
        home.set_image(image).map_err(|error| sentence(&error))?;
    }
    Ok(())
}

/// Whether a VM may be removed from this host: neither the record that the witness keeps nor the one
/// that this host knows may name it. The error is a sentence.
async fn may_remove(env: &Surroundings, vm: &VmName, known: Option<&Record>) -> Result<(), String> {
    let witness = env.witness.as_ref().ok_or_else(|| {
        format!("this cluster has no witness, so nobody can say whether {vm} is wanted here")
    })?;
    let kept = witness.kept(vm).await.map_err(|error| {
        format!(
            "the witness does not answer ({}): it has to say first whether a copy of {vm} is \
             wanted here",
            sentence(&error)
        )
    })?;
    if let Some(set_back) = kept.set_back {
        return Err(set_back.to_string());
    }
    let kept = kept.committed.map(|committed| committed.record);
    let host = &env.host;
    match (&kept, known) {
        (Some(record), _) if record.concerns(host) => Err(format!(
            "the record of {vm} names {host}: pair it without {host} first"
        )),
        (kept, Some(known))
            if known.concerns(host)
                && kept.as_ref().map(Record::version) < Some(known.version()) =>
        {
            Err(format!(
                "{host} has seen a record of {vm} that names it, and the witness has no such \
                 record: the witness may have lost it; see to that first"
            ))
        }
        _ => Ok(()),
    }
}

/// Ends the driver of a VM, if there is one, and removes its folder. The error is a sentence.
async fn remove_folder(
    env: &Surroundings,
    vm: &VmName,
    running: Option<Running>,
) -> Result<(), String> {
    if let Some(running) = running
        && let Ok(Err(undead)) = running.end().await
    {
        return Err(format!("{undead}. Remove {vm} again when it is gone"));
    }
    let folder = env.config.data.join("vms").join(vm.as_str());
    let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder));
    match removed.await {
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Err(not_here(vm)),
        Ok(Err(error)) => Err(format!("the folder of {vm} cannot be removed: {error}")),
        // Only a runtime that ends lets it go.
        Err(ended) => Err(ended.to_string()),
        Ok(Ok(())) => Ok(()),
    }
}
