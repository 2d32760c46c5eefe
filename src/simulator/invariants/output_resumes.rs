//! Output resumes: while enough healthy copies are connected, the clients of every gateway get
//! answers again within a bound, whatever becomes of the other gateways.

use std::collections::BTreeMap;

use replay_log::GatewayIncarnation;

use super::super::facts::{Fact, Invariant, View, Watched};
use super::super::gateway::number_of;
use super::super::queue::Moment;

/// See the file.
#[derive(Debug, Default)]
pub(in super::super) struct OutputResumes {
    /// Since when somebody could have served each gateway, and nobody has.
    since: BTreeMap<usize, Moment>,
}

impl Invariant for OutputResumes {
    fn name(&self) -> &'static str {
        "output_resumes"
    }

    fn check(&mut self, fact: &Fact, _: &View<'_>) -> Result<(), String> {
        match fact {
            Fact::Passed { gateway, .. } => {
                self.since.remove(&number_of(GatewayIncarnation(*gateway)));
            }
            Fact::Disturbed => self.since.clear(),
            Fact::Watched(watched) => {
                for (gateway, could) in watched.could_serve.iter().enumerate() {
                    if *could {
                        self.waits(gateway, watched)?;
                    } else {
                        self.since.remove(&gateway);
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }
}

impl OutputResumes {
    fn waits(&mut self, gateway: usize, watched: &Watched) -> Result<(), String> {
        let since = *self.since.entry(gateway).or_insert(watched.now);
        if watched.now - since > watched.within {
            return Err(format!(
                "enough healthy copies have been connected for {} ms, and no output has left \
                 through gateway {gateway}",
                (watched.now - since) / 1_000_000
            ));
        }
        Ok(())
    }
}
