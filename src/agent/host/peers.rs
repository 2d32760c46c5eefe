//! The other hosts of the cluster: who is connected, who can share VMs with this one, and which driver
//! hears what they say.

use super::super::driver::HostMessage;
use super::super::introduction::{self, Introduction, Verdict};
use super::super::journal::Incident;
use super::super::link::LinkEvent;
use super::inbox::Told;
use super::{Agent, Wish};
use crate::protocol::{HostName, Input, Span, VmName};

impl Agent {
    pub(super) fn link_event(&mut self, event: LinkEvent<HostMessage>) {
        match event {
            LinkEvent::PeerUp { peer, .. } => {
                let peer = HostName::from(&peer);
                self.troubles.remove(&format!("reaching {peer}"));
                let connected = Incident::HostConnected { peer: peer.clone() };
                self.env.journal.write(None, connected);
                let introduction = Box::new(self.introduction.clone());
                let message = HostMessage::Introduction(introduction);
                // What cannot be sent is said again with the next connection.
                if let Err(error) = self.env.link.send(peer.as_str(), &message) {
                    tracing::debug!(%peer, %error, "not introduced");
                }
            }
            LinkEvent::PeerDown { peer, ended, .. } => {
                let peer = HostName::from(&peer);
                let lost = Incident::HostLost {
                    peer: peer.clone(),
                    reason: ended.word().to_owned(),
                    detail: ended.to_string(),
                };
                self.env.journal.write(None, lost);
                if self.up.remove(&peer) {
                    self.tell_all(&peer, &Input::PeerDown(peer.clone()));
                }
            }
            LinkEvent::Unreachable { peer, why } => {
                let peer = HostName::from(&peer);
                let trouble = format!("cannot reach {peer}: {why}");
                self.troubles.insert(format!("reaching {peer}"), trouble);
                let incident = Incident::HostUnreachable { peer, why };
                self.env.journal.write(None, incident);
            }
            LinkEvent::Message {
                peer,
                message: HostMessage::Introduction(theirs),
                ..
            } => self.introduced(HostName::from(&peer), &theirs),
            LinkEvent::Message {
                peer,
                message: HostMessage::Vm { vm, message },
                ..
            } => {
                let from = HostName::from(&peer);
                // Only a datagram can overtake an introduction.
                if !self.up.contains(&from) {
                    return;
                }
                match self.drivers.get_mut(&vm) {
                    Some(running) => {
                        let message = Input::Message {
                            from: from.clone(),
                            message,
                        };
                        let told = running.tell(&from, message);
                        self.told(&vm, told);
                    }
                    None => self.spoken_of(vm, &from),
                }
            }
        }
    }

    /// Another host has told of itself.
    fn introduced(&mut self, peer: HostName, theirs: &Introduction) {
        let Verdict { refusals, warnings } = introduction::judge(&self.introduction, theirs);
        if !refusals.is_empty() {
            let why = refusals.join("; ");
            let incident = Incident::HostIncompatible {
                peer: peer.clone(),
                why: why.clone(),
            };
            self.env.journal.write(None, incident);
            self.unfit.insert(peer, why);
            return;
        }
        self.unfit.remove(&peer);
        if !warnings.is_empty() {
            let why = warnings.join("; ");
            let peer = peer.clone();
            self.env
                .journal
                .write(None, Incident::HostDiffers { peer, why });
        }
        if self.up.insert(peer.clone()) {
            self.tell_all(&peer, &Input::PeerUp(peer.clone()));
        }
    }

    /// Refuses an order that wants copies on hosts which can hold none.
    pub(super) fn check_fit(&self, hosts: &[HostName]) -> Result<(), String> {
        let mut unfit = hosts.iter().filter_map(|host| {
            let why = self.unfit.get(host)?;
            Some(format!(
                "{host} cannot hold a copy of what runs here: {why}"
            ))
        });
        unfit.next().map_or(Ok(()), Err)
    }

    /// Tells all drivers how far the connected hosts are.
    pub(super) fn tell_distances(&mut self) {
        for host in self.up.clone() {
            if let Some(trip) = self.env.link.round_trip(host.as_str()) {
                let nanos = u64::try_from(trip.as_nanos()).unwrap_or(u64::MAX);
                let rtt = Span::from_nanos(nanos);
                let far = Input::Distance {
                    host: host.clone(),
                    rtt,
                };
                self.tell_all(&host, &far);
            }
        }
    }

    fn tell_all(&mut self, about: &HostName, input: &Input) {
        let mut all = Vec::new();
        for (vm, running) in &mut self.drivers {
            all.push((vm.clone(), running.tell(about, input.clone())));
        }
        for (vm, told) in all {
            self.told(&vm, told);
        }
    }

    /// Something was told to a driver. If it does not listen, it is seen to that it is told again.
    fn told(&self, vm: &VmName, told: Told) {
        if told == Told::Well {
            return;
        }
        let Some(running) = self.drivers.get(vm) else {
            return;
        };
        self.env.journal.write(Some(vm), Incident::DriverDeaf);
        let (room, wishes, vm) = (running.room(), self.wishes.clone(), vm.clone());
        tokio::spawn(async move {
            room.await;
            // Fails only when the agent ends.
            let _ = wishes.send(Wish::Listens { vm }).await;
        });
    }

    /// A driver that did not listen has room again.
    pub(super) fn listens(&mut self, vm: &VmName) {
        if let Some(running) = self.drivers.get_mut(vm) {
            let told = running.hears_again(&self.up);
            self.told(vm, told);
        }
    }
}
