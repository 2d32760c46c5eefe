//! Which output is for which gateway. Outputs have one count for the whole machine, and each gateway
//! gets those that are for it: the answers to its clients, and whatever is for nobody in particular.

use std::collections::BTreeMap;

use bytes::Bytes;
use replay_log::FrameNumber;
use vmm::host::Output;
use vmm::model::Model;

use super::facts::Fact;
use super::gateway::ToGateway;

/// So many gateways may a VM have.
pub(super) const GATEWAYS: usize = 2;
/// Where the number of a gateway stands in the tags of its clients' requests.
const TAGS: u32 = 48;

/// The tag of a gateway's nth request; its answer has it, too.
pub(super) fn tag(gateway: usize, nth: u64) -> u64 {
    ((gateway as u64) << TAGS) + nth
}

/// The outputs of one machine for each gateway, from power-on.
#[derive(Debug, Default)]
pub(super) struct Lines([Vec<FrameNumber>; GATEWAYS]);

/// An output and whom it is for.
pub(super) struct Addressed {
    number: FrameNumber,
    content: u64,
    bytes: Bytes,
    /// `None`: everybody.
    to: Option<usize>,
    /// The last output before it for each gateway.
    follows: [FrameNumber; GATEWAYS],
}

impl Lines {
    /// The machine has made this one; another time, if it replays.
    pub(super) fn made(&mut self, output: &Output) {
        let to = addressee(&output.bytes);
        for (gateway, line) in self.0.iter_mut().enumerate() {
            let is_new = line.last().is_none_or(|last| *last < output.number);
            if is_new && to.is_none_or(|to| to == gateway) {
                line.push(output.number);
            }
        }
    }

    pub(super) fn address(&self, output: &Output) -> Addressed {
        let before = FrameNumber(output.number.0.saturating_sub(1));
        Addressed {
            number: output.number,
            content: content(&output.bytes),
            bytes: output.bytes.clone(),
            to: addressee(&output.bytes),
            follows: std::array::from_fn(|gateway| self.last(gateway, before)),
        }
    }

    /// The last one for a gateway up to this number.
    pub(super) fn last(&self, gateway: usize, through: FrameNumber) -> FrameNumber {
        let line = &self.0[gateway];
        let end = line.partition_point(|number| *number <= through);
        line[..end].last().copied().unwrap_or_default()
    }

    /// Every one of so many gateways has all that is for it up to here, of what was released;
    /// `received` is what each of them has said.
    pub(super) fn received_by_all(
        &self,
        gateways: usize,
        received: &BTreeMap<usize, FrameNumber>,
        released: FrameNumber,
    ) -> FrameNumber {
        let lacks = |(gateway, line): (usize, &Vec<FrameNumber>)| {
            let has = received.get(&gateway).copied().unwrap_or_default();
            let first = line.partition_point(|number| *number <= has);
            line.get(first).copied()
        };
        let lacking = self.0.iter().enumerate().take(gateways).filter_map(lacks);
        let before = lacking.map(|first| FrameNumber(first.0 - 1));
        before.min().unwrap_or(released).min(released)
    }
}

impl Addressed {
    pub(super) fn let_out(&self) -> Fact {
        Fact::LetOut {
            number: self.number,
            content: self.content,
            to: self.to,
        }
    }

    /// What a gateway is told, if it is for that one.
    pub(super) fn message(&self, gateway: usize) -> Option<ToGateway> {
        let for_it = self.to.is_none_or(|to| to == gateway);
        for_it.then(|| ToGateway::Output {
            number: self.number,
            follows: self.follows[gateway],
            content: self.content,
            bytes: self.bytes.clone(),
        })
    }
}

/// The gateway that an answer is for.
fn addressee(bytes: &Bytes) -> Option<usize> {
    let (tag, _, _) = Model::read_answer(bytes)?;
    Some((tag >> TAGS) as usize)
}

/// What two outputs must have in common to be the same.
fn content(bytes: &[u8]) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&blake3::hash(bytes).as_bytes()[..8]);
    u64::from_le_bytes(first)
}
