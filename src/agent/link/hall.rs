//! The hall: an endpoint on a thread of its own, where the connections live of everybody but configured
//! peers: gateways, operators, the witness's clients, and strangers until they are refused.
//!
//! What their handshakes cost (signatures, certificates), and what they send later, takes the hall's
//! time, not that of the thread that heartbeats live on. The streams that they open are handed to
//! the same services; only what drives the connections runs here.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::thread::JoinHandle;

use quinn::{EndpointConfig, ServerConfig};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};

use super::accept::{Acceptor, At, accept_all};
use super::door::LetIn;
use super::socket::{self, QuietRuntime};
use crate::agent::thread::behind_heartbeats;

/// The thread of the hall. It ends when this is dropped, and its connections end with it: close the
/// endpoint first where somebody is to be told.
#[derive(Debug)]
pub(super) struct Hall {
    endpoint: quinn::Endpoint,
    /// The thread ends when this is gone.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What the hall is made of.
pub(super) struct Furnishing {
    pub(super) socket: UdpSocket,
    /// What the door lets in.
    pub(super) inlet: mpsc::Receiver<LetIn>,
    pub(super) endpoint: EndpointConfig,
    pub(super) server: ServerConfig,
    pub(super) acceptor: Arc<Acceptor>,
}

impl Hall {
    pub(super) fn open(furnishing: Furnishing) -> io::Result<Self> {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("hall".to_owned())
            .spawn(move || {
                // Clients wait for what gateways send. What strangers may take of this thread is
                // bounded, and whoever drives a connection has it locked meanwhile: behind what
                // computes, it would keep those waiting that use the connection's streams.
                behind_heartbeats();
                run(furnishing, &tell, stopped);
            })?;
        let ended = |_| io::Error::other("the hall's thread ended without a result");
        let endpoint = told.recv().map_err(ended)??;
        Ok(Self {
            endpoint,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    pub(super) const fn endpoint(&self) -> &quinn::Endpoint {
        &self.endpoint
    }
}

impl Drop for Hall {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but this, and nothing there holds the hall: it never waits for
            // itself. The port is free when it has ended.
            let _ = thread.join();
        }
    }
}

/// quinn drives connections on the runtime on which they are accepted.
fn run(
    furnishing: Furnishing,
    tell: &SyncSender<io::Result<quinn::Endpoint>>,
    stopped: oneshot::Receiver<()>,
) {
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        // Whoever opens the hall waits for this.
        Err(error) => return drop(tell.send(Err(error))),
    };
    runtime.block_on(async {
        let opened = open(furnishing);
        let open = opened.is_ok();
        if tell.send(opened).is_ok() && open {
            // Only ever dropped.
            let _ = stopped.await;
        }
    });
}

fn open(furnishing: Furnishing) -> io::Result<quinn::Endpoint> {
    let Furnishing {
        socket,
        inlet,
        endpoint,
        server,
        acceptor,
    } = furnishing;
    let socket = socket::quiet(socket, Some(inlet))?;
    let runtime = Arc::new(QuietRuntime);
    let endpoint =
        quinn::Endpoint::new_with_abstract_socket(endpoint, Some(server), socket, runtime)?;
    tokio::spawn(accept_all(endpoint.clone(), At::Hall, acceptor, ()));
    Ok(endpoint)
}
