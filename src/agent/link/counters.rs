//! What the link counts; read by the metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds.
    pub fn add(&self, amount: usize) {
        self.0.fetch_add(amount as u64, Ordering::Relaxed);
    }

    /// What it has come to.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Everything one endpoint counts.
#[derive(Debug, Default)]
pub struct LinkCounters {
    /// Handshakes refused because of a certificate (a foreign cluster's most of all).
    pub refused_certificates: Counter,
    /// Connections with a good certificate that were refused: unknown peers, wrong roles or names,
    /// other versions.
    pub refused_peers: Counter,
    /// Connections closed because of what the peer sent: garbage, lengths beyond the limit.
    pub closed_for_garbage: Counter,
    /// Connections closed because a queue reached its limit.
    pub closed_for_full_queue: Counter,
    /// Connections between hosts that came up.
    pub sessions: Counter,
    /// Messages not sent because the peer was not connected.
    pub not_connected: Counter,
    /// Bytes written to control streams.
    pub control_bytes: Counter,
    /// Bytes of log messages before compression.
    pub log_bytes_raw: Counter,
    /// Bytes of log messages as they were sent.
    pub log_bytes_sent: Counter,
    /// Bytes of log messages as they arrived.
    pub log_bytes_received: Counter,
    /// Datagrams sent.
    pub datagrams: Counter,
    /// Messages that should have been datagrams and went to the control stream: too large.
    pub datagrams_too_large: Counter,
}
