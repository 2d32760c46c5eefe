//! What a gateway counts, readable from any thread.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// The live counters. One task writes them.
        #[derive(Debug, Default)]
        pub struct GatewayMetrics {
            $($(#[$doc])* pub(super) $name: AtomicU64,)*
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct GatewayCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl GatewayMetrics {
            /// Reads all counters.
            pub fn read(&self) -> GatewayCounts {
                GatewayCounts {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                }
            }
        }

        impl GatewayCounts {
            /// Every counter with its name, for an exporter.
            pub fn each(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Clients connected now.
    clients,
    /// Clients that have connected since the start.
    clients_accepted,
    /// Clients whose connection was reset, by the guest or for want of it.
    clients_reset,
    /// Clients that were turned away because too many came from their address.
    clients_turned_away,
    /// Frames sent to the guest, each counted once.
    frames_to_guest,
    /// Their bytes.
    bytes_to_guest,
    /// Frames received from the guest, each counted once.
    frames_from_guest,
    /// Their bytes.
    bytes_from_guest,
    /// Frames sent again after a lost connection or a change of primary.
    resent,
    /// Outputs that came twice.
    duplicates,
    /// Outputs of a term that was over.
    dropped_old_term,
    /// Sessions welcomed by a primary.
    welcomes,
    /// Bytes of frames that no committed log holds yet.
    uncommitted_bytes,
    /// How often reading from clients was stopped because those bytes were too many.
    stops_reading,
    /// How often all clients were reset because the guest had lost their connections.
    fresh_starts,
    /// The term believed in.
    term,
    /// 1 while a primary's welcome stands.
    welcomed,
}

/// Sets a counter to a value.
pub(super) fn set(counter: &AtomicU64, value: u64) {
    counter.store(value, Ordering::Relaxed);
}

/// Adds to a counter.
pub(super) fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}
