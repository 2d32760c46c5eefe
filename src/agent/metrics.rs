//! `/metrics` in Prometheus's text format.
//!
//! The recorder is the process's one: any part may count with the macros of crate `metrics`. What
//! the agent knows anyway (statuses, the link's counters) is set when somebody reads.

mod listener;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use metrics::{counter, gauge};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use thiserror::Error;
use tokio::net::TcpListener;

use self::listener::Bounded;
use super::operator::{HostStatus, VmStatus};
use super::space::Space;
use crate::protocol::RoleName;

/// The format that Prometheus asks for.
const FORMAT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Why metrics cannot be served.
#[derive(Debug, Error)]
#[error(
    "cannot serve metrics on TCP {address}, and tries again: stop what has it, or choose another address under 'metrics'"
)]
pub struct ServeMetricsError {
    /// Which address.
    pub address: SocketAddr,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// The process's recorder.
pub fn recorder() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        // Somebody else's recorder (a test's) stays; ours then shows nothing.
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!("another recorder of metrics is installed");
        }
        handle
    })
}

/// When an address that is taken is tried again.
pub const TRY_AGAIN: Duration = Duration::from_secs(10);

/// Serves `/metrics` until the task ends; `text` makes what is served. An address that cannot be had
/// is tried `again` and again: figures are worth less than what they are of. `tell` hears of it once,
/// and when it is over.
pub async fn serve<T, F>(
    address: SocketAddr,
    again: Duration,
    tell: impl Fn(Option<&ServeMetricsError>),
    text: T,
) -> Infallible
where
    T: Fn() -> F + Clone + Send + Sync + 'static,
    F: Future<Output = String> + Send + 'static,
{
    let text = Arc::new(text);
    let handler = move || {
        let text = Arc::clone(&text);
        async move { ([(CONTENT_TYPE, FORMAT)], text().await) }
    };
    let router = Router::new().route("/metrics", get(handler));
    let mut told = false;
    loop {
        let failed = match TcpListener::bind(address).await {
            Ok(listener) => {
                if std::mem::take(&mut told) {
                    tell(None);
                }
                let served = axum::serve(Bounded::new(listener), router.clone()).await;
                served.err()
            }
            Err(error) => Some(error),
        };
        if let Some(source) = failed
            && !std::mem::replace(&mut told, true)
        {
            tell(Some(&ServeMetricsError { address, source }));
        }
        tokio::time::sleep(again).await;
    }
}

/// Everything as Prometheus reads it, with a host's status set in it.
pub fn render(status: &HostStatus) -> String {
    let recorder = recorder();
    let link = &status.link;
    if let Some(space) = status.space {
        set_space(space);
    }
    counter!("understudy_log_bytes_raw_total").absolute(link.log_bytes_raw);
    counter!("understudy_log_bytes_sent_total").absolute(link.log_bytes_sent);
    counter!("understudy_log_bytes_received_total").absolute(link.log_bytes_received);
    let refused = "understudy_refused_total";
    counter!(refused, "why" => "certificate").absolute(link.refused_certificates);
    counter!(refused, "why" => "peer").absolute(link.refused_peers);
    counter!(refused, "why" => "garbage").absolute(link.closed_for_garbage);
    counter!("understudy_journal_lines_total").absolute(status.journal);
    for (peer, connected) in &status.peers {
        let peer = peer.to_string();
        gauge!("understudy_peer_connected", "peer" => peer).set(u8::from(*connected));
    }
    if let Some(witness) = &status.witness {
        gauge!("understudy_witness_reachable").set(u8::from(witness.reachable));
        let refuses = witness.keeper.refuses_writes.is_some();
        gauge!("understudy_witness_refuses_writes").set(u8::from(refuses));
        gauge!("understudy_witness_copied").set(u8::from(witness.keeper.copied));
        for vm in &status.vms {
            let set_back = witness.set_back.contains_key(&vm.vm);
            let name = vm.vm.to_string();
            gauge!("understudy_record_set_back", "vm" => name).set(u8::from(set_back));
        }
    }
    for vm in &status.vms {
        set_vm(vm);
    }
    recorder.run_upkeep();
    recorder.render()
}

/// Gauges are floating point numbers; above 2^53 they are rounded.
#[allow(clippy::cast_precision_loss)]
fn set_space(space: Space) {
    gauge!("understudy_data_free_bytes").set(space.free as f64);
    gauge!("understudy_data_total_bytes").set(space.total as f64);
}

/// Gauges are floating point numbers; above 2^53 they are rounded.
#[allow(clippy::cast_precision_loss)]
fn set_vm(vm: &VmStatus) {
    let name = vm.vm.to_string();
    let set = |metric: &'static str, value: u64| {
        gauge!(metric, "vm" => name.clone()).set(value as f64);
    };
    let node = &vm.node;
    for role in ROLES {
        let is = u64::from(node.role == role);
        gauge!("understudy_role", "vm" => name.clone(), "role" => word(role)).set(is as f64);
    }
    let version = node.record.as_ref().map(crate::protocol::Record::version);
    let version = version.unwrap_or_default();
    set("understudy_term", version.term.0);
    set("understudy_epoch", version.epoch.0);
    set("understudy_position", node.position.0);
    set("understudy_log_index", node.tip.index.0);
    set("understudy_stored_index", node.stored.0);
    set("understudy_synced_index", node.synced.0);
    set("understudy_executed_index", node.executed.0);
    set("understudy_committed_index", node.committed.0);
    set(
        "understudy_lag_entries",
        node.tip.index.since(node.executed),
    );
    set("understudy_throttled", u64::from(node.throttled));
    set(
        "understudy_unprotected",
        u64::from(node.unprotected_since.is_some()),
    );
    set(
        "understudy_output_stalled",
        u64::from(node.stalled_since.is_some()),
    );
    set("understudy_waiting_output_bytes", vm.waiting_output);
    set("understudy_gateways", vm.gateways as u64);
    set("understudy_vmm_running", u64::from(vm.guest.is_some()));
    if let Some(guest) = &vm.guest {
        set("understudy_guest_ended", u64::from(guest.ended.is_some()));
        let seconds = guest.longest_deferral.as_nanos() as f64 / 1e9;
        gauge!("understudy_guest_longest_deferral_seconds", "vm" => name.clone()).set(seconds);
        let seconds = guest.silence.as_nanos() as f64 / 1e9;
        gauge!("understudy_guest_silence_seconds", "vm" => name.clone()).set(seconds);
    }
    if let Some(bytes) = vm.log_bytes {
        set("understudy_log_disk_bytes", bytes);
    }
    set("understudy_log_budget_bytes", vm.store.budget);
    set("understudy_log_unwritten_bytes", vm.store.waiting);
    set("understudy_log_full", u64::from(vm.store.full.is_some()));
    let oldest = vm.store.oldest_sync.unwrap_or_default().as_nanos() as f64 / 1e9;
    gauge!("understudy_log_oldest_sync_seconds", "vm" => name.clone()).set(oldest);
    for follower in &node.followers {
        let to = follower.host.to_string();
        let seconds = follower.lag.as_nanos() as f64 / 1e9;
        gauge!("understudy_follower_lag_seconds", "vm" => name.clone(), "host" => to.clone())
            .set(seconds);
        let behind = node.tip.index.since(follower.held);
        gauge!("understudy_follower_unheld_entries", "vm" => name.clone(), "host" => to)
            .set(behind as f64);
    }
}

const ROLES: [RoleName; 8] = [
    RoleName::Starting,
    RoleName::Outsider,
    RoleName::Learner,
    RoleName::Member,
    RoleName::Claimant,
    RoleName::GoingLive,
    RoleName::Primary,
    RoleName::HandingOver,
];

const fn word(role: RoleName) -> &'static str {
    match role {
        RoleName::Starting => "starting",
        RoleName::Outsider => "outsider",
        RoleName::Learner => "learner",
        RoleName::Member => "member",
        RoleName::Claimant => "claimant",
        RoleName::GoingLive => "going-live",
        RoleName::Primary => "primary",
        RoleName::HandingOver => "handing-over",
    }
}
