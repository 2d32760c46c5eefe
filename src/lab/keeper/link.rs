//! The keeper's end of a host's serial port: many jobs over one line.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::mpsc;
use tokio::task::spawn_local;

use crate::lab::wire::{self, FromHost, FromJob, Job, ToHost, ToJob, WireError};

/// Messages that were read and not yet looked at.
const WAITING: usize = 16;

type Listeners = Rc<RefCell<BTreeMap<u32, mpsc::UnboundedSender<FromJob>>>>;

/// The line to a host's agent.
pub struct Link {
    out: mpsc::UnboundedSender<ToHost>,
    listeners: Listeners,
    next: Cell<u32>,
}

impl Link {
    /// Takes over the line; what the host says comes out of the second part.
    pub fn new(stream: UnixStream) -> (Self, mpsc::Receiver<FromHost>) {
        let (from, to) = stream.into_split();
        let (out, outgoing) = mpsc::unbounded_channel();
        spawn_local(write(to, outgoing));
        let link = Self {
            out,
            listeners: Rc::default(),
            next: Cell::new(0),
        };
        (link, incoming(from))
    }

    /// Starts a job.
    pub fn start(&self, job: Job) -> RemoteJob {
        let id = self.next.get();
        self.next.set(id.wrapping_add(1));
        let (told, events) = mpsc::unbounded_channel();
        self.listeners.borrow_mut().insert(id, told);
        // Fails only when the line does, and then the job's events end.
        let _ = self.out.send(ToHost::Start(id, job));
        RemoteJob {
            id,
            out: self.out.clone(),
            listeners: Rc::clone(&self.listeners),
            events,
        }
    }

    /// Hands what a job says to whoever started it.
    pub fn said(&self, id: u32, what: FromJob) {
        let mut listeners = self.listeners.borrow_mut();
        let listener = if matches!(what, FromJob::Done(_)) {
            listeners.remove(&id)
        } else {
            listeners.get(&id).cloned()
        };
        if let Some(listener) = listener {
            // One that went is taken off the list when it is dropped.
            let _ = listener.send(what);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Whoever waits for a job hears that there will be nothing more.
        self.listeners.borrow_mut().clear();
    }
}

/// A job in a host; dropping it ends the job.
pub struct RemoteJob {
    id: u32,
    out: mpsc::UnboundedSender<ToHost>,
    listeners: Listeners,
    events: mpsc::UnboundedReceiver<FromJob>,
}

impl RemoteJob {
    /// Waits for what it says; nothing when the host is gone, or after its end.
    pub async fn next(&mut self) -> Option<FromJob> {
        self.events.recv().await
    }

    /// Says something to it.
    pub fn say(&self, what: ToJob) {
        // Fails only when the line does, and then the job's events end.
        let _ = self.out.send(ToHost::Job(self.id, what));
    }
}

impl Drop for RemoteJob {
    fn drop(&mut self) {
        if self.listeners.borrow_mut().remove(&self.id).is_some() {
            let _ = self.out.send(ToHost::Cancel(self.id));
        }
    }
}

async fn write(mut to: OwnedWriteHalf, mut outgoing: mpsc::UnboundedReceiver<ToHost>) {
    while let Some(message) = outgoing.recv().await {
        if wire::send(&mut to, &message).await.is_err() {
            break;
        }
    }
    // Fails only when the other end is gone.
    let _ = to.shutdown().await;
}

/// Messages off a stream as they come, until its end; nonsense ends it, too.
pub fn incoming<M, R>(mut from: R) -> mpsc::Receiver<M>
where
    M: serde::de::DeserializeOwned + 'static,
    R: tokio::io::AsyncRead + Unpin + 'static,
{
    let (said, incoming) = mpsc::channel(WAITING);
    spawn_local(async move {
        loop {
            match wire::receive(&mut from).await {
                Ok(Some(message)) => {
                    if said.send(message).await.is_err() {
                        return;
                    }
                }
                Ok(None) | Err(WireError::Io(_)) => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection of the lab's keeper ends");
                    return;
                }
            }
        }
    });
    incoming
}
