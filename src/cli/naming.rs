//! Has a record name a host that it does not name. Only hosts that a record names may reign; when none
//! of those can be had any more, another may have what is left, and only an operator may say so.

use std::time::Duration;

use super::failure::{Failure, OrExit as _};
use super::output;
use super::waiting::{self, WaitError};
use crate::agent::operator::Client;
use crate::protocol::{HostName, Record, Swapped, VmName};

/// How often it is looked whether the host knows.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// A host reads the records of VMs that do not concern it every few seconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Names `host` in the record of `vm`, if it is not named, and waits until the host knows that, if it
/// looks after the VM.
pub async fn name_host(client: &Client, vm: &VmName, host: &HostName) -> Result<(), Failure> {
    let before = client.record(vm).await.or_fail()?;
    if !before.concerns(host) {
        let next = before.wanted_on(host);
        let witness = client.witness().or_fail()?;
        match witness.swap(vm, Some(before.version()), next, None).await {
            Swapped::Done(_) => {}
            Swapped::Conflict(_) => {
                let why = format!("the record of {vm} has just changed: see 'understudy status'");
                return Err(why).or_fail();
            }
            Swapped::Unknown { reason } => {
                return Err(format!(
                    "the record of {vm} must name {host} first, and the witness does not do it: {reason}"
                ))
                .or_fail();
            }
        }
        output::line(format_args!("The record of {vm} names {host}, too, now."))?;
    }
    let named = waiting::until(PATIENCE, LOOK_EVERY, async || {
        let status = client.status(host).await?;
        let Some(seen) = status.vms.iter().find(|seen| seen.vm == *vm) else {
            return Ok(Ok(()));
        };
        let concerns = |record: &Record| record.concerns(host);
        Ok(if seen.node.record.as_ref().is_some_and(concerns) {
            Ok(())
        } else {
            Err(format!("{host} to hear of it"))
        })
    });
    match named.await {
        Err(WaitError::TooLong { .. }) => Err(format!(
            "{host} has not heard within {} s that the record of {vm} names it: see whether it \
             reaches the witness",
            PATIENCE.as_secs()
        ))
        .or_fail(),
        named => named.or_fail(),
    }
}
