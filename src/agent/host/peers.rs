//! The other hosts of the cluster: who is connected, who can share VMs with this one, and which driver
//! hears what they say.

use super::super::driver::{HostMessage, ToDriver};
use super::super::introduction::{self, Introduction, Verdict};
use super::super::journal::Incident;
use super::super::link::LinkEvent;
use super::Agent;
use crate::protocol::{HostName, Input};

impl Agent {
    pub(super) async fn link_event(&mut self, event: LinkEvent<HostMessage>) {
        match event {
            LinkEvent::PeerUp { peer, .. } => {
                let peer = HostName::from(&peer);
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
                    self.tell_all(&Input::PeerDown(peer)).await;
                }
            }
            LinkEvent::Message {
                peer,
                message: HostMessage::Introduction(theirs),
                ..
            } => self.introduced(HostName::from(&peer), &theirs).await,
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
                if let Some(running) = self.drivers.get(&vm) {
                    let heard = ToDriver::Heard(Input::Message { from, message });
                    // A driver that is gone has said why.
                    let _ = running.inbox.send(heard).await;
                } else {
                    self.spoken_of(vm, &from);
                }
            }
        }
    }

    /// Another host has told of itself.
    async fn introduced(&mut self, peer: HostName, theirs: &Introduction) {
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
            self.tell_all(&Input::PeerUp(peer)).await;
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

    async fn tell_all(&self, input: &Input) {
        for running in self.drivers.values() {
            let _ = running.inbox.send(ToDriver::Heard(input.clone())).await;
        }
    }
}
