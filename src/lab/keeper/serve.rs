//! What clients ask of the keeper: one call a connection.

use std::rc::Rc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::unix::OwnedWriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::spawn_local;

use super::host::{Host, HostError};
use super::link::incoming;
use super::network::NetworkError;
use super::{KeeperError, Lab};
use crate::lab::state::{Delay, End, HostId, LinkName};
use crate::lab::wire::{self, Call, FromClient, FromJob, Job, Reply, WireError};
use crate::sentence::sentence;

/// How long to wait before hearing clients again after a failure.
const AGAIN: Duration = Duration::from_millis(100);

/// Why a call is refused.
#[derive(Debug, Error)]
enum CallError {
    #[error("there is no {0} in this lab: 'understudy lab status' shows the hosts there are")]
    NoHost(HostId),
    #[error("a link has two ends, and {0} is one of them only")]
    OneEnd(End),
    #[error("{0} % of the frames cannot be lost: name a number from 0 to 100")]
    Loss(f64),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Serves clients until the keeper ends.
pub async fn accept(listener: UnixListener, lab: Rc<Lab>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                spawn_local(serve(stream, Rc::clone(&lab)));
            }
            // Out of descriptors: there are some again when a client goes, and nobody tells of that.
            Err(error) => {
                eprintln!("a client of the lab cannot be heard: {error}");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, lab: Rc<Lab>) {
    let (from, mut to) = stream.into_split();
    let mut said = incoming::<FromClient, _>(from);
    let Some(FromClient::Call(call)) = said.recv().await else {
        return;
    };
    let reply = match answer(call, &lab, &mut said, &mut to).await {
        Ok(Some(reply)) => reply,
        Ok(None) => return,
        Err(error) => Reply::Refused(sentence(&error)),
    };
    // A client that has gone wants no reply.
    let _ = wire::send(&mut to, &reply).await;
}

/// Does what a client asks for; the last thing to say to it.
async fn answer(
    call: Call,
    lab: &Rc<Lab>,
    said: &mut mpsc::Receiver<FromClient>,
    to: &mut OwnedWriteHalf,
) -> Result<Option<Reply>, CallError> {
    match call {
        Call::Status => return Ok(Some(Reply::Status(lab.status()))),
        Call::Job(host, job) => {
            let host = host_of(lab, host)?;
            relay(&host, job, said, to).await?;
            return Ok(None);
        }
        Call::Kill(host) => host_of(lab, host)?.power_off().await?,
        Call::Start(host) => {
            let host = host_of(lab, host)?;
            lab.power_on(&host)?;
            host.up().await?;
        }
        Call::Link { a, b, cut } => lab.set_cut(link_of(lab, a, b)?, cut).await?,
        Call::Delay { a, b, delay } => {
            let Delay { loss_percent, .. } = delay;
            if !(0.0..=100.0).contains(&loss_percent) {
                return Err(CallError::Loss(loss_percent));
            }
            lab.set_delay(link_of(lab, a, b)?, delay).await?;
        }
        Call::Down => {
            lab.end().await;
            wire::send(to, &Reply::Done).await?;
            lab.end.send_replace(true);
            return Ok(None);
        }
        Call::Watch => {
            // Until the client goes, or this process.
            while said.recv().await.is_some() {}
            return Ok(None);
        }
    }
    Ok(Some(Reply::Done))
}

fn host_of(lab: &Lab, id: HostId) -> Result<Rc<Host>, CallError> {
    lab.hosts.get(&id).cloned().ok_or(CallError::NoHost(id))
}

fn link_of(lab: &Lab, a: End, b: End) -> Result<LinkName, CallError> {
    if a == b {
        return Err(CallError::OneEnd(a));
    }
    for end in [a, b] {
        if let End::Host(id) = end {
            host_of(lab, id)?;
        }
    }
    Ok(LinkName::between(a, b))
}

/// Passes on what client and job say to each other, until the job ends or the client goes.
async fn relay(
    host: &Host,
    job: Job,
    said: &mut mpsc::Receiver<FromClient>,
    to: &mut OwnedWriteHalf,
) -> Result<(), CallError> {
    let mut job = host.job(job)?;
    loop {
        tokio::select! {
            message = said.recv() => match message {
                Some(FromClient::Job(message)) => job.say(message),
                Some(FromClient::Call(_)) | None => return Ok(()),
            },
            event = job.next() => {
                let gone = || FromJob::Done(Err("it lost its power meanwhile".into()));
                let event = event.unwrap_or_else(gone);
                let last = matches!(event, FromJob::Done(_));
                wire::send(to, &Reply::Job(event)).await?;
                if last {
                    return Ok(());
                }
            }
        }
    }
}
